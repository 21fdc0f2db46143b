# SPDX-License-Identifier: Apache-2.0
"""Own data: what rows may say, how they become examples, and how every mistake in a file is told with its line."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_video
from PIL import Image, ImageFile

from vtprune.errors import ConfigError
from vtprune.eval.tasks import FileTask, open_task
from vtprune.eval.tasks.rows import COLUMNS
from vtprune.eval.tasks.scores import SCORES

ROW = {"image": "red.png", "question": "What colour?", "answer": "red"}


@pytest.fixture
def folder(tmp_path):
    for name in ("red", "blue"):
        Image.new("RGB", (8, 8), name).save(tmp_path / f"{name}.png")
    return tmp_path


def jsonl(folder, *rows, name="mine.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def examples(path, limit=None, **settings):
    return open_task({"file": path, **settings}).examples(limit)


def problem(path, **settings):
    """What is wrong with a file, without its name."""
    with pytest.raises(ConfigError) as caught:
        examples(path, **settings)
    return str(caught.value).replace(f"{path}, ", "")


def texts(example):
    return [part.get("text") for part in example.conversation()[0]["content"]]


def test_a_row_becomes_an_example(folder):
    rows = [{**ROW, "family": "colour", "id": 7}, {**ROW, "image": "blue.png", "answer": "blue"}]
    first, second = examples(jsonl(folder, rows[0], "", rows[1]))
    assert (first.question, first.answer, first.family) == ("What colour?", "red", "colour")
    assert (second.answer, second.family) == ("blue", "other")
    (turn,) = first.conversation()
    assert [part["type"] for part in turn["content"]] == ["image", "text"] and turn["role"] == "user"
    assert turn["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0)
    assert texts(first)[1] == "What colour?"
    assert [e.family for e in examples(jsonl(folder, ROW))] == ["all"]


def test_pictures_stand_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(folder / "phone.jpg", exif=exif)
    (example,) = examples(jsonl(folder, {**ROW, "image": "phone.jpg"}))
    assert example.conversation()[0]["content"][0]["image"].size == (10, 20)


def test_several_pictures_and_a_folder_of_media(folder):
    (folder / "data").mkdir()
    path = jsonl(folder / "data", {"images": ["red.png", str(folder / "blue.png")], "question": "?", "answer": 2})
    (example,) = examples(path, media=folder)
    shown = [part["image"].getpixel((0, 0)) for part in example.conversation()[0]["content"][:2]]
    assert shown == [(255, 0, 0), (0, 0, 255)] and example.answer == "2"


def test_a_video(folder):
    tiny_video.write_clip(folder / "clip.mp4", tiny_video.clip(0))
    task = open_task({"file": jsonl(folder, {"video": "clip.mp4", "question": "?", "answer": "yes"})})
    (example,) = task.examples(None)
    assert task.kind == "video"
    assert example.conversation()[0]["content"][0] == {"type": "video", "video": str(folder / "clip.mp4")}


def test_csv_is_the_same_as_jsonl(folder):
    rows = [
        {"images": ["red.png", "blue.png"], "question": 'Two,\n"lines"', "answers": ["one", "1"], "family": "a"},
        {"images": ["red.png"], "question": "?", "answers": ["0.50"], "family": "b"},
    ]
    with (folder / "mine.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
            )
    (folder / "plain.csv").write_text("image,question,answer,family\nred.png,?,0.50,b\n")
    ours = examples(folder / "mine.csv")
    assert ours == examples(jsonl(folder, *rows))
    assert examples(folder / "plain.csv") == ours[1:]


def test_answers_and_scores(folder):
    path = jsonl(folder, {"image": "red.png", "question": "?", "answers": ["two", "2"]})
    task = open_task({"file": path})
    (example,) = task.examples(None)
    assert [task.score(said, example) for said in ("2", "Two.", "3")] == [1, 1, 0]
    assert open_task({"file": path, "score": "anls"}).score("twoo", example) == pytest.approx(0.75)
    number = open_task({"file": jsonl(folder, {**ROW, "answer": 9.5}), "score": "number", "tolerance": 1})
    assert [number.score(said, *number.examples(None)) for said in ("10.5", "10.6")] == [1, 0]


def test_choices(folder):
    rows = [
        {**ROW, "choices": ["red", "blue"], "answer": "B"},
        {**ROW, "question": "And?", "choices": ["red", "blue"], "answer": "Red"},
    ]
    task = open_task({"file": jsonl(folder, *rows)})
    first, second = task.examples(None)
    assert first.question == "What colour?\nA. red\nB. blue\nAnswer with the letter of the right choice."
    assert (first.answer, second.answer) == ("B. blue", "A. red")
    assert [task.score(said, first) for said in ("B", "blue", "A", "red or blue")] == [1, 1, 0, 0]
    own = examples(jsonl(folder, rows[0]), prompt="{choices}\nQ: {question} {{}}")
    assert own[0].question == "A. red\nB. blue\nQ: What colour? {}"
    shown = examples(jsonl(folder, {**rows[0], "answer": "red"}), score="exact")
    assert shown[0].question == "What colour?\nA. red\nB. blue"


def test_the_longest_answer_fits_into_the_generated_tokens(folder):
    def tokens(answer, **settings):
        return open_task({"file": jsonl(folder, {**ROW, "answer": answer}), **settings}).max_new_tokens

    assert tokens("red") == 16 and tokens("red", score="contains") == 64
    assert tokens("ä" * 30) == 61 and tokens("ä" * 30, max_new_tokens=5) == 5


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "?", "answer": "x"}, "expected one of image, images and video, got none"),
        ({**ROW, "images": ["red.png"]}, "expected one of image, images and video, got image and images"),
        ({"image": "red.png", "answer": "x"}, "no question"),
        ({"image": "red.png", "question": "?"}, "no answer"),
        ({**ROW, "answer": None}, "no answer"),
        ({**ROW, "answers": ["red"]}, "answer and answers are both given"),
        (
            {**ROW, "answer": ["a", "b"]},
            "answer: expected a text or a number, got ['a', 'b']; several accepted answers",
        ),
        ({**ROW, "answer": True}, "answer: expected a text or a number, got True"),
        ({**ROW, "answer": " "}, "answer: empty"),
        ({**ROW, "answer": "."}, "answer '.' is nothing but a full stop"),
        ({"images": [], "question": "?", "answer": "x"}, "images: an empty list"),
        ({**ROW, "image": "gone.png"}, "image 'gone.png': no such file"),
        (
            {**ROW, "image": "http://x.org/a.png"},
            "image 'http://x.org/a.png': a web address; save the file and give its path",
        ),
        ({**ROW, "image": "."}, "image '.': not a file"),
        ({**ROW, "image": "broken.png"}, "image 'broken.png': not a readable picture"),
        ({**ROW, "image": "torn.jpg"}, "image 'torn.jpg': not a readable picture"),
        ({"video": "broken.png", "question": "?", "answer": "x"}, "video 'broken.png': not a readable video"),
        ({**ROW, "anwser": "x"}, "column 'anwser': did you mean answer?"),
        ({**ROW, "Family": "x"}, "column 'Family': did you mean family?"),
        ({**ROW, "image2": "x"}, "column 'image2': did you mean image or images?"),
        ({**ROW, "choices": ["blue", "green"]}, "answer 'red' is none of the choices ['blue', 'green'], and no letter"),
        ({**ROW, "choices": ["red", "green"], "answer": "C"}, "answer 'C' is none of the choices"),
        ({**ROW, "choices": ["red"]}, "expected 2 to 26 choices, got 1"),
        ({**ROW, "choices": ["red", "Red."]}, "a choice is there twice"),
        ({**ROW, "choices": ["B", "A"], "answer": "A"}, "a choice reads like the letter of another"),
        ("{torn", "not valid JSON"),
        ('{"image": "a.png", "image": "b.png"}', "not valid JSON: 'image' is given twice"),
        ('{"answer": NaN}', "not valid JSON: NaN is no JSON"),
        ("[1]", "expected an object"),
    ],
)
def test_what_is_wrong_with_a_row_is_told_with_its_line(folder, row, said):
    (folder / "broken.png").write_text("nothing")
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    (folder / "torn.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-400])
    told = problem(jsonl(folder, "", row))
    assert told.startswith(f"line 2: {said}"), told


def test_torn_pictures_are_found_where_another_library_lets_pillow_fill_them_up(folder, monkeypatch):
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.png")
    (folder / "torn.png").write_bytes((folder / "whole.png").read_bytes()[:-4000])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert "image 'torn.png': not a readable picture" in problem(jsonl(folder, {**ROW, "image": "torn.png"}))
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    ("settings", "row", "said"),
    [
        ({"score": "number"}, ROW, "line 1: answer 'red' is no number"),
        ({"score": "choice"}, ROW, "line 1: expected 2 to 26 choices, got 0"),
        ({"prompt": "{question} {choices}"}, ROW, "line 1: the prompt has {choices}, and the row has none"),
        ({"media": "nowhere"}, ROW, "nowhere: the folder of the media does not exist"),
    ],
)
def test_rows_that_do_not_go_with_the_settings(folder, settings, row, said):
    assert said in problem(jsonl(folder, row), **settings)


def test_rows_that_do_not_go_together(folder):
    tiny_video.write_clip(folder / "clip.mp4", tiny_video.clip(0))
    clip = {"video": "clip.mp4", "question": "?", "answer": "x"}
    assert problem(jsonl(folder, ROW, clip)) == (
        "line 2: a row with videos, but line 1 has images; make a file of each kind"
    )
    assert problem(jsonl(folder, ROW, "", {**ROW, "answer": "blue"})) == "line 3: asks the same as line 1"
    mixed = problem(jsonl(folder, ROW, {**ROW, "choices": ["red", "blue"]}))
    assert mixed.startswith("line 2: some rows have choices and some have none") and "give 'score'" in mixed


def test_the_first_problems_are_told_and_the_number_of_the_others(folder):
    told = problem(jsonl(folder, *[{**ROW, "image": f"{number}.png"} for number in range(12)])).splitlines()
    assert [line.split(":")[0] for line in told[:5]] == [f"line {number}" for number in range(1, 6)]
    assert told[5].endswith("and 7 more problems") and len(told) == 6


def test_a_limit_looks_at_the_media_of_so_many_rows(folder):
    path = jsonl(folder, ROW, {**ROW, "image": "gone.png"})
    assert [e.answer for e in examples(path, 1)] == ["red"]
    with pytest.raises(ConfigError, match=r"line 2: image 'gone\.png'"):
        examples(path, 2)


def test_files_that_are_none(folder):
    assert problem(folder / "gone.jsonl").endswith("cannot be read: No such file or directory")
    assert problem(jsonl(folder, ROW, name="mine.json")).endswith("expected a file that ends in .jsonl or .csv")
    assert problem(jsonl(folder)).endswith("there is no row")
    (folder / "latin.csv").write_bytes("image,question,answer\nred.png,?,grün\n".encode("latin-1"))
    assert problem(folder / "latin.csv") == "line 2: not UTF-8; save the file as UTF-8"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image;question;answer\n", "line 1: expected columns image, images, video, question"),
        ("image,image,question\n", "line 1: column 'image' is there twice"),
        ('image,question,answer\nred.png,"a\nb",x\nred.png,?\n', "line 4: 2 cells, but 3 columns"),
        ("image,question,answer\nred.png,?,\n", "line 2: no answer"),
        ('images,question,answer\n"[""red.png""",?,x\n', "line 2: images: not a valid JSON list"),
        ('image,question,answer\nred.png,"open,x\n', "line 2: not valid CSV"),
    ],
)
def test_what_is_wrong_with_csv(folder, text, said):
    (folder / "mine.csv").write_text(text)
    assert problem(folder / "mine.csv").startswith(said)


def fingerprint(path, **settings):
    task = open_task({"file": path, **settings})
    return task.fingerprint(task.digests(task.examples(None)))


def test_the_fingerprint_changes_with_all_that_numbers_depend_on(folder):
    choices = {**ROW, "choices": ["red", "blue"]}
    first = fingerprint(jsonl(folder, choices))
    assert (
        first
        == fingerprint(jsonl(folder, choices, name="other.jsonl"), name="another")
        == fingerprint(jsonl(folder, {**choices, "id": 3}))
    )
    others = [
        fingerprint(jsonl(folder, {**choices, **change}))
        for change in ({"answer": "blue"}, {"question": "?"}, {"family": "x"}, {"image": "blue.png"})
    ]
    others.append(fingerprint(jsonl(folder, {**choices, "choices": ["blue", "red"]})))
    path = jsonl(folder, choices)
    settings = ({"score": "exact"}, {"prompt": "{question}"}, {"max_new_tokens": 3})
    others += [fingerprint(path, **changed) for changed in settings]
    Image.new("RGB", (8, 8), "green").save(folder / "red.png")
    others.append(fingerprint(path))
    assert len({first, *others}) == len(others) + 1


def test_a_video_is_known_by_its_content(folder):
    tiny_video.write_clip(folder / "clip.mp4", tiny_video.clip(0))
    path = jsonl(folder, {"video": "clip.mp4", "question": "?", "answer": "yes"})
    first = fingerprint(path)
    tiny_video.write_clip(folder / "clip.mp4", tiny_video.clip(1))
    assert fingerprint(path) != first


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": "What?"}, "expected {question} in it"),
        ({"prompt": "{question} {answer}"}, "expected {question} and {choices} only, but there is {answer}"),
        ({"prompt": "{question"}, "a brace that stands for itself is written twice"),
        ({"tolerance": 1}, "goes with 'score: number' only"),
        ({"scor": "exact"}, "unknown key; did you mean score?"),
        ({"name": "a/b"}, "String should match pattern"),
    ],
)
def test_settings_that_are_wrong(settings, said):
    with pytest.raises(ValueError) as caught:
        FileTask(file="mine.jsonl", **settings)
    assert said in str(caught.value)


def test_the_rows_of_the_documentation(folder):
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = re.search(r"<!-- tested: own data -->\n```json\n(.*?)```", page, re.DOTALL).group(1).splitlines()
    for name in ("kitchen", "street"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.jpg")
    first, second = (examples(jsonl(folder, row))[0] for row in rows)
    assert (first.answers, first.family) == (("a cup", "a mug"), "object")
    assert second.answer == "B. the blue one"
    assert all(f"`{name}`" in page for name in (*COLUMNS, *FileTask.model_fields, *SCORES))

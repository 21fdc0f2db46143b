# SPDX-License-Identifier: Apache-2.0
"""Tasks for lmms-eval about DigitScenes, one for each kind of request, prompt and metric, without a download."""

from pathlib import Path

import datasets
import lmms_eval

from vtprune.eval import digitscenes

SCENES = Path(digitscenes.__file__).parent.parent / "tasks" / "digitscenes.yaml"

_INCLUDE = f"include: {SCENES}\n"
_CHOICES = """generation_kwargs: null
target_delimiter: ""
"""
_TASKS = {
    # Questions in pairs, points by category, and a metric that only some documents have; like MME.
    "pairs": """task: pairs
process_results: !function local.pair_results
metric_list:
  - {metric: odd_points, aggregation: !function local.pair_points, higher_is_better: true}
  - {metric: pair_points, aggregation: !function local.pair_points, higher_is_better: true}
  - {metric: submission, aggregation: !function local.submission, higher_is_better: true}
""",
    # A filter, and metrics over (right, given) of all documents; like F1.
    "first_word": """task: first_word
doc_to_text: !function local.long_question
process_results: !function local.truth
filter_list:
  - name: letter
    filter: [{function: regex, regex_pattern: '([a-z0-9])', group_select: 0}, {function: take_first}]
  - name: none
    filter: [{function: take_first}]
metric_list:
  - {metric: harmonic, aggregation: !function local.harmonic, higher_is_better: true}
""",
    # Two pictures in a prompt, in messages of the task's own.
    "two_images": """task: two_images
doc_to_messages: !function local.two_pictures
""",
    "choices": f"""task: choices
output_type: multiple_choice
process_results: null
doc_to_target: !function local.place
doc_to_choice: !function local.words
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
{_CHOICES}""",
    "greedy": f"""task: greedy
output_type: loglikelihood
process_results: !function local.greedy
metric_list:
  - {{metric: greedy, aggregation: mean, higher_is_better: true}}
  - {{metric: loss, aggregation: mean, higher_is_better: false}}
{_CHOICES}""",
    "both": "group: both\ntask: [pairs, choices]\n",
}
_CODE = '''
from pathlib import Path

from vtprune.eval import digitscenes


def pair_results(doc, results):
    right = digitscenes.score(results[0], doc["answer"])
    item = {"question_id": doc["index"] // 2, "category": doc["index"] // 2 % 3, "score": right}
    return {"odd_points" if item["category"] == 2 else "pair_points": item, "submission": item}


def pair_points(items):
    pairs = {}
    for item in items:
        pairs.setdefault((item["category"], item["question_id"]), []).append(item["score"])
    assert all(len(scores) == 2 for scores in pairs.values()), "pairs only"
    points = {}
    for (category, _), scores in pairs.items():
        points.setdefault(category, []).append(50 * sum(scores) + 100 * (sum(scores) == 2))
    print("a table of points")
    return sum(sum(own) / len(own) for own in points.values())


def submission(items, args):
    Path(args.output_path).mkdir(parents=True, exist_ok=True)
    (Path(args.output_path) / "submission.json").write_text(f"{len(items)} answers")


def long_question(doc):
    return doc["question"]


def truth(doc, results):
    return {"harmonic": (doc["answer"], results[0])}


def harmonic(items):
    """2 / (1 / share of the right + 1 / share of the non-empty): not a mean over documents."""
    right, said = zip(*items)
    exact = sum(a.startswith(b[:1]) and b != "" for a, b in zip(right, said)) / len(items)
    given = sum(b != "[invalid]" for b in said) / len(items)
    return 2 * exact * given / (exact + given) if exact + given else 0.0


def two_pictures(doc):
    other = digitscenes.example((doc["index"] + 1) % 5)
    shown = [{"type": "image", "url": other.image}, {"type": "image", "url": doc["medium"]}]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": doc["question"]}]}]


def words(doc):
    wrong = [word for word in ("red", "yes", "7") if word != doc["answer"]]
    return [*wrong[:1], doc["answer"], *wrong[1:]]


def place(doc):
    return 1


def greedy(doc, results):
    loss, same = results[0]
    return {"greedy": float(same), "loss": float(loss)}
'''


PUBLISHED = ("pope", "mme", "gqa")
"""Tasks of lmms-eval that are also there on eight questions about scenes, as `pope_here` and so on."""


def _write_published(folder: Path) -> None:
    asked = [example for example in digitscenes.examples("test", limit=100) if example.answer in ("yes", "no")][:8]
    rows = {
        "question_id": [str(place // 2) for place in range(8)],
        "image": [example.image for example in asked],
        "question": [example.question for example in asked],
        "answer": [example.answer for example in asked],
        "category": ["existence", "existence", "code_reasoning", "code_reasoning"] * 2,
    }
    features = datasets.Features({key: datasets.Value("string") for key in rows} | {"image": datasets.Image()})
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"test": data, "testdev": data}).save_to_disk(folder / "data")
    for name in PUBLISHED:
        theirs = Path(lmms_eval.__file__).parent / "tasks" / name / f"{name}.yaml"
        local = f"dataset_path: {folder}/data\ndataset_name: null\ndataset_kwargs: {{load_from_disk: true}}\n"
        (folder / f"{name}_here.yaml").write_text(f"include: {theirs}\ntask: {name}_here\nprocess_docs: null\n{local}")


def write(folder: Path) -> Path:
    """The tasks, for `include_path`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in _TASKS.items():
        (folder / f"{name}.yaml").write_text(text if text.startswith("group") else _INCLUDE + text)
    (folder / "local.py").write_text(_CODE)
    _write_published(folder)
    return folder

# SPDX-License-Identifier: Apache-2.0
"""The page as programs reach it: values, messages instead of stack traces, limits, and no other machine."""

from pathlib import Path

import pytest
from PIL import Image

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")

import httpx  # noqa: E402 (comes with gradio)
from served import served  # noqa: E402 (imports gradio)

from vtprune.demo.comparison import Comparison, Source  # noqa: E402
from vtprune.demo.serve import serve  # noqa: E402
from vtprune.demo.setting import Setting  # noqa: E402
from vtprune.demo.uploads import LIMITS  # noqa: E402
from vtprune.errors import ConfigError  # noqa: E402
from vtprune.eval.digitscenes import example  # noqa: E402

QUESTION = "How many digits are there?"
MESSAGE, TABLE, LINK, FIRST = 0, 1, 2, 3
"""Places in what the page gives back; a column is five of them from `FIRST` on: title, picture, answer and code."""


@pytest.fixture(scope="module")
def address():
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    return gradio_client.Client(address, verbose=False)


def value(component):
    return component.get("value", component) if isinstance(component, dict) else component


def test_the_page_shows_what_the_comparison_says(client, address):
    setting = Setting(QUESTION, ("auto", "fastv"), 0.25, example=3)
    given = client.predict(None, 3, QUESTION, ["auto", "fastv"], 0.25, api_name="/answer")
    expected = Comparison.open(Source(), 16).compare(setting)
    assert [row[:2] for row in value(given[TABLE])["data"]] == [["full", "144"], ["auto: mmtok", "36"], ["fastv", "21"]]
    for number, answer in enumerate(expected.answers):
        title, picture, text, python, _ = given[FIRST + 5 * number : FIRST + 5 * number + 5]
        assert answer.name in title and text == answer.text
        assert "max_new_tokens=16" in python
        drawn = expected.prompt.sheet.draw(answer.kept)
        assert Image.open(value(picture)).tobytes() == drawn.tobytes()
    assert given[LINK] == f"{address}?{setting.query()}"


def test_an_upload_is_answered(client, tmp_path):
    example(3).image.save(tmp_path / "scene.png")
    file = gradio_client.handle_file(tmp_path / "scene.png")
    given = client.predict(file, None, QUESTION, ["auto"], 0.25, api_name="/answer")
    assert "load_picture(Path('scene.png'))" in given[FIRST + 3]
    assert "example" not in given[LINK]


@pytest.mark.parametrize(
    ("question", "methods", "number", "says"),
    [
        ("", ["auto"], 3, "ask a question"),
        (QUESTION, ["auto"], None, "upload an image"),
        (QUESTION, ["auto"], 5000, "expected 0 to 299"),
    ],
)
def test_what_cannot_be_done_is_a_message(client, question, methods, number, says):
    given = client.predict(None, number, question, methods, 0.25, api_name="/answer")
    assert says in value(given[MESSAGE]) and "Traceback" not in str(given)


def test_what_a_method_refuses_stands_in_its_column(client):
    given = client.predict(None, 3, QUESTION, ["fastv", "uniform"], 0.03, api_name="/answer")
    assert given[FIRST + 5 + 2].startswith("refused: fastv") and given[FIRST + 10 + 2]


def test_large_uploads_are_cut_off(address):
    content = b"0" * (LIMITS.bytes + (1 << 20))
    answer = httpx.post(f"{address}gradio_api/upload", files={"files": ("big.png", content)}, timeout=60)
    assert answer.status_code == 413


def test_files_of_this_machine_are_not_opened(address, tmp_path):
    example(3).image.save(tmp_path / "scene.png")
    stolen = {"path": str(tmp_path / "scene.png"), "meta": {"_type": "gradio.FileData"}}
    data = {"data": [stolen, None, QUESTION, ["auto"], 0.25]}
    event = httpx.post(f"{address}gradio_api/call/answer", json=data, timeout=60).json()["event_id"]
    told = httpx.get(f"{address}gradio_api/call/answer/{event}", timeout=60).text
    assert "event: error" in told and "Traceback" not in told


def test_a_port_that_is_taken_is_named(address):
    port = int(address.rsplit(":", 1)[1].strip("/"))
    with pytest.raises(ConfigError, match=f"127.0.0.1: cannot listen.*{port}"):
        serve(Source(), "127.0.0.1", port, 16)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux says who listens")
def test_it_listens_on_the_loopback_address_alone(address):
    port = int(address.rsplit(":", 1)[1].strip("/"))
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")]
    assert listening == [f"0100007F:{port:04X}"]

# SPDX-License-Identifier: Apache-2.0
"""The command: what it says before there is a page."""

import pytest
from typer.testing import CliRunner

from vtprune.cli import app
from vtprune.demo import serve


def test_without_gradio_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["demo", "no/such/folder/of/a/model"])
    assert result.exit_code == 2
    assert result.stderr == 'error: the demo needs Gradio: pip install "vtprune[demo]"\n'


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["./nowhere"], "error: model './nowhere' cannot be loaded: there is no such folder\n"),
        (["--dtype", "float8"], "error: --dtype float8: expected auto, float32, bfloat16 or float16\n"),
    ],
)
def test_a_refusal_is_one_line(monkeypatch, arguments, says):
    monkeypatch.setattr(serve, "find_spec", lambda name: object())
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert (result.exit_code, result.stderr) == (2, says)

# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: what it prints, and how it fails."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app
from vtprune.plan import Prompt, plan
from vtprune.testing import families

sys.path.insert(0, str(Path(__file__).parent / "eval"))
import tiny_eval

RUN = ["run", "--method", "mmtok", "--prompt", "word1 word2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_eval.save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    tiny_eval.examples(1)[0].image.save(path)
    return path


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def test_methods_lists_every_registered_method():
    shown = invoke("methods").stdout
    for name, method in vtprune.list_methods().items():
        (line,) = (line for line in shown.splitlines() if line.split("│")[1:2] and line.split("│")[1].strip() == name)
        assert method.stage in line and method.signal in line and method.paper in line


def test_methods_says_what_fits_a_model_with_whole_names_at_80_columns(model):
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["methods", "--model", model])
    assert result.exit_code == 0, result.output
    rows = [line.split("│")[1:3] for line in result.stdout.splitlines() if line.startswith("│")]
    names = {name.strip(): fits.strip() for name, fits in rows if name.strip()}
    assert names == dict.fromkeys(vtprune.list_methods(), "yes")
    assert '"auto" is mmtok' in result.stdout


def test_models_lists_the_families():
    assert "LLaVA-1.5" in invoke("models").stdout


def test_run_answers_reports_and_shows_what_was_kept(model, image, tmp_path):
    shown = tmp_path / "shown.png"
    result = invoke(
        *RUN, "--model", model, "--image", image, "--keep-ratio", 0.25, "--show", shown, "--max-new-tokens", 2
    )
    assert result.exit_code == 0, result.output
    assert "vtprune mmtok" in result.stdout and "25.0%" in result.stdout
    before, after = Image.open(image), Image.open(shown)
    bright = [
        before.crop(box).tobytes() == after.crop(box).tobytes()
        for box in ((14 * col, 14 * row, 14 * col + 14, 14 * row + 14) for row in range(4) for col in range(4))
    ]
    assert sum(bright) == 4


def test_run_takes_a_method_file(model, image, tmp_path):
    method = tmp_path / "method.yaml"
    method.write_text("- name: uniform\n  keep_ratio: 0.5\n- name: fastv\n  layer: 2\n  keep_tokens: 4\n")
    result = invoke("run", "--method", method, "--prompt", "word1", "--model", model, "--image", image)
    assert result.exit_code == 0, result.output
    assert "vtprune uniform + fastv" in result.stdout


def test_run_takes_a_count_parameters_and_a_precision(model, image):
    chosen = ["--method", "fastv", "--keep-tokens", 9, "--set", "layer=2", "--set", "positions=compact"]
    result = invoke(*RUN, *chosen, "--model", model, "--image", image, "--dtype", "bfloat16", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stderr == "LlavaForConditionalGeneration on cpu, bfloat16\n"
    fastv = vtprune.build_method("fastv", keep_tokens=9, layer=2)
    shape = vtprune.ModelShape(encoder_layers=3, decoder_layers=8, feature_layer=1, has_cls=True)
    last = plan([fastv], shape, Prompt(visual=16, crops=1, text=5))[-1]
    assert f"{last:>14,.4g}" in result.stdout  # visual tokens, final


def test_run_draws_no_picture_of_tiles_and_says_so_before_it_answers(image, tmp_path, monkeypatch):
    """A family whose adapter states no grid."""
    from vtprune.eval import inputs

    model = families.shared("qwen2_vl")
    monkeypatch.setattr(inputs, "load_model", lambda *args, **kwargs: (model, None))
    result = invoke(*RUN, "--keep-ratio", 0.5, "--model", "any", "--image", image, "--show", tmp_path / "shown.png")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --show needs a model that lays every image out in one grid")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*RUN, "--keep-ratio", "0.5", "--device", "gpu"], "error: device 'gpu' cannot be used: "),
        ([*RUN, "--keep-ratio", "0.5", "--dtype", "float8"], "error: --dtype float8: expected auto, float32, bfloat16"),
        ([*RUN, "--keep-ratio", "0.5", "--set", "layr=2"], "error: mmtok: unknown parameter 'layr'"),
        ([*RUN, "--keep-ratio", "0.5", "--set", "layer"], "error: --set layer: expected KEY=VALUE"),
        ([*RUN, "--method", "mmtk"], "error: unknown method 'mmtk': did you mean mmtok?"),
        ([*RUN, "--keep-ratio", "1.5"], "error: mmtok: keep_ratio=1.5"),
        ([*RUN], "error: mmtok needs a budget"),
        ([*RUN, "--keep-ratio", "0.5", "--image", "none.png"], "error: none.png: not a readable image"),
        ([*RUN, "--keep-ratio", "0.5", "--model", "./nowhere"], "error: model './nowhere' cannot be loaded"),
        (["eval", "none.yaml"], "error: none.yaml: cannot be read: No such file or directory"),
        (["eval", "quickstrat"], "error: quickstrat: no such file, and none that comes with vtprune; did you mean"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(model, image, arguments, message):
    defaults = ["--model", model, "--image", image] if arguments[0] == "run" else []
    result = invoke(arguments[0], *defaults, *arguments[1:])
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1 and result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        (["eval", "quickstart"], "matplotlib"),
        (["eval", "quickstart"], "sklearn"),
        (["eval", "quickstart", "--dry-run"], "sklearn"),
        (["eval", "video", "--limit", "1"], "av"),
        (["report", "."], "matplotlib"),
    ],
)
def test_a_command_without_its_extra_names_the_extra(arguments, module, tmp_path):
    """As in an environment in which only the core is installed, hence in a process of its own."""
    script = f"import sys; sys.modules[{module!r}] = None; from vtprune.cli import app; app({arguments!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'error: evaluation needs {module}: pip install "vtprune[eval]"\n'


def test_importing_the_library_imports_neither_plots_nor_evaluation_nor_the_command_line():
    unwanted = "{'matplotlib', 'typer', 'lmms_eval', 'vtprune.eval'}"
    script = f"import sys, vtprune; print({unwanted} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"

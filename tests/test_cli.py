# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: what it prints, and how it fails."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import vtprune
from vtprune.adapters.coverage import coverage
from vtprune.cli import app
from vtprune.plan import Prompt, plan

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


def test_models_all_lists_every_class_with_whole_names_in_80_columns():
    lines = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["models", "--all"]).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert {tuple(line.split()) for line in lines} >= {(row.model_type, row.class_name) for row in coverage()}
    heading, place = (
        "Supported, with methods at these stages",
        "  qwen2_vl                 Qwen2VLForConditionalGeneration",
    )
    starts = [i for i, line in enumerate(lines) if line.startswith(heading)]
    assert any(place in lines[start : lines.index("", start)] for start in starts)
    reason = next(i for i, line in enumerate(lines) if line.startswith("Refused, few tokens: a Q-Former already makes"))
    start = lines.index("  blip-2                   Blip2ForConditionalGeneration")
    assert 0 < start - reason < 5 and lines[start + 1].strip() == "32 an image"


def test_run_answers_reports_and_shows_what_was_kept(model, image, tmp_path):
    shown = tmp_path / "shown.png"
    result = invoke(
        *RUN, "--model", model, "--image", image, "--keep-ratio", 0.25, "--show", shown, "--max-new-tokens", 2
    )
    assert result.exit_code == 0, result.output
    assert "vtprune mmtok" in result.stdout and "25.0%" in result.stdout
    picture = np.asarray(Image.open(shown).convert("L")).astype(int)
    assert picture.shape == (336, 336 + 8 + 336)  # 56 pixels of the encoder are enlarged
    before, after = picture[:, :336], picture[:, 344:]
    same = [
        bool((before[at] == after[at]).all())
        for at in (np.s_[84 * row : 84 * row + 84, 84 * col : 84 * col + 84] for row in range(4) for col in range(4))
    ]
    assert sum(same) == 4 and 0.2 < after[before > 100].mean() / before[before > 100].mean() < 0.6


def test_run_says_what_it_waits_for(model, image):
    result = invoke(*RUN, "--model", model, "--image", image, "--keep-ratio", 0.5, "--max-new-tokens", 1)
    assert result.stderr == f"loading {model}\nLlavaForConditionalGeneration on cpu, float32\n"


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
    assert result.stderr.endswith("LlavaForConditionalGeneration on cpu, bfloat16\n")
    fastv = vtprune.build_method("fastv", keep_tokens=9, layer=2)
    shape = vtprune.ModelShape(encoder_layers=3, decoder_layers=8, feature_layer=1, has_cls=True)
    last = plan([fastv], shape, Prompt(visual=16, crops=1, text=5))[-1]
    assert f"{last:>14,.4g}" in result.stdout  # visual tokens, final


def test_run_that_cannot_draw_says_so_before_it_answers(model, image, tmp_path, monkeypatch):
    from vtprune.eval.pages import views

    monkeypatch.setattr(views, "view_of", lambda *args: None)
    arguments = ["--keep-ratio", 0.5, "--model", model, "--image", image, "--show", tmp_path / "shown.png"]
    result = invoke(*RUN, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error: --show: the places of the visual tokens of this LLaVA-1.5 are not known" in result.stderr


def test_run_looks_at_the_picture_to_write_before_it_loads_the_model(image, tmp_path):
    run = [*RUN, "--keep-ratio", 0.5, "--model", "./nowhere", "--image", image]
    result = invoke(*run, "--show", tmp_path / "no" / "k.png")
    assert (result.exit_code, result.stderr) == (2, f"error: {tmp_path}/no/k.png: the folder does not exist\n")


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
        (
            [*RUN, "--keep-ratio", "0.5", "--model", "./nowhere"],
            "error: model './nowhere' cannot be loaded: there is no such folder",
        ),
        (["eval", "none.yaml"], "error: none.yaml: cannot be read: No such file or directory"),
        (["eval", "quickstrat"], "error: quickstrat: no such file, and none that comes with vtprune; did you mean"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(model, image, arguments, message):
    defaults = ["--model", model, "--image", image] if arguments[0] == "run" else []
    result = invoke(arguments[0], *defaults, *arguments[1:])
    assert result.exit_code == 2
    said = re.sub(r"^loading .*\n", "", result.stderr)
    assert said.startswith(message)
    assert said.count("\n") == 1 and result.stdout == ""


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
    script = f"import sys; from vtprune import prune; print({unwanted} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"


def test_the_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"vtprune {vtprune.__version__}\n")


def test_shells_complete(monkeypatch):
    # Where no shell started the process, none can be found out.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    result = invoke("--show-completion", "bash")
    assert result.exit_code == 0 and "COMPLETE=complete_bash" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["--help"], {}, "Prune visual tokens"),
        (["run", "--help"], {}, "Answer one question"),
        (["--version"], {}, f"vtprune {vtprune.__version__}"),
        ([], {"_VTPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": "vtprune ben", "COMP_CWORD": "1"}, "bench"),
    ],
)
def test_help_version_and_completion_wait_for_no_torch(arguments, environment, expected):
    code = (
        "import sys\n"
        f"sys.argv = ['vtprune', *{arguments}]\n"
        "try:\n"
        "    import vtprune.__main__\n"
        "finally:\n"
        "    print({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules) or 'none', file=sys.stderr)"
    )
    variables = os.environ | {"COLUMNS": "200"} | environment
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    assert (result.returncode, result.stderr.strip()) == (0, "none")
    assert expected in result.stdout


def test_a_folder_of_results_that_is_not_there():
    result = invoke("report", "nowhere")
    assert (result.exit_code, result.stderr) == (2, "error: nowhere: there is no such folder\n")

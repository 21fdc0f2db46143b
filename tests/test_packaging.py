# SPDX-License-Identifier: Apache-2.0
"""Wheels and editable installs: what is in them, who finds it, and what a type checker sees."""

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"vtprune": "vtprune", "adapters": "vtprune/adapters", "eval": "vtprune/eval"}


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True)


def python(code: str, cwd: Path, site: Path | None = None) -> list[str]:
    """Words printed by `code` in a fresh interpreter, where `site` alone holds vtprune when it is given."""
    options = []
    if site is not None:
        # -S: the .pth files of the environment, this project's own editable install among them, stay unread
        options = ["-S"]
        code = (
            "import site, sys\n"
            f"site.addsitedir({str(site)!r})\n"
            f"sys.path.append({sysconfig.get_path('purelib')!r})\n{code}"
        )
    result = subprocess.run([sys.executable, *options, "-c", code], cwd=cwd, check=True, capture_output=True, text=True)
    return result.stdout.split()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy to build from, named as `git clone` names it, so that no build folder appears in the working tree."""
    copy = tmp_path_factory.mktemp("sources") / "vtprune"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in (*FOLDERS, "src"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def build(sources: Path, folder: Path) -> Path:
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    return build(sources, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_site(wheel, tmp_path_factory):
    """A folder into which the wheel is installed."""
    site = tmp_path_factory.mktemp("wheel_site")
    pip("install", "--no-deps", "--target", site, wheel)
    return site


@pytest.fixture(scope="module")
def editable_site(sources, tmp_path_factory):
    """A folder that makes `sources` importable."""
    site = tmp_path_factory.mktemp("editable_site")
    pip("install", "--no-deps", "--no-build-isolation", "--target", site, "--editable", sources)
    return site


def test_wheel_holds_every_module_and_data_file(sources, wheel, wheel_site, tmp_path):
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"{target}/{path.relative_to(sources / folder)}"
        for folder, target in FOLDERS.items()
        for path in (sources / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".j2", ".jsonl")
        or path.name == "py.typed"
        or path.parent.name in ("model", "video_model", "open_clip_model")
        and path.is_file()
    }
    assert wanted - packed == set()
    assert {name.split("/")[0] for name in packed if not name.split("/")[0].endswith(".dist-info")} == {"vtprune"}
    code = "import vtprune as v, vtprune.adapters as a, vtprune.eval as e; print(v.__file__, a.__file__, e.__file__)"
    assert python(code, tmp_path, wheel_site) == [
        str(wheel_site / "vtprune" / child / "__init__.py") for child in ("", "adapters", "eval")
    ]


def test_a_checkout_without_links_makes_the_same_wheel(sources, wheel, tmp_path):
    """Git on Windows writes a text file for a symbolic link."""
    copy = tmp_path / "vtprune"
    shutil.copytree(sources, copy, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    for link in ("src/vtprune", "vtprune/adapters", "vtprune/eval"):
        target = (copy / link).readlink()
        (copy / link).unlink()
        (copy / link).write_text(str(target))
    other = build(copy, tmp_path)
    assert sorted(zipfile.ZipFile(other).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_the_command_runs_in_the_checkout(sources, wheel_site):
    """There Python takes the folder `vtprune/`, not the installed package."""
    code = "import runpy, sys; sys.argv = ['vtprune', 'models']; runpy.run_module('vtprune', run_name='__main__')"
    assert "LLaVA-1.5" in python(code, sources, wheel_site)


def test_shipped_evaluations_are_found_by_name(wheel_site, tmp_path):
    code = (
        "from vtprune.eval.config import load_config\n"
        "print(*(load_config(name).output for name in ('quickstart', 'video', 'clip')))"
    )
    assert python(code, tmp_path, wheel_site) == ["results/quickstart", "results/video", "results/clip"]


def test_a_script_beside_an_editable_clone_gets_the_package(sources, editable_site):
    """The clone's own folder has the package's name, and a folder without `__init__.py` is a namespace package."""
    code = "import vtprune; print(vtprune.prune.__name__, *vtprune.__path__)"
    assert python(code, sources.parent, editable_site) == ["prune", str(sources / "src" / "vtprune")]


def test_editable_install_sees_files_that_are_added_later(sources, editable_site, tmp_path):
    added = [sources / folder / "added_later.py" for folder in FOLDERS]
    for path in added:
        path.write_text("")
    modules = ["vtprune.added_later", "vtprune.adapters.added_later", "vtprune.eval.added_later"]
    code = "import importlib\n" + "\n".join(f"print(importlib.import_module({m!r}).__file__)" for m in modules)
    try:
        found = [Path(path).resolve() for path in python(code, tmp_path, editable_site)]
        assert found == [path.resolve() for path in added]
    finally:
        for path in added:
            path.unlink()


def test_import_is_light(tmp_path):
    """Only small packages, and no model of transformers. `scripts/bench_import.py` says how long it takes."""
    code = (
        "import sys, torch, transformers\n"
        "before = set(sys.modules)\n"
        "from vtprune import prune\n"
        "print(*sorted(set(sys.modules) - before - set(sys.stdlib_module_names)))"
    )
    modules = python(code, tmp_path)
    assert "vtprune.session" in modules
    packages = {module.partition(".")[0] for module in modules}
    assert packages - sys.stdlib_module_names <= {
        "vtprune",
        "transformers",
        "einops",
        "annotated_types",
        "huggingface_hub",
    }
    assert not [module for module in modules if module.startswith(("vtprune.eval", "transformers.models."))]


CLIENT = """
import torch
import vtprune
from vtprune.adapters import list_adapters


def ask(model: torch.nn.Module, method: str) -> float:
    with vtprune.prune(model, method, keep_ratio=0.25) as session:
        model(torch.zeros(1, 1))
        report = session.report
    assert report is not None
    kept: torch.Tensor = report.kept(0)
    written: dict[str, object] = report.to_dict()
    print(report, kept.tolist(), written)
    return report.keep_ratio


def stay(model: torch.nn.Module) -> vtprune.Session:
    return vtprune.patch(model, vtprune.TransPrune(layers=(7, 9), schedule=(0.5, 0.25)))


class Mine(vtprune.BeforeLLM, vtprune.Scorer):
    name = "mine"
    signal = "feature length"

    def scores(self, tokens: vtprune.VisualTokens) -> torch.Tensor:
        return tokens.features.abs().sum(-1)


@vtprune.register_adapter
class MyAdapter(vtprune.Adapter):
    model_types = ("mine",)
    family = "Mine"


vtprune.register_method(Mine)
names: list[str] = sorted(vtprune.list_methods()) + sorted(list_adapters())
method: vtprune.Method = vtprune.build_method({"name": "fastv", "layer": 2}, keep_ratio=0.5)
adapter: vtprune.Adapter = vtprune.adapter_for(torch.nn.Linear(1, 1))
"""
WRONG = "\nask(3, 'mmtok')\nvtprune.prun\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_mypy_strict_of_a_client(kind, request, tmp_path, tmp_path_factory):
    """In an environment of its own: mypy asks an interpreter where its packages are, and reads .pth files there."""
    site = request.getfixturevalue(f"{kind}_site")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    purelib = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    lines = [p.read_text() for p in site.glob("*.pth")] or [f"{site}\n"]
    # Of this environment only what follows: torch.
    with open(f"{purelib}/all.pth", "w") as file:
        file.write("".join(line.rstrip() + "\n" for line in lines) + sysconfig.get_path("purelib") + "\n")

    def mypy(code: str) -> str:
        (tmp_path / "client.py").write_text(code)
        cache = tmp_path_factory.getbasetemp() / "mypy_cache"  # torch is the same for all
        options = ["--strict", "--cache-dir", cache, "--python-executable", python]
        command = [sys.executable, "-m", "mypy", *options, "client.py"]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout

    assert mypy(CLIENT) == "Success: no issues found in 1 source file\n"
    assert re.findall(r"\[([a-z-]+)\]$", mypy(CLIENT + WRONG), flags=re.M) == ["arg-type", "attr-defined"]

# SPDX-License-Identifier: Apache-2.0
import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
from typing import ClassVar

import pytest

import vtprune
from vtprune import catalogue
from vtprune.errors import BudgetError, ConfigError
from vtprune.methods import build_methods
from vtprune.tokens import ModelShape

SHAPE = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)


@pytest.mark.parametrize("cls", vtprune.list_methods().values(), ids=vtprune.list_methods().keys())
def test_every_method_is_frozen_documented_and_has_defaults(cls):
    method = cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.positions = "compact"
    documented = "".join(base.__doc__ or "" for base in cls.__mro__)
    for field in dataclasses.fields(cls):
        assert f"{field.name}:" in documented, f"{field.name} is not documented"
    assert cls.signal and set(cls.stage.split(", ")) <= {"encoder", "before_llm", "in_llm", "decode"}
    assert cls.paper == "-" or cls.paper.removeprefix("arXiv ") in cls.__doc__


@pytest.mark.parametrize("bad", [0, -0.1, 1.01, float("nan"), "half"])
@pytest.mark.parametrize("name", vtprune.list_methods())
def test_bad_ratios_are_refused_on_construction(name, bad):
    with pytest.raises(BudgetError, match="keep_ratio"):
        vtprune.build_method(name, keep_ratio=bad)


def test_bad_counts_and_double_budgets_are_refused():
    with pytest.raises(BudgetError, match="keep_tokens"):
        vtprune.MMTok(keep_tokens=-1)
    with pytest.raises(BudgetError, match="not both"):
        vtprune.MMTok(keep_tokens=1, keep_ratio=0.5)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mmtok", {"alpha": -1}),
        ("mmtok", {"tau_text": 0}),
        ("fastv", {"layer": 0}),
        ("fastv", {"share": 1.5}),
        ("transprune", {"score": "neither"}),
        ("transprune", {"schedule": (0.5, 0.6, 0.1)}),
        ("transprune", {"layers": (1, 2)}),
        ("random", {"seed": -1}),
        ("uniform", {"positions": "somewhere"}),
    ],
)
def test_bad_parameters_are_refused(name, parameters):
    with pytest.raises(ConfigError, match=f"{name}: ?.*{next(iter(parameters))[:5]}|schedule"):
        vtprune.build_method({"name": name, **parameters})


def test_names_mappings_objects_lists_and_files_name_methods(tmp_path):
    assert vtprune.build_method("fastv", keep_ratio=0.5) == vtprune.FastV(keep_ratio=0.5)
    assert vtprune.build_method({"name": "fastv", "layer": 2, "keep_ratio": 0.5}).layer == 2
    assert build_methods(vtprune.FastV(layer=3), keep_ratio=0.5) == [vtprune.FastV(layer=3, keep_ratio=0.5)]
    listed = build_methods(["transprune", {"name": "mmtok", "keep_tokens": 64}])
    assert [m.name for m in listed] == ["mmtok", "transprune"]  # in the order of the path
    file = tmp_path / "method.yaml"
    file.write_text("name: mmtok\nkeep_tokens: 64\n")
    assert build_methods(str(file)) == [vtprune.MMTok(keep_tokens=64)]


def test_unknown_names_and_parameters_name_the_nearest():
    with pytest.raises(ConfigError, match="unknown method 'mmtoc'.*mmtok"):
        vtprune.build_method("mmtoc")
    with pytest.raises(ConfigError, match="unknown parameter 'keepratio'.*keep_ratio"):
        vtprune.build_method("mmtok", keepratio=0.5)
    with pytest.raises(ConfigError, match="own budget"):
        build_methods(["mmtok", "fastv"], keep_ratio=0.5)


def test_a_taken_name_is_refused():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Impostor(vtprune.Uniform):
        name = "mmtok"

    with pytest.raises(ConfigError, match="registered already"):
        vtprune.register_method(Impostor)


def test_a_class_that_lacks_what_every_method_has_is_refused_by_name():
    class Nameless(vtprune.BeforeLLM):
        signal = "-"

    class Undecorated(vtprune.BeforeLLM):
        name: ClassVar[str] = "undecorated"
        signal: ClassVar[str] = "-"
        order: int = 2

    class Dark(vtprune.BeforeLLM):
        name = "dark"

    for cls, words in (
        (Nameless, "Nameless has no `name`"),
        (Dark, "Dark has no `signal`"),
        (Undecorated, "Undecorated is not a dataclass, so order would not be its parameters"),
    ):
        with pytest.raises(ConfigError, match=words):
            vtprune.register_method(cls)
    assert "undecorated" not in vtprune.list_methods()


def test_what_is_listed_is_exported():
    own = {cls.__name__: cls for cls in vtprune.list_methods().values() if cls.__module__.startswith("vtprune.methods")}
    assert all(getattr(vtprune, name) is getattr(vtprune.methods, name) is cls for name, cls in own.items())
    assert set(own) <= set(vtprune.__all__) and set(vtprune.__all__) <= set(dir(vtprune))
    assert all(hasattr(vtprune, name) for name in vtprune.__all__) and len(set(vtprune.__all__)) == len(vtprune.__all__)


def test_type_checkers_see_every_method_of_the_catalogue():
    tree = ast.parse(inspect.getsource(catalogue))
    seen = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "importlib"]
    imports = {node.module: node.names[0].name for node in seen if any(name.asname for name in node.names)}
    assert imports == {f"vtprune.methods.{name}": cls for name, cls in catalogue.CLASSES.items()}
    assert all(catalogue.load(name).name == name for name in catalogue.CLASSES)
    with pytest.raises(AttributeError, match="module 'vtprune' has no attribute 'DivPrun'"):
        vtprune.DivPrun  # noqa: B018


def test_type_checkers_see_what_is_exported():
    """What `vtprune/__init__.py` imports for type checkers is what it hands out, and whence."""
    tree = ast.parse(inspect.getsource(vtprune))
    seen = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.startswith("vtprune.")]
    imports = {alias.name: node.module for node in seen for alias in node.names if alias.asname is None}
    del imports["*"]
    assert imports.keys() == set(vtprune.__all__) - set(catalogue.CLASSES.values())
    for name, module in imports.items():
        assert getattr(vtprune, name) is getattr(importlib.import_module(module), name)
        assert vtprune._MODULES[name] == module.removeprefix("vtprune.")


def test_modules_need_no_import_of_their_own():
    code = (
        "import vtprune\n"
        "print(vtprune.signals.EncoderFeatures.__module__, vtprune.ops.__name__, hasattr(vtprune, 'nowhere'))\n"
        "print({'signals', 'DivPrune', 'prune', '__version__'} <= set(dir(vtprune)), 'import_module' in dir(vtprune))\n"
        "from vtprune import *\n"
        "print(Report.__name__, DivPrune.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:3] == [
        "vtprune.signals.encoder vtprune.ops False",
        "True False",
        "Report DivPrune",
    ]


def test_a_method_is_imported_when_it_is_asked_for():
    """`vtprune.prune` loads no method, so its time does not grow with their number."""
    code = (
        "import sys, vtprune\n"
        "def loaded(): return {name for name in sys.modules if name.startswith('vtprune.methods.')}\n"
        "vtprune.prune\n"
        "first = loaded()\n"
        "print(*sorted(first))\n"
        "print(*{'pydantic', 'rich', 'typer', 'vtprune.config', 'vtprune.eval'} & set(sys.modules))\n"
        "vtprune.build_method('divprune')\n"
        "vtprune.FastV\n"
        "print(*sorted(loaded() - first))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, heavy, asked = result.stdout.split("\n")[:3]
    shared = ("base", "in_layers", "schedules")
    assert first.split() == [f"vtprune.methods.{name}" for name in shared]
    assert asked.split() == ["vtprune.methods.divprune", "vtprune.methods.fastv"]
    assert heavy == ""


def test_a_missing_budget_is_an_error_where_nothing_is_published():
    for name, cls in vtprune.list_methods().items():
        if cls.needs_budget:
            with pytest.raises(BudgetError, match=f"{name} needs a budget"):
                cls().check_budget(SHAPE)
        else:
            cls().check_budget(SHAPE)


def test_layers_are_checked_against_the_model():
    with pytest.raises(ConfigError, match="1..31"):
        vtprune.FastV(layer=32).cuts(SHAPE)
    assert vtprune.TransPrune().cuts(SHAPE) == (7, 9, 12)
    assert vtprune.TransPrune().measured(SHAPE) == (6, 7, 8, 9, 10, 11)
    assert vtprune.VTCCls().layers(SHAPE) == (16, 17, 18, 19, 20, 21, 22)
    assert vtprune.VTCCls(start_layer=-2).layers(SHAPE) == (22,)

# SPDX-License-Identifier: Apache-2.0
"""What an evaluation file may say, and how it is told that it is wrong."""

import pytest
import yaml

import vtprune
import vtprune.eval
from vtprune.errors import ConfigError
from vtprune.eval.config import load_config, parse_changes
from vtprune.eval.running.cells import Cell, Identity, expand
from vtprune.eval.tasks import open_task

VALID = {"model": "digitscenes", "keep_ratios": [0.5, 0.25], "methods": ["uniform"]}


def write(tmp_path, **changes):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**VALID, **changes}, sort_keys=False))
    return path


def test_the_grid_has_one_cell_a_method_budget_and_seed(tmp_path):
    rows = [{"name": "random", "seeds": [3, 4]}, {"name": "fastv", "layer": 1, "keep_ratios": [0.3]}, "mmtok"]
    config = load_config(write(tmp_path, baselines=["downsample", "full"], methods=rows))
    assert expand(config) == [
        Cell("full", 1.0),
        Cell("downsample", 0.5),
        Cell("downsample", 0.25),
        *(Cell("random", ratio, {}, seed) for ratio in (0.5, 0.25) for seed in (3, 4)),
        Cell("fastv", 0.3, {"layer": 1}),
        Cell("mmtok", 0.5),
        Cell("mmtok", 0.25),
    ]
    assert expand(config)[7].label == "fastv(layer=1)"


def test_a_grid_of_parameters_counts_of_tokens_and_the_methods_own_schedule(tmp_path):
    rows = [
        {"name": "fastv", "positions": "compact", "grid": {"layer": [1, 2], "share": [0.5, 0.1]}, "keep_ratios": [0.4]},
        {"name": "random", "grid": {"scope": ["crop", "image"]}, "seeds": [0, 1], "keep_tokens": [8, 4]},
        {"name": "transprune", "grid": {"schedule": [[0.9, 0.5, 0.1], [0.5, 0.4, 0.3]]}, "keep_ratios": []},
    ]
    cells = expand(load_config(write(tmp_path, baselines=["full"], methods=rows)))[1:]
    given = [{"positions": "compact", "layer": layer, "share": share} for layer in (1, 2) for share in (0.5, 0.1)]
    assert cells[:4] == [Cell("fastv", 0.4, own) for own in given]
    assert cells[4:12] == [
        Cell("random", None, {"scope": scope}, seed, keep_tokens=count)
        for scope in ("crop", "image")
        for count in (8, 4)
        for seed in (0, 1)
    ]
    assert [cell.title for cell in cells[11:]] == [
        "random(scope=image, keep_tokens=4) seed1",
        "transprune(schedule=[0.9,0.5,0.1], own schedule)",
        "transprune(schedule=[0.5,0.4,0.3], own schedule)",
    ]
    assert vtprune.build_method(cells[4].spec) == vtprune.build_method("random", scope="crop", keep_tokens=8, seed=0)
    assert vtprune.build_method(cells[13].spec).schedule == (0.5, 0.4, 0.3)


def test_a_grid_of_budgets_and_seeds_is_the_row_that_lists_them(tmp_path):
    def cells(row):
        return expand(load_config(write(tmp_path, methods=[{"name": "random", **row}])))

    grid = {"scope": ["crop", "image"], "seed": [0, 1]}
    listed = {"grid": {"scope": ["crop", "image"]}, "seeds": [0, 1]}
    assert cells({"grid": grid | {"keep_ratio": [0.3, 0.2]}}) == cells(listed | {"keep_ratios": [0.3, 0.2]})
    assert cells({"grid": grid | {"keep_tokens": [8, 4]}}) == cells(listed | {"keep_tokens": [8, 4]})
    assert len(cells({"grid": grid | {"keep_tokens": [8, 4]}})) - len(cells({"seeds": [0]})) == 8 - 2


def test_a_list_is_a_row_of_several_methods(tmp_path):
    rows = [["divprune", "transprune"], [{"name": "divprune", "keep_ratio": 0.5}, {"name": "fastv", "keep_ratio": 0.4}]]
    rows[0][0] = {"name": "divprune", "keep_tokens": 64}
    config = load_config(write(tmp_path, baselines=["full"], methods=rows))
    scheduled, ratios = expand(config)[1:]
    assert scheduled.spec == [{"name": "divprune", "keep_tokens": 64}, {"name": "transprune"}]
    assert (scheduled.keep_ratio, ratios.keep_ratio) == (None, 0.2)
    assert scheduled.title == "divprune(keep_tokens=64) + transprune"
    assert ratios.title == "divprune(keep_ratio=0.5) + fastv(keep_ratio=0.4)"
    assert ratios.methods == ("divprune", "fastv") and ratios.params["parts"][1]["keep_ratio"] == 0.4
    changed = load_config(write(tmp_path, methods=rows), {"methods.1.1.keep_ratio": 0.3})
    assert expand(changed)[-1].spec[1]["keep_ratio"] == 0.3


def test_the_same_cell_twice(tmp_path):
    with pytest.raises(ConfigError, match="the configuration has uniform 0.5 twice"):
        expand(load_config(write(tmp_path, methods=["uniform", "uniform"])))


def test_values_set_on_the_command_line(tmp_path):
    path = write(tmp_path, methods=["fastv", {"name": "random", "seeds": [0, 1]}])
    changes = parse_changes(["limit=5", "methods.0.layer=3", "methods.1.seeds=[7]", "methods.0.grid.share=[0.5, 0.2]"])
    config = load_config(path, changes, limit=6)
    assert config.limit == 6
    assert [(entry.name, entry.params, entry.grid, entry.seeds) for entry in config.methods] == [
        ("fastv", {"layer": 3}, {"share": (0.5, 0.2)}, ()),
        ("random", {}, {}, (7,)),
    ]
    assert load_config(path, {"limit": 5}).limit == 5
    assert load_config(path, {"methods": ["mmtok"]}).methods[0].name == "mmtok"


@pytest.mark.parametrize(
    ("assignment", "part"),
    [
        ("limit", "--set limit: expected KEY=VALUE"),
        ("limit=[1", "--set limit=[1: the value is not valid YAML"),
        ("limt=3", "key 'limt': unknown key; did you mean limit?"),
        ("limit=0", "line 1: key 'limit': expected greater than or equal to 1, got 0"),
        ("methods.3.layer=1", "key 'methods': --set methods.3.layer: there is no 3 in methods (a list of 1)"),
        ("methods.0.layr=1", "key 'methods.0.layr': unknown key; did you mean layer"),
        ("model.path=x", "key 'model': --set model.path: there is no 'path' in model"),
    ],
)
def test_what_is_wrong_with_a_value_set_on_the_command_line(tmp_path, assignment, part):
    path = write(tmp_path, methods=["fastv"])
    with pytest.raises(ConfigError) as caught:
        load_config(path, parse_changes([assignment]))
    assert part in str(caught.value)


def test_the_quickstart_compares_methods_and_baselines():
    config = load_config("quickstart")
    cells = expand(config)
    one_row = {"vtc_cls", "divprune", "mmtok", "fastv", "transprune", "tome", "uniform", "pool"}
    assert {cell.method for cell in cells} == one_row | {"random", "full", "zero", "downsample", "tome + transprune"}
    budgets, seeds, composed = 4, 3, 2
    assert len(cells) == len(set(map(str, cells))) == 2 + budgets * (1 + seeds + len(one_row)) + composed
    assert str(config.output) == "results/quickstart"


def test_defaults_and_overrides(tmp_path):
    config = load_config(write(tmp_path), limit=7, output=tmp_path / "there")
    assert (config.limit, config.output) == (7, tmp_path / "there")
    assert str(load_config(write(tmp_path)).output) == "results/grid"
    assert config.baselines == ("full", "zero", "downsample")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"batch": 3}, "line 7: key 'batch': unknown key; did you mean batch_size?"),
        ({"keep_ratios": [0.5, 1.5]}, "key 'keep_ratios.1': expected less than 1, got 1.5"),
        ({"keep_ratios": []}, "key 'keep_ratios'"),
        ({"dtype": "float8"}, "key 'dtype': expected 'float32', 'bfloat16' or 'float16', got 'float8'"),
        ({"batch_size": 0}, "key 'batch_size': expected greater than or equal to 1, got 0"),
        (
            {"task": "digitscene"},
            "key 'task': expected the name of a task (did you mean digitscenes or digitscenes_video or",
        ),
        ({"model": "./nowhere"}, "key 'model': expected a folder that exists, got './nowhere'"),
        ({"baselines": ["zero"]}, "key 'baselines': expected 'full' among them"),
        ({"methods": ["mmtokk"]}, "key 'methods.0.name': unknown method 'mmtokk'; did you mean mmtok?"),
        ({"methods": ["uniform", "zero"]}, "key 'methods.1.name': zero is a baseline, list it under 'baselines'"),
        ({"methods": [{"name": "fastv", "layr": 2}]}, "key 'methods.0.layr': unknown key; did you mean layer?"),
        ({"methods": [{"name": "fastv", "layer": "two"}]}, "key 'methods.0': fastv: layer='two'"),
        ({"methods": [{"name": "fastv", "keep_ratio": 0.5}]}, "key 'methods.0.keep_ratio': not as a single value"),
        ({"model": ["digitscenes", "digitscenes"]}, "key 'model': expected each name once"),
        (
            {"methods": [{"name": "fastv", "grid": {"layr": [2]}}]},
            "key 'methods.0.layr': unknown key; did you mean layer",
        ),
        ({"methods": [{"name": "fastv", "layer": 1, "grid": {"layer": [2]}}]}, "key 'methods.0.layer': given twice"),
        ({"methods": [{"name": "fastv", "grid": {"layer": [2, "x"]}}]}, "key 'methods.0': fastv: layer='x'"),
        ({"methods": [{"name": "fastv", "grid": {"layer": []}}]}, "key 'methods.0.grid': expected different value"),
        (
            {"methods": [{"name": "fastv", "grid": {"layer": [2, 2]}}]},
            "key 'methods.0.grid': expected different values",
        ),
        (
            {"methods": [{"name": "random", "seeds": [1], "grid": {"seed": [2]}}]},
            "key 'methods.0.grid': seed is given twice, here and as 'seeds'",
        ),
        ({"methods": [{"name": "fastv", "grid": {"seed": [2]}}]}, "key 'methods.0.seeds': fastv has no randomness"),
        ({"methods": [{"name": "fastv", "grid": {"keep_ratio": [2]}}]}, "key 'methods.0': expected less than 1, got 2"),
        ({"methods": [{"name": "mmtok", "keep_ratios": []}]}, "key 'methods.0.keep_ratios': mmtok has no schedule"),
        (
            {"methods": [{"name": "mmtok", "keep_ratios": [0.5], "keep_tokens": [3]}]},
            "key 'methods.0.keep_tokens': give 'keep_ratios' or 'keep_tokens', not both",
        ),
        (
            {"methods": [{"preset": "fastv/llava-1.5-7b/19"}]},
            "key 'methods.0.preset': unknown preset 'fastv/llava-1.5-7b/19'; did you mean fastv/llava-1.5-7b/192",
        ),
        ({"methods": [{"preset": "mmtok/llava-1.5-7b/64", "layer": 1}]}, "key 'methods.0.layer': does not go with"),
        ({"methods": [{"name": "mmtok", "seeds": [1]}]}, "key 'methods.0.seeds': mmtok has no randomness to seed"),
        ({"methods": [{"name": "random", "seeds": [1, 1]}]}, "key 'methods.0.seeds': a seed is given twice"),
        ({"methods": [{"name": "random", "seed": 1, "seeds": [1]}]}, "give 'seed' or 'seeds', not both"),
        ({"methods": [{"seeds": [1]}]}, "key 'methods.0.name': missing"),
        ({"methods": [["uniform"]]}, "key 'methods.0': expected at least two methods in a list"),
        ({"methods": [["fastv", {"name": "mmtokk"}]]}, "key 'methods.0': unknown method 'mmtokk': did you mean mmtok"),
        ({"methods": [[{"name": "mmtok", "keep_ratio": 2}, "fastv"]]}, "key 'methods.0': mmtok: keep_ratio=2"),
        ({"methods": [[{"name": "fastv", "layr": 1}, "mmtok"]]}, "key 'methods.0': fastv: unknown parameter 'layr'"),
        ({"methods": [[3, "fastv"]]}, "key 'methods.0.0': expected dictionary, got 3"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(tmp_path, changes, part):
    path = write(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))
    assert part in str(caught.value)


def test_a_file_that_is_no_mapping(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- digitscenes\n")
    with pytest.raises(ConfigError, match="expected a mapping with model, task"):
        load_config(path)


def test_a_cells_key_changes_with_whatever_its_numbers_depend_on(tmp_path):
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "weights"
    weights.write_bytes(b"1")

    def key(cell, **changes):
        config = load_config(write(tmp_path, **changes))
        return Identity.of(config, open_task("digitscenes"), [], str(tmp_path / "model")).key(cell)

    cell = Cell("random", 0.5, {}, 0)
    first = key(cell)
    assert first == key(cell) == key(cell, output="elsewhere", methods=["mmtok"], keep_ratios=[0.5])
    others = [
        key(cell, limit=5),
        key(cell, batch_size=3),
        key(cell, dtype="bfloat16"),
        key(Cell("random", 0.5, {}, 1)),
        key(Cell("random", 0.25, {}, 0)),
        key(Cell("random", None, {}, 0, keep_tokens=3)),
        key(Cell("random", 0.5, {"positions": "original"}, 0)),
        key(Cell("uniform", 0.5)),
    ]
    weights.write_bytes(b"2")
    assert len({first, key(cell), *others}) == len(others) + 2

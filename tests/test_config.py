# SPDX-License-Identifier: Apache-2.0
import pytest
from pydantic import Field

from vtprune.config import ConfigModel, YamlFile, load_method_file, validate
from vtprune.errors import ConfigError


class Inner(ConfigModel):
    layer: int = Field(default=2, ge=1)


class Outer(ConfigModel):
    ratio: float = Field(gt=0, le=1)
    rows: tuple[Inner | int, ...] = ()


def write(tmp_path, text):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    return path


def complaint(call, *args):
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return str(caught.value)


def check(tmp_path, text):
    return validate(Outer, YamlFile(write(tmp_path, text)))


def test_valid_file(tmp_path):
    assert check(tmp_path, "ratio: 0.5\nrows:\n  - layer: 3\n  - 4\n") == Outer(ratio=0.5, rows=(Inner(layer=3), 4))


def test_value_out_of_range_names_file_line_key_and_what_was_expected(tmp_path):
    message = complaint(check, tmp_path, "rows: []\n\nratio: 1.5\n")
    path = tmp_path / "file.yaml"
    assert message == f"{path}, line 3: key 'ratio': expected less than or equal to 1, got 1.5"


def test_unknown_key_names_the_nearest_one(tmp_path):
    message = complaint(check, tmp_path, "ratio: 0.5\nrow: []\n")
    assert "line 2: key 'row': unknown key; did you mean rows?" in message


def test_nested_key(tmp_path):
    message = complaint(check, tmp_path, "ratio: 0.5\nrows:\n  - layer: 1\n  - layer: 0\n")
    assert "line 4: key 'rows.1.layer': expected greater than or equal to 1, got 0" in message


def test_missing_key(tmp_path):
    assert "key 'ratio': missing" in complaint(check, tmp_path, "rows: []\n")


def test_every_problem_is_reported(tmp_path):
    lines = complaint(check, tmp_path, "ratio: x\nrows: 3\n").splitlines()
    assert ["key 'ratio'" in lines[0], "key 'rows'" in lines[1]] == [True, True]


def test_key_given_twice(tmp_path):
    assert "line 2: not valid YAML: key 'ratio' is given twice" in complaint(check, tmp_path, "ratio: 1\nratio: 2\n")


def test_not_yaml(tmp_path):
    assert "line 2: not valid YAML: expected" in complaint(check, tmp_path, "ratio: [1\n")


def test_unreadable_file(tmp_path):
    assert "none.yaml: cannot be read: No such file" in complaint(YamlFile, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: mmtok\nkeep_ratio: 0.25\n", {"name": "mmtok", "keep_ratio": 0.25}),
        (
            "- name: divprune\n  keep_ratio: 0.5\n- transprune\n",
            [{"name": "divprune", "keep_ratio": 0.5}, "transprune"],
        ),
    ],
)
def test_method_file(tmp_path, text, expected):
    assert load_method_file(write(tmp_path, text)) == expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("mmtok\n", "expected a mapping with 'name', got 'mmtok'"),
        ("[]\n", "got an empty list"),
        ("", "expected a mapping with 'name', got None"),
        ("- divprune\n- keep_ratio: 0.5\n", "line 2: key '1.name': expected a method's name, got None"),
    ],
)
def test_not_a_method_file(tmp_path, text, part):
    assert part in complaint(load_method_file, write(tmp_path, text))

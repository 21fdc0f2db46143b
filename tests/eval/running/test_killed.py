# SPDX-License-Identifier: Apache-2.0
"""A grid of sixty cells that is killed three times on the way."""

import sys

import pytest
import tiny_eval
import yaml

CELLS = 60
EXAMPLES = 4
GRID = {
    "task": "tiny",
    "limit": EXAMPLES,
    "batch_size": 2,
    "keep_ratios": [0.6, 0.5, 0.4],
    "methods": [
        {"name": "random", "seeds": [0, 1, 2, 3, 4]},
        {"name": "fastv", "grid": {"layer": [1, 2, 3], "positions": ["original", "compact"]}},
        {"name": "mmtok", "grid": {"alpha": [0, 0.5, 1]}},
        "uniform",
        "pool",
        "divprune",
        "vtc_cls",
        {"name": "transprune", "keep_ratios": []},
    ],
}


@pytest.mark.slow
def test_every_cell_and_every_sample_is_there_once(tmp_path):
    config = tmp_path / "grid.yaml"
    config.write_text(yaml.safe_dump({"model": str(tiny_eval.save_model(tmp_path / "model")), **GRID}))
    output = tmp_path / "output"
    command = [sys.executable, tiny_eval.__file__, "eval", str(config), "--output", str(output)]
    tiny_eval.run_killed_three_times(command, output, CELLS, EXAMPLES)

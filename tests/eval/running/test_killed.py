# SPDX-License-Identifier: Apache-2.0
"""A grid of sixty cells that is killed three times on the way."""

import random
import signal
import subprocess
import sys
import time

import pytest
import tiny_eval
import yaml

from vtprune.eval.results.records import cell_records, read_results

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
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    moments = sorted(random.Random().sample(range(1, int(0.9 * CELLS * EXAMPLES)), 3))
    for wanted in moments:
        process = subprocess.Popen(command, **streams)
        while tiny_eval.examples_on_disk(output) < wanted and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (moments, process.stderr.read().decode())
    done = subprocess.run(command, **streams)
    assert done.returncode == 0, (moments, done.stderr.decode())

    lines = read_results(output / "results.jsonl")
    assert len({line["cell"] for line in lines}) == len(lines) == CELLS
    assert {(line["status"], line["n"]) for line in lines} == {("ok", EXAMPLES)}
    assert len(list((output / "cells").iterdir())) == CELLS
    for line in lines:
        assert [record["index"] for record in cell_records(output, line["cell"])] == list(range(EXAMPLES)), moments

# SPDX-License-Identifier: Apache-2.0
"""`--shard 3/8`: commands that know nothing of one another share a run by the files in its folder."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
import tiny_eval

from vtprune.errors import ConfigError
from vtprune.eval.config import load_config
from vtprune.eval.running.processes import Processes
from vtprune.eval.running.runner import run
from vtprune.eval.running.shards import Shard, claim
from vtprune.eval.running.unfinished import unfinished

CONFIG = {
    "task": "tiny",
    "batch_size": 3,
    "keep_ratios": [0.5, 0.1],
    "methods": [{"name": "random", "seeds": [0, 1]}, "fastv", "uniform"],
}
CELLS = 12
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(config_file, output, shard):
    command = [sys.executable, tiny_eval.__file__, "eval", str(config_file), "--output", str(output), "--shard", shard]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def done(output):
    """(cell, first example of a batch) of all times that were noted."""
    lines = [line for path in output.glob("timings*.jsonl") for line in path.read_text().splitlines()]
    return [(line["cell"], line["first"]) for line in map(json.loads, lines)]


def test_shards_one_after_the_other_do_every_batch_once_and_the_last_one_finishes_the_cells(
    config_file, alone, tmp_path
):
    config = load_config(config_file, output=tmp_path)
    for index in (2, 3, 1):
        assert run(config, shard=Shard(index, 3)) == []
        finished = list((tmp_path / "cells").glob("*.gz"))
        # Only the cell that cannot run is finished early.
        assert len(finished) == (CELLS if index == 1 else 1)
    assert not list((tmp_path / "cells").glob("*.batches"))
    assert sorted(done(tmp_path)) == sorted(done(alone)) and len(set(done(tmp_path))) == len(done(tmp_path))
    assert not (tmp_path / "results.jsonl").exists()

    run(config)
    assert tiny_eval.files(tmp_path) == tiny_eval.files(alone)
    assert sorted(done(tmp_path)) == sorted(done(alone))  # nothing ran again, and all times are in one file
    assert [path.name for path in tmp_path.glob("timings*")] == ["timings.jsonl"]


def test_shards_side_by_side_of_which_one_is_killed(config_file, alone, tmp_path):
    shards = [start(config_file, tmp_path, f"{index}/3") for index in (1, 2, 3)]
    while not list((tmp_path / "cells").glob("*.2of3.batches")) and shards[1].poll() is None:
        time.sleep(0.005)
    shards[1].send_signal(signal.SIGKILL)
    for shard in (shards[0], shards[2]):
        _, errors = shard.communicate(timeout=600)
        assert shard.returncode == 0, errors
    assert shards[1].wait() == -signal.SIGKILL, shards[1].stderr.read()
    left = list((tmp_path / "cells").glob("*.2of3.batches"))
    before = tiny_eval.examples_on_disk(tmp_path)
    if left:
        with left[-1].open("ab") as file:  # and a batch torn by the kill
            file.write(gzip.compress(b'{"index": 4, "question": "wh')[:-9])

    again = start(config_file, tmp_path, "2/3")
    _, errors = again.communicate(timeout=600)
    assert again.returncode == 0, errors
    assert f"shard 2/3 is done; {CELLS} of {CELLS} cells are finished" in errors
    assert tiny_eval.examples_on_disk(tmp_path) > before
    repeated = len(done(tmp_path)) - len(set(done(tmp_path)))
    assert repeated <= 1  # what the killed one was at

    run(load_config(config_file, output=tmp_path))
    assert tiny_eval.files(tmp_path) == tiny_eval.files(alone)
    assert not list(tmp_path.rglob("*.part"))


def test_a_run_without_shards_takes_over_what_a_dead_shard_left(config_file, alone, tmp_path):
    config = load_config(config_file, output=tmp_path)
    run(config, shard=Shard(2, 4))
    some = done(tmp_path)
    (progress,) = unfinished(tmp_path)  # so a report can show how far the shards are
    examples = [min(CONFIG["batch_size"], tiny_eval.EXAMPLES - first) for _, first in some]
    cannot_run = tiny_eval.EXAMPLES
    assert sum(progress.done.values()) == sum(examples) + cannot_run
    (tmp_path / "cells" / ".any.0123.part").write_bytes(b"half")  # as if it had been killed while it wrote
    run(config)
    assert tiny_eval.files(tmp_path) == tiny_eval.files(alone)
    assert len(done(tmp_path)) == len(set(done(tmp_path))) == len(done(alone)) > len(some) > 0


def test_other_numbers_of_shards_go_on_from_what_is_there(config_file, alone, tmp_path):
    config = load_config(config_file, output=tmp_path)
    for shard in (Shard(1, 3), Shard(1, 2), Shard(2, 2)):
        run(config, shard=shard)
    assert len(done(tmp_path)) == len(set(done(tmp_path))) == len(done(alone))
    run(config)
    assert tiny_eval.files(tmp_path) == tiny_eval.files(alone)


def test_who_may_use_a_folder_at_the_same_time(tmp_path):
    with ExitStack() as stack:
        claim(tmp_path, Shard(1, 3), stack)
        claim(tmp_path, Shard(2, 3), stack)
        with pytest.raises(ConfigError, match="shard 2/3 is running in this folder already"):
            claim(tmp_path, Shard(2, 3), stack)
        with pytest.raises(ConfigError, match="shard 1/3 is running in this folder"):
            claim(tmp_path, None, stack)
    with ExitStack() as stack:
        claim(tmp_path, None, stack)
        with pytest.raises(ConfigError, match="another evaluation is running in this folder"):
            claim(tmp_path, None, stack)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match="another evaluation is running"):
            patch.setattr("vtprune.eval.running.shards._PATIENCE", 0.0)
            claim(tmp_path, Shard(1, 3), stack)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("text", ["3", "0/3", "4/3", "a/b", "1/", "-1/3"])
def test_a_shard_that_there_cannot_be(text):
    with pytest.raises(ConfigError, match=f"--shard {text}: expected INDEX/COUNT"):
        Shard.parse(text)


def test_every_batch_belongs_to_one_shard():
    shards = [Shard.parse(f"{index}/3") for index in (1, 2, 3)]
    taken = [[number for number in range(8) if shard.takes(number)] for shard in shards]
    assert taken == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_a_shard_is_one_process(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, "start", lambda config: Processes(0, 2, "cpu"))
    with pytest.raises(ConfigError, match="--shard 1/2: 2 processes share a run already; start one"):
        run(load_config(config_file, output=tmp_path), shard=Shard(1, 2))

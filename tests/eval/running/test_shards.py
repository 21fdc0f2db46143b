# SPDX-License-Identifier: Apache-2.0
"""Several processes on one grid: the same files as of one process, and what happens when one of them dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_eval

from vtprune.errors import ConfigError
from vtprune.eval.config import load_config
from vtprune.eval.running.processes import Processes
from vtprune.eval.running.runner import run

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CONFIG = {
    "task": "tiny",
    "batch_size": 3,
    "keep_ratios": [0.5, 0.1],
    "methods": [{"name": "random", "seeds": [0, 1]}, "fastv"],
}


def launch(config_file, output, processes=2):
    """Starts `torchrun`, in a process group of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*torchrun, tiny_eval.__file__, "eval", str(config_file), "--output", str(output)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **streams)


def launch_nodes(config_file, output, nodes=2):
    """Starts `torchrun` once for each of several machines, which are all this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ["--nnodes", str(nodes), "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    command = [tiny_eval.__file__, "eval", str(config_file), "--output", str(output)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    torchrun = [sys.executable, "-m", "torch.distributed.run", *common]
    return [
        subprocess.Popen([*torchrun, "--node_rank", str(node), *command], env=ENVIRONMENT, **streams)
        for node in range(nodes)
    ]


def rank(launcher, wanted):
    """Process id of a rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # somebody else's, or gone
        if parent == launcher.pid and f"RANK={wanted}".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"rank {wanted} does not run")


def test_two_processes_leave_the_files_of_one(config_file, alone, tmp_path):
    process = launch(config_file, tmp_path)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert output.count("downsample") == 1  # one table, not one a process
    assert tiny_eval.files(tmp_path) == tiny_eval.files(alone)


@pytest.mark.slow
def test_two_machines_leave_the_files_of_one(config_file, alone, tmp_path):
    nodes = launch_nodes(config_file, tmp_path)
    outputs = [node.communicate(timeout=600) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum(output.count("downsample") for output, _ in outputs) == 1
    assert tiny_eval.files(tmp_path) == tiny_eval.files(alone)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
def test_a_rank_that_dies_fails_the_run_and_loses_nothing(config_file, alone, tmp_path):
    process = launch(config_file, tmp_path)
    while tiny_eval.examples_on_disk(tmp_path) < 20 and process.poll() is None:
        time.sleep(0.01)
    os.kill(rank(process, 1), signal.SIGKILL)
    killed = tiny_eval.examples_on_disk(tmp_path)
    _, errors = process.communicate(timeout=600)
    assert process.returncode != 0, errors
    assert not (tmp_path / "results.jsonl").exists()
    assert tiny_eval.examples_on_disk(tmp_path) >= killed >= 20

    run(load_config(config_file, output=tmp_path))
    assert tiny_eval.files(tmp_path) == tiny_eval.files(alone)
    assert repeated(tmp_path) <= 2 * 3  # what the two processes were at


def repeated(output):
    """Examples that were run more than once."""
    lines = (output / "timings.jsonl").read_text().splitlines()
    return sum(json.loads(line)["examples"] for line in lines) - tiny_eval.examples_on_disk(output)


@pytest.mark.slow
def test_a_folder_that_is_taken_fails_all_processes(config_file, tmp_path):
    with tiny_eval.held(tmp_path / ".lock"):
        process = launch(config_file, tmp_path)
        _, errors = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "another evaluation is running in this folder" in errors


@pytest.mark.slow
def test_accelerates_launcher_that_starts_one_process_instead_of_two_is_found_out(config_file, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = [*launcher, tiny_eval.__file__, "eval", str(config_file), "--output", str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "asked for several processes and started one" in done.stderr and "torchrun" in done.stderr
    assert not list(tmp_path.iterdir())


def test_devices_of_several_processes(config_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    for device, problem in {
        "cuda:1": "device 'cuda:1' is not for 2 processes",
        ("cpu", "cuda"): "device 'cpu' and 'cuda' is not for 2 processes",
        "cuda": "1000 processes on this machine, which shows",
    }.items():
        with pytest.raises(ConfigError, match=problem):
            Processes.start(load_config(config_file, device=device))

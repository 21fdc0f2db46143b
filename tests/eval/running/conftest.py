# SPDX-License-Identifier: Apache-2.0
"""The grid of a module's `CONFIG` on the tiny model, and the folder of one run of it."""

import pytest
import tiny_eval
import yaml

from vtprune.eval.config import load_config
from vtprune.eval.running.runner import run


@pytest.fixture(scope="module")
def config_file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    model = str(tiny_eval.save_model(path.parent / "model"))
    path.write_text(yaml.safe_dump({"model": model, **request.module.CONFIG}))
    return path


@pytest.fixture(scope="module")
def alone(config_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    run(load_config(config_file, output=output))
    return output

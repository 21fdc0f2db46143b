# SPDX-License-Identifier: Apache-2.0
"""A race of few methods on the tiny model. As a script it is the `vtprune` command: `python tiny_tune.py tune ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_eval

from vtprune.eval.tasks import TASKS, Task
from vtprune.eval.tuning import candidates

FEW = ("random", "uniform", "divprune", "mmtok", "fastv")


def few_methods(set_attribute):
    """Lets only these methods race. set_attribute: `setattr`, or that of a monkeypatch."""
    known = candidates.list_methods()
    set_attribute(candidates, "list_methods", lambda: {name: known[name] for name in FEW})


if __name__ == "__main__":
    from vtprune.cli import app

    few_methods(setattr)
    TASKS["tiny"] = lambda: Task(tiny_eval.examples, tiny_eval.slow_score, max_new_tokens=3)
    app()

# SPDX-License-Identifier: Apache-2.0
"""Small finished runs for tests of what is made of them: a task that says nasty things, and records to be rewritten."""

import gzip
from dataclasses import replace

import tiny_eval

from vtprune.eval.config import EvalConfig
from vtprune.eval.results.records import cell_records, to_line
from vtprune.eval.running.runner import run
from vtprune.eval.tasks import TASKS, Task

QUESTION = '</style></svg><script>document.title = "owned"</script>'
ANSWER = '"><img src="http://example.org/x.png" onerror="document.title=1">'
FAMILY = "R&D <b>'quoted'"
REVERSED = "tfel\u202eright {{ 7 * 7 }}"
"""With a mark that turns the text behind it around, and an expression of the page's own template language."""
LONG = "w" * 3000


def nasty_examples(limit):
    first, second, third, *rest = tiny_eval.examples(None)
    first = replace(first, question=QUESTION, answer=ANSWER, family=FAMILY)
    second = replace(second, question=REVERSED)
    third = replace(third, question=LONG)
    return [first, second, third, *rest][:limit]


TASKS["nasty"] = lambda: Task(nasty_examples, tiny_eval.score, max_new_tokens=3)

METHODS = ({"name": "random", "seeds": (0, 1)}, {"name": "uniform"}, {"name": "fastv"})


def finish(model, output, task="nasty", limit=None, methods=METHODS, baselines=("full", "zero")):
    """The lines of a run of a few cells."""
    grid = {"keep_ratios": (0.5, 0.1), "baselines": baselines, "methods": methods}
    return run(EvalConfig(model=model, task=task, limit=limit, batch_size=5, output=output, **grid))


def rewrite(output, cell, change):
    """Records of a finished cell as `change` wants them, given (index, record)."""
    records = [record | change(record["index"], record) for record in cell_records(output, cell)]
    (path,) = (output / "cells").glob(f"{cell}.jsonl*")
    content = b"".join(map(to_line, records))
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)

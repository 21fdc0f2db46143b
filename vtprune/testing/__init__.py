# SPDX-License-Identifier: Apache-2.0
"""Checks of the library's promises, for tests, for `vtprune doctor`, and for what other packages add to it.

`check_method` and `check_adapter` run all of them and raise what broke; `check_task` does so for tasks of evaluations.
`promises` holds the checks, `families` a tiny random-weight model of every family and batches for it, `recompute` what
pruned generation has to compute.
"""

from vtprune.testing.adapter_kit import check_adapter
from vtprune.testing.cases import Case, PromiseBroken, Result
from vtprune.testing.families import Batch
from vtprune.testing.method_kit import check_method
from vtprune.testing.task_kit import check_task

__all__ = ["Batch", "Case", "PromiseBroken", "Result", "check_adapter", "check_method", "check_task"]

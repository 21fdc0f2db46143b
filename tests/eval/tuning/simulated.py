# SPDX-License-Identifier: Apache-2.0
"""Answers drawn from known curves in place of a model's, so that the best setting is known."""

import random
import zlib

from vtprune.eval.tuning.candidates import Candidate
from vtprune.eval.tuning.measuring import OutOfTime, Sample

TOKENS = 1000


def candidates(*names):
    return [Candidate(({"name": name},)) for name in names]


class Simulated:
    """The full model answers 90 %. A method loses an answer with probability 1 - its retention at the budget.

    An answer is lost at every budget under the one at which it is lost first, as if easy questions needed few tokens.
    """

    def __init__(self, curves, seed=0, batches=None):
        """curves: name -> function from a keep ratio to the true retention; batches: how many may be measured."""
        self.curves, self.seed, self.left = curves, seed, batches
        self.measured = {}

    def _example(self, index, name):
        """Whether the full model is right, and how likely retention must be for the method to be right, too."""
        full = random.Random(f"{self.seed} {index}").random() < 0.9
        return full, random.Random(zlib.crc32(f"{self.seed} {index} {name}".encode())).random()

    def affordable(self):
        return float("inf") if self.left is None else self.left

    def sample(self, cell, batches):
        for batch in batches:
            if (cell.title, batch) not in self.measured:
                if self.left is not None:
                    if self.left <= 0:
                        raise OutOfTime
                    self.left -= 1
                self.measured[cell.title, batch] = None
        pairs = [self._example(index, cell.method) for batch in batches for index in batch]
        retention = self.curves[cell.method](cell.keep_ratio)
        full = tuple(float(right) for right, _ in pairs)
        scores = tuple(float(right and draw < retention) for right, draw in pairs)
        share = {"flops": cell.keep_ratio, "kv": cell.keep_ratio, "latency": cell.keep_ratio}
        return Sample(cell, scores, full, TOKENS * cell.keep_ratio, share)

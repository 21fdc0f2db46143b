# SPDX-License-Identifier: Apache-2.0
"""What a merge of tokens leaves: fewer tokens, and where each of the old ones went."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Merged:
    """The tokens left of each group after a merge, in the order in which they go on."""

    features: Tensor
    """(groups, left, dim); zero for padding, which ends the rows of groups that have fewer left."""
    places: Tensor
    """(groups, left) long: the original token in whose place each stands; -1 for padding."""
    sources: Tensor
    """(groups, tokens) long: the place of the token that each original one went into; -1 for what was padding, and for
    all where nothing is left."""

    @property
    def valid(self) -> Tensor:
        """(groups, left) bool."""
        return self.places >= 0

    @property
    def sizes(self) -> Tensor:
        """(groups, left) long: how many original tokens each stands for; 0 for padding."""
        counts = torch.zeros_like(self.sources)
        counts.scatter_add_(1, self.sources.clamp_min(0), (self.sources >= 0).long())
        return counts.gather(1, self.places.clamp_min(0)).masked_fill(~self.valid, 0)

    def in_place(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same with every token in its place among the original ones, i.e. what makes a `Selection`.

        Args:
            features: ``(groups, tokens, dim)`` before the merge.

        Returns:
            ``(groups, tokens)`` bool, which tokens are left; ``(groups, tokens, dim)``, the features with theirs
            replaced; ``(groups, tokens)`` long, ``sources``.
        """
        group, row = self.valid.nonzero(as_tuple=True)
        place = self.places[group, row]
        keep = torch.zeros_like(self.sources, dtype=torch.bool)
        keep[group, place] = True
        features = features.clone()
        features[group, place] = self.features[group, row]
        return keep, features, self.sources

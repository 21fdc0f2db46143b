# SPDX-License-Identifier: Apache-2.0
"""The result of a merge: fewer tokens, and the token that each original token went into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Merged:
    """The tokens of each group that are left after a merge, in their new order."""

    features: Tensor
    """(groups, remaining, dim). Groups with fewer tokens left have padding, zeros, at the end of their rows."""
    places: Tensor
    """(groups, remaining) long: the original token whose place each token takes; -1 for padding."""
    sources: Tensor
    """(groups, tokens) long: the place of the token that each original token went into; -1 for padding, and for all
    tokens of a group with no token left."""

    @property
    def valid(self) -> Tensor:
        """(groups, remaining) bool."""
        return self.places >= 0

    @property
    def sizes(self) -> Tensor:
        """(groups, remaining) long: how many original tokens went into each token; 0 for padding."""
        counts = torch.zeros_like(self.sources)
        counts.scatter_add_(1, self.sources.clamp_min(0), (self.sources >= 0).long())
        return counts.gather(1, self.places.clamp_min(0)).masked_fill(~self.valid, 0)

    def in_place(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same result with every token in its original place: the parts of a `Selection`.

        Args:
            features: ``(groups, tokens, dim)`` before the merge.

        Returns:
            ``(groups, tokens)`` bool, which tokens are left; ``(groups, tokens, dim)``, the features, replaced for the
            tokens that are left; ``(groups, tokens)`` long, ``sources``.
        """
        groups, tokens = self.sources.shape
        rows = torch.arange(self.places.shape[1], device=self.places.device).expand_as(self.places)
        # For each token its row here, -1 for those that are gone. Padding is put behind the last token.
        row_of = self.sources.new_full((groups, tokens + 1), -1)
        row_of = row_of.scatter(1, torch.where(self.valid, self.places, tokens), rows)[:, :tokens]
        keep = row_of >= 0
        if rows.numel():
            replaced = self.features.gather(1, row_of.clamp_min(0).unsqueeze(2).expand_as(features))
            features = torch.where(keep.unsqueeze(2), replaced, features)
        return keep, features, self.sources

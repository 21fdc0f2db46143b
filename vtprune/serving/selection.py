# SPDX-License-Identifier: Apache-2.0
"""Chooses among the tokens of one image or video, alone, so that a batch gives each request what it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtprune.adapters import Adapter
from vtprune.errors import UnsupportedStageError, VTPruneError
from vtprune.methods.base import BeforeLLM
from vtprune.serving.plan import Plan, groups_of
from vtprune.signals import EncoderRecord
from vtprune.stages.encoder import EncoderRecorder
from vtprune.stages.encoder_call import EncoderCall
from vtprune.stages.layout import Groups
from vtprune.stages.reading import visual_tokens
from vtprune.tokens import Medium, ModelShape

_NEXT_CROP = 7919
"""Crops of one image draw apart, as in a session."""


@dataclass(frozen=True)
class EncodedMedium:
    """The `vtprune.signals.EncoderView` of one image or video of a call of the server's vision encoder."""

    recorder: EncoderRecorder
    encoding: EncoderCall
    """What was recorded of the call, of all its media."""
    index: int
    """Number of the medium among them."""
    groups: Groups
    plan: Plan
    embed: Callable[[Tensor], Tensor]
    """Token ids (m,) -> their input embeddings (m, dim)."""

    @property
    def shape(self) -> ModelShape:
        return self.recorder.adapter.shape

    def per_token(self, values: Callable[[EncoderRecord], Tensor]) -> Tensor:
        return self._own(self.recorder.per_token([self.encoding], values))

    def projector_inputs(self) -> Tensor:
        return self._own(self.recorder.projector_inputs([self.encoding]))

    def normalised(self, output: Tensor) -> Tensor:
        raise UnsupportedStageError("a server does not load the encoder's last normalisation")

    def text_embeddings(self, *, keywords: bool) -> list[Tensor]:
        # Words are looked up only in a `text` given to a session; a server reads the prompt.
        ids = torch.tensor(self.plan.text, dtype=torch.long)
        return [self.embed(ids)] * len(self.groups.rows)

    def joint_space(self, tower: str) -> tuple[Tensor, Tensor]:
        raise UnsupportedStageError("a text tower beside the model is not built for servers")

    def sample_keys(self) -> list[int]:
        key = self.plan.prompt_key + self.recorder.image_keys(self.encoding)[self.index]
        return [key + _NEXT_CROP * number for number in range(len(self.groups.rows))]

    def _own(self, values: Tensor) -> Tensor:
        """Values of the tokens of all media (tokens, ...) -> (groups, tokens, ...) of this one, zero for padding."""
        first = sum(map(len, self.encoding.media[: self.index]))
        own = values[first : first + len(self.encoding.media[self.index])]
        columns, valid = self.groups.columns.to(own.device), self.groups.valid.to(own.device)
        return own[columns].masked_fill(~valid.view(*valid.shape, *[1] * (own.ndim - 1)), 0)


def choose_tokens(
    method: BeforeLLM,
    plan: Plan,
    features: Tensor,
    width: int,
    recorder: EncoderRecorder,
    encoding: EncoderCall,
    index: int,
    embed: Callable[[Tensor], Tensor],
) -> Tensor:
    """What is left of the features of one image or video.

    Args:
        method: what chooses.
        plan: the decision on this medium.
        features: (tokens, width or more), what the projector gave. What lies behind `width` (DeepStack) goes with its
            token; of tokens that merge, their mean does.
        width: of the language model.
        recorder, encoding, index: the call of the encoder, and the medium's number in it.
        embed: token ids (m,) -> their input embeddings (m, dim).

    Returns (plan.kept and the text of plan.within, width or more), in order.
    Raises VTPruneError if the method keeps another number of tokens than the prompt has room for.
    """
    medium: Medium = encoding.media[index]
    adapter: Adapter = recorder.adapter
    groups = groups_of(medium, method.scope)
    hidden = features[None, :, :width]
    view = EncodedMedium(recorder, encoding, index, groups, plan, embed)
    crops = groups.gather(medium.crops[None]).masked_fill(~groups.valid, -1)
    by_image = method.scope == "image"
    tokens = visual_tokens(
        method,
        adapter.shape,
        groups,
        groups.gather(hidden),
        lambda signal: signal.read_encoded(view),
        budget=method.budgets(groups.valid.sum(1), groups.images),
        crops=crops if by_image else crops.clamp(max=0),
        layouts=(medium.grids,) if by_image else tuple((grid,) for grid in medium.grids),
        kinds=(encoding.kind,) * len(groups.rows),
    )
    selection = method.choose(tokens)
    if selection.features is not None:
        hidden = groups.scatter(
            torch.where(selection.keep[..., None], selection.features.to(hidden), groups.gather(hidden)), hidden
        )
        behind = features[None, :, width:]
        if selection.sources is not None and behind.shape[-1]:
            behind = groups.scatter(_mean(groups.gather(behind), selection.sources), behind)
        features = torch.cat([hidden[0], behind[0]], 1)
    separators = (medium.crops < 0)[None]
    keep = groups.scatter(selection.keep.to(groups.valid.device) & groups.valid, separators)[0].to(features.device)
    left = features[keep]
    if len(left) != plan.kept:
        raise VTPruneError(f"{method.name} kept {len(left)} tokens of a medium that has room for {plan.kept}")
    return _with_text(left, keep, plan, embed)


def _with_text(left: Tensor, keep: Tensor, plan: Plan, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """What is left of a medium (tokens, width or more) with the text that stands between its tokens.

    keep: (all tokens,) bool. DeepStack adds nothing to text.
    """
    before = [int(keep[:place].sum()) for place, _ in plan.within]
    parts = []
    for own, (_, ids) in zip(left.tensor_split(before), ((0, ()), *plan.within), strict=True):
        if ids:
            text = embed(torch.tensor(ids, dtype=torch.long)).to(left)
            parts.append(pad(text, (0, left.shape[1] - text.shape[1])))
        parts.append(own)
    return torch.cat(parts)


def _mean(values: Tensor, sources: Tensor) -> Tensor:
    """values (groups, tokens, dim) -> the same shape: at each kept token the mean of all that went into it.

    sources: see `Selection`.
    """
    group, slot = (sources >= 0).nonzero(as_tuple=True)
    into = group, sources[group, slot]
    total = torch.zeros_like(values).index_put(into, values[group, slot], accumulate=True)
    count = torch.zeros_like(values[..., 0]).index_put(into, values.new_ones(len(slot)), accumulate=True)
    return total / count.clamp(min=1)[..., None]

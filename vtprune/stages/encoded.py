# SPDX-License-Identifier: Apache-2.0
"""What a signal sees before the LLM: the `vtprune.signals.EncoderView` of groups of visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vtprune.checks import require
from vtprune.devices import send
from vtprune.errors import UnsupportedStageError
from vtprune.signals import EncoderRecord, EncoderSignal
from vtprune.stages.call import Call
from vtprune.stages.encoder import COMPUTED_ELSEWHERE, EncoderRecorder
from vtprune.stages.layout import Groups
from vtprune.stages.question import Text, joint_space, text_embeddings
from vtprune.tokens import ModelShape


class EncodedMedia:
    """See `vtprune.signals.EncoderView`."""

    def __init__(self, call: Call, groups: Groups, recorder: EncoderRecorder, text: Text | None):
        """text: the question that the session was given."""
        self.call, self.groups, self.recorder, self.text = call, groups, recorder, text

    def read(self, signal: EncoderSignal) -> Any:
        return signal.read_encoded(self)

    @property
    def shape(self) -> ModelShape:
        return self.call.adapter.shape

    def per_token(self, values: Callable[[EncoderRecord], Tensor]) -> Tensor:
        check_encoded(self.call)
        return per_group(self.recorder.per_token(self.call.media.encodings, values), self.call, self.groups)

    def projector_inputs(self) -> Tensor:
        check_encoded(self.call)
        return per_group(self.recorder.projector_inputs(self.call.media.encodings), self.call, self.groups)

    def normalised(self, output: Tensor) -> Tensor:
        return self.call.adapter.vision_tower().post_layernorm(output)

    def text_embeddings(self, *, keywords: bool) -> list[Tensor]:
        return text_embeddings(self.text, self.call, self.groups, keywords)

    def joint_space(self, tower: str) -> tuple[Tensor, Tensor]:
        return joint_space(self.text, self.call, self.groups, tower)

    def sample_keys(self) -> list[int]:
        media, groups = self.call.media, self.groups
        by_medium = [key for encoding in media.encodings for key in self.recorder.image_keys(encoding)]
        if len(groups.rows) == len(media.crop_rows):
            crops = zip(media.crop_media.tolist(), media.crop_ranks.tolist(), strict=True)
            # Crops of one image draw apart; the factor is an arbitrary prime.
            keys = [by_medium[medium] + 7919 * rank for medium, rank in crops]
        else:
            keys = [by_medium[medium] for medium in media.image_media.tolist()]
        return [self.call.prompt_key(row) + key for row, key in zip(groups.rows.tolist(), keys, strict=True)]


def check_encoded(call: Call) -> None:
    """Raise unless the call's features come from the encoder, pixels and all, as this session saw it run."""
    media = call.media
    error = f"this method reads the vision encoder, but {COMPUTED_ELSEWHERE}"
    if any(encoding.inputs is None for encoding in media.encodings):
        raise UnsupportedStageError(error)
    require(media.holds(call.embeddings), error, UnsupportedStageError)


def per_group(values: Tensor, call: Call, groups: Groups) -> Tensor:
    """Values (encoded tokens, ...) of the encoder for the tokens alive: (groups, tokens, ...)."""
    taken = values[send(groups.gather(call.encoded_tokens()), values.device)]
    valid = groups.on(values.device).valid
    return taken.masked_fill(~valid.view(*valid.shape, *[1] * (taken.ndim - 2)), 0)

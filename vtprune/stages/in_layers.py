# SPDX-License-Identifier: Apache-2.0
"""Inside the layers of the vision encoder of a vision-language model: merges or drops tokens there, as in an encoder
alone (`layer_calls.py`), and notes which visual tokens are copies of one row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from vtprune.adapters import find_encoder
from vtprune.adapters.base import Adapter
from vtprune.adapters.encoder import EncoderAdapter
from vtprune.errors import ConfigError, UnsupportedModelError, UnsupportedStageError
from vtprune.methods.in_layers import InLayers
from vtprune.stages.choosing import Profile
from vtprune.stages.encoder_pass import EncoderPass
from vtprune.stages.in_encoder import EncoderMerge, copied_tokens, has_mixed_tokens
from vtprune.stages.layer_calls import LayerCalls


class TowerCut:
    """Hooks on the layers of the vision towers of one model."""

    def __init__(self, adapter: Adapter, methods: Sequence[InLayers], encoding: Callable[[], Any], *, profile: Profile):
        """encoding: gives the `EncoderCall` that is being computed, None outside of the session's encode methods.

        Raises UnsupportedStageError if tokens cannot be taken away inside the encoder of this family.
        """
        self.adapter, self.methods, self.encoding, self.profile = adapter, methods, encoding, profile
        if len(methods) > 1:
            raise ConfigError(f"{', '.join(m.name for m in methods)}: only one method acts inside encoder layers")
        # Kinds may share a tower.
        towers = {id(adapter.vision_tower(kind)): kind for kind in adapter.visual_token_ids} if methods else {}
        self._by_tower = {tower: self._calls(kind) for tower, kind in towers.items()}

    def _calls(self, kind: str) -> LayerCalls:
        (method,) = self.methods
        reason = None
        if not self.adapter.merges_in_encoder:
            reason = self.adapter.why_unmerged()
        elif len(self.adapter.feature_layers) > 1:
            reason = "the projector reads several layers"
        elif (encoder := self._encoder(kind)) is None:
            reason = f"its vision tower is a {type(self.adapter.vision_tower(kind)).__name__}"
        if reason is not None:
            raise UnsupportedStageError(
                f"{method.name}: tokens cannot be taken away inside the layers of the vision encoder of "
                f"{self.adapter.family} ({reason}); methods that act behind it work: divprune, cdpruner"
            )
        method.check_budget(encoder.shape)
        return LayerCalls(
            encoder,
            method,
            self._note,
            profile=self.profile,
            last=self.adapter.shape.feature_layer,
            follows=lambda: self.encoding() is not None,
        )

    def _encoder(self, kind: str) -> EncoderAdapter | None:
        try:
            return find_encoder(self.adapter.vision_tower(kind))
        except UnsupportedModelError:
            return None

    def install(self, kind: str) -> Iterator[RemovableHandle]:
        """Yields what takes each hook on the tower of a kind off again, as soon as it is on."""
        if self.methods:
            yield from self._by_tower[id(self.adapter.vision_tower(kind))].install()

    def stop(self) -> None:
        """Let later images be encoded as they are. Waits for those that another thread encodes."""
        for calls in self._by_tower.values():
            calls.stop()

    def _note(self, batch: EncoderPass) -> None:
        """Say of the images that ran which of their tokens are left."""
        encoding, (method,) = self.encoding(), self.methods
        if encoding.merge is not None:
            raise UnsupportedStageError(
                f"{method.name}: the vision encoder ran twice for the {encoding.kind}s of one call, which is not "
                "supported"
            )
        encoding.selection_flops += batch.selection_flops
        if batch.sources is None:
            return
        place = self.adapter, encoding.kind, encoding.inputs, batch.images, batch.tokens
        refuse_mixed_tokens(method, *place)
        copies = copied_tokens(*place)
        prefix = int(self.adapter.shape.has_cls)
        places = batch.places
        encoding.merge = EncoderMerge(
            copies,
            places,
            torch.ones_like(places, dtype=torch.bool),
            batch.sources,
            counts=tuple((a - prefix, b - prefix) for a, b in zip(batch.entered, batch.in_mlp, strict=True)),
        )


def refuse_mixed_tokens(
    method: InLayers, adapter: Adapter, kind: str, inputs: Mapping[str, Any], images: int, tokens: int
) -> None:
    """Raise UnsupportedStageError if a method drops patches, and visual tokens are means of several of them.

    inputs: of the encoder, for media of a kind. images, tokens: what the encoder runs on, images with so many tokens.
    """
    if method.drops and has_mixed_tokens(adapter, kind, inputs, images, tokens):
        raise UnsupportedStageError(
            f"{method.name} drops patches, and visual tokens of these {kind}s of {adapter.family} are means of "
            "several, some of which would be missing; methods that merge patches work: tome, mctf"
        )

# SPDX-License-Identifier: Apache-2.0
"""The vision encoder: watches what it computes for each image, for methods that act later on the path."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.base import Adapter
from vtprune.errors import UnsupportedStageError
from vtprune.ops.attention import attention_rows


class EncoderTap:
    """Keeps, for the images encoded last, what goes through the projector and the CLS rows of chosen layers.

    `generate()` encodes images long before the language model runs, and only once for all beams, so the tap
    remembers until the tower runs again.
    """

    def __init__(self, adapter: Adapter, cls_layers: Sequence[int], *, keep_features: bool, profile: bool):
        self.adapter = adapter
        self.cls_layers = tuple(cls_layers)
        self.keep_features = keep_features or bool(cls_layers)
        self.profile = profile
        self.images = 0
        """Images encoded last; 0 if none was encoded in this session."""
        self.tokens: int | None = None
        """Visual tokens of each of them."""
        self.features: Tensor | None = None
        """(images, tokens, dim): the projector's input; only with `keep_features`."""
        self.projected: Tensor | None = None
        """(images, tokens, LLM dim): its output; only with `keep_features`."""
        self._pixels: Tensor | None = None
        self.seconds = 0.0
        self._rows: dict[int, Tensor] = {}
        self._queries: dict[int, Tensor] = {}

    def install(self) -> list[RemovableHandle]:
        tower = self.adapter.vision_tower
        handles = [
            tower.register_forward_pre_hook(self._before_tower),
            tower.register_forward_hook(self._after_tower),
            self.adapter.projector.register_forward_hook(self._after_projector),
        ]
        for index in self.cls_layers:
            attention = self.adapter.encoder_layers[index].self_attn
            # `prepend` is not needed here: these hooks read and never replace.
            handles.append(attention.q_proj.register_forward_hook(self._take_query(index)))
            handles.append(attention.k_proj.register_forward_hook(self._take_row(index)))
        return handles

    def _before_tower(self, module, args):
        self.images, self.tokens, self.features, self.projected = 0, None, None, None
        self._pixels = args[0] if args else None
        self._rows.clear()
        self._started = clock(self.adapter.model) if self.profile else 0.0

    def _after_tower(self, module, args, output):
        if self.profile:
            self.seconds = clock(self.adapter.model) - self._started

    def _after_projector(self, module, args, output):
        self.images, self.tokens = output.shape[:2]
        if self.keep_features:
            self.features, self.projected = args[0].detach(), output.detach()

    def _take_query(self, layer: int):
        def hook(module, args, output):
            self._queries[layer] = output[:, :1].detach()

        return hook

    def _take_row(self, layer: int):
        def hook(module, args, output):
            heads = self.adapter.config.vision_config.num_attention_heads
            query, key = (
                rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (self._queries.pop(layer), output.detach())
            )
            rows = attention_rows(query, key, scale=query.shape[-1] ** -0.5)
            self._rows[layer] = rows[:, :, 0]

        return hook

    def image_key(self, image: int) -> int:
        """A number that depends on one encoded image's pixels alone; 0 if they were not seen."""
        if self._pixels is None or not image < len(self._pixels):
            return 0
        # A sum of bit patterns is exact: it does not depend on how a batch is laid out or a device adds up.
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[self._pixels.element_size()]
        return int(self._pixels[image].contiguous().view(bits).sum(dtype=torch.int64)) % 2**31

    def check(self, embeddings: Tensor, images: Tensor, slots: Tensor) -> None:
        """Raise unless `embeddings` (visual tokens, dim) are the features seen last, of these images and slots."""
        seen = self.projected
        if seen is None or not torch.equal(
            seen[images.to(seen.device), slots.to(seen.device)].to(embeddings), embeddings
        ):
            raise UnsupportedStageError(
                "this method reads the vision encoder, but the image features of this call were computed elsewhere; "
                "pass pixel_values inside the session"
            )

    def cls_rows(self, layers: Sequence[int]) -> Tensor:
        """(images, layers, heads, tokens): CLS attention over the tokens that the projector reads."""
        rows = torch.stack([self._rows[layer].to(self.features.device) for layer in layers], 1)
        return rows[..., rows.shape[-1] - self.tokens :]


def clock(model) -> float:
    """Seconds, once everything queued on the model's device has run."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()

# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5: a CLIP or SigLIP tower, a two-layer projector, one block of patch tokens an image."""

from __future__ import annotations

from vtprune.adapters.base import Adapter
from vtprune.tokens import Grid, ModelShape


class Llava(Adapter):
    """`LlavaForConditionalGeneration` (LLaVA-1.5, arXiv 2310.03744) with a CLIP or SigLIP vision tower.

    Tokens of an image: the patches in raster order. CLIP puts a CLS token before them, which the select strategy
    "default" cuts off and "full" hands to the LLM as one more visual token. SigLIP has no CLS token ("default" would
    cut a patch off, so its grid is then unknown).
    """

    model_types = ("llava",)
    family = "LLaVA-1.5"
    towers = {"clip_vision_model": 1, "siglip_vision_model": 0}
    """Supported vision towers and their number of CLS tokens."""

    @classmethod
    def refuses(cls, config) -> str | None:
        tower = config.vision_config.model_type
        if tower not in cls.towers:
            return f"its vision tower is {tower!r}; supported: {', '.join(cls.towers)}"
        return None

    @property
    def vision_tower(self):
        return self.base.vision_tower

    @property
    def encoder_layers(self):
        return self.vision_tower.encoder.layers

    @property
    def projector(self):
        return self.base.multi_modal_projector

    @property
    def visual_token_ids(self):
        return (self.config.image_token_id,)

    @property
    def shape(self):
        depth = self.config.vision_config.num_hidden_layers
        chosen = self.config.vision_feature_layer
        chosen = [chosen] if isinstance(chosen, int) else chosen
        # Entry 0 of the hidden states is the embedding, so entry i is the output of layer i - 1.
        deepest = max(layer if layer >= 0 else depth + 1 + layer for layer in chosen) - 1
        return ModelShape(
            encoder_layers=depth,
            decoder_layers=len(self.decoder_layers),
            feature_layer=max(deepest, 0),
            has_cls=bool(self._cls_tokens),
        )

    @property
    def _cls_tokens(self) -> int:
        return self.towers[self.config.vision_config.model_type]

    @property
    def _side(self) -> int:
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    @property
    def tokens_per_image(self):
        cut = 1 if self.config.vision_feature_select_strategy == "default" else 0
        return self._side**2 + self._cls_tokens - cut

    def grid(self, tokens):
        patches = self._side**2
        if tokens == patches + self._cls_tokens:
            return Grid(self._side, self._side, prefix=self._cls_tokens)
        return Grid(self._side, self._side) if tokens == patches else None

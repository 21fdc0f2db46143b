# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V to GLM-4.6V and GLM-OCR: the layout of Qwen2-VL, with frames of videos marked as images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from vtprune.adapters.qwen_vl import Qwen2VL


class GlmV(Qwen2VL):
    """`Glm4vForConditionalGeneration`, `Glm4vMoeForConditionalGeneration` and `Glm46VForConditionalGeneration`
    (GLM-4.1V to 4.6V, arXiv 2507.01006).

    Like Qwen2-VL, but a convolution makes one token of four neighbouring patches, before the merger. A video is two
    frames after another, each with the placeholders of images, "begin of image" and "end of image", and a time stamp
    behind it; "begin of video" and "end of video" are around all of them. As one placeholder stands for both, the model
    takes images or videos in a call, not both.
    """

    model_types: ClassVar[tuple[str, ...]] = ("glm4v", "glm4v_moe", "glm46v", "glmga")
    family = "GLM-4.1V to 4.6V"
    gated_encoder_mlp = True

    @property
    def visual_token_ids(self) -> Mapping[str, int]:
        return dict.fromkeys(self.kinds, self.config.image_token_id)

    @property
    def marker_token_ids(self) -> tuple[int, ...]:
        config = self.config
        return (config.image_start_token_id, config.image_end_token_id, *self._around_videos)

    @property
    def _around_videos(self) -> tuple[int, int]:
        return self.config.video_start_token_id, self.config.video_end_token_id

    def markers(self, ids: Tensor | None, images: Tensor) -> Tensor:
        # The last time stamp is behind all frames.
        found = super().markers(ids, images)
        if ids is None:
            return found
        starts, ends = ((ids.to(images.device) == token).long() for token in self._around_videos)
        inside = (starts.cumsum(1) > ends.cumsum(1)) & (ends.flip(1).cumsum(1).flip(1) > 0)
        return found | (inside & (images < 0))

    @property
    def position_axes(self) -> int:
        return 3  # also without `mrope_section` in the config

    @property
    def projector(self) -> nn.Module:
        return self.base.visual.downsample

    @property
    def encoder_mlp_width(self) -> int | None:
        return self.vision_config.out_hidden_size

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        # (tokens, dim, 2, 2)
        return features.flatten(2).mean(2)

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        return super().projector_inputs(kind, inputs, values.flatten(0, 1))


class GlmOcr(GlmV):
    """`GlmOcrForConditionalGeneration` (GLM-OCR; no paper). Like GLM-4.1V."""

    model_types: ClassVar[tuple[str, ...]] = ("glm_ocr",)
    family = "GLM-OCR"

    @property
    def encoder_mlp_width(self) -> int | None:
        return None


class Glm5Next(GlmOcr):
    """`Glm5NextForConditionalGeneration` (GLM-5 Next; no paper).

    Like GLM-4.1V, without positions. Most layers of the language model are linear attention, whose state every token
    changes. The others attend to a few pools of columns, which they look up in an index, so tokens can be dropped
    before the language model only. Of a prompt with tokens missing, pools are those of the tokens that are there.
    """

    model_types: ClassVar[tuple[str, ...]] = ("glm5_next",)
    family = "GLM-5 Next"
    carries_state = True

    @property
    def position_axes(self) -> int:
        return 1

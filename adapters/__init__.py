# SPDX-License-Identifier: Apache-2.0
"""Adapters: one file a model family, with facts only.

`adapter_for(model)` finds the adapter of a vision-language model, `find_encoder(model)` that of a vision encoder.
"""

from __future__ import annotations

import functools
from typing import Any

from vtprune.adapters.base import Adapter
from vtprune.adapters.clip import TransformersEncoder
from vtprune.adapters.cohere_compass import CohereCompass
from vtprune.adapters.cohere_vision import AyaVision, Cohere2Vision
from vtprune.adapters.cosmos3 import Cosmos3Edge, Cosmos3Omni
from vtprune.adapters.deepseek_ocr2 import DeepseekOcr2
from vtprune.adapters.deepseek_vl import DeepseekVL, DeepseekVLHybrid, Janus
from vtprune.adapters.dots3_note import Dots3Note
from vtprune.adapters.encoder import EncoderAdapter
from vtprune.adapters.ernie4_5_vl import Ernie4_5VL
from vtprune.adapters.fast_vlm import FastVLM
from vtprune.adapters.fuyu import Fuyu
from vtprune.adapters.gemma3 import Gemma3
from vtprune.adapters.gemma3n import Gemma3n
from vtprune.adapters.gemma4 import Gemma4
from vtprune.adapters.gemma4_unified import Gemma4Unified
from vtprune.adapters.generic import Generic
from vtprune.adapters.glm_v import Glm5Next, GlmOcr, GlmV
from vtprune.adapters.got_ocr2 import GotOcr2
from vtprune.adapters.granite import Granite4Vision, GraniteDocling
from vtprune.adapters.hunyuan_vl import HunYuanVL
from vtprune.adapters.hy_v4_vl import HyV4VL
from vtprune.adapters.idefics2 import Aria, Idefics2
from vtprune.adapters.idefics3 import Idefics3
from vtprune.adapters.internvl import InternVL, QianfanOcr
from vtprune.adapters.kimi_k25 import KimiK25
from vtprune.adapters.lfm_vl import Lfm2VL, Lfm3VL
from vtprune.adapters.llama4 import Llama4
from vtprune.adapters.llava import Llava
from vtprune.adapters.llava_next import LlavaNext
from vtprune.adapters.llava_next_video import LlavaNextVideo
from vtprune.adapters.llava_onevision import LlavaOnevision
from vtprune.adapters.minicpm import MiniCPMV, MiniCPMV4_7
from vtprune.adapters.mistral3 import LightOnOcr, Mistral3, MistralLarge4
from vtprune.adapters.molmo2 import Molmo2
from vtprune.adapters.muse import Muse
from vtprune.adapters.nemotron_h_omni import NemotronHOmni
from vtprune.adapters.open_clip import OpenClipTimm, OpenClipViT
from vtprune.adapters.ovis2 import Ovis2
from vtprune.adapters.paddleocr_vl import PaddleOcrVL
from vtprune.adapters.paligemma import PaliGemma
from vtprune.adapters.perception_lm import PerceptionLM
from vtprune.adapters.phi4_multimodal import Phi4Multimodal
from vtprune.adapters.pixtral import Pixtral
from vtprune.adapters.qwen_omni import Qwen2_5Omni, Qwen3Omni
from vtprune.adapters.qwen_towers import Exaone4_5, HyperClovaX
from vtprune.adapters.qwen_vl import Qwen2_5_VL, Qwen2VL, Qwen3_5, Qwen3VL, Qwen4Exp
from vtprune.adapters.refusals import refusal, remote_code
from vtprune.adapters.step3p7 import Step3p7
from vtprune.adapters.timm import TimmViT
from vtprune.adapters.unlimited_ocr import UnlimitedOcr
from vtprune.adapters.video_llama3 import VideoLlama3
from vtprune.adapters.video_llava import VideoLlava
from vtprune.adapters.vipllava import VipLlava
from vtprune.adapters.wrappers import unwrapped
from vtprune.errors import ConfigError, UnsupportedModelError
from vtprune.plugins import load_plugins
from vtprune.transformers_private import is_remote_code

__all__ = ["Adapter", "EncoderAdapter", "Generic", "adapter_for", "find_encoder", "list_adapters", "register_adapter"]

_ADAPTERS: dict[str, type[Adapter]] = {}
_ENCODERS: tuple[type[EncoderAdapter], ...] = (TransformersEncoder, OpenClipViT, OpenClipTimm, TimmViT)


def register_adapter(adapter: type[Adapter]) -> type[Adapter]:
    """Register an adapter under its `model_types`; usable as a decorator. Raises ConfigError if a type is taken."""
    for model_type in adapter.model_types:
        if _ADAPTERS.get(model_type, adapter) is not adapter:
            raise ConfigError(f"an adapter for model type {model_type!r} is registered already")
        _ADAPTERS[model_type] = adapter
    return adapter


for _adapter in (
    Llava,
    LlavaNext,
    LlavaNextVideo,
    LlavaOnevision,
    VideoLlava,
    Pixtral,
    Qwen2VL,
    Qwen2_5_VL,
    Qwen3VL,
    Qwen3_5,
    Qwen2_5Omni,
    Qwen3Omni,
    InternVL,
    Idefics3,
    Gemma3,
    PaliGemma,
    Mistral3,
    AyaVision,
    Cohere2Vision,
    LightOnOcr,
    QianfanOcr,
    GotOcr2,
    DeepseekOcr2,
    HunYuanVL,
    MiniCPMV,
    MiniCPMV4_7,
    GlmV,
    GlmOcr,
    PaddleOcrVL,
    Granite4Vision,
    GraniteDocling,
    Lfm2VL,
    Lfm3VL,
    NemotronHOmni,
    Qwen4Exp,
    Llama4,
    Cosmos3Edge,
    Cosmos3Omni,
    VideoLlama3,
    KimiK25,
    MistralLarge4,
    VipLlava,
    DeepseekVL,
    DeepseekVLHybrid,
    Janus,
    FastVLM,
    Idefics2,
    Aria,
    Molmo2,
    Ovis2,
    Fuyu,
    Step3p7,
    PerceptionLM,
    Gemma4,
    Gemma4Unified,
    CohereCompass,
    Muse,
    Exaone4_5,
    HyperClovaX,
    Phi4Multimodal,
    Dots3Note,
    HyV4VL,
    Glm5Next,
    Gemma3n,
    UnlimitedOcr,
    Ernie4_5VL,
):
    register_adapter(_adapter)


@functools.cache
def _load_entry_points() -> None:
    load_plugins("vtprune.adapters", register_adapter)


def list_adapters() -> dict[str, type[Adapter]]:
    """Model type -> adapter class, including those of other packages."""
    _load_entry_points()
    return dict(_ADAPTERS)


def find_encoder(model: Any) -> EncoderAdapter | None:
    """The adapter of a vision encoder: alone, in a wrapper, or in a model of image and text; None if it is none.

    Raises UnsupportedModelError if it is one of a known family with parts that are not supported, or no model at all.
    """
    model = unwrapped(model)
    model = getattr(model, "_orig_mod", model)  # compiled
    for encoder in _ENCODERS:
        if (tower := encoder.find(model)) is not None:
            return encoder(model, tower)
    return None


def adapter_for(model: Any) -> Adapter:
    """The adapter of a loaded model, which may be in a wrapper (peft, DistributedDataParallel, FSDP, a pipeline).

    Raises UnsupportedModelError: the message says why, and what would help; of a model of which nothing is known, it
    names the supported families.
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    known = list_adapters()
    model_type = getattr(config, "model_type", "")
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    adapter = known.get(f"{model_type}/{tower}", known.get(model_type))
    if adapter is None:
        if (reason := refusal(model)) is not None:
            raise UnsupportedModelError(reason)
        supported = ", ".join(f"{a.family} ({t})" for t, a in sorted(known.items()))
        encoders = ", ".join(a.family for a in _ENCODERS)
        raise UnsupportedModelError(
            f"no adapter for {type(model).__name__}; supported: {supported}; and as encoders alone: {encoders}; "
            "adapter='generic' tries whether methods that need features only can be trusted on it"
        )
    if (reason := adapter.refuses(config)) is not None:
        raise UnsupportedModelError(f"{type(model).__name__} is not supported here: {reason}")
    found = adapter(model)
    try:
        _ = found.base, found.language_model, found.vision_tower()
    except AttributeError as error:
        if is_remote_code(model):
            raise UnsupportedModelError(remote_code(model)) from None
        raise UnsupportedModelError(
            f"a {type(model).__name__} has the config of {found.family}, but not its parts ({error}); pass the "
            "transformers model itself"
        ) from None
    return found

# SPDX-License-Identifier: Apache-2.0
"""What methods ask of vLLM's vision encoder, taken down while it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather

from vtprune.adapters import Adapter
from vtprune.adapters.base import PIXELS
from vtprune.adapters.llava_next import LlavaNext
from vtprune.adapters.qwen_vl import Qwen2VL
from vtprune.ops.attention import attention_received, attention_rows
from vtprune.stages.encoder import EncoderRecorder
from vtprune.stages.encoder_call import EncoderCall


@contextmanager
def recorded(model: Any, recorder: EncoderRecorder, encoding: EncoderCall) -> Iterator[None]:
    """While it lasts, what the recorder's methods ask for is taken down in `encoding`."""
    with ExitStack() as hooks:
        if recorder.keep_features:
            hooks.enter_context(_watched(_projector(model), encoding.project))
        for layer in recorder.watched | recorder.output_layers:
            module = model.vision_tower.vision_model.encoder.layers[layer]
            if layer in recorder.output_layers:
                handle = module.register_forward_hook(_take_output(encoding, layer))
                hooks.callback(handle.remove)
            if layer in recorder.watched:
                attention = module.self_attn
                handle = attention.qkv_proj.register_forward_hook(_take_attention(recorder, encoding, layer, attention))
                hooks.callback(handle.remove)
        yield


def _projector(model: Any) -> nn.Module:
    return model.visual.merger if hasattr(model, "visual") else model.multi_modal_projector


@contextmanager
def _watched(module: nn.Module, before: Callable[[Tensor], None]) -> Iterator[None]:
    """While it lasts, `before` sees the first argument of each call. On classes that vLLM may compile no hook runs."""
    forward = module.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        before((*args, *kwargs.values())[0])
        return forward(*args, **kwargs)

    module.forward = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


def _take_output(encoding: EncoderCall, layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        encoding.outputs[layer] = output[0] if isinstance(output, tuple) else output

    return hook


def _take_attention(
    recorder: EncoderRecorder, encoding: EncoderCall, layer: int, attention: Any
) -> Callable[..., None]:
    """A hook on the projection that makes queries, keys and values at once. CLIP and SigLIP rotate nothing."""

    def gather(values: Tensor, axis: int) -> Tensor:
        # Each rank has some of the heads, and all have to choose alike.
        return tensor_model_parallel_all_gather(values.contiguous(), axis) if attention.tp_size > 1 else values

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        split = functools.partial(
            rearrange, pattern="b n (heads d) -> b heads n d", heads=attention.num_heads_per_partition
        )
        queries, keys, _ = (split(values) for values in output[0].chunk(3, dim=-1))
        if layer in recorder.key_layers:
            encoding.keys[layer] = rearrange(gather(keys, 1), "b heads n d -> b n heads d")
        if layer in recorder.cls_layers:
            rows = attention_rows(queries[:, :, :1], keys, scale=attention.scale)
            encoding.rows[layer] = gather(rows[:, :, 0], 1)
        if layer in recorder.received_layers:
            received = attention_received(queries, keys, scale=attention.scale)  # the mean over this rank's heads
            encoding.received[layer] = gather(received[:, None], 1).mean(1)

    return hook


def reshape(encoding: EncoderCall, adapter: Adapter) -> None:
    """Give what was recorded the shape that it has in transformers.

    There, what Qwen-VL's merger reads is rows. And images of one request are padded to equally many tiles; vLLM encodes
    the padding, too.
    """
    features = encoding.projector_input
    if features is not None and isinstance(adapter, Qwen2VL):
        encoding.projector_input = features.flatten(0, -2)
    if encoding.kind == "image" and isinstance(adapter, LlavaNext):
        inputs = encoding.inputs or {}
        real, padded = adapter.crops(inputs), [len(image) for image in inputs[PIXELS["image"]]]

        def cut(values: Tensor) -> Tensor:
            return torch.cat([own[:count] for own, count in zip(values.split(padded), real, strict=True)])

        if features is not None:
            encoding.projector_input = cut(features)
        for recorded_of in (encoding.rows, encoding.received, encoding.keys, encoding.outputs):
            recorded_of.update({layer: cut(values) for layer, values in recorded_of.items()})

# SPDX-License-Identifier: Apache-2.0
"""What pruned generation has to compute, for every family, written without a line of the hooks.

One sample at a time, without padding and without a cache: a plain loop over the decoder layers runs over the prompt and
everything that was generated, and takes visual tokens out of the sequence where it is told to.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtprune.adapters import adapter_for
from vtprune.testing.around_layers import (
    close_streams,
    embed,
    enter,
    entering_scale,
    layer_kind,
    open_streams,
    rotary,
    run_layer,
    to_logits,
)
from vtprune.testing.written import written
from vtprune.transformers_private import attention_back_end

PIXELS = {"image": ("pixel_values", "pixel_values_images", "image_pixel_values"), "video": ("pixel_values_videos",)}
"""Kind of medium -> names of the argument that carries its pixels."""


@dataclass(frozen=True)
class Vision:
    """What the encoder gave for a prompt."""

    columns: Tensor
    """(visual tokens,) ascending columns of the prompt that hold features"""
    features: Tensor
    """(visual tokens, dim)"""
    deepstack: dict[int, Tensor]
    """decoder layer -> (visual tokens, dim), added on its input; empty for most models"""
    indicators: tuple[Tensor, Tensor]
    """columns, and (columns, dim): text whose embeddings come with the encoder's output; none in most models"""

    def averaged(self, kept: Tensor, sources: Tensor) -> Vision:
        """Each kept token, and what is added to it later, as the mean of the tokens that went into it."""
        deepstack = {layer: self.mean(added, kept, sources) for layer, added in self.deepstack.items()}
        return replace(self, features=self.mean(self.features, kept, sources), deepstack=deepstack)

    def mean(self, values: Tensor, kept: Tensor, sources: Tensor) -> Tensor:
        """(visual tokens, dim): values of which each kept token has the mean of those that went into it."""
        values, sources = values.clone(), sources.to(values.device)
        means = [values[sources == index].mean(0) for index in range(len(kept))]
        if means:
            values[torch.searchsorted(self.columns, kept)] = torch.stack(means)
        return values


@dataclass(frozen=True)
class Merges:
    """What a method put in the place of the visual tokens that it kept, as it said itself."""

    values: Sequence[tuple[int, Tensor, Tensor]]
    """Decoder layer, columns (tokens,), features (tokens, dim): what stands in these columns on the layer's input."""
    sources: Sequence[Tensor]
    """One a layer, (visual tokens,): index in `kept` of that layer that each visual token went into, or -1."""


@torch.no_grad()
def recompute(
    model,
    inputs: dict[str, Tensor],
    generated: Tensor,
    kept: list[Tensor],
    positions: str = "original",
    sources: Tensor | None = None,
    cached: list[Tensor] | None = None,
    merges: Merges | None = None,
) -> Tensor:
    """Logits (tokens, vocabulary) of one sample; rows of dropped columns are NaN.

    Args:
        inputs: of a single prompt without padding.
        generated: (new tokens,), what followed the prompt.
        kept: one LongTensor a layer, the visual columns of the prompt alive in it.
        positions: "original" (those of the unpruned model), "compact" (once anything is removed, a token's rank in
            the layer's sequence) or "compact once" (its rank in the first layer's if anything is missing there).
        sources: (visual tokens,), if features were averaged before the LLM: index in `kept[0]` that each went into, or
            -1.
        cached: one LongTensor a layer, the columns of `kept` that what was generated still sees in it; default all.
        merges: values that were merged in any other way, at any layer; instead of `sources`.
    """
    decoder = adapter_for(model).language_model
    device = inputs["input_ids"].device
    generated, kept = generated.to(device), [columns.to(device) for columns in kept]
    ids = torch.cat([inputs["input_ids"][0], generated])
    hidden = embed(model, ids)
    if "input_features" in inputs:
        audio = {key: inputs[key] for key in ("input_features", "feature_attention_mask")}
        heard = model.get_audio_features(**audio, return_dict=True).last_hidden_state
        hidden[(inputs["input_ids"][0] == model.config.audio_token_id).nonzero()[:, 0]] = heard
    if "input_values" in inputs:
        heard = model.base_model.get_audio_features(inputs["input_values"], inputs["input_values_mask"]).pooler_output
        hidden[(inputs["input_ids"][0] == model.config.audio_token_id).nonzero()[:, 0]] = heard
    vision = look(model, inputs)
    if sources is not None:
        vision = vision.averaged(kept[0], sources)
    hidden = enter(decoder, hidden, vision)
    original = prompt_positions(model, inputs, len(generated))
    blocks = prompt_blocks(model, inputs, len(generated))

    embedded = None
    columns = torch.arange(len(ids), device=device)
    text = columns[~torch.isin(columns, vision.columns)]
    if positions == "compact once":
        entering = torch.isin(columns, torch.cat([text, kept[0]]))
        if not entering.all():
            original = (entering.cumsum(0) - 1).expand(*original.shape)
    handed = _handed_on(decoder)
    assert len(kept) == len(decoder.layers), "this is not one number a layer"
    for index, alive in enumerate(kept):
        assert torch.isin(alive, vision.columns).all(), "these are not visual columns"
        wanted = torch.cat([text, alive])
        rows = torch.isin(columns, wanted)
        assert int(rows.sum()) == len(wanted), "a dropped token came back in a later layer"
        columns, hidden = columns[rows], hidden[rows]
        for layer_index, where, values in merges.values if merges is not None else ():
            if layer_index == index:
                there = torch.isin(where.to(device), columns)
                scaled = values.to(hidden)[there] * (entering_scale(decoder, vision) if index == 0 else 1)
                hidden[torch.searchsorted(columns, where.to(device)[there])] = scaled.view(-1, *hidden.shape[1:])
        if index == 0:
            embedded = _by_layer(decoder, ids, vision.columns, columns, hidden)
            hidden = open_streams(decoder, hidden)
        kind = layer_kind(decoder.config, index)
        ranks = torch.arange(len(columns), device=device)
        renumbered = positions == "compact" and len(columns) < len(ids)
        place = ranks.expand(*original.shape[:-1], -1) if renumbered else original[..., columns]
        carries_state = kind in ("linear_attention", "conv", "moe", "mlp")  # sees all that came before, or nothing
        mask = None if carries_state else _mask(model, kind, blocks[columns], hidden.dtype)
        if cached is not None and not carries_state:
            evicted = torch.isin(columns, alive) & ~torch.isin(columns, cached[index].to(device))
            later = columns >= len(ids) - len(generated)
            mask = mask.masked_fill(later[:, None] & evicted, torch.finfo(hidden.dtype).min)
        if kind == "reference_sliding_attention":  # a window of the answer alone
            far = columns[:, None] - columns >= decoder.config.sliding_window
            mask = mask.masked_fill(far & (columns >= len(ids) - len(generated)), torch.finfo(hidden.dtype).min)
        if decoder.config.model_type == "glm5_next_text":  # its index is told which columns are padding
            mask = ranks[None] >= 0
        if embedded is not None:
            handed["per_layer_input"] = embedded[columns, index][None]
        if "ple_input_ids" in handed:
            handed["ple_input_ids"] = ids[columns][None]
        if "moe_mm_token_type_ids" in handed:  # what is generated is text
            handed["moe_mm_token_type_ids"] = pad(inputs["moe_mm_token_type_ids"], (0, len(generated)))[:, columns]
        output = run_layer(
            decoder,
            index,
            hidden,
            attention_mask=mask,
            **rotary(decoder, index, hidden[None], place),
            # FlashAttention takes gaps for the borders of packed sequences.
            position_ids=ranks[None] if mask is None or place.ndim == 3 else place,
            **handed,
        )
        if "prev_topk_indices" in handed:
            output, handed["prev_topk_indices"] = output
        hidden = output[0]
        if index + 1 in vision.deepstack:
            added = hidden.new_zeros(len(ids), hidden.shape[-1])
            features = vision.deepstack[index + 1]
            added[vision.columns] = features if merges is None else vision.mean(features, alive, merges.sources[index])
            hidden = hidden + added[columns]

    last = to_logits(model, close_streams(decoder, hidden))
    logits = last.new_full((len(ids), last.shape[-1]), float("nan"))
    logits[columns] = last
    return logits


def _handed_on(decoder) -> dict[str, Any]:
    """Arguments of the first layer that hand something on to later ones, where layers take them."""
    given = {"prev_topk_indices": None, "shared_kv_states": {}, "ple_input_ids": None, "moe_mm_token_type_ids": None}
    accepted = inspect.signature(type(decoder.layers[0]).forward).parameters
    return {name: value for name, value in given.items() if name in accepted}


def _by_layer(decoder, ids: Tensor, visual: Tensor, columns: Tensor, hidden: Tensor) -> Tensor | None:
    """(tokens, layers, dim): what Gemma 3n and Gemma 4 add in each layer to the columns that enter the first one as
    `hidden` (n, dim); None for others. Visual tokens have the embedding of padding."""
    if not getattr(decoder.config, "hidden_size_per_layer_input", 0):
        return None
    own = ids.index_fill(0, visual, decoder.config.pad_token_id)
    embedded = decoder.get_per_layer_inputs(own[None])[0]
    embedded[columns] = decoder.project_per_layer_inputs(hidden[None], embedded[None, columns])[0]
    return embedded


_ROPE_ARGUMENTS = {"video_second_per_grid": "second_per_grids"}
"""What a model is called with -> what its `get_rope_index` calls it, where the two differ."""


def visual_columns(model, inputs: dict[str, Tensor]) -> Tensor:
    """(visual tokens,) columns of a single prompt that hold features."""
    ids = inputs["input_ids"][0]
    return torch.isin(ids, torch.tensor([*_placeholders(model).values()], device=ids.device)).nonzero().flatten()


def keep_all(model, inputs: dict[str, Tensor]) -> list[Tensor]:
    """`kept` of a model that prunes nothing."""
    return [visual_columns(model, inputs)] * len(adapter_for(model).decoder_layers)


def _placeholders(model) -> dict[str, int]:
    return dict(adapter_for(model).visual_token_ids)


def encoded(model, inputs: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, dict[str, Tensor], Any]]:
    """Kind, columns of its visual tokens, arguments and output of each encode call that a single prompt needs."""
    ids = inputs["input_ids"][0]
    for kind, placeholder in _placeholders(model).items():
        if "image_pixel_values" in inputs:
            yield kind, (ids == placeholder).nonzero().flatten(), *written(model, inputs, placeholder)
        elif any(name in inputs for name in PIXELS[kind]):
            encode = getattr(model.base_model, f"get_{kind}_features", None)
            if encode is None:  # videos are encoded as images
                encode, arguments = model.base_model.get_image_features, {"pixel_values": inputs[PIXELS[kind][0]]}
            else:
                accepted = inspect.signature(encode).parameters
                arguments = {key: value for key, value in inputs.items() if key in accepted}
            yield kind, (ids == placeholder).nonzero().flatten(), arguments, encode(**arguments, return_dict=True)


def look(model, inputs: dict[str, Tensor]) -> Vision:
    """Features from the model's own `get_image_features` and `get_video_features`."""
    ids = inputs["input_ids"][0]
    columns, deepstack, nothing = [ids[:0]], [], model.get_input_embeddings()(ids[:0])
    features, indicators = [nothing], (ids[:0], nothing)
    for kind, placeholders, _, output in encoded(model, inputs):
        columns.append(placeholders)
        deepstack.append(_deepstack(output))
        if hasattr(output, "visual_indicator_features"):
            marks = torch.tensor(model.config.visual_indicator_token_ids, device=ids.device)
            there, which = (ids[:, None] == marks).nonzero(as_tuple=True)
            indicators = there, output.visual_indicator_features[which]
        entering = _features(model, output)
        if entering is None:  # all that there is of these tokens is added in layers
            features.append(torch.zeros_like(deepstack[-1][0]))
        else:
            rows = torch.cat([part.flatten(0, -2) for part in entering])
            left = inputs.get("video_compression_mask") if kind == "video" else None
            features.append(rows if left is None else rows[left])
    where, order = torch.cat(columns).sort()
    layers = deepstack[0] if deepstack else {}
    stacked = {layer: torch.cat([of_kind[layer] for of_kind in deepstack])[order] for layer in layers}
    return Vision(where, torch.cat(features)[order], stacked, indicators)


def _deepstack(output) -> dict[int, Tensor]:
    """Decoder layer -> (visual tokens, dim) to be added on its input, from what an encode call returned: what is added
    behind layer 0, 1, ..., or pairs of a layer and what is added before it."""
    found = {}
    for index, entry in enumerate(getattr(output, "deepstack_features", None) or []):
        layer, parts = entry if isinstance(entry[0], int) else (index + 1, entry)
        found[layer] = torch.cat(list(parts))
    return found


def _features(model, output: Any) -> Any:
    """What enters the language model, of an encode call's output; None if nothing does."""
    if model.config.model_type == "llama4":
        return model.multi_modal_projector(output.last_hidden_state)
    if model.config.model_type == "fuyu":
        return [output.last_hidden_state]
    if model.config.model_type == "molmo2":
        placeholder = torch.tensor(model.config.image_patch_id, device=output.pooler_output[0].device)
        return [part + model.get_input_embeddings()(placeholder) for part in output.pooler_output]
    return output.pooler_output


def prompt_positions(model, inputs: dict[str, Tensor], generated: int) -> Tensor:
    """(1, tokens), or (3, 1, tokens) for three axes: positions of the unpruned sequence."""
    length = inputs["input_ids"].shape[1]
    base = model.base_model
    if hasattr(base, "get_rope_index"):
        accepted = inspect.signature(base.get_rope_index).parameters
        named = {_ROPE_ARGUMENTS.get(key, key): value for key, value in inputs.items()}
        if "feature_attention_mask" in inputs:
            named["audio_seqlens"] = inputs["feature_attention_mask"].sum(1)
        prompt, _ = base.get_rope_index(**{key: value for key, value in named.items() if key in accepted})
        return torch.cat([prompt, prompt[..., -1:] + 1 + torch.arange(generated, device=prompt.device)], -1)
    first = 1 if model.config.model_type == "paligemma" else 0
    return torch.arange(first, first + length + generated, device=inputs["input_ids"].device)[None]


def prompt_blocks(model, inputs: dict[str, Tensor], generated: int) -> Tensor:
    """(tokens,) number of the block of tokens that all see one another; -1 for none."""
    ids = inputs["input_ids"]
    blocks = adapter_for(model).blocks(inputs)
    prompt = torch.full_like(ids[0], -1) if blocks is None else blocks[0].to(ids)
    return pad(prompt, (0, generated), value=-1)


def _mask(model, kind: str, blocks: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(1, 1, n, n) additive mask over the tokens that are there; None for FlashAttention, which is causal by itself.

    blocks: (n,), as in `prompt_blocks`.
    """
    adapter = adapter_for(model)
    if "flash" in attention_back_end(adapter.language_model.config):
        return None
    blocks = blocks if adapter.has_blocks(kind) else torch.full_like(blocks, -1)
    ranks = torch.arange(len(blocks), device=blocks.device)
    distance = ranks[:, None] - ranks
    causal = distance >= 0
    together = (blocks[:, None] == blocks) & (blocks >= 0)
    window = torch.ones_like(causal)
    if kind == "sliding_attention":
        window = distance < adapter.language_model.config.sliding_window
    allowed = window & (causal | together) if adapter.window_cuts_blocks else (window & causal) | together
    mask = torch.zeros(allowed.shape, dtype=dtype, device=blocks.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[None, None]

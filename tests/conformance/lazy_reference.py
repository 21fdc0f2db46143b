# SPDX-License-Identifier: Apache-2.0
"""Pruning with revival for one sample, written without a line of the library, and without a cache.

Every layer remembers what each token came in with. What a step has to compute in a layer is computed there among all
tokens it may see, whose keys and values are made anew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import vtprune
from vtprune.testing.around_layers import enter, layer_kind, rotary, to_logits
from vtprune.testing.attention import eager
from vtprune.testing.recompute import look, prompt_blocks, prompt_positions


class Lazy(NamedTuple):
    logits: Tensor
    """(new tokens, vocabulary): of the prompt's last token, then of every generated one"""
    cached: list[list[int]]
    """a layer each: visual columns that were computed there in any step"""
    revived: int
    """how often a token was computed in a layer in a later step than it came to its first"""


def cuts_of(report, sample: int = 0, separators: int = 0) -> dict[int, int]:
    """`cuts` of a sample, as a report gives the counts; separators: newline tokens of the sample, which never go."""
    counts = report.counts[sample].tolist()
    return {layer: n - separators for layer, n in enumerate(counts) if layer and n < counts[layer - 1]}


@torch.no_grad()
def lazy_recompute(model, inputs: dict[str, Tensor], generated: Tensor, cuts: dict[int, int]) -> Lazy:
    """What generation has to compute if, before each layer of `cuts`, so many visual tokens as it says are let through:
    those of the largest attention of the step's last token in the layer before, mean over heads.

    inputs: a single prompt without padding. generated: (new tokens,).
    """
    decoder = vtprune.adapter_for(model).language_model
    assert all(layer_kind(decoder.config, index) == "full_attention" for index in range(len(decoder.layers)))
    ids = torch.cat([inputs["input_ids"][0], generated])
    length = inputs["input_ids"].shape[1]
    vision = look(model, inputs)
    embedded = enter(decoder, model.get_input_embeddings()(ids), vision)
    deepstack = {}
    for layer, added in vision.deepstack.items():
        deepstack[layer] = torch.zeros_like(embedded)
        deepstack[layer][vision.columns] = added
    positions = prompt_positions(model, inputs, len(generated))
    blocks = prompt_blocks(model, inputs, len(generated))
    visual = set(vision.columns.tolist()) - separators(model, inputs)
    # By layer and column: the state a token came in with, and that of tokens which came as far and no further.
    entered: list[dict[int, Tensor]] = [{} for _ in decoder.layers]
    parked: dict[int, dict[int, Tensor]] = {cut: {} for cut in cuts}
    logits, revived = [], 0

    with eager(model):  # whose layers return their weights
        for step in range(len(generated) + 1):
            new = list(range(length)) if step == 0 else [length + step - 1]
            flow = {column: embedded[column] for column in new}
            seen, weights = sorted(visual), {}
            for index in range(len(decoder.layers)):
                if index in cuts:
                    seen = sorted(seen, key=lambda column: -weights[column])[: cuts[index]]
                    pool = parked[index] | {column: state for column, state in flow.items() if column in visual}
                    go = {column: state for column, state in pool.items() if column in seen}
                    parked[index] = {column: state for column, state in pool.items() if column not in seen}
                    flow = {column: state for column, state in flow.items() if column not in visual} | go
                revived += len(visual.intersection(flow)) if step else 0
                entered[index] |= flow
                context = sorted(column for column in entered[index] if column not in visual or column in seen)
                places = torch.tensor(context)
                states = torch.stack([entered[index][column] for column in context])
                states, rows = _run(decoder, index, states, positions[..., places], blocks[places])
                weights = dict(zip(context, rows[:, context.index(new[-1])].mean(0).tolist(), strict=True))
                flow = {column: states[context.index(column)] for column in flow}
                if index + 1 in deepstack:
                    flow = {column: state + deepstack[index + 1][column] for column, state in flow.items()}
            logits.append(to_logits(model, decoder.norm(flow[new[-1]])))
    return Lazy(torch.stack(logits), [sorted(visual.intersection(known)) for known in entered], revived)


@torch.no_grad()
def separators(model, inputs: dict[str, Tensor]) -> set[int]:
    """Columns of a single prompt that hold newline tokens and the like: the same whatever an image shows."""
    shown = [inputs, {key: -0.5 * x if key.startswith("pixel_values") else x for key, x in inputs.items()}]
    one, other = (look(model, pictures) for pictures in shown)
    first, second = (vision.deepstack.get(0, vision.features) for vision in (one, other))
    return set(one.columns[(first == second).all(-1)].tolist())


def _run(decoder, index: int, states: Tensor, positions: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Output (n, dim) of a layer for states (n, dim), and its attention weights (heads, n, n)."""
    layer, ranks = decoder.layers[index], torch.arange(len(states))
    allowed = (ranks[:, None] >= ranks) | ((blocks[:, None] == blocks) & (blocks >= 0))
    mask = torch.zeros(allowed.shape, dtype=states.dtype).masked_fill(~allowed, torch.finfo(states.dtype).min)
    weights = []
    hook = layer.self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    try:
        output = layer(
            states[None],
            attention_mask=mask[None, None],
            **rotary(decoder, index, states[None], positions),
            position_ids=ranks[None] if positions.ndim == 3 else positions,
        )
    finally:
        hook.remove()
    return output[0], weights[0][0]

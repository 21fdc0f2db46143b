# SPDX-License-Identifier: Apache-2.0
"""Drops visual tokens from the sequence of a forward call, as a selection says."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.devices import send
from vtprune.stages.call import Call
from vtprune.stages.layout import Groups, SequenceLayout, take_columns
from vtprune.tokens import Selection


def cut_sequence(
    call: Call,
    hidden: Tensor,
    groups: Groups,
    selection: Selection,
    layer: int,
    *,
    compact: bool,
    keep_separators: bool = False,
    masking: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Drop what a selection leaves out, on the input (batch, n, dim) of a decoder layer.

    keep_separators: also those of lines of which nothing is kept. masking: drop by hiding it from that layer on,
        instead of taking it out.
    Returns the shorter input and the indices (batch, m) of its columns; None if everything survives.
    """
    sequence = call.sequence
    selected = selection.on_host()
    kept = selected.keep & groups.valid
    if torch.equal(kept, groups.valid):
        return None
    if selection.features is not None:
        changed = selection.keep[..., None].to(hidden.device)
        hidden = groups.scatter(torch.where(changed, selection.features.to(hidden), groups.gather(hidden)), hidden)
    keep = groups.scatter(kept, sequence.real)
    if not keep_separators:
        keep &= ~idle_separators(call, keep)
    merged_into = sequence.merged_after(groups, selected, keep)
    if masking:
        index = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        after = sequence.hide(keep, merged_into)
    else:
        after, index = sequence.cut(keep, merged_into, compact=compact)
        index = send(index, hidden.device)
        hidden = take_columns(hidden, index)
    # A masked key still multiplies its value by zero, and 0 * NaN is NaN.
    if not bool(after.present.all()):
        hidden = hidden.masked_fill(~send(after.present, hidden.device)[..., None], 0)
    if call.starts[-1] == layer:
        call.sequence_layouts[-1] = after
    else:
        call.sequence_layouts.append(after)
        call.starts.append(layer)
    call.memo.clear()
    call.update_cache_layouts(layer)
    return hidden, index


def idle_separators(call: Call, keep: Tensor, sequence: SequenceLayout | None = None) -> Tensor:
    """(batch, n) bool: separators (newline tokens) of lines, or of whole images, of which nothing is kept, by default
    of those now."""
    sequence = sequence or call.sequence
    lines, content = call.alive(call.media.lines, sequence), call.crop_labels(sequence) >= 0
    separators = sequence.visual & ~content
    if not bool(separators.any()):
        return separators

    def is_empty(parts: Tensor) -> Tensor:
        """(batch, n) bool: whether no content is kept of the part that each column is in, -1 for none."""
        held = parts.new_zeros(int(parts.max()) + 2, dtype=torch.bool)
        held[parts[keep & content] + 1] = True
        return ~held[parts + 1]

    return separators & torch.where(lines >= 0, is_empty(lines), is_empty(call.alive(call.media.images, sequence)))

# SPDX-License-Identifier: Apache-2.0
"""Where the columns of a forward call are after each cut: compaction, groups of visual tokens, positions.

All of it is on the CPU, position ids excepted: where a call runs on an accelerator, nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vtprune.devices import send
from vtprune.tokens import Selection


def compact_columns(keep: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """(batch, n) bool -> indices (batch, m) of the kept columns in order, right-aligned, and which of them are real.

    m is the largest number kept in a row; shorter rows are filled on the left with columns marked False. most: that
    number, for those who know it.
    """
    m = max(int(keep.sum(1).max()) if most is None else most, 1)
    index = torch.argsort(keep.to(torch.uint8), dim=1, stable=True)[:, -m:]
    return index, keep.gather(1, index)


def take_columns(x: Tensor, index: Tensor) -> Tensor:
    """Gather columns: x (batch, n) or (batch, n, dim), index (batch, m)."""
    index = send(index, x.device)
    return x.gather(1, index if x.ndim == 2 else index[..., None].expand(-1, -1, x.shape[2]))


def spread_columns(columns: Tensor, values: Tensor, length: int) -> Tensor:
    """values (batch, n[, dim]) of columns (batch, n) -> (batch, length[, dim]), 0 or False elsewhere.

    Where columns repeat, flags are joined by "or".
    """
    if values.dtype == torch.bool:
        counts = torch.zeros(len(columns), length, dtype=torch.long, device=columns.device)
        return counts.scatter_add(1, columns, values.to(columns.device).long()) > 0
    out = values.new_zeros(len(columns), length, values.shape[-1])
    return out.scatter(1, send(columns, values.device)[..., None].expand_as(values), values)


@dataclass(frozen=True)
class Groups:
    """Groups of visual tokens inside a batch of sequences."""

    rows: Tensor
    """(groups,) long: the sample of each group."""
    columns: Tensor
    """(groups, tokens) long: where each token stands in its sample's current sequence; 0 for padding."""
    valid: Tensor
    """(groups, tokens) bool."""
    images: Tensor
    """(groups,) long: the image or video each group is of; -1 for groups of several."""
    _sent: dict[torch.device, Groups] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The same on other devices."""

    @classmethod
    def of_labels(cls, labels: Tensor, rows: Tensor, images: Tensor) -> Groups:
        """From labels (batch, n), -1 or a group's number, and every group's sample and image, (groups,) each."""
        row, column = (labels >= 0).nonzero(as_tuple=True)
        group = labels[row, column]
        order = group.argsort(stable=True)
        column, group = column[order], group[order]
        lengths = torch.bincount(group, minlength=len(rows))
        slot = torch.arange(len(group), device=labels.device) - (lengths.cumsum(0) - lengths)[group]
        columns = labels.new_zeros(len(rows), max(int(lengths.max()), 1) if len(rows) else 1)
        valid = torch.zeros_like(columns, dtype=torch.bool)
        columns[group, slot] = column
        valid[group, slot] = True
        return cls(rows, columns, valid, images)

    @classmethod
    def of_rows(cls, flags: Tensor) -> Groups:
        """One group a sample, of the columns marked in `flags` (batch, n). Of an accelerator one value is read."""
        rows, lengths = torch.arange(len(flags), device=flags.device), flags.sum(1)
        most = max(int(lengths.max()), 1) if len(flags) else 1
        valid = torch.arange(min(most, flags.shape[1]), device=flags.device) < lengths[:, None]
        columns = (~flags).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        return cls(rows, columns.masked_fill(~valid, 0), valid, torch.full_like(rows, -1))

    def on(self, device: torch.device) -> Groups:
        """The same groups, on a device."""
        if device == self.rows.device:
            return self
        if device not in self._sent:
            parts = (self.rows, self.columns, self.valid, self.images)
            self._sent[device] = Groups(*(send(part, device) for part in parts))
        return self._sent[device]

    def gather(self, x: Tensor) -> Tensor:
        """x (batch, n) or (batch, n, dim) -> (groups, tokens) or (groups, tokens, dim); padding becomes zero."""
        there = self.on(x.device)
        taken = x[there.rows[:, None], there.columns]
        return taken.masked_fill_(~(there.valid if x.ndim == 2 else there.valid[..., None]), 0)

    def scatter(self, flags: Tensor, into: Tensor) -> Tensor:
        """Copy of `into` (batch, n[, dim]) with `flags` (groups, tokens[, dim]) written at the groups' tokens."""
        group, slot = self.valid.nonzero(as_tuple=True)
        places = (self.rows[group], self.columns[group, slot], group, slot)
        rows, columns, group, slot = (send(place, into.device) for place in places)
        out = into.clone()
        out[rows, columns] = send(flags, into.device).to(into.dtype)[group, slot]
        return out


@dataclass(frozen=True)
class SequenceLayout:
    """The layout of the sequence between two cuts of one forward call. Columns are those of the call."""

    columns: Tensor
    """(batch, n) long: the call's column that each current column was."""
    real: Tensor
    """(batch, n) bool: False for padding, and for what is masked."""
    visual: Tensor
    """(batch, n) bool: the visual tokens alive, separators included."""
    positions: Tensor
    """(..., batch, n) long: position ids, as the call gave them or compacted since; M-RoPE has leading axes."""
    end: Tensor
    """(batch, 1) long: position of the last token, after which those still to come count on."""
    merged_into: Tensor
    """(batch, call length) long: the column each column of the call went into (itself while alive), -1 if dropped."""
    dropped: int = 0
    """Call length minus n."""
    masked: Tensor | None = None
    """(batch, n) bool: visual tokens that were dropped by masking alone: they are still computed and cached, but no one
    attends to them. None for none."""

    @classmethod
    def whole(cls, real: Tensor, visual: Tensor, positions: Tensor) -> SequenceLayout:
        """Nothing cut yet. positions (..., batch | 1, length)."""
        columns = torch.arange(real.shape[1], device=real.device).expand_as(real)
        positions = positions.expand(*positions.shape[:-2], *real.shape)
        last = torch.where(real, columns, 0).amax(1, keepdim=True)
        return cls(columns, real, visual, positions, counted_from(positions, last), columns)

    @property
    def present(self) -> Tensor:
        """(batch, n) bool: False for padding alone."""
        return self.real if self.masked is None else self.real | self.masked

    @property
    def computed(self) -> Tensor:
        """(batch, n) bool: the visual tokens alive, and those masked."""
        return self.visual if self.masked is None else self.visual | self.masked

    def padding(self) -> Tensor | None:
        """`real`, or None if every column is."""
        return None if bool(self.real.all()) else self.real

    def merged_after(self, groups: Groups, selection: Selection, keep: Tensor) -> Tensor:
        """`merged_into` once a selection is applied; keep (batch, n) bool over the current columns."""
        target = self.columns.masked_fill(~keep, -1)
        if selection.sources is not None:
            into = groups.columns.gather(1, selection.sources.clamp(min=0))
            columns = self.columns[groups.rows[:, None], into].masked_fill(selection.sources < 0, -1)
            target = groups.scatter(columns, target)
        # What had gone into a column goes where that column goes now.
        after = torch.full_like(self.merged_into, -1).scatter(1, self.columns, target)
        return torch.where(self.merged_into >= 0, after.gather(1, self.merged_into.clamp(min=0)), -1)

    def cut(self, keep: Tensor, merged_into: Tensor, *, compact: bool) -> tuple[SequenceLayout, Tensor]:
        """Keep the columns `keep` (batch, n) bool; padding always goes, and so does what is masked.

        compact: renumber positions from that of the first token on; all axes of M-RoPE then hold a token's rank. A
        sample that loses nothing keeps its positions, as it would alone.
        Returns the new layout and the indices (batch, m) into the current columns.
        """
        index, real = compact_columns(keep & self.real)
        place = send(index, self.positions.device)
        positions = self.positions.gather(-1, place.expand(*self.positions.shape[:-2], *place.shape))
        end = self.end
        if compact:
            parts = (
                self.real.to(torch.uint8).argmax(1, keepdim=True),
                real.cumsum(1) - 1,
                (self.real & ~keep).any(1, keepdim=True),
            )
            first, rank, shorter = (send(part, positions.device) for part in parts)
            start = last_axis(self.positions).gather(1, first)
            positions = torch.where(shorter, (start + rank).clamp(min=0), positions)
            end = torch.where(shorter, start + rank[:, -1:], end)
        columns = take_columns(self.columns, index)
        after = replace(
            self,
            columns=columns,
            real=real,
            visual=take_columns(self.visual, index) & real,
            positions=positions,
            end=end,
            merged_into=merged_into,
            dropped=self.dropped + self.columns.shape[1] - columns.shape[1],
            masked=None,
        )
        return after, index

    def hide(self, keep: Tensor, merged_into: Tensor) -> SequenceLayout:
        """Mask the columns that are not in `keep` (batch, n) bool; all stay where they are."""
        masked = self.present & ~(self.real & keep)
        return replace(self, real=self.real & keep, visual=self.visual & keep, merged_into=merged_into, masked=masked)

    def places(self) -> Tensor:
        """(batch, length) long: where in the sequence each column of the call stands; 0 if it is not there."""
        here = torch.arange(self.columns.shape[1], device=self.columns.device).expand_as(self.columns)
        return torch.zeros_like(self.merged_into).scatter(1, self.columns, here)

    def takes_from(self, earlier: SequenceLayout) -> Callable[[Tensor], Tensor]:
        """What takes values (batch, n, ...) of the columns of an earlier layout of the call to those that are left."""
        if earlier is self:
            return lambda values: values

        def take(values: Tensor) -> Tensor:
            index = earlier.places().gather(1, self.columns)
            taken = take_columns(values.flatten(2) if values.ndim > 3 else values, index)
            return taken.unflatten(2, values.shape[2:]) if values.ndim > 3 else taken

        return take

    def restore(self, hidden: Tensor, length: int) -> Tensor:
        """(batch, n, dim) back to (batch, length, dim): a dropped column carries the state of the nearest surviving
        token before it (whose successor in the pruned sequence is the next surviving token), zeros if there is none."""
        n = hidden.shape[1]
        slots = torch.arange(1, n + 1).expand(len(hidden), n).masked_fill(~self.present, 0)
        # Two slots never share a real column; padding slots write 0, which no maximum can prefer.
        latest = torch.zeros(len(hidden), length, dtype=torch.long)
        latest = latest.scatter_reduce(1, self.columns, slots, "amax").cummax(1).values
        latest = send(latest, hidden.device)
        restored = take_columns(hidden, (latest - 1).clamp(min=0))
        return restored.masked_fill((latest == 0)[..., None], 0)


def counted_from(positions: Tensor, last: Tensor) -> Tensor:
    """(batch, 1): the position from which callers count on, for positions (..., batch, n) whose last token stands in
    the columns `last` (batch, 1).

    `generate()` hands in a row of text positions beside the axes of M-RoPE and adds one to each. Calls without it go on
    behind the largest position of all axes, which a long video's can be.
    """
    if positions.ndim == 3 and len(positions) == 3:
        return positions.amax(0).amax(1, keepdim=True)
    return last_axis(positions).gather(1, send(last, positions.device))


def last_axis(positions: Tensor) -> Tensor:
    """(..., batch, n) -> (batch, n): the only axis, or the last one of M-RoPE; text has the same position on all."""
    return positions.reshape(-1, *positions.shape[-2:])[-1]

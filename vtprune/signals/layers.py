# SPDX-License-Identifier: Apache-2.0
"""Signals that are read between the layers of the LLM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from vtprune.attention import LayerAttention
    from vtprune.stages.layout import Groups
from vtprune.signals.encoder import EncoderSignal, EncoderView


class LayerView(Protocol):
    """What a signal may look at on the input of a decoder layer. n are the columns left of the prompts, padded."""

    @property
    def layer(self) -> int:
        """The decoder layer that runs next, 0-based."""

    @property
    def hidden(self) -> Tensor:
        """(batch, n, dim): what enters it."""

    @property
    def groups(self) -> Groups:
        """The visual tokens of each sample: `gather` takes (batch, n[, dim]) to (groups, tokens[, dim])."""

    @property
    def real(self) -> Tensor:
        """(batch, n) bool: False for padding, and for what an earlier cut hid."""

    @property
    def present(self) -> Tensor:
        """(batch, n) bool: `real`, and what an earlier cut hid but is still computed."""

    @property
    def visual(self) -> Tensor:
        """(batch, n) bool."""

    @property
    def padded_length(self) -> Tensor:
        """(batch, 1) long: columns of the prompts as they came in, padding included."""

    def normed(self) -> Tensor:
        """(batch, n, dim): `hidden`, put through the LLM's last normalisation."""

    def text_rows(self, *, last_only: bool = False) -> tuple[Tensor, Tensor]:
        """Columns (batch, r) of the prompt's text after its last visual token, and which of them are real rows.

        Samples without such text, and `last_only`, give the prompt's last column.
        """

    def rows_of(self, marked: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (batch, r) of what is marked, (batch, n) bool, and which are real rows; the prompt's last column
        where nothing is."""

    def attention(self, layer: int) -> LayerAttention:
        """The attention of a decoder layer that `LayerSignal.attends` names, or of the next one (`ahead`)."""

    def measured(self, signal: LayerSignal) -> Tensor:
        """(batch, n): what `signal.measure` gave so far, summed. Raises UnsupportedStageError before the first time."""

    def marked(self, signal: LayerSignal) -> Tensor:
        """(batch, n) bool: what `signal.mark` marked that is left."""

    def encoded(self, signal: EncoderSignal) -> tuple[Groups, Any]:
        """A signal of the encoder, listed by the same method, and the groups that it is of: the visual tokens of
        each crop."""

    def by_head(self, weights: Tensor) -> Tensor:
        """(batch, heads, n) -> (groups, heads, tokens)."""

    def prompt_keys(self) -> list[int]:
        """One integer a sample, a function of its prompt's text."""


class LayerSignal(ABC):
    """A signal that is read between the decoder layers, during prefill."""

    ahead: ClassVar[bool] = False
    """Whether it reads the attention of the decoder layer that runs next, which is computed ahead for it."""

    def attends(self, cut: int) -> tuple[int, ...]:
        """Decoder layers before `cut` whose attention it reads at a cut on the input of layer `cut`.

        Their projections are kept until then.
        """
        return ()

    def measures(self) -> tuple[int, ...]:
        """Decoder layers of whose attention and MLP block `measure` is called."""
        return ()

    def measure(self, inputs: Tensor, outputs: Tensor, counted: Tensor) -> Tensor:
        """Inputs and outputs (batch, n, dim) of a block -> (batch, n), to be summed up.

        counted: (batch, n) bool, the real columns of the prompt.
        """
        raise NotImplementedError

    def mark(self, view: LayerView) -> Tensor | None:
        """(batch, n) bool on the input of the first layer, remembered for `view.marked`; None for nothing."""
        return None

    @abstractmethod
    def read_layer(self, view: LayerView) -> Any:
        """The signal, on the input of the layer that runs next."""


@dataclass(frozen=True)
class SampleKeys(EncoderSignal, LayerSignal):
    """A list with one integer a group, a function of its sample's prompt and (before the LLM) its image alone.

    For seeded randomness that does not depend on the rest of the batch.
    """

    def read_encoded(self, view: EncoderView) -> list[int]:
        return view.sample_keys()

    def read_layer(self, view: LayerView) -> list[int]:
        return view.prompt_keys()


@dataclass(frozen=True)
class LastQueryAttention(LayerSignal):
    """(groups, heads, tokens): attention of the prompt's last token over the visual tokens in a decoder layer."""

    layer: int
    """0-based; must have run: at most the layer before the cut."""

    def attends(self, cut: int) -> tuple[int, ...]:
        return (self.layer,)

    def read_layer(self, view: LayerView) -> Tensor:
        rows, _ = view.text_rows(last_only=True)
        return view.by_head(view.attention(self.layer).rows(rows)[:, :, 0])


@dataclass(frozen=True)
class InstructionAttention(LayerSignal):
    """(groups, tokens): attention of the text after the last visual token over the visual tokens, averaged over heads
    and rows, in the decoder layer that runs next."""

    ahead: ClassVar[bool] = True

    last_only: bool = False
    """Instead, the row of the prompt's last token alone."""

    def read_layer(self, view: LayerView) -> Tensor:
        rows, valid = view.text_rows(last_only=self.last_only)
        weights = view.attention(view.layer).rows(rows).mean(1)
        valid = valid.to(weights.device)[..., None]
        return view.groups.gather((weights * valid).sum(1) / valid.sum(1))

# SPDX-License-Identifier: Apache-2.0
"""What a method may ask the model for. A signal says what is recorded for it, and how it is read from that.

A method announces its signals in `Method.signals()` and reads them as `tokens[signal]`. It may bring signals of its
own, frozen dataclasses derived from `EncoderSignal`, `LayerSignal` or `CacheSignal`, after the stage they are read at.
A signal may look at what its view offers. The method gets what it returns on the device of the features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from einops import rearrange
from torch import Tensor

from vtprune.tokens import ModelShape

if TYPE_CHECKING:
    from vtprune.attention import LayerAttention
    from vtprune.stages.layout import Groups


# -- before the LLM ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taps:
    """What is recorded while the vision encoder runs. Layers are 0-based."""

    cls_rows: tuple[int, ...] = ()
    """Layers whose attention of the CLS query is kept. Needs a CLS token."""
    received: tuple[int, ...] = ()
    """Layers whose mean attention that each token receives is kept. Needs attention that can be recomputed."""
    keys: tuple[int, ...] = ()
    """Layers whose keys are kept. Needs attention that can be recomputed."""
    outputs: tuple[int, ...] = ()
    """Layers whose outputs are kept."""
    projector_input: bool = False
    """Whether what the projector reads is kept."""


class EncoderRecord(Protocol):
    """What was recorded of one run of the vision encoder. Tokens are its own, a CLS token (if any) included."""

    @property
    def rows(self) -> dict[int, Tensor]:
        """Layer -> (crops, heads, tokens), the CLS query's attention."""

    @property
    def received(self) -> dict[int, Tensor]:
        """Layer -> (crops, tokens)."""

    @property
    def keys(self) -> dict[int, Tensor]:
        """Layer -> (crops, tokens, heads, head dim), before any rotation."""

    @property
    def outputs(self) -> dict[int, Tensor]:
        """Layer -> (crops, tokens, dim)."""


class EncoderView(Protocol):
    """What a signal may look at before the LLM."""

    @property
    def shape(self) -> ModelShape: ...

    def per_token(self, values: Callable[[EncoderRecord], Tensor]) -> Tensor:
        """Values of the encoder's tokens, (crops, tokens, dim) of each run, as those of the visual tokens: (groups,
        tokens, dim), zero for padding. Where several patches become one visual token: their mean."""

    def projector_inputs(self) -> Tensor:
        """(groups, tokens, dim): what the projector reads for each visual token."""

    def normalised(self, output: Tensor) -> Tensor:
        """A layer's output (crops, tokens, dim), put through CLIP's last normalisation."""

    def text_embeddings(self, *, keywords: bool) -> list[Tensor]:
        """See `TextEmbeddings`."""

    def joint_space(self, tower: str) -> tuple[Tensor, Tensor]:
        """See `JointSpace`."""

    def sample_keys(self) -> list[int]:
        """See `SampleKeys`."""


class EncoderSignal(ABC):
    """A signal that is read before the LLM: of the vision encoder, of the question, or of the prompt.

    Inside the LLM, `LayerView.encoded` reads one, too.
    """

    needs_clip: ClassVar[str | None] = None
    """What for the vision encoder has to be a CLIP, in a few words; None if it need not be."""

    def taps(self, shape: ModelShape) -> Taps:
        """What is recorded for it."""
        return Taps()

    def substitute(self, shape: ModelShape) -> str | None:
        """What is read on a model of this shape instead of what the method's paper names, in words, for the report;
        None if nothing else is."""
        return None

    @abstractmethod
    def read_encoded(self, view: EncoderView) -> Any:
        """The signal of the groups that a method chooses among."""


@dataclass(frozen=True)
class EncoderFeatures(EncoderSignal):
    """(groups, tokens, dim): what the projector reads, i.e. the encoder's features of each visual token."""

    def taps(self, shape: ModelShape) -> Taps:
        return Taps(projector_input=True)

    def read_encoded(self, view: EncoderView) -> Tensor:
        return view.projector_inputs()


@dataclass(frozen=True)
class ClsAttention(EncoderSignal):
    """(groups, layers, heads, tokens): post-softmax attention of the encoder's CLS query over the visual tokens."""

    layers: tuple[int, ...]
    """0-based encoder layers."""

    def taps(self, shape: ModelShape) -> Taps:
        return Taps(cls_rows=self.layers)

    def read_encoded(self, view: EncoderView) -> Tensor:
        def by_token(record: EncoderRecord) -> Tensor:
            rows = [record.rows[layer] for layer in self.layers]
            side_by_side = [row.to(rows[0].device) for row in rows]
            return rearrange(side_by_side, "layers crops heads tokens -> crops tokens (layers heads)")

        values = view.per_token(by_token)
        return rearrange(values, "groups tokens (layers heads) -> groups layers heads tokens", layers=len(self.layers))


@dataclass(frozen=True)
class AttentionReceived(EncoderSignal):
    """(groups, tokens): attention that each visual token receives in an encoder layer, the mean over heads and queries.

    For encoders without a CLS token, too. Where several patches become one visual token: their mean.
    """

    layer: int
    """0-based encoder layer."""

    def taps(self, shape: ModelShape) -> Taps:
        return Taps(received=(self.layer,))

    def read_encoded(self, view: EncoderView) -> Tensor:
        return view.per_token(lambda record: record.received[self.layer][..., None])[..., 0]


@dataclass(frozen=True)
class EncoderSaliency(EncoderSignal):
    """(groups, tokens): attention of the CLS query, the mean over heads; where the encoder has no CLS token, what each
    token receives, as in `AttentionReceived`. Where several patches become one visual token: their mean."""

    layer: int
    """0-based encoder layer."""

    def taps(self, shape: ModelShape) -> Taps:
        return Taps(cls_rows=(self.layer,)) if shape.has_cls else Taps(received=(self.layer,))

    def substitute(self, shape: ModelShape) -> str | None:
        return None if shape.has_cls else f"no CLS token; attention received in encoder layer {self.layer} instead"

    def read_encoded(self, view: EncoderView) -> Tensor:
        def by_token(record: EncoderRecord) -> Tensor:
            values = record.rows[self.layer].mean(1) if view.shape.has_cls else record.received[self.layer]
            return values[..., None]

        return view.per_token(by_token)[..., 0]


@dataclass(frozen=True)
class EncoderKeys(EncoderSignal):
    """(groups, tokens, dim): key of each visual token in an encoder layer, without its rotation if there is one.

    For encoders without a CLS token, too. Where several patches become one visual token: their mean.
    """

    layer: int
    """0-based encoder layer."""
    heads: Literal["all", "mean"] = "all"
    """All heads side by side, or their mean."""

    def taps(self, shape: ModelShape) -> Taps:
        return Taps(keys=(self.layer,))

    def read_encoded(self, view: EncoderView) -> Tensor:
        def by_token(record: EncoderRecord) -> Tensor:
            keys = record.keys[self.layer]
            return keys.flatten(2) if self.heads == "all" else keys.float().mean(2)

        return view.per_token(by_token)


@dataclass(frozen=True)
class EncoderOutput(EncoderSignal):
    """(groups, tokens, dim): what an encoder layer puts out for each visual token, before any last normalisation.

    For encoders without a CLS token, too. Where several patches become one visual token: their mean.
    """

    layer: int
    """0-based encoder layer."""
    normalised: bool = False
    """After CLIP's last normalisation, whatever the layer; other encoders are refused."""

    @property
    def needs_clip(self) -> str | None:  # type: ignore[override]
        return "the encoder's last normalisation" if self.normalised else None

    def taps(self, shape: ModelShape) -> Taps:
        return Taps(outputs=(self.layer,))

    def read_encoded(self, view: EncoderView) -> Tensor:
        def output(record: EncoderRecord) -> Tensor:
            values = record.outputs[self.layer]
            return view.normalised(values) if self.normalised else values

        return view.per_token(output)


@dataclass(frozen=True)
class TextEmbeddings(EncoderSignal):
    """A list with one (text tokens, dim) tensor a group: input embeddings of the question.

    From the session's `text` if given; otherwise of the prompt's text tokens after the group's last visual token (of
    all its text tokens if none follow), without bos, eos, padding and what a processor puts around media.
    """

    keywords: bool = False
    """Drop stop words from `text` when it is a string, and look its words up one by one."""

    def read_encoded(self, view: EncoderView) -> list[Tensor]:
        return view.text_embeddings(keywords=self.keywords)


@dataclass(frozen=True)
class JointSpace(EncoderSignal):
    """A pair: (groups, dim), the question by the text tower of the CLIP that is the model's vision encoder, and
    (dim, width), the matrix that takes an `EncoderOutput` to the same space.

    The question is the session's `text`, or the prompt's text as in `TextEmbeddings`, decoded.
    """

    needs_clip: ClassVar[str | None] = "a text tower"

    tower: str
    """Folder or hub id of a transformers CLIP; or "open_clip:NAME@WEIGHTS" with the name of a model that open_clip
    knows, and a file or a tag."""

    def read_encoded(self, view: EncoderView) -> tuple[Tensor, Tensor]:
        return view.joint_space(self.tower)


# -- between the layers of the LLM ------------------------------------------------------------------------------------


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
        """A signal of the encoder, announced by the same method, and the groups that it is of: the visual tokens of
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


# -- after the prefill ------------------------------------------------------------------------------------------------


class CacheView(Protocol):
    """What a signal may look at once the KV cache of a prompt is filled."""

    @property
    def groups(self) -> Groups:
        """The visual tokens of each sample in one cache layer."""

    def alive(self, layer: int) -> Tensor:
        """(groups, tokens) bool: which of them a decoder layer computed, 0-based; -1 is the last."""


class CacheSignal(ABC):
    """A signal that is read once after the prefill, by a method that drops visual tokens from the KV cache."""

    @abstractmethod
    def read_cache(self, view: CacheView) -> Any:
        """The signal of the visual tokens of one cache layer."""

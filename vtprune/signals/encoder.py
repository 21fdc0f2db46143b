# SPDX-License-Identifier: Apache-2.0
"""Signals that are read before the LLM: of the vision encoder, of the question, of the prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from einops import rearrange
from torch import Tensor

from vtprune.tokens import ModelShape


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
            values = self.of_heads(record.rows[self.layer]) if view.shape.has_cls else record.received[self.layer]
            return values[..., None]

        return view.per_token(by_token)[..., 0]

    def of_heads(self, rows: Tensor) -> Tensor:
        """(crops, heads, tokens), the CLS query's attention -> (crops, tokens)."""
        return rows.mean(1)


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

# SPDX-License-Identifier: Apache-2.0
"""MustDrop: merge similar patches in the encoder, drop what the text ignores in the LLM, evict it from the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.methods.base import AfterPrefill, Composite, InEncoder, Method, Share, require_cls
from vtprune.methods.schedules import Progressive
from vtprune.ops.dual_attention import dual_attention, dual_attention_filter, key_tokens
from vtprune.ops.window_merging import window_merging
from vtprune.signals import CacheSignal, CacheView, ClsAttention, LayerSignal, LayerView
from vtprune.tokens import ModelShape, Selection, VisualTokens

PUBLISHED_LAYERS = (3, 7, 11, 15)


@dataclass(frozen=True)
class TextAttention(LayerSignal):
    """(groups, tokens, 2): attention of the text after the last visual token over the visual tokens, averaged over
    heads, in the decoder layer before the cut. First its sum over the text tokens, then its maximum."""

    def attends(self, cut: int) -> tuple[int, ...]:
        return (cut - 1,)

    def read_layer(self, view: LayerView) -> Tensor:
        total, peak = None, None
        for _, real, weights in view.attention(view.layer - 1).blocks_of_rows(*view.text_rows()):
            sums, most = dual_attention(weights * real[:, None, :, None])
            total = sums if total is None else total + sums
            peak = most if peak is None else torch.maximum(peak, most)
        return view.groups.gather(torch.stack([total, peak], -1))


@dataclass(frozen=True)
class KeyTokens(LayerSignal):
    """(groups, tokens) bool: the visual tokens of each crop that the encoder's CLS query attends to most, chosen among
    the tokens that enter the LLM (`vtprune.ops.dual_attention.key_tokens`)."""

    layer: int
    """0-based encoder layer; the method lists its ClsAttention in `signals`, too."""
    share: float
    """Share of the tokens of each crop; their number is rounded up."""

    def mark(self, view: LayerView) -> Tensor:
        groups, rows = view.encoded(ClsAttention((self.layer,)))
        keys = key_tokens(rows[:, 0], groups.valid.to(rows.device), self.share)
        return groups.scatter(keys, torch.zeros_like(view.real))

    def read_layer(self, view: LayerView) -> Tensor:
        return view.groups.gather(view.marked(self))


@dataclass(frozen=True)
class AliveInLastLayer(CacheSignal):
    """(groups, tokens) bool: which visual tokens of a cache layer reached the last decoder layer."""

    def read_cache(self, view: CacheView) -> Tensor:
        return view.alive(-1)


@dataclass(frozen=True, kw_only=True)
class MustDrop(Composite):
    """Drops tokens while the image is encoded, while the prompt is read and before the answer (arXiv 2411.10803).

    Stages: in the vision encoder, after its first layer, each window of the grid whose patches are similar is averaged
    to one patch, so all later layers run on fewer patches. Inside the LLM, on the input of four decoder layers, tokens
    are dropped that neither the whole text after the image nor a single token of it attends to in the layer before. Key
    tokens, which the encoder's CLS token attends to most in its last layer, stay. After the prefill, tokens that did
    not reach the last layer are also evicted from the KV cache of all layers from the one before the first cut on.
    Deviations: merged tokens take the place of the middle of their window (the reference puts them first, the most
    similar ones leading); every crop merges its own windows (in the reference, all crops of a call merge as many as the
    crop with the fewest); windows need not fill the grid; while decoding, positions continue after the prompt (the
    reference counts the cache of each layer, so an answer is too close to the tokens in the first layers); nothing is
    merged where several patches become one visual token; budgets are an addition (the reference has only thresholds,
    which are tuned for each data set).

    Fields
        keep_ratio, keep_tokens: optional, averaged over the LLM's layers and met exactly. Windows are merged as long
            as their crop has more tokens than the average. The cuts inside the LLM drop the other tokens in equal
            steps, those with the lowest attention against the thresholds first, key tokens last. The eviction from the
            cache comes in addition. Without a budget the thresholds decide.
        window: rows and columns of a window in the encoder, at least two patches, default (3, 3).
        similarity: smallest mean cosine of the pairs of patches with which a window is merged, in [-1, 1], default 0.8;
            None merges nothing.
        merge_layer: encoder layer on whose output windows are merged, >= 0, default 0.
        key_share: share of each crop's tokens that are key tokens by CLS attention, in [0, 1], rounded up, default
            0.08; with 0 there are none, and the encoder needs no CLS token.
        layers: 0-based decoder layers on whose input tokens are dropped; default None: (3, 7, 11, 15) of 32, rescaled
            to the model's depth.
        global_threshold: share of the whole text's attention below which a token may be dropped, >= 0, default 0.001.
            With a budget both thresholds must be above 0.
        individual_threshold: largest attention of a single text token below which a token may be dropped, >= 0, default
            0.001.
        evict: whether tokens are evicted from the cache after the prefill, default True. Generation with
            use_cache=False needs False.
        reference_quirks: let every crop of a call merge as many windows as the crop with the fewest windows that pass.
            Default False.
    """

    name: ClassVar[str] = "mustdrop"
    stage = "encoder, in_llm, decode"
    signal: ClassVar[str] = "similarity and CLS attention in the encoder, attention of the text in the LLM"
    paper: ClassVar[str] = "arXiv 2411.10803"
    text_aware: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True
    needs_budget: ClassVar[bool] = False

    window: tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]] = (3, 3)
    similarity: Annotated[float, Interval(ge=-1, le=1)] | None = 0.8
    merge_layer: Annotated[int, Ge(0)] = 0
    key_share: Share = 0.08
    layers: tuple[int, ...] | None = None
    global_threshold: Annotated[float, Ge(0)] = 0.001
    individual_threshold: Annotated[float, Ge(0)] = 0.001
    evict: bool = True
    reference_quirks: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.window[0] * self.window[1] < 2:
            raise ConfigError(f"mustdrop: window={self.window} has nothing to merge: it needs two patches at least")
        has_budget = self.keep_ratio is not None or self.keep_tokens is not None
        if has_budget and min(self.global_threshold, self.individual_threshold) == 0:
            raise ConfigError("mustdrop: with a budget both thresholds must be above 0, because they weigh attention")

    def check_budget(self, shape: ModelShape) -> None:
        # A model without an encoder has no CLS token either, which is refused by name.
        if shape.encoder_layers and self.merge_layer >= shape.encoder_layers - 1:
            raise ConfigError(f"mustdrop: merge_layer={self.merge_layer} must be within 0..{shape.encoder_layers - 2}")
        self._filter().check_budget(shape)

    def _filter(self) -> _Filter:
        names = ("key_share", "layers", "global_threshold", "individual_threshold")
        return _Filter(**self._common(), **{name: getattr(self, name) for name in names})

    def _common(self) -> dict:
        return {name: getattr(self, name) for name in ("keep_ratio", "keep_tokens", "positions")}

    def parts(self, shape: ModelShape) -> tuple[Method, ...]:
        parts: list[Method] = [self._filter()]
        if self.similarity is not None:
            names = ("window", "similarity", "merge_layer", "reference_quirks")
            parts.insert(0, _MergeWindows(**self._common(), **{name: getattr(self, name) for name in names}))
        if self.evict:
            cuts = self._filter().cuts(shape)
            parts.append(_Evict(keep_ratio=self.keep_ratio, looked_through=tuple(range(cuts[0] - 1, cuts[-1]))))
        return tuple(parts)


@dataclass(frozen=True, kw_only=True)
class _MergeWindows(InEncoder):
    """The part in the vision encoder; the fields are those of `MustDrop`."""

    name: ClassVar[str] = "mustdrop"
    signal: ClassVar[str] = "similarity in the encoder"
    needs_budget: ClassVar[bool] = False

    window: tuple[int, int]
    similarity: float
    merge_layer: int
    reference_quirks: bool

    def cuts(self, shape: ModelShape) -> tuple[int, ...]:
        return (self.merge_layer,)

    def budgets(self, lengths: Tensor) -> Tensor:
        if self.keep_ratio is not None:
            return (lengths * self.keep_ratio).ceil().long()
        return torch.full_like(lengths, -1) if self.keep_tokens is None else lengths.clamp(max=self.keep_tokens)

    def select(self, tokens: VisualTokens) -> Selection:
        grid = tokens.grids[0]
        merged = window_merging(
            tokens.features,
            (grid.rows, grid.cols),
            self.window,
            threshold=self.similarity,
            at_least=tokens.budget.clamp(min=0),
            reference_quirks=self.reference_quirks,
        )
        return Selection(*merged.in_place(tokens.features))


@dataclass(frozen=True, kw_only=True)
class _Filter(Progressive):
    """The part inside the LLM; the fields are those of `MustDrop`."""

    name: ClassVar[str] = "mustdrop"
    signal: ClassVar[str] = "attention of the text in the LLM"

    key_share: float
    layers: tuple[int, ...] | None
    global_threshold: float
    individual_threshold: float

    def cuts(self, shape: ModelShape) -> tuple[int, ...]:
        return self.resolve_layers(self.layers, PUBLISHED_LAYERS, shape)

    def shares(self) -> tuple[float, ...]:
        steps = len(self.layers or PUBLISHED_LAYERS) + 1
        return tuple(1 - step / steps for step in range(1, steps))

    def prompt_budgets(self, shape: ModelShape, entering: Tensor, crops: Tensor, original: Tensor) -> Tensor:
        shares, samples = self.shares(), zip(entering.tolist(), crops.tolist(), original.tolist(), strict=True)
        return self.scheduled(shape, shares, samples, lambda n: [-1] * len(shares))

    def _keys(self, shape: ModelShape) -> KeyTokens:
        return KeyTokens(shape.encoder_layers - 1, self.key_share)

    def signals(self, shape: ModelShape):
        if not self.key_share:
            return (TextAttention(),)
        require_cls(self.name, "(unless key_share=0) spares the tokens that matter to", shape)
        return TextAttention(), self._keys(shape), ClsAttention((shape.encoder_layers - 1,))

    def select(self, tokens: VisualTokens) -> Selection:
        total, peak = tokens[TextAttention()].unbind(-1)
        has_budget = self.keep_ratio is not None or self.keep_tokens is not None
        kept = dual_attention_filter(
            total,
            peak,
            global_threshold=self.global_threshold,
            individual_threshold=self.individual_threshold,
            spared=tokens[self._keys(tokens.shape)] if self.key_share else None,
            valid=tokens.valid,
            budget=tokens.budget if has_budget else None,
        )
        return Selection(kept)


@dataclass(frozen=True, kw_only=True)
class _Evict(AfterPrefill):
    """The part after the prefill.

    Fields
        looked_through: decoder layers whose cache loses the tokens that did not reach the last layer.
    """

    name: ClassVar[str] = "mustdrop"
    signal: ClassVar[str] = "tokens in the LLM's last layer"
    needs_budget: ClassVar[bool] = False

    looked_through: tuple[int, ...]

    def layers(self, shape: ModelShape) -> tuple[int, ...]:
        return self.looked_through

    def signals(self, shape: ModelShape):
        return (AliveInLastLayer(),)

    def select(self, tokens: VisualTokens) -> Selection:
        return Selection(tokens[AliveInLastLayer()])

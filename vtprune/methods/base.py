# SPDX-License-Identifier: Apache-2.0
"""What every method is: a frozen, checked set of parameters with one function, `select`."""

from __future__ import annotations

import dataclasses
import functools
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from vtprune import budget
from vtprune.checks import Condition, asked_together, read_with_conditions, require, require_all
from vtprune.errors import BudgetError, ConfigError, UnsupportedStageError, VTPruneError, shown
from vtprune.ops.selection import top_k_mask
from vtprune.tokens import ModelShape, Selection, VisualTokens


def require_cls(name: str, use: str, shape: ModelShape, others: str = "divprune, cdpruner, fastv, transprune") -> None:
    """Raise UnsupportedStageError if the encoder has no CLS token, which the method `name` has a `use` for.

    others: names of methods that need none.
    """
    if not shape.has_cls:
        raise UnsupportedStageError(
            f"{name} {use} a CLS token, and this vision encoder has none; methods that need none: {others}"
        )


KeepRatio = Annotated[float, Interval(gt=0, le=1)]
Share = Annotated[float, Interval(ge=0, le=1)]


@functools.cache
def _checks(cls: type) -> dict[str, Callable]:
    from pydantic import TypeAdapter  # slow to import, and not needed before the first method is made

    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name]).validate_python for field in dataclasses.fields(cls)}


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to choose visual tokens. Subclass one of the classes below, not this; each states its stage.

    `BeforeLLM` (between projector and LLM), `InLLM` (between decoder layers), `Progressive` (the same, by a schedule
    that scales to any budget), `Staged` and `CutOnce` (the same, layers and shares are fields), `Reviving` (cuts made
    anew for every generated token), `InEncoder`, `AfterPrefill` (the KV cache), and `Composite` (several of them).

    Fields (all methods)
        keep_ratio: share of the visual tokens kept, averaged over the LLM's layers; in (0, 1], 1.0 prunes nothing.
        keep_tokens: the same as a count per crop (an image, a tile or a frame: `vtprune models` says which); >= 0. Give
            one of the two, never both. Newline tokens between rows are no content and never count.
        positions: "original" keeps the position ids of the surviving tokens; "compact" renumbers: at every layer a
            token's position is its rank in that layer's sequence.
    Raises BudgetError (budget fields) or ConfigError (all others) on construction.
    """

    name: ClassVar[str]
    stage: ClassVar[str]
    """Where it acts: "before_llm", "in_llm", "decode", or several of them with commas between."""
    signal: ClassVar[str]
    """What the method looks at, in a few words, for tables."""
    paper: ClassVar[str] = "-"
    needs_budget: ClassVar[bool] = True
    """Whether keep_ratio or keep_tokens must be given (a published schedule makes it optional)."""
    text_aware: ClassVar[bool] = False
    """Whether the prompt's text decides, with the image, what is kept."""
    merges: ClassVar[bool] = False
    """Whether tokens that go are averaged into tokens that stay."""
    adaptive: ClassVar[bool] = False
    """Whether what it sees decides how many tokens stay if no budget is given."""
    needs_grid: ClassVar[bool] = False
    """Whether it goes by the rows and columns of tokens; families whose tokens have none are refused."""

    keep_ratio: KeepRatio | None = None
    keep_tokens: Annotated[int, Ge(0)] | None = None
    positions: Literal["original", "compact"] = "compact"

    def __post_init__(self) -> None:
        from pydantic import ValidationError

        for name, check in _checks(type(self)).items():
            try:
                object.__setattr__(self, name, check(getattr(self, name)))
            except ValidationError as error:
                kind = BudgetError if name in ("keep_ratio", "keep_tokens") else ConfigError
                first = error.errors()[0]
                raise kind(f"{self.name}: {name}={shown(getattr(self, name))}: {first['msg']}") from None
        if self.keep_ratio is not None and self.keep_tokens is not None:
            raise BudgetError(f"{self.name}: give keep_ratio or keep_tokens, not both")

    def check_budget(self, shape: ModelShape) -> None:
        """Raise BudgetError if the budget is missing or cannot be met on a model of this shape."""
        if self.needs_budget and self.keep_ratio is None and self.keep_tokens is None:
            raise BudgetError(f"{self.name} needs a budget: keep_ratio=0.25 or keep_tokens=64, for example")

    def parts(self, shape: ModelShape) -> tuple[Method, ...]:
        """The methods of one stage each that this one consists of on a model of this shape; usually itself alone."""
        return (self,)

    def signals(self, shape: ModelShape) -> tuple[Hashable, ...]:
        """The requests of `vtprune.signals` that `select` will look up; none by default."""
        return ()


class _OneStage(Method):
    """A method that selects, at one stage. It overrides `scores` or `select`."""

    _may_keep_more: ClassVar[bool] = False
    """Whether a budget is a lower bound only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self).select is _OneStage.select and type(self).scores is _OneStage.scores:
            raise ConfigError(f"{self.name}: a method gives every token a score in `scores`, or chooses in `select`")

    def scores(self, tokens: VisualTokens) -> Tensor:
        """(groups, tokens) float, larger is better; padding is ignored."""
        raise NotImplementedError

    def select(self, tokens: VisualTokens) -> Selection:
        """Choose `tokens.budget[g]` of the valid tokens of each group g; by default those of the largest scores."""
        scores = self.scores(tokens)
        if not torch.is_tensor(scores) or scores.shape != tokens.valid.shape:
            shape = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
            raise VTPruneError(f"{self.name} returned scores of {shape}, expected {tuple(tokens.valid.shape)}")
        real = tokens.valid.to(scores.device)
        require(~(scores.isnan() & real).any(), f"{self.name} returned scores that are NaN")
        return Selection(top_k_mask(scores, tokens.valid, tokens.budget))

    @torch.no_grad()
    def choose(self, tokens: VisualTokens, conditions: Iterable[Condition] = ()) -> Selection:
        """What `select` gives, with copies on the CPU. Raises VTPruneError if it does not fit.

        conditions: what else is asked, with the same wait for an accelerator.
        """

        def checked() -> Selection:
            require_all(conditions)
            selection = self.select(tokens)
            _check_selection(self.name, tokens, selection, self._may_keep_more)
            values = (selection.keep,) if selection.sources is None else (selection.keep, selection.sources)
            return dataclasses.replace(selection, copies=read_with_conditions(*values))

        return asked_together(checked)


def _check_selection(name: str, tokens: VisualTokens, selection: Selection, may_keep_more: bool) -> None:
    """Raise VTPruneError, which names the method, unless a selection fits the tokens that it was made among."""
    if not isinstance(selection, Selection):
        raise VTPruneError(f"{name} returned a {type(selection).__name__}, expected a vtprune.Selection")
    shape, device = tokens.valid.shape, tokens.valid.device
    for what, values, dtype in (
        ("a selection", selection.keep, torch.bool),
        ("sources", selection.sources, torch.long),
    ):
        if values is not None and (values.shape != shape or values.dtype != dtype):
            raise VTPruneError(
                f"{name} returned {what} of {values.dtype} {tuple(values.shape)}, expected {dtype} {tuple(shape)}"
            )
    if selection.features is not None and selection.features.shape != tokens.features.shape:
        raise VTPruneError(
            f"{name} returned features of {tuple(selection.features.shape)}, expected {tuple(tokens.features.shape)}"
        )
    kept, budget = (selection.keep.to(device) & tokens.valid).sum(1), tokens.budget.to(device)
    least = torch.minimum(budget, tokens.lengths).clamp(max=1)
    wrong = (budget >= 0) & ((kept < least) if may_keep_more else (kept > budget) | (kept < least))

    def message() -> str:
        group = int(wrong.nonzero()[0, 0])
        return (
            f"{name} kept {int(kept[group])} of {int(tokens.lengths[group])} tokens where {int(budget[group])} were to "
            "be kept"
        )

    require(~wrong.any(), message)


class InEncoder(_OneStage):
    """A method that merges tokens inside the vision encoder, whose later layers then run on fewer; a group is a crop.

    It is shown the encoder's tokens without the CLS token. The projector still gets them all, those that were merged
    alike; of visual tokens that are copies of one merged token a single one enters the LLM, and of dropped ones none.
    """

    stage = "encoder"
    _may_keep_more: ClassVar[bool] = True  # what is not alike is not merged

    @abstractmethod
    def cuts(self, shape: ModelShape) -> tuple[int, ...]:
        """0-based encoder layers on whose output tokens are merged, ascending."""

    @abstractmethod
    def budgets(self, lengths: Tensor) -> Tensor:
        """(crops,) visual tokens of each crop -> (crops,) long counts of them to keep, -1 without a budget.

        Tokens of the encoder that become no visual token are counted on top before `select` sees the budget.
        """


@dataclass(frozen=True, kw_only=True)
class BeforeLLM(_OneStage):
    """A method that acts once on the projected features, before the first decoder layer.

    Fields (all methods before the LLM)
        scope: "crop" (default) gives every crop of an image, or frame of a video, a budget and a choice of its own;
            "image" gives one to the whole image or video, whose crops then compete.
        keep_separators: True keeps all newline tokens of an image or video; by default (False) those go that end lines
            of which nothing is kept. Budgets do not count them. Servers, which make room before they see the image,
            need True for families that have them (LLaVA-NeXT, LLaVA-OneVision).
    """

    stage = "before_llm"

    scope: Literal["crop", "image"] = "crop"
    keep_separators: bool = False

    def budgets(self, lengths: Tensor, images: Tensor) -> Tensor:
        """(groups,) lengths and the image each group is of -> (groups,) long counts to keep, -1 without a budget."""
        if self.keep_ratio is None and self.keep_tokens is None:
            return torch.full_like(lengths, -1)
        return budget.group_counts(lengths, images, self.keep_ratio, self.keep_tokens)


class InLLM(_OneStage):
    """A method that acts on the input of chosen decoder layers during prefill; a group is one sample."""

    stage = "in_llm"

    masks: bool = False
    """Whether what it drops stays in the sequence and the KV cache, hidden from all layers that follow."""

    @abstractmethod
    def cuts(self, shape: ModelShape) -> tuple[int, ...]:
        """0-based decoder layers on whose input tokens are dropped, ascending, each in 1..decoder_layers-1."""

    @abstractmethod
    def budgets(self, shape: ModelShape, entering: Tensor, crops: Tensor) -> Tensor:
        """(samples,) visual tokens entering the LLM, (samples,) crops -> (cuts, samples) long counts to keep,
        -1 without a budget."""

    def scheduled(
        self,
        shape: ModelShape,
        shares: tuple[float, ...],
        samples: Iterable[tuple[int, int, int]],
        unasked: Callable[[int], list[int]],
    ) -> Tensor:
        """(cuts, samples) long counts that meet the budget by a schedule of shares of the entering tokens.

        samples: each one's tokens entering the LLM, its crops, and the tokens that its budget is a share of. unasked:
        the counts for so many tokens entering, where there is no budget.
        """
        cuts, depth = self.cuts(shape), shape.decoder_layers
        rows = []
        for n, crops, original in samples:
            if self.keep_ratio is None and self.keep_tokens is None:
                rows.append(unasked(n))
            elif n == 0:
                rows.append([0] * len(cuts))
            else:
                ratio = budget.schedule_budget(self.keep_ratio, self.keep_tokens, original, crops)
                ratio = min(ratio * original / n, 1.0) if original != n else ratio
                rows.append(budget.schedule_counts(self.name, cuts, shares, depth, n, ratio))
        return torch.tensor(rows, dtype=torch.long).T

    def prompt_budgets(self, shape: ModelShape, entering: Tensor, crops: Tensor, original: Tensor) -> Tensor:
        """The same, for methods that need to know the (samples,) `original` visual tokens of the prompts, too."""
        return self.budgets(shape, entering, crops)


class AfterPrefill(_OneStage):
    """A part that drops visual tokens from the KV cache once, when the prefill is over; a group is one sample.

    `tokens.features` are the layer's cached keys, (samples, tokens, kv heads * head dim), `tokens.budget` is -1, and
    AliveInLastLayer is the only signal. Positions stay as they are, so that a token generated later is as far from each
    token left as it was. Layers with a sliding window are left alone.
    """

    stage = "decode"

    @abstractmethod
    def layers(self, shape: ModelShape) -> tuple[int, ...]:
        """0-based decoder layers whose cache it looks through."""


class Composite(Method):
    """A method that acts at several stages. Subclasses state `parts`, with budgets that meet theirs."""

    stage = "before_llm, in_llm"

    @abstractmethod
    def parts(self, shape: ModelShape) -> tuple[Method, ...]:
        """The methods it consists of, in the order of the path."""


class Scorer(ABC):
    """Says of a method of one stage that it gives every token a score, and no more; it may stand before or behind the
    stage's class."""

    @abstractmethod
    def scores(self, tokens: VisualTokens) -> Tensor:
        """(groups, tokens) float, larger is better; padding is ignored."""

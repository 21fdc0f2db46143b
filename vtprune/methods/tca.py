# SPDX-License-Identifier: Apache-2.0
"""TCA: keep the patches that the CLS token attends to, and condense the others, in layers of the vision encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Interval

from vtprune.errors import BudgetError, ConfigError
from vtprune.methods.base import require_cls
from vtprune.methods.in_layers import InLayers, LayerTokens, Projection, depths, placed
from vtprune.ops.condensation import condensation, condensation_counts
from vtprune.ops.token_reduction import Reduction
from vtprune.tokens import ModelShape

PUBLISHED_LAYERS = (3, 6, 9)
Positive = Annotated[float, Gt(0)]


@dataclass(frozen=True, kw_only=True)
class TCA(InLayers):
    """Condenses patches between attention and MLP of a few layers of the vision encoder (arXiv 2410.14729).

    Stage: inside the vision encoder. By falling attention of the CLS token, patches stay, become four means of clusters
    that are far apart, or become one sum weighted by that attention. The encoder puts out what is left, in that order.
    With `reservoir`, it also adapts a zero-shot classifier to the stream of images that it sees: a few samples of each
    class are kept, layers that condense also attend to what CLS tokens of one class have in common, and logits are
    corrected. That needs logits, so `vtprune.prune` refuses it: see `vtprune.adaptation.AdaptingClassifier`.
    Deviations: the first cluster's centre is the patch of the most attention, not a random one; where few tokens are
    left, fewer stay (the reference fails).

    Fields
        drop_rate: share of the patches that a layer sums up, in (0, 1); 0.1 if there is neither drop_rate nor
            keep_ratio nor keep_tokens. The latter two take the smallest rate, in steps of 0.001, that leaves no more.
        layers: 0-based layers; default None: 3, 6 and 9 of 12, at the same relative depth.
        reservoir: how many samples each class keeps, >= 1; default None: condensation alone. Published: 3, for
            EuroSAT 2.
        scale: with `reservoir`: temperature of the weights of layers in the correction, > 0; with a small one only the
            last layers count. Default 0.1, that for ImageNet; published for other data sets: 0.01 to 5.5.
        strength: with `reservoir`: factor of the correction, > 0, called lambda in the paper. Default 3, that for
            ImageNet; published for other data sets: 1.5 to 8.
        beta: with `reservoir`: how much less a sample counts that is less similar, > 0. Default 5, that for ImageNet;
            published for other data sets: 2 to 9.
    """

    name: ClassVar[str] = "tca"
    signal: ClassVar[str] = "CLS attention in the encoder"
    paper: ClassVar[str] = "arXiv 2410.14729"
    merges: ClassVar[bool] = True
    needs_budget: ClassVar[bool] = False
    place = "between"
    reads: ClassVar[tuple[Projection, ...]] = ("queries", "keys")
    drops = True

    drop_rate: Annotated[float, Interval(gt=0, lt=1)] | None = None
    layers: tuple[Annotated[int, Ge(0)], ...] | None = None
    reservoir: Annotated[int, Ge(1)] | None = None
    scale: Positive | None = None
    strength: Positive | None = None
    beta: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("scale", "strength", "beta") if getattr(self, name) is not None]
        if given and self.reservoir is None:
            raise ConfigError(f"{self.name}: {', '.join(given)}: only with reservoir, reservoir=3 for example")
        if self.drop_rate is not None and (self.keep_ratio is not None or self.keep_tokens is not None):
            raise BudgetError(f"{self.name}: give one of drop_rate, keep_ratio and keep_tokens")

    @property
    def correction(self) -> dict[str, float]:
        """How logits are corrected: scale, strength and beta, as given or by default."""
        published = {"scale": 0.1, "strength": 3.0, "beta": 5.0}
        given = {name: getattr(self, name) for name in published}
        return published | {name: value for name, value in given.items() if value is not None}

    def check_budget(self, shape: ModelShape) -> None:
        super().check_budget(shape)
        if self.reservoir is not None:
            raise ConfigError(
                f"{self.name}: reservoir={self.reservoir} adapts a zero-shot classifier, whose logits are needed: call "
                "vtprune.adaptation.AdaptingClassifier(classifier, method) in place of the classifier; without "
                "reservoir, a session condenses only"
            )
        require_cls(self.name, "reads the attention of", shape, others="tome, mctf, zero_tprune")
        depths(self.layers, PUBLISHED_LAYERS, shape.encoder_layers)

    def schedule(self, layers: int, patches: int, protected: int) -> list[int]:
        chosen = depths(self.layers, PUBLISHED_LAYERS, layers)
        if self.keep_ratio is None and self.keep_tokens is None:
            return placed(_steps(patches, self.drop_rate or 0.1, len(chosen)), chosen, layers)
        left = self.patches_left(patches)
        if left == patches:
            return [0] * layers
        for rate in _RATES:
            steps = _steps(patches, rate, len(chosen))
            if sum(steps) >= patches - left:
                return placed(steps, chosen, layers)
        floor = patches - max(sum(_steps(patches, rate, len(chosen))) for rate in _RATES)
        raise BudgetError(
            f"{self.name}: of {patches} patches, layers {chosen} leave {floor} at least; {left} were asked for",
            floor=floor / patches,
        )

    def reduce(self, tokens: LayerTokens) -> Reduction | None:
        patches = tokens.hidden.shape[1] - tokens.protected
        rate = self.drop_rate or 0.1
        if self.keep_ratio is not None or self.keep_tokens is not None:
            rate = next(rate for rate in _RATES if _removed(patches, rate) == tokens.remove)
        # An anchor's share is left out, and the others are not scaled up for it.
        attention = tokens.attention(queries=1).mean(1)[:, 0, : tokens.hidden.shape[1]]
        return condensation(tokens.hidden, attention, rate, protected=tokens.protected)


_RATES = [step / 1000 for step in range(1, 1000)]


def _removed(patches: int, rate: float) -> int:
    """How many rows fewer a layer puts out than so many patches."""
    stay, clustered, dropped = condensation_counts(patches, rate)
    return patches - stay - min(clustered, 4) - 1 if dropped else 0


def _steps(patches: int, rate: float, layers: int) -> list[int]:
    """What each of so many layers takes away."""
    steps = []
    for _ in range(layers):
        steps.append(_removed(patches, rate))
        patches -= steps[-1]
    return steps

# SPDX-License-Identifier: Apache-2.0
"""Every method on made-up tokens: what it chooses, compared with what was recorded, and what choosing costs.

`bench_selection.py --part methods` prints the table. `selection_indices.json` holds what was chosen when it was
recorded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

import vtprune
from vtprune import signals
from vtprune.methods.base import BeforeLLM
from vtprune.methods.glsim import ClsSimilarity
from vtprune.tokens import Grid, ModelShape, Selection, VisualTokens

RECORD = Path(__file__).with_name("selection_indices.json")
SHAPE = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)
KEEP_RATIO = 0.11
WIDTH, INNER, HEADS, DEPTH, TEXT = 4096, 11008, 32, 32, 64
ENCODER_WIDTH, ENCODER_HEADS = 1024, 16


@dataclass(frozen=True)
class Case:
    """Groups of visual tokens: what each is of, and the grids of its crops."""

    kinds: tuple[str, ...]
    layouts: tuple[tuple[Grid, ...], ...]
    width: int = WIDTH
    keep_ratio: float = KEEP_RATIO

    @property
    def lengths(self) -> list[int]:
        return [sum(map(len, layout)) for layout in self.layouts]


CASES = {
    "576": Case(("image",), ((Grid(24, 24),),)),
    "2880": Case(("image",), ((Grid(24, 24),) * 5,)),
    "6272": Case(("video",), ((Grid(14, 14),) * 32,)),
    "ragged": Case(
        ("image", "image", "video", "image", "image"),
        ((Grid(14, 14),), (Grid(12, 16),), (Grid(8, 8),) * 4, (Grid(10, 6), Grid(5, 5)), (Grid(1, 1),)),
        width=256,
        keep_ratio=0.3,
    ),
}
"""One group of 576, 2,880 and 6,272 tokens (an image, an image with tiles, a video), and a batch of ragged groups."""


def methods_before_llm(case: Case) -> Iterator[tuple[str, BeforeLLM]]:
    """Every method of the library that acts before the LLM, or its part that does, on whole images and videos."""
    for name, cls in vtprune.list_methods().items():
        whole: dict[str, Any] = {"scope": "image"} if issubclass(cls, BeforeLLM) else {}
        for part in cls(keep_ratio=case.keep_ratio, **whole).parts(SHAPE):
            if isinstance(part, BeforeLLM):
                yield name, part


class MadeUp:
    """Features and signals of made-up tokens that resemble each other in groups, as the patches of an image do.

    What a patch shows is mostly the same in the next frame or tile.
    """

    def __init__(self, case: Case):
        self.case = case
        self.generator = torch.Generator().manual_seed(sum(case.lengths))
        self.valid = torch.arange(max(case.lengths)) < torch.tensor(case.lengths)[:, None]
        self.crops = torch.full(self.valid.shape, -1)
        self.shown = torch.full(self.valid.shape, -1)
        for group, layout in enumerate(case.layouts):
            sizes = torch.tensor([len(grid) for grid in layout])
            self.crops[group, : int(sizes.sum())] = torch.arange(len(layout)).repeat_interleave(sizes)
            self.shown[group, : int(sizes.sum())] = torch.cat(list(self._frames(sizes.tolist())))
        self.features = self._alike(case.width)
        self._known: dict[Any, Any] = {}

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _frames(self, sizes: list[int]) -> Iterator[Tensor]:
        """What each patch of each frame shows, one of 40 things."""
        before = torch.empty(0, dtype=torch.long)
        for size in sizes:
            now = torch.randint(40, (size,), generator=self.generator)
            if len(before) == size:
                changes = torch.rand(size, generator=self.generator) < 0.1
                now = torch.where(changes, now, before)
            yield now
            before = now

    def _alike(self, width: int) -> Tensor:
        """(groups, tokens, width)"""
        things = self._noise(40, width)
        features = torch.empty(*self.valid.shape, width)
        for group, shown in enumerate(self.shown):  # one group after the other needs less memory
            features[group] = things[shown] + 0.4 * self._noise(len(shown), width)
        return features * self.valid[..., None]

    def _attention(self, *shape: int) -> Tensor:
        """(groups, ..., tokens): few tokens get much attention."""
        groups, tokens = self.valid.shape
        weights = (2 * self._noise(groups, *shape, tokens)).exp()
        weights = weights * self.valid.view(groups, *(1 for _ in shape), tokens)
        return weights / weights.sum(-1, keepdim=True)

    def __call__(self, request: Any) -> Any:
        if request not in self._known:
            self._known[request] = self._make(request)
        return self._known[request]

    def _make(self, request: Any) -> Any:
        match request:
            case signals.EncoderSaliency() | signals.AttentionReceived():
                return self._attention()
            case signals.ClsAttention(layers):
                return self._attention(len(layers), ENCODER_HEADS)
            case signals.EncoderKeys(_, "mean"):
                return self._alike(ENCODER_WIDTH // ENCODER_HEADS)
            case signals.EncoderKeys() | signals.EncoderFeatures() | signals.EncoderOutput():
                return self._alike(ENCODER_WIDTH)
            case ClsSimilarity():
                return self._noise(*self.valid.shape) * self.valid
            case signals.TextEmbeddings():
                return [self._noise(20, self.case.width) + 0.3 * group[:20] for group in self.features]
            case signals.SampleKeys():
                return list(range(1, len(self.valid) + 1))
        raise TypeError(f"no made-up signal for {request}")

    def tokens(self, method: BeforeLLM) -> VisualTokens:
        """What the method is shown. Signals are made for each method alone, from the same seed."""
        self.generator.manual_seed(7)
        self._known = {}
        lengths = torch.tensor(self.case.lengths)
        tokens = VisualTokens(
            self.features,
            self.valid,
            method.budgets(lengths, torch.arange(len(lengths))),
            self,
            self.crops,
            self.case.layouts,
            self.case.kinds,
            shape=SHAPE,
        )
        for request in method.signals(SHAPE):
            tokens[request]
        return tokens


# -- what was chosen --------------------------------------------------------------------------------------------------


def packed(keep: Tensor) -> str:
    """(groups, tokens) bool as text, a bit a token."""
    bits = torch.nn.functional.pad(keep.flatten().long(), (0, -keep.numel() % 8)).view(-1, 8)
    values = (bits << torch.arange(8)).sum(1).to(torch.uint8)
    return base64.b64encode(bytes(values.tolist())).decode()


def unpacked(text: str, shape: torch.Size) -> Tensor:
    """The inverse of `packed`."""
    values = torch.tensor(list(base64.b64decode(text)), dtype=torch.long)
    return (values[:, None] >> torch.arange(8) & 1).flatten()[: shape.numel()].view(shape).bool()


def noted(selection: Selection) -> dict[str, str]:
    """What the record holds of a selection: the tokens kept, and a digest of where the others went."""
    entry = {"keep": packed(selection.keep)}
    if selection.sources is not None:
        data = bytes(json.dumps(selection.sources.tolist()), "ascii")
        entry["sources"] = hashlib.sha256(data).hexdigest()[:16]
    return entry


def recorded() -> dict[str, dict[str, dict[str, str]]]:
    """Case -> method -> what `noted` gave."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def same_as_recorded(case: str, name: str, selection: Selection) -> str:
    """ "yes", or how it differs from what was recorded."""
    before, now = recorded().get(case, {}).get(name), noted(selection)
    if before is None:
        return "not recorded"
    if before == now:
        return "yes"
    keep = unpacked(before["keep"], selection.keep.shape)
    if (changed := int((keep & ~selection.keep).sum())) or not torch.equal(keep, selection.keep):
        return f"NO: {changed} of {int(keep.sum())} others"
    return "NO: other sources"


def record(case: str, name: str, selection: Selection) -> None:
    """Put a selection into the record."""
    entries = recorded()
    entries.setdefault(case, {})[name] = noted(selection)
    RECORD.write_text(json.dumps(entries, indent=0) + "\n")


# -- what it costs ----------------------------------------------------------------------------------------------------


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of CPU time of all threads of this process, and the result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


@torch.no_grad()
def layer_seconds(columns: int) -> float:
    """CPU time of the prefill of one decoder layer of a 7B model (width 4096, 11008 inside the MLP) in float32."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=HEADS, num_hidden_layers=1
    )
    model = LlamaModel(config).eval()
    model(inputs_embeds=torch.randn(1, 8, WIDTH), use_cache=False)
    embeddings = torch.randn(1, columns, WIDTH)
    return cpu_seconds(lambda: model(inputs_embeds=embeddings, use_cache=False))[0]


def choice(method: BeforeLLM, tokens: VisualTokens) -> tuple[float, Selection]:
    """Seconds of CPU time of a choice, and the choice."""
    return cpu_seconds(lambda: method.choose(tokens))

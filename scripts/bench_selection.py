# SPDX-License-Identifier: Apache-2.0
"""Measures the cost of choosing tokens.

Every method before the LLM is compared with the prefill of a 7B-shaped model at three lengths, and its choice with the
recorded one (`selection_methods.py`). The greedy selections and the steps of merging are compared with straightforward
versions of the same formulas, and the selectors inside the LLM with the prefill of a 7B-shaped model.

    python scripts/bench_selection.py [--repeats 3] [--large] [--part methods|selection|merging|prefill]

`--part methods` measures CPU time, the others the time that passes. Everything runs on the CPU in float32. Torch's
number of threads is not changed (OMP_NUM_THREADS sets it).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from enum import StrEnum

import selection_methods as made_up
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import vtprune
from vtprune.eval.bench.stopwatch import peak_bytes
from vtprune.ops.bipartite_merging import bipartite_merging
from vtprune.ops.coverage import coverage_matrices, max_coverage
from vtprune.ops.density_peaks import density_peaks, merge_clusters
from vtprune.ops.diversity import max_min_diversity
from vtprune.ops.segmentation import segment_frames

console = Console()


class Part(StrEnum):
    METHODS = "methods"
    SELECTION = "selection"
    MERGING = "merging"
    PREFILL = "prefill"


# -- every method before the LLM --------------------------------------------------------------------------------------


def methods(repeats: int, renew: bool, names: list[str] | None = None) -> None:
    """One table a case. The ragged batch is only compared with the record."""
    for label, case in made_up.CASES.items():
        n, columns = sum(case.lengths), sum(case.lengths) + made_up.TEXT
        ragged = len(case.lengths) > 1
        title = f"{label} groups" if ragged else f"{n:,} tokens in one group"
        table = Table(title=f"{title}, keep {case.keep_ratio:.0%}, CPU time, medians of {repeats}")
        for heading in ("method", "choice", "of 7B prefill", "same indices", "peak memory"):
            table.add_column(heading, justify="left" if heading == "method" else "right")
        prefill = None if ragged else made_up.DEPTH * made_up.layer_seconds(columns)
        data = made_up.MadeUp(case)
        for name, method in made_up.methods_before_llm(case):
            if names and name not in names:
                continue
            tokens = data.tokens(method)
            seconds_taken, chosen = zip(*(made_up.choice(method, tokens) for _ in range(repeats)), strict=True)
            if renew:
                made_up.record(label, name, chosen[0])
            taken = statistics.median(seconds_taken)
            table.add_row(
                name,
                f"{taken * 1e3:,.1f} ms",
                "-" if prefill is None else f"{taken / prefill:.2%}",
                made_up.same_as_recorded(label, name, chosen[0]),
                f"{peak_bytes(lambda method=method, tokens=tokens: method.choose(tokens)) / 2**20:,.0f} MiB",
            )
        console.print(table)
        if prefill is not None:
            console.print(
                f"7B prefill of {n:,} + {made_up.TEXT} columns = {made_up.DEPTH} layers x "
                f"{prefill / made_up.DEPTH:.2f} s = {prefill:.1f} s: one layer of width {made_up.WIDTH} (MLP "
                f"{made_up.INNER}) measured in this run, CPU time, float32\n"
            )


# -- greedy selections ------------------------------------------------------------------------------------------------


def dense_coverage(features: Tensor, encoder_features: Tensor, text: Tensor, k: int, alpha: float = 0.5) -> Tensor:
    """The textbook greedy: the gain of every candidate at every step."""
    by_text, by_visual = coverage_matrices(features, encoder_features, text)
    covers = torch.cat((by_text, alpha * by_visual))
    covered = torch.zeros(len(covers))
    available = torch.ones(len(features), dtype=torch.bool)
    chosen = []
    for _ in range(k):
        gains = (covers - covered[:, None]).clamp(min=0).sum(dim=0)
        gains[~available] = -torch.inf
        best = int(gains.argmax())
        chosen.append(best)
        available[best] = False
        covered = torch.maximum(covered, covers[:, best])
    return torch.tensor(sorted(chosen))


def greedy_diversity(features: Tensor, k: int) -> Tensor:
    """The library's choice among one group."""
    everything = torch.ones(1, len(features), dtype=torch.bool)
    return max_min_diversity(features[None], everything, torch.tensor([k]))[0].nonzero()[:, 0]


def dense_diversity(features: Tensor, k: int) -> Tensor:
    """The textbook loop: every step looks up the distances of all candidates to all chosen tokens."""
    directions = torch.nn.functional.normalize(features, dim=-1)
    distances = 1 - directions @ directions.T
    others = distances + torch.diag(torch.full((len(features),), torch.inf))
    chosen = [int(others.min(dim=0).values.argmax())]
    while len(chosen) < k:
        nearest = distances[chosen].min(dim=0).values
        nearest[chosen] = -torch.inf
        chosen.append(int(nearest.argmax()))
    return torch.tensor(sorted(chosen))


def seconds(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def compare(
    table: Table, name: str, size: str, ours: Callable, textbook: Callable, repeats: int, memory: bool = False
) -> None:
    """Times both in turn. The row has medians, their ratio, whether both chose the same tokens, and peak memory."""
    ours()
    times: tuple[list[float], list[float]] = ([], [])
    equal = True
    for _ in range(repeats):
        ours_seconds, ours_chosen = seconds(ours)
        textbook_seconds, textbook_chosen = seconds(textbook)
        times[0].append(ours_seconds)
        times[1].append(textbook_seconds)
        equal &= torch.equal(ours_chosen, textbook_chosen)
    fast, slow = map(statistics.median, times)
    table.add_row(
        name,
        size,
        f"{slow * 1e3:,.1f} ms",
        f"{fast * 1e3:,.1f} ms",
        f"{slow / fast:.1f} x",
        "yes" if equal else "[red]NO[/red]",
        *(f"{peak_bytes(function) / 2**20:,.1f} MiB" for function in (textbook, ours) if memory),
    )


def image_like(n: int, text_tokens: int = 20, dim: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """Visual tokens that resemble each other in groups, as patches of an image do, and text near some of them."""
    generator = torch.Generator().manual_seed(n)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    groups = noise(40, dim)[torch.randint(40, (n,), generator=generator)]
    features = groups + noise(n, dim)
    text = features[torch.randint(n, (text_tokens,), generator=generator)] + noise(text_tokens, dim)
    return features, features + 0.5 * noise(n, dim), text


def selection(repeats: int, large: bool) -> None:
    table = Table(title=f"Greedy selection, medians of {repeats}, {torch.get_num_threads()} threads")
    for heading in ("selection", "tokens, kept", "textbook loop", "vtprune", "ratio", "same indices"):
        table.add_column(heading, justify="left" if heading == "selection" else "right")
    for n, k in [(576, 64), (2000, 400)] + [(2880, 640)] * large:
        inputs = image_like(n)
        compare(
            table,
            "max_coverage",
            f"{n}, {k}",
            lambda inputs=inputs, k=k: max_coverage(*inputs, k),
            lambda inputs=inputs, k=k: dense_coverage(*inputs, k),
            repeats,
        )
        compare(
            table,
            "max_min_diversity",
            f"{n}, {k}",
            lambda features=inputs[0], k=k: greedy_diversity(features, k),
            lambda features=inputs[0], k=k: dense_diversity(features, k),
            repeats,
        )
    console.print(table)
    console.print("Both columns of max_coverage include the similarity matrices.\n")


# -- merging ----------------------------------------------------------------------------------------------------------


def tabled_segmentation(still: Tensor) -> Tensor:
    """Positions that do not change from any frame to any later one, the gain of every segment, then the best sum."""
    frames = len(still) + 1
    throughout = torch.zeros(frames, frames, still.shape[1], dtype=torch.bool)
    for first in range(frames - 1):
        throughout[first, first + 1 :] = still[first:].cumprod(dim=0)
    # Row by row: the sum of a whole table of booleans would copy it to integers of 64 bits first.
    counts = torch.stack([row.sum(dim=-1) for row in throughout])
    length = torch.arange(frames)
    gains = (counts * (length - length[:, None])).tolist()
    value, start = [0] * (frames + 1), [0] * frames
    for last in range(frames):
        value[last + 1], start[last] = value[last], last
        for first in range(last - 1, -1, -1):
            if value[first] + gains[first][last] > value[last + 1]:
                value[last + 1], start[last] = value[first] + gains[first][last], first
    segments, last = [], frames - 1
    while last >= 0:
        segments.append([start[last], last])
        last = start[last] - 1
    return torch.tensor(segments[::-1])


def looped_clustering(points: Tensor, clusters: int, neighbours: int = 7, centre_weight: float = 0.6) -> Tensor:
    """Finds density peaks point by point and merges clusters one by one; returns the centres."""
    distances = (points[:, None] - points).norm(dim=-1) / points.shape[1] ** 0.5
    density = (-distances.topk(neighbours, largest=False).values.square().mean(dim=-1)).exp()
    separation = []
    for reference, to_others in zip(density, distances, strict=True):
        to_denser = to_others[density > reference]
        separation.append(to_denser.min() if len(to_denser) else distances.max())
    centres = (density * torch.stack(separation)).topk(clusters).indices.sort().values
    nearest = distances[:, centres].argmin(dim=1).tolist()
    merged = []
    for number, centre in enumerate(centres.tolist()):
        members = [i for i, cluster in enumerate(nearest) if cluster == number and i != centre]
        middle = points[centre]
        merged.append(centre_weight * middle + (1 - centre_weight) * points[members].mean(dim=0) if members else middle)
    torch.stack(merged)
    return centres


def batched_clustering(points: Tensor, clusters: int) -> Tensor:
    centres, assigned = density_peaks(points, clusters)
    merge_clusters(points, centres, assigned)
    return centres


def tabled_merging(frames: Tensor, k: int) -> Tensor:
    """Rounds of merging exactly as the formulas say: directions, the table of cosines, means by scattering.

    Returns the tokens that remain of each frame.
    """
    places = torch.arange(frames.shape[1]).expand(len(frames), -1)
    while (tokens := frames.shape[1]) > k:
        count = min(tokens // 2, tokens - k)
        directions = torch.nn.functional.normalize(frames, dim=-1)
        similarity, partner = (directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)).max(dim=2)
        going = similarity.argsort(dim=1, descending=True, stable=True)[:, :count]
        rows = going.unsqueeze(2).expand(-1, -1, frames.shape[2])
        into = partner.gather(1, going).unsqueeze(2).expand_as(rows)
        merged = frames.clone()
        merged[:, 1::2] = frames[:, 1::2].scatter_reduce(1, into, frames[:, ::2].gather(1, rows), "mean")
        stays = torch.ones_like(places, dtype=torch.bool).scatter_(1, 2 * going, False)
        frames, places = (x[stays].unflatten(0, (len(x), -1)) for x in (merged, places))
    return places


def clip_like(frames: int, positions: int = 196) -> Tensor:
    """Which positions do not change from frame to frame: shots of about 20 frames, in each of which a part moves."""
    generator = torch.Generator().manual_seed(frames)
    cut = torch.rand(frames - 1, 1, generator=generator) < 0.05
    liveliness = torch.rand(positions, generator=generator).square()
    return (torch.rand(frames - 1, positions, generator=generator) > 0.5 * liveliness) & ~cut


def merging(repeats: int, large: bool) -> None:
    table = Table(title=f"Merging, medians of {repeats}, {torch.get_num_threads()} threads")
    for heading in (
        "step", "size", "straightforward", "vtprune", "ratio", "same indices", "its peak memory", "vtprune's",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for frames in (256, 1024):
        still = clip_like(frames)
        compare(
            table,
            "segment_frames",
            f"{frames} x {still.shape[1]}",
            lambda still=still: segment_frames(still)[0],
            lambda still=still: tabled_segmentation(still),
            repeats,
            memory=True,
        )
    for n, clusters in [(196, 29), (729, 109)] + [(1500, 225)] * large:
        points = image_like(n, dim=896)[0]
        compare(
            table,
            "density_peaks, merge_clusters",
            f"{n}, {clusters}",
            lambda points=points, clusters=clusters: batched_clustering(points, clusters),
            lambda points=points, clusters=clusters: looped_clustering(points, clusters),
            repeats,
            memory=True,
        )
    # A video, one down to a few tokens a frame, and an image.
    for frames, n, k in [(32, 196, 49), (32, 196, 4), (1, 2880, 320)] + [(192, 196, 49)] * large:
        tokens = image_like(frames * n, dim=896)[0].view(frames, n, -1)
        compare(
            table,
            "bipartite_merging",
            f"{frames} x {n}, {k}",
            lambda tokens=tokens, k=k: bipartite_merging(tokens, k).places,
            lambda tokens=tokens, k=k: tabled_merging(tokens, k),
            repeats,
            memory=True,
        )
    console.print(table)
    console.print(
        "Sizes: frames x positions; points, clusters; frames x tokens, kept of each (896 channels). Memory is that of "
        "tensors, inputs left out.\n"
    )


# -- selectors inside the LLM -----------------------------------------------------------------------------------------

VISUAL, TEXT_BEFORE, TEXT_AFTER, DEPTH = 576, 35, 29, 32
IMAGE_TOKEN = 63


def model_of_7b_width(layers: int) -> LlavaForConditionalGeneration:
    """LLaVA with a small encoder and `layers` decoder layers of Vicuna-7B's shape.

    The layers share one set of weights: 0.8 GB, far beyond any cache, so that they cost what layers of their own do.
    """
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=96,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            vocab_size=64, hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=1
        ),
        image_token_index=IMAGE_TOKEN,
    )
    model = LlavaForConditionalGeneration(config).eval()
    decoder = model.model.language_model
    first = decoder.layers[0]
    for index in range(1, layers):
        with torch.device("meta"):
            layer = LlamaDecoderLayer(decoder.config, layer_idx=index)
        layer.load_state_dict(first.state_dict(), assign=True)
        decoder.layers.append(layer.eval())
    decoder.config.num_hidden_layers = layers
    return model


class SessionClock:
    """Seconds that a session spends in its hooks, and the seconds of each decoder layer without them.

    Hooks run in the order of their registration, so one registered before the session's and one after them enclose
    all that the session does there: cuts, attention rows, transitions, masks, bookkeeping.
    """

    def __init__(self, model: LlavaForConditionalGeneration):
        decoder = model.model.language_model
        self.layers = list(decoder.layers)
        self.modules: list[nn.Module] = [model.model, decoder, *self.layers]
        for layer in self.layers:
            self.modules += [layer.self_attn, layer.mlp, layer.self_attn.q_proj, layer.self_attn.k_proj]
        self.session = 0.0
        self.layer_seconds: list[float] = []
        self._handles: list = []
        self._enclosing = 0

    def _open(self, module: nn.Module, *_) -> None:
        self._enclosing += 1
        if self._enclosing == 1:
            self._started = time.perf_counter()

    def _close(self, module: nn.Module, *_) -> None:
        self._enclosing -= 1
        if not self._enclosing:  # hooks inside a hook of the session are part of it
            self.session += time.perf_counter() - self._started

    def _enter_layer(self, module: nn.Module, *_) -> None:
        self._layer_started = time.perf_counter() - self.session

    def _leave_layer(self, module: nn.Module, *_) -> None:
        self.layer_seconds.append(time.perf_counter() - self.session - self._layer_started)

    def _register(self, function: Callable, modules: list[nn.Module], before: bool) -> None:
        for module in modules:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            self._handles.append(register(function))

    def before_session(self) -> None:
        self._register(self._leave_layer, self.layers, before=False)
        self._register(self._open, self.modules, before=True)
        self._register(self._open, self.modules, before=False)

    def after_session(self) -> None:
        self._register(self._close, self.modules, before=True)
        self._register(self._close, self.modules, before=False)
        self._register(self._enter_layer, self.layers, before=True)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def prefill(model: LlavaForConditionalGeneration, method: vtprune.Method) -> SessionClock:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(IMAGE_TOKEN, (TEXT_BEFORE + TEXT_AFTER,), generator=generator)
    ids = torch.cat((text[:TEXT_BEFORE], torch.full((VISUAL,), IMAGE_TOKEN), text[TEXT_BEFORE:]))[None]
    pixels = torch.randn(1, 3, 96, 96, generator=generator)
    clock = SessionClock(model)
    clock.before_session()
    try:
        with vtprune.prune(model, method):
            clock.after_session()
            model(input_ids=ids, pixel_values=pixels)
    finally:
        clock.remove()
    return clock


def selectors(repeats: int) -> None:
    columns = TEXT_BEFORE + VISUAL + TEXT_AFTER
    table = Table(title=f"Selectors inside a 7B-shaped LLM: {columns} columns, {VISUAL} of them visual, float32")
    for heading in ("method", "layers run", "session", "one full layer", "of unpruned prefill", "of pruned prefill"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    lines = []
    # All cuts and measured layers of the published settings lie within the layers run.
    methods = ((vtprune.TransPrune(layers=(7, 9, 12)), 13), (vtprune.FastV(layer=2), 3))
    for method, layers in methods:
        model = model_of_7b_width(layers)
        first_cut = method.layers[0] if isinstance(method, vtprune.TransPrune) else method.layer
        clocks = [prefill(model, method) for _ in range(repeats)]
        session = statistics.median(clock.session for clock in clocks)
        full = statistics.median(seconds for clock in clocks for seconds in clock.layer_seconds[:first_cut])
        run = statistics.median(sum(clock.layer_seconds) for clock in clocks)
        last = statistics.median(clock.layer_seconds[-1] for clock in clocks)
        unpruned, pruned = DEPTH * full, run + (DEPTH - layers) * last
        table.add_row(
            method.name,
            str(layers),
            f"{session * 1e3:,.0f} ms",
            f"{full * 1e3:,.0f} ms",
            f"{session / unpruned:.2%}",
            f"{session / pruned:.2%}",
        )
        lines.append(
            f"{method.name}: unpruned prefill = {DEPTH} layers x {full:.3f} s = {unpruned:.1f} s; pruned prefill = "
            f"{run:.2f} s for the {layers} layers run + {DEPTH - layers} more x {last:.3f} s = {pruned:.1f} s; "
            f"session {session:.3f} s"
        )
        del model
    console.print(table)
    console.print(
        f"'session' is everything that happens in the session's hooks. Later layers hold no cut and measure nothing, "
        f"so the rest of a {DEPTH}-layer model adds to the denominators only:"
    )
    for line in lines:
        console.print(f"  {line}", highlight=False)


def main(
    repeats: int = 3,
    large: bool = False,
    part: Part | None = None,
    method: list[str] | None = None,
    renew: bool = False,
) -> None:
    """Time every method before the LLM, the selections (`--large` adds 2,880 tokens, minutes), the merges and the
    selectors inside the LLM.

    `--method NAME` times only the methods named. `--renew` records what the methods choose now.
    """
    if part in (None, Part.METHODS):
        methods(repeats, renew, method)
    if part in (None, Part.SELECTION):
        selection(repeats, large)
    if part in (None, Part.MERGING):
        merging(repeats, large)
    if part in (None, Part.PREFILL):
        selectors(repeats)


if __name__ == "__main__":
    typer.run(main)

# SPDX-License-Identifier: Apache-2.0
"""The measurements for people: four tables a batch size, in the terminal and as `bench.md`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from textwrap import fill

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from vtprune.eval.bench.stopwatch import Spread
from vtprune.eval.results.formatting import MISSING
from vtprune.eval.results.records import Record
from vtprune.eval.results.status import OK, status_text

Column = tuple[str, Callable[[Record], str]]

NOTES = """\
Medians over the rounds; ± half of the distance between the quartiles. Every round measures every row once, in an order
of its own; gains are taken round by round against the full model, which runs without a session.

*first token* is the time until the first token of the answer: *encoder*, *selection* (choices of the method, those
between decoder layers included) and *LLM* (the rest). *32 tokens* is the time until the last of 32 tokens, computed
as the time to the first token and 31 decoding steps; steps are timed when the answer has the lengths of the *tokens/s*
columns (keys and values of the tokens in front are filled in, not generated), and interpolated between these.
*tokens/s* counts the tokens of all prompts of a batch. A static cache has the length of the longest answer from the
start, so that a step takes as long at any length. *graphs*: how many the compiler made of a step.

*ideal* is the gain that FLOPs promise: those of the full model over those of the pruned one, convention `exact` of
`vtprune.cost` (two FLOPs per multiply-add, attention over the full square), LM head for one position; for the first
token with the encoder, and with the matrix products of the choices, which are counted in a pass that is not timed.
*plain* is the gain of the model without a session on text as long as what each layer is left with (and the full
model's encoder); short of *ideal* by what the machine loses on short inputs. *of ideal* and *of plain* are the measured
gain over these. *prefill* goes from the encoded image to the first token, selection included.

*peak*: tensors during encoding, prefill and a decoding step, beyond weights and inputs. *KV*: keys and values after the
prefill, all samples together."""


def budget(line: Record) -> str:
    """The budget as asked."""
    if line["method"] is None:
        return "all"
    return "published" if line["keep_ratio"] is None else f"{100 * line['keep_ratio']:g} %"


def seconds(spread: Record) -> str:
    """Median in the unit that suits it, to three digits."""
    if spread["median"] == 0:
        return MISSING
    unit, factor, digits = _unit(spread["median"])
    return f"{spread['median'] * factor:.{digits}f} {unit}"


def seconds_and_spread(spread: Record) -> str:
    """Median and half of the distance between the quartiles."""
    unit, factor, digits = _unit(spread["median"])
    half = (spread["high"] - spread["low"]) / 2
    return f"{spread['median'] * factor:.{digits}f} ±{half * factor:.{digits}f} {unit}"


def _unit(median: float) -> tuple[str, float, int]:
    """Unit, factor and digits behind the point that suit a number of seconds."""
    unit, factor = ("s", 1.0) if median >= 1 else ("ms", 1e3)
    return unit, factor, 0 if median * factor >= 100 else 1 if median * factor >= 10 else 2


def times(gain: float) -> str:
    return f"{gain:.2f}x"


def share(value: float | None) -> str:
    """Of a gain; None if FLOPs of this encoder are not counted."""
    return MISSING if value is None else f"{100 * value:.0f} %"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:.3g} MB"


def _rest(line: Record) -> Record:
    """Seconds of the prefill without the selection."""
    spent = line["seconds"]
    parts = zip(spent["prefill"]["samples"], spent["selector"]["samples"], strict=True)
    return Spread(tuple(whole - chosen for whole, chosen in parts)).to_dict()


def _per_second(line: Record, length: str) -> str:
    """Tokens of all prompts in a second of decoding."""
    rate = line["batch_size"] / line["seconds"]["per_token"][length]["median"]
    return f"{rate:.{0 if rate >= 100 else 1 if rate >= 10 else 2}f}"


FIRST_TOKEN: tuple[Column, ...] = (
    ("encoder", lambda line: seconds(line["seconds"]["encoder"])),
    ("selection", lambda line: seconds(line["seconds"]["selector"])),
    ("LLM", lambda line: seconds(_rest(line))),
    ("first token", lambda line: seconds_and_spread(line["seconds"]["first_token"])),
    ("gain", lambda line: times(line["speedup"]["first_token"]["median"])),
    ("of ideal", lambda line: share(line["realised_first_token"])),
    ("of plain", lambda line: share(line["of_plain_first_token"])),
)
PREFILL: tuple[Column, ...] = (
    ("prefill", lambda line: seconds_and_spread(line["seconds"]["prefill"])),
    ("gain", lambda line: times(line["speedup"]["prefill"]["median"])),
    ("ideal", lambda line: times(line["ideal_prefill_speedup"])),
    ("of ideal", lambda line: share(line["realised"])),
    ("plain", lambda line: times(line["plain_prefill_speedup"]["median"])),
    ("of plain", lambda line: share(line["of_plain"])),
)
HELD: tuple[Column, ...] = (
    ("last layer", lambda line: f"{line['final_tokens']:g}"),
    ("average", lambda line: f"{100 * line['measured_keep_ratio']:.1f} %"),
    ("peak", lambda line: megabytes(line["peak_bytes"])),
    ("KV", lambda line: megabytes(line["kv_bytes"])),
)


def _answers(lengths: Sequence[str], compiled: bool) -> Iterator[Column]:
    for n in lengths:
        if n != "1":
            yield f"{n} tokens", lambda line, n=n: seconds(line["seconds"]["answer"][n])
            yield "gain", lambda line, n=n: times(line["speedup"]["answer"][n]["median"])
        yield f"tokens/s at {n}", lambda line, n=n: _per_second(line, n)
    if compiled:
        yield "graphs", lambda line: str(line["graphs"])


@dataclass(frozen=True)
class Sheet:
    """A table in words."""

    title: str
    head: list[str]
    body: list[list[str]]


def sheets(lines: Sequence[Record]) -> Iterator[Sheet]:
    """For each batch size: first token, answers, prefill, tokens and memory. Then the batch sizes side by side."""
    sizes = list(dict.fromkeys(line["batch_size"] for line in lines))
    lengths = list(lines[0]["seconds"]["per_token"])
    answers = tuple(_answers(lengths, lines[0]["config"]["compile"]))
    config = lines[0]["config"]
    name = f"{config['shape'] or config['model']}, {lines[0]['decoder_layers']} decoder layers, {config['dtype']}"
    if config["cache"] == "static":
        name += ", static cache" + ", compiled steps" * config["compile"]
    for size in sizes:
        of_size = [line for line in lines if line["batch_size"] == size]
        first = of_size[0]
        about = (
            f"{name}, batch {size}: {first['prompt_tokens']} tokens a prompt, {first['visual_tokens']:g} of them visual"
        )
        for what, columns in (
            ("Time to the first token", FIRST_TOKEN),
            (
                "Whole answers, computed from the first token and decoding steps",
                answers,
            ),
            ("Prefill of the language model", PREFILL),
            ("Visual tokens and memory", HELD),
        ):
            yield _sheet(f"{what}. {about}", columns, of_size)
    if len(sizes) > 1:
        yield _beside(f"Gains by batch size. {name}", lines, sizes, lengths)


def _sheet(title: str, columns: Sequence[Column], lines: Sequence[Record]) -> Sheet:
    head = ["method", "budget", *(heading for heading, _ in columns)]
    return Sheet(title, head, [_row(line, columns) for line in lines])


def _beside(title: str, lines: Sequence[Record], sizes: Sequence[int], lengths: Sequence[str]) -> Sheet:
    """The gains of a row at every batch size, each over the full model at this size."""

    def column(heading: str, size: int, gain: Callable[[Record], Record]) -> Column:
        def show(line: Record) -> str:
            for other in lines:
                same = all(other[key] == line[key] for key in ("label", "keep_ratio"))
                if same and other["batch_size"] == size and other["status"] == OK:
                    return times(gain(other)["median"])
            return MISSING

        return f"{heading} batch {size}", show

    measures: list[tuple[str, Callable[[Record], Record]]] = [
        ("prefill", lambda line: line["speedup"]["prefill"]),
        ("first token", lambda line: line["speedup"]["first_token"]),
        *((f"{n} tokens", lambda line, n=n: line["speedup"]["answer"][n]) for n in lengths if n != "1"),
    ]
    columns = [column(heading, size, gain) for heading, gain in measures for size in sizes]
    return _sheet(title, columns, [line for line in lines if line["batch_size"] == sizes[0]])


def _row(line: Record, columns: Sequence[Column]) -> list[str]:
    start = [line["label"], budget(line)]
    if line["status"] != OK:
        return [*start, status_text(line["status"], line["floor"]), *[MISSING] * (len(columns) - 1)]
    return [*start, *(show(line) for _, show in columns)]


def terminal_tables(lines: Sequence[Record]) -> Iterator[Table]:
    """The sheets, narrow enough for 80 columns with the default lengths of answers."""
    for sheet in sheets(lines):
        table = Table(title=sheet.title, title_justify="left", box=SIMPLE_HEAD, padding=0)
        for heading in sheet.head:
            left = heading in ("method", "budget")
            table.add_column(heading.replace(" ", "\n"), justify="left" if left else "right", no_wrap=True)
        for row in sheet.body:
            # Words in the place of a number would make its column wide.
            words = (fill(text, 12, break_long_words=False) if text[0].isalpha() else text for text in row)
            table.add_row(*map(escape, words))
        yield table


def show(lines: Sequence[Record], console: Console) -> None:
    """Prints all tables, and how to read them."""
    for table in terminal_tables(lines):
        # In 80 columns, which pipes and files have, the numbers of a wider table would be cut off.
        natural = Measurement.get(console, console.options.update(width=1000), table).maximum
        Console(width=max(console.width, natural)).print(table)
    console.print(Markdown(NOTES))


def markdown(lines: Sequence[Record]) -> str:
    """All tables, how to read them, and what they were measured with."""
    first = lines[0]
    parts = ["# Time and memory", NOTES]
    for sheet in sheets(lines):
        rows = [sheet.head, ["---", "---", *["---:"] * (len(sheet.head) - 2)], *sheet.body]
        parts += [f"## {sheet.title}", "\n".join(f"| {' | '.join(row)} |" for row in rows)]
    facts = {"device": first["device"], "threads": first["threads"], **first["versions"]}
    parts += [
        "## Provenance",
        "\n".join(f"* {name}: {value}" for name, value in facts.items()),
        f"```json\n{json.dumps(first['config'], indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"

# SPDX-License-Identifier: Apache-2.0
"""The measurements for people: two tables a batch size, in the terminal and as `bench.md`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from vtprune.eval.results.formatting import MISSING
from vtprune.eval.results.records import Record
from vtprune.eval.results.status import OK, status_text

Column = tuple[str, Callable[[Record], str]]

NOTES = """\
Medians over the rounds; ± half of the distance between the quartiles. Every round measures every row once, in an order
of its own; speed-ups are taken round by round against the full model, which runs without a session. *prefill*: from the
encoded image to the first token, with the selection and all else that a session does. *first token*: encoder and
prefill. *per token*: decoding steps when the answer has so many tokens (their keys and values are filled in, not
generated). *ideal*: prefill FLOPs of the full model over those of the pruned one, convention `exact` of `vtprune.cost`
(two FLOPs per multiply-add, attention over the full square), LM head for one position. *realised*: measured over ideal
speed-up of the prefill. *ideal first token*: the same with the encoder, and with what the method computes to choose
(the matrix products, which are counted in a pass that is not timed). *plain*: speed-up of the model without a session
on text as long as what each layer is left with; short of *ideal* by what the machine loses on short inputs, and *of
plain* is what the library reaches of it. *peak*: tensors during encoding, prefill and a decoding step, beyond weights
and inputs. *KV*: keys and values after the prefill, all samples together."""


def budget(line: Record) -> str:
    """The budget as asked."""
    if line["method"] is None:
        return "all"
    return "published" if line["keep_ratio"] is None else f"{100 * line['keep_ratio']:g} %"


def seconds(spread: Record) -> str:
    """Median and spread in the unit that suits the median, to three digits."""
    if spread["median"] == 0:
        return MISSING
    factor, unit = (1, "s") if spread["median"] >= 1 else (1e3, "ms")
    middle, half = (value * factor for value in (spread["median"], (spread["high"] - spread["low"]) / 2))
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} ±{half:.{digits}f} {unit}"


def times(spread: Record) -> str:
    """A speed-up."""
    return f"{spread['median']:.2f}x"


def _ideal(speedup: float | None) -> str:
    """None: FLOPs of this encoder are not counted."""
    return MISSING if speedup is None else f"{speedup:.2f}x"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:.3g} MB"


def _time_columns(lengths: Sequence[str]) -> list[Column]:
    return [
        ("encoder", lambda line: seconds(line["seconds"]["encoder"])),
        ("selector", lambda line: seconds(line["seconds"]["selector"])),
        ("prefill", lambda line: seconds(line["seconds"]["prefill"])),
        ("first token", lambda line: seconds(line["seconds"]["first_token"])),
        *((f"per token at {n}", lambda line, n=n: seconds(line["seconds"]["per_token"][n])) for n in lengths),
    ]


def _saving_columns(lengths: Sequence[str]) -> list[Column]:
    return [
        ("last layer", lambda line: f"{line['final_tokens']:g}"),
        ("average", lambda line: f"{100 * line['measured_keep_ratio']:.1f} %"),
        ("ideal", lambda line: f"{line['ideal_prefill_speedup']:.2f}x"),
        ("prefill", lambda line: times(line["speedup"]["prefill"])),
        ("realised", lambda line: f"{100 * line['realised']:.0f} %"),
        ("plain", lambda line: times(line["plain_prefill_speedup"])),
        ("of plain", lambda line: f"{100 * line['of_plain']:.0f} %"),
        ("ideal first token", lambda line: _ideal(line["ideal_first_token_speedup"])),
        ("first token", lambda line: times(line["speedup"]["first_token"])),
        *((f"{n} tokens", lambda line, n=n: times(line["speedup"]["answer"][n])) for n in lengths if n != "1"),
        ("peak", lambda line: megabytes(line["peak_bytes"])),
        ("KV", lambda line: megabytes(line["kv_bytes"])),
    ]


@dataclass(frozen=True)
class Sheet:
    """A table in words."""

    title: str
    head: list[str]
    body: list[list[str]]


def sheets(lines: Sequence[Record]) -> Iterator[Sheet]:
    """Time, and what is saved, for each batch size."""
    for size in dict.fromkeys(line["batch_size"] for line in lines):
        of_size = [line for line in lines if line["batch_size"] == size]
        first = of_size[0]
        lengths = list(first["seconds"]["per_token"])
        config = first["config"]
        name = config["shape"] or config["model"]
        about = (
            f"{name}, {first['decoder_layers']} decoder layers, {config['dtype']}, batch {size}: "
            f"{first['prompt_tokens']} tokens a prompt, {first['visual_tokens']:g} of them visual"
        )
        for what, columns in (("time", _time_columns(lengths)), ("saving", _saving_columns(lengths))):
            head = ["method", "budget", *(heading for heading, _ in columns)]
            yield Sheet(f"{what.capitalize()}. {about}", head, [_row(line, columns) for line in of_size])


def _row(line: Record, columns: Sequence[Column]) -> list[str]:
    start = [line["label"], budget(line)]
    if line["status"] != OK:
        return [*start, status_text(line["status"], line["floor"]), *[MISSING] * (len(columns) - 1)]
    return [*start, *(show(line) for _, show in columns)]


def terminal_tables(lines: Sequence[Record]) -> Iterator[Table]:
    """Time, and what is saved, for each batch size."""
    for sheet in sheets(lines):
        table = Table(title=sheet.title, title_justify="left")
        for heading in sheet.head:
            table.add_column(heading, justify="left" if heading in ("method", "budget") else "right")
        for row in sheet.body:
            table.add_row(*map(escape, row))
        yield table


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

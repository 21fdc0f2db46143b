# SPDX-License-Identifier: Apache-2.0
"""Which method, model and input make a cell of the matrix, whether it is refused, and the page that shows all this."""

from __future__ import annotations

import re

import vtprune
from vtprune.adapters.coverage import coverage
from vtprune.testing import families

from . import text_models
from .methods import METHODS, Spec, drops_patches, spec

MEANS_OF_PATCHES: dict[str, tuple[str, ...]] = {
    "aya_vision": ("image",),
    "cohere2_vision": ("image",),
    "gemma3": ("image",),
    "llava_onevision": ("image", "video", "mixed"),  # of images those that are resized
    "llava_next_video": ("video", "mixed"),
}
"""Families and media of which some visual tokens are means of several patches. Inside the encoder these patches can
merge, but not go; `tests/encoders` has the refusals."""


NO_LOOK_AHEAD = ("exaone4_5",)
"""Families whose decoder layers have no norm before their attention, so that it cannot be computed ahead."""
COUNT_PADDING = ("exaone4_5", "hyperclovax_vision_v2")
"""Families that count positions from the padding on the left on. Attention does not change by that, but the lengths of
rotated keys do, which `dart` goes by."""


def turn(name: str, method: str) -> int:
    """A number that is one larger for the next family, and for the next method."""
    return families.NAMES.index(name) + list(METHODS).index(method)


def _has_its_turn(name: str, media: str, method: str) -> bool:
    """Whether a medium is the one with which a method's turn is on a family."""
    kinds = families.MEDIA[name]
    return media == kinds[turn(name, method) % len(kinds)]


UNSTEADY = (
    ("glm5_next", "video", "textmonkey"),  # chunks of its linear attention begin elsewhere in a padded batch: 1.1e-4
    ("qwen3_5", "video", "prumerge"),  # the same, with eager attention
)
"""Cells that are not run, and why."""

CELLS = [
    (name, media, method)
    for name in families.NAMES
    for media in families.MEDIA[name]
    for method in METHODS
    if not (drops_patches(method) and media in MEANS_OF_PATCHES.get(name, ()))
    if name not in families.KINDRED or _has_its_turn(name, media, method)
    if (name, media, method) not in UNSTEADY
]
"""All families, media and methods that are tested together; on kindred families one medium a method, in turns."""


def in_turns(name: str, media: str, method: str) -> bool:
    """Whether a cell is one of those that have every method on every family once, with media in turns; on kindred
    families every eighth method."""
    rounds = turn(name, method) // len(families.MEDIA[name])
    return _has_its_turn(name, media, method) and (name not in families.KINDRED or rounds % 8 == 0)


def refusal(model, methods: Spec) -> str | None:
    """Why a session with these methods cannot even be made; None if it can."""
    try:
        vtprune.prune(model, methods)
    except (vtprune.UnsupportedModelError, vtprune.UnsupportedStageError) as error:
        return str(error)
    return None


# -- the page ----------------------------------------------------------------------------------------------------------

_HEAD = """<!-- Written by `pytest tests/conformance/test_matrix.py --update-support`; a test fails when stale. -->

# What works on what

The tests run every cell below on tiny random-weight models, for single prompts and for a padded batch of three that
differ in length and in the number and size of their images. Families that take videos run with images, with videos, and
with both in one prompt, with sdpa (positions kept); with eager attention (positions renumbered) a method runs with one
of these media, in turns. On kindred families, in which little is new, a method runs with one of these media and one
kind of attention. Language models that do what sdpa cannot (Gemma 2 caps attention logits, gpt-oss has sinks) are
eager in either case.

A cell with ✓ keeps these promises:

* keeping everything gives the logits and ids of the model without vtprune, bit by bit;
* generation with a pruned KV cache gives the logits (within 1e-4) and ids of a recompute without a cache, what was
  evicted from the cache after the prefill, or came back to it while decoding, included;
* a batch gives each sample what it gets alone;
* afterwards no hook, attribute or changed setting is left on the model;
* the attention back end stays;
* text is never dropped, and the report counts what every cache layer holds.

Any other cell is refused when the session is made, before anything is computed; its letter is the reason, below.
Methods inside encoder layers (`tome` to `tca`, and names with `_patches`): where visual tokens are means of
several patches (Gemma 3, Aya Vision, Command A Vision, videos of LLaVA-OneVision and LLaVA-NeXT-Video, resized images
of LLaVA-OneVision), merging makes only the encoder cheaper, and methods that drop patches refuse the batch.
"""

_WORKS = "✓"


def page() -> str:
    """The text of docs/support.md, from what sessions accept now."""
    reasons: dict[str, str] = {}
    columns: dict[tuple[str, ...], list[str]] = {}
    facts = [["family", "tested as", "media", "visual tokens", "stages", "signals", "CLS token in the tests"]]
    for name in families.NAMES:
        model = families.shared(name)
        adapter = vtprune.adapter_for(model)
        marks = []
        for method in METHODS:
            reason = refusal(model, spec(method))
            if reason is not None:
                reason = _general(reason, method, adapter.family)
                reasons.setdefault(reason, _letter(len(reasons)))
            marks.append(_WORKS if reason is None else reasons[reason])
        columns.setdefault(tuple(marks), []).append(name)
        media = ", ".join(f"{kind}s" for kind in adapter.kinds)
        stages, signals = ", ".join(f"`{stage}`" for stage in adapter.stages()), ", ".join(adapter.signals())
        has_cls = "yes" if adapter.shape.has_cls else "no"
        facts.append([adapter.family, f"`{name}`", media, adapter.layout, stages, signals, has_cls])
    numbers = [str(number) for number in range(1, len(columns) + 1)]
    groups = [["column", "families, as they are tested"]]
    groups += [
        [number, ", ".join(f"`{name}`" for name in names)]
        for number, names in zip(numbers, columns.values(), strict=True)
    ]
    table = [["method", *numbers]]
    table += [[f"`{method}`", *marks] for method, *marks in zip(METHODS, *columns, strict=True)]
    notes = [f"* **{letter}**: {reason}." for reason, letter in reasons.items()]
    text = [_TEXT_HEAD, *_markdown(_text_models()), ""]
    head = [_HEAD, "Families with the same marks are one column:", "", *_markdown(groups), "", *_markdown(table), ""]
    return "\n".join([*head, *notes, "", "## Families", "", *_markdown(facts), "", *text, *_every_class(), ""])


def _letter(number: int) -> str:
    """a to z, then aa to zz."""
    first, last = divmod(number, 26)
    return ("" if first == 0 else chr(96 + first)) + chr(97 + last)


def _general(reason: str, method: str, family: str) -> str:
    """A reason without names of the method (of its part), of the family and its encoder, and without what works
    instead."""
    general = re.sub(r"^\w+: ", "", reason.partition("; methods ")[0]).removeprefix(method).lstrip()
    general = general.replace(f"the vision encoder of {family}", "the vision encoder")
    return re.sub(r"its vision tower is a \w+", "it is another one than CLIP's and SigLIP's", general)


_TEXT_HEAD = """## Language models

Some classes, `LlavaForConditionalGeneration` and InternVL's among them, take any language model. The tests put each of
these below LLaVA's encoder (`tests/conformance/test_text_models.py`), on the oldest and the newest supported release of
transformers. A cell that *works* gives, for a padded batch and on a KV cache, what the model computes with the dropped
columns taken out by hand; and the attention that a method is shown is, in every layer, what the model's own eager
attention computes. Any other cell is refused when the session is made.

A language model that is not in the table is asked before its first use: the attention of the layers that a method reads
is recomputed for a few random tokens and compared with the model's own. If it differs, methods that read attention
inside the LLM are refused, and the others work.
"""


def _text_models() -> list[list[str]]:
    stages = {
        "before the LLM": "divprune",
        "inside, by a layer that has run": "fastv",
        "inside, by the layer to come": "pdrop",
    }
    rows = [["model type", *(f"{stage} (`{method}`)" for stage, method in stages.items())]]
    for name in text_models.NAMES:
        reasons = [refusal(text_models.shared(name), spec(method, keep_ratio=0.9)) for method in stages.values()]
        rows.append([f"`{name}`", *("works" if reason is None else f"refused: {_brief(reason)}" for reason in reasons)])
    return rows


def _brief(reason: str) -> str:
    """A reason without what is said in all of them."""
    return (
        reason.partition("; methods before")[0].rpartition("language model, which ")[2].rpartition("recomputed for ")[2]
    )


_CLASSES_HEAD = """## Every class of transformers

These are all model types that transformers loads as language models with images, videos or sound, or as models for
retrieval. `vtprune models --all` prints them for the installed release. A model that is refused gets its reason as the
error of `vtprune.prune`. A test fails for a class of a tested release that has neither an adapter nor a reason.
"""


def _every_class() -> list[str]:
    rows = coverage()
    reasons = sorted({row.refusal.reason for row in rows if row.refusal is not None})
    table = [["model type", "class", "stages, or why it is refused", "what is special"]]
    for row in rows:
        if row.adapter is not None:
            cells = ", ".join(f"`{stage}`" for stage in row.adapter.stages()), row.adapter.layout
        else:
            cells = row.refusal.reason.name, row.refusal.detail
        table.append([f"`{row.model_type}`", f"`{row.class_name}`", *cells])
    return [_CLASSES_HEAD, *(f"* *{name}*: {why}; {helps}." for name, why, helps in reasons), "", *_markdown(table)]


def _markdown(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]

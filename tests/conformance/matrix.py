# SPDX-License-Identifier: Apache-2.0
"""Which method, model and input make a cell of the matrix, whether it is refused, and the page that shows all this."""

from __future__ import annotations

import re
from string import ascii_uppercase

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

The tests run every method on every family below, on tiny random-weight models, for single prompts and for a padded
batch of three that differ in length and in the number and size of their images. Families that take videos run with
images, with videos, and with both in one prompt, with sdpa (positions kept); with eager attention (positions
renumbered) a method runs with one of these media, in turns. On kindred families, in which little is new, a method
runs with one of these media and one kind of attention; one prompt of the batch also runs alone, and every eighth
method also keeps everything. Language models that do what sdpa cannot (Gemma 2 caps attention logits, gpt-oss has
sinks) are eager in either case.

What works keeps these promises:

* keeping everything gives the logits and ids of the model without vtprune, bit by bit;
* generation with a pruned KV cache gives the logits (within 1e-4) and ids of a recompute without a cache, what was
  evicted from the cache after the prefill, or came back to it while decoding, included;
* a batch gives each sample what it gets alone;
* afterwards no hook, attribute or changed setting is left on the model;
* the attention back end stays;
* text is never dropped, and the report counts what every cache layer holds.

Anything else is refused when the session is made, before anything is computed, with the reason that is given below.
Methods inside encoder layers (`tome` to `tca`, and names with `_patches`): where visual tokens are means of
several patches (Gemma 3, Aya Vision, Command A Vision, videos of LLaVA-OneVision and LLaVA-NeXT-Video, resized images
of LLaVA-OneVision), merging makes only the encoder cheaper, and methods that drop patches refuse the batch.
"""

_METHODS_HEAD = """## Methods

Methods that the same families take are one group. The numbers are the rows of the next table.
"""

_REFUSED_HEAD = """## Families and what they refuse

Families that take the same methods, and refuse others for the same reasons, are one row. They take all groups of
methods that the row does not name.
"""

_WORKS = ""
"""Stands where a method works, among the reasons why others do not."""


def page() -> str:
    """The text of docs/support.md, from what sessions accept now."""
    marked: dict[tuple[str, ...], list[str]] = {}
    facts = [["family", "tested as", "media", "visual tokens", "stages", "signals", "CLS token in the tests"]]
    for name in families.NAMES:
        model = families.shared(name)
        adapter = vtprune.adapter_for(model)
        reasons = (refusal(model, spec(method)) for method in METHODS)
        marks = [
            _WORKS if reason is None else _general(reason, method, adapter.family)
            for method, reason in zip(METHODS, reasons, strict=True)
        ]
        marked.setdefault(tuple(marks), []).append(name)
        media = ", ".join(f"{kind}s" for kind in adapter.kinds)
        stages, signals = ", ".join(f"`{stage}`" for stage in adapter.stages()), ", ".join(adapter.signals())
        has_cls = "yes" if adapter.shape.has_cls else "no"
        facts.append([adapter.family, f"`{name}`", media, adapter.layout, stages, signals, has_cls])
    methods, refused = _groups(marked)
    text = [_TEXT_HEAD, *_markdown(_text_models()), ""]
    head = [_HEAD, _METHODS_HEAD, *_markdown(methods), "", _REFUSED_HEAD, *_markdown(refused), ""]
    return "\n".join([*head, "## Families", "", *_markdown(facts), "", *text, *_every_class(), ""])


def _groups(marked: dict[tuple[str, ...], list[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """The table of the methods and the table of what families refuse.

    marked: for each method `_WORKS` or why not -> the families of which that is true.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for method, *marks in zip(METHODS, *marked, strict=True):
        groups.setdefault(tuple(marks), []).append(method)
    methods = [["group", "methods", "refused in rows"]]
    refused = [["row", "families, as they are tested", "groups that are refused, and why"]]
    for group, (marks, names) in zip(ascii_uppercase, groups.items(), strict=False):
        taken = [str(row) for row, mark in enumerate(marks, 1) if mark == _WORKS]
        others = [str(row) for row, mark in enumerate(marks, 1) if mark != _WORKS]
        refusing = ", ".join(others) or "none" if len(others) <= len(taken) else f"all but {', '.join(taken)}"
        methods.append([group, ", ".join(f"`{name}`" for name in names), refusing])
    for row, (names, marks) in enumerate(zip(marked.values(), zip(*groups, strict=True), strict=True), 1):
        why: dict[str, list[str]] = {}
        for group, mark in zip(ascii_uppercase, marks, strict=False):
            if mark != _WORKS:
                why.setdefault(mark, []).append(group)
        lines = [f"**{' '.join(letters)}**: {reason}" for reason, letters in why.items()]
        refused.append([str(row), ", ".join(f"`{name}`" for name in names), "<br>".join(lines) or "none"])
    assert len(groups) <= len(ascii_uppercase)
    return methods, refused


def _general(reason: str, method: str, family: str) -> str:
    """A reason without names of the method (of its part), of the family and its encoder, and without what works
    instead."""
    general = re.sub(r"^\w+: ", "", reason.partition("; methods ")[0]).removeprefix(method).lstrip()
    general = general.replace(f"the vision encoder of {family}", "the vision encoder")
    general = re.sub(r"^\w+ by .* CLS token(?=, and this vision encoder)", "needs a CLS token", general)
    general = general.replace("reads the attention of a CLS token", "needs a CLS token")
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

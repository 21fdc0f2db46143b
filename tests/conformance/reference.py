# SPDX-License-Identifier: Apache-2.0
"""What pruned generation has to compute on the models of `models`, by `vtprune.testing.recompute`; and greedy runs."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.testing import recompute as testing

from . import methods
from .lazy_reference import cuts_of, lazy_recompute
from .models import IMAGE_TOKEN, Prompts

ATOL = 1e-4


def recompute(
    model,
    ids: Tensor,
    images: Tensor,
    kept: list[Tensor],
    positions: str,
    sources: Tensor | None = None,
    cached: list[Tensor] | None = None,
    *,
    prompt: int | None = None,
) -> Tensor:
    """Logits (tokens, vocabulary) of one sample; rows of dropped columns are NaN.

    Args:
        ids: (tokens,), the prompt, then what was generated.
        images: (images, 3, height, width).
        kept, positions, sources, cached: see `vtprune.testing.recompute.recompute`.
        prompt: how many of the ids are the prompt's; default all. An image token that the model generates is text.
    """
    prompt = len(ids) if prompt is None else prompt
    inputs = _inputs(ids[:prompt], images)
    return testing.recompute(model, inputs, ids[prompt:], kept, positions, sources, cached)


def _inputs(ids: Tensor, images: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} | (
        {"pixel_values": images} if len(images) else {}
    )


def kept_columns(report, prompts: Prompts, sample: int, layers: int, padding_side: str = "left") -> list[Tensor]:
    """`report.kept` of one sample, as columns of its own unpadded ids."""
    first = prompts.first_column(sample, padding_side)
    return [report.kept(sample, layer) - first for layer in range(layers)]


def depth(model) -> int:
    return model.config.text_config.num_hidden_layers


def cached_columns(report, prompts: Prompts, sample: int, layers: int, padding_side: str = "left") -> list[Tensor]:
    """The same of `report.cached`."""
    first = prompts.first_column(sample, padding_side)
    return [report.cached(sample, layer) - first for layer in range(layers)]


def expected_steps(
    model, prompts: Prompts, report, sample: int, generated: Tensor, positions: str, *, revives: bool = False
) -> Tensor:
    """Recomputed logits (steps, vocabulary) of one sample of a left-padded generation.

    revives: whether tokens came back while decoding (`methods.revives`).
    """
    prompt = prompts.ids[sample]
    if revives:
        inputs = _inputs(prompt, prompts.images[sample])
        return lazy_recompute(model, inputs, generated[:-1], cuts_of(report, sample)).logits
    ids = torch.cat([prompt, generated[:-1]])
    kept = kept_columns(report, prompts, sample, depth(model))
    cached = cached_columns(report, prompts, sample, depth(model))
    sources = report.sources(sample, 0)
    images = prompts.images[sample]
    return recompute(model, ids, images, kept, positions, sources, cached, prompt=len(prompt))[len(prompt) - 1 :]


def assert_recomputed(model, prompts: Prompts, report, output, positions: str, *, revives: bool = False) -> None:
    """Every step's logits, and the ids for greedy decoding, of a left-padded generation are the recomputed ones."""
    length = max(map(len, prompts.ids))
    got = torch.stack(output.logits, 1)
    for sample in range(len(prompts)):
        generated = output.sequences[sample, length:]
        expected = expected_steps(model, prompts, report, sample, generated, positions, revives=revives)
        torch.testing.assert_close(got[sample], expected, atol=ATOL, rtol=0, msg=lambda m, s=sample: f"sample {s}: {m}")
        allowed = expected.clone()
        allowed[:, IMAGE_TOKEN] = float("-inf")
        assert generated.tolist() == allowed.argmax(-1).tolist()


def assert_method_recomputed(model, prompts: Prompts, report, output, name: str, positions: str) -> None:
    """`assert_recomputed` for a method of `methods.EVERY` that was given `positions`."""
    if methods.revives(name):
        assert_recomputed(model, prompts, report, output, "original", revives=True)
    else:
        numbered = methods.numbered(methods.spec(name, positions=positions))
        assert_recomputed(model, prompts, report, output, numbered)


def generate(model, inputs: dict[str, Tensor], new_tokens: int = 8, **options):
    """Greedy unless said otherwise; logits kept; the image token, which has no meaning in an answer, suppressed."""
    options = {"do_sample": False, "suppress_tokens": [IMAGE_TOKEN]} | options
    return model.generate(
        **inputs, max_new_tokens=new_tokens, output_logits=True, return_dict_in_generate=True, **options
    )

# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of several families: pruned generation against a recompute, and the patches of visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import vtprune
from vtprune.signals import TextEmbeddings
from vtprune.testing import families
from vtprune.testing.recompute import recompute
from vtprune.tokens import Selection

ATOL = 1e-4
NEW = 5
METHODS = ("random", "divprune", "mmtok", "pool", "vtc_cls", "fastv", "transprune")


def every_cell(name: str, *, cls_token: bool):
    """Parametrises `media`, `method`, `attention` and `positions` over what the family `name` can do."""
    methods = [method for method in METHODS if cls_token or method != "vtc_cls"]
    cells = [
        pytest.param(media, method, *pair, marks=marks, id="-".join((media, method, *pair)))
        for media in families.MEDIA[name]
        for method in methods
        # The matrix has the other pairs.
        for pair, marks in ((("sdpa", "compact"), []), (("eager", "original"), [pytest.mark.slow]))
    ]
    return pytest.mark.parametrize(("media", "method", "attention", "positions"), cells)


def generate(model, batch: families.Batch):
    return model.generate(
        **batch.inputs,
        max_new_tokens=NEW,
        suppress_tokens=list(batch.visual_ids),
        output_logits=True,
        return_dict_in_generate=True,
    )


@torch.no_grad()
def check_pruned(name: str, media: str, method: str, attention: str = "sdpa", positions: str = "compact", **options):
    """A padded batch of three, pruned, gives the recomputed logits and ids. Returns the session's report."""
    model = families.shared(name, attention)
    batch = families.batch(name, model, media=media)
    with vtprune.prune(model, method, positions=positions, **{"keep_ratio": 0.3} | options) as session:
        output = generate(model, batch)
    report = session.report
    assert report.keep_ratio < 0.6
    for sample, inputs in enumerate(batch.singles):
        kept = [report.kept(sample, layer) - batch.first_column(sample) for layer in range(report.depth)]
        sources = report.sources(sample, 0) if method == "pool" else None
        generated = output.sequences[sample, -NEW:]
        expected = recompute(model, inputs, generated[:-1], kept, positions, sources)[-NEW:]
        torch.testing.assert_close(torch.stack(output.logits, 1)[sample], expected, atol=ATOL, rtol=0)
        expected[:, list(batch.visual_ids)] = float("-inf")
        assert generated.tolist() == expected.argmax(-1).tolist()
    return report


@torch.no_grad()
def check_untouched(name: str, media: str, attention: str):
    """Methods that keep everything do not change a bit."""
    model = families.shared(name, attention)
    batch = families.batch(name, model, media=media)
    before = generate(model, batch)
    with vtprune.prune(model, [{"name": "mmtok", "keep_ratio": 1.0}, {"name": "fastv", "keep_ratio": 1.0}]):
        after = generate(model, batch)
    assert torch.equal(before.sequences, after.sequences)
    assert torch.equal(torch.stack(before.logits), torch.stack(after.logits))


def blinkered(name: str):
    """A new model whose vision encoder has no attention between patches: a feature depends only on its own pixels."""
    model = families.build(name)
    adapter = vtprune.adapter_for(model)
    for layer in (layer for kind in adapter.kinds for layer in adapter.encoder_layers(kind)):
        parts = dict(adapter.encoder_attention(layer).named_children())
        (output,) = [parts[key] for key in ("proj", "out_proj", "o_proj", "projection_layer") if key in parts]
        getattr(output, "linear", output).weight.data.zero_()
    return model


@torch.no_grad()
def origins(encode: Callable[[Tensor], Tensor], pixels: Tensor, patch: int) -> Tensor:
    """(tokens, crops, patches) bool: the patches that each visual token of a blinkered model depends on.

    encode: pixels (crops, 3, height, width) -> (tokens, dim). patch: side of a patch in pixels.
    """
    before = encode(pixels)
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    depends = torch.zeros(len(before), len(pixels), rows * columns, dtype=torch.bool)
    for crop in range(len(pixels)):
        for place in range(rows * columns):
            top, left = place // columns * patch, place % columns * patch
            changed = pixels.clone()
            changed[crop, :, top : top + patch, left : left + patch] += 1
            depends[:, crop, place] = (encode(changed) != before).any(-1)
    return depends


@torch.no_grad()
def projector_input(model, encode: Callable[[], object]) -> Tensor:
    """The arguments with which the projector was called meanwhile."""
    seen = []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    encode()
    handle.remove()
    (features,) = seen
    return features


@torch.no_grad()
def check_frames_are_asked(name: str, end: int):
    """Every frame of a video is asked the text behind the last token `end` of its prompt, and nothing else."""
    model = families.shared(name)
    batch = families.batch(name, model, media="video")
    questions = []

    @dataclass(frozen=True, kw_only=True)
    class Listens(vtprune.BeforeLLM):
        name = "listens"
        signal = "text"

        def signals(self, shape):
            return (TextEmbeddings(),)

        def select(self, tokens):
            questions.extend(tokens[TextEmbeddings()])
            return Selection.of_indices(tokens, [torch.arange(k) for _, _, k in tokens.each()])

    with vtprune.prune(model, Listens(keep_ratio=0.3)):
        model(**batch.inputs)
    # Frames of the first sample's video, of the second one's last, of the third's.
    for inputs, frames in zip(batch.singles, (questions[:3], questions[5:9], questions[9:]), strict=True):
        ids = inputs["input_ids"][0]
        asked = ids[(ids == end).nonzero().max() + 1 :]
        assert len(asked) >= 4 and len(frames) >= 3
        assert all(torch.equal(question, model.get_input_embeddings()(asked)) for question in frames)

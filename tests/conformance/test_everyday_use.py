# SPDX-License-Identifier: Apache-2.0
"""What users do beside `generate(**inputs)`: embeddings, quantised layers, several devices, second turns, pipelines."""

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn

import vtprune
from vtprune.signals import TextEmbeddings
from vtprune.testing import families
from vtprune.testing.recompute import recompute
from vtprune.transformers_private import CACHE

from .methods import spec

ATOL = 1e-4
NEW = 5
# One family for each way of laying tokens out, of counting positions and of building masks.
VARIED = ("llava", "llava_next", "qwen3_vl", "internvl", "gemma3")
METHODS = ("mmtok", "fastv", "transprune")


def generate(model, inputs: dict[str, Tensor], **options):
    options = {"max_new_tokens": NEW, "suppress_tokens": [families.IMAGE, families.VIDEO]} | options
    return model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)


def kept_columns(report, sample: int, first: int) -> list[Tensor]:
    return [report.kept(sample, layer) - first for layer in range(report.depth)]


def assert_recomputed(reference, batch: families.Batch, report, output, positions: str = "original") -> None:
    """Every step of a left-padded generation is what the reference model gives without the same tokens."""
    for sample, inputs in enumerate(batch.singles):
        kept = kept_columns(report, sample, batch.first_column(sample))
        logits = torch.stack(output.logits, 1)[sample]
        generated = output.sequences[sample, -len(logits) :]
        expected = recompute(reference, inputs, generated[:-1], kept, positions)[-len(logits) :]
        torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0, msg=lambda m, s=sample: f"sample {s}: {m}")


class Int8Linear(nn.Module):
    """A linear layer without a float weight, as quantisation leaves it behind."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = nn.Parameter(linear.weight.detach().abs().amax(1, keepdim=True) / 127, requires_grad=False)
        self.register_buffer("packed", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.packed.to(x.dtype) * self.scale, self.bias)


def quantised(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Int8Linear(module))
    return model


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, method) for name in VARIED for method in METHODS),
        *((name, "vtc_cls") for name in ("llava", "llava_next", "internvl")),
    ],
)
def test_quantised_linear_layers(name, method):
    """Nothing reads a weight: anything that is called as a module will do."""
    model = quantised(families.build(name))
    batch = families.batch(name, model, samples=2)
    with vtprune.prune(model, spec(method, positions="original")) as session:
        output = generate(model, batch.inputs)
    assert_recomputed(model, batch, session.report, output)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", VARIED)
def test_a_model_spread_over_devices(name, method):
    """accelerate replaces the forward of every module and copies what goes in."""
    plain = families.shared(name)
    places = {child: "cpu" for child, _ in plain.model.named_children()}
    decoder = next(child for child, module in plain.model.named_children() if module is plain.get_decoder())
    del places[decoder]
    layers = len(plain.get_decoder().layers)
    places |= {f"{decoder}.{part}": "cpu" for part, _ in plain.get_decoder().named_children() if part != "layers"}
    places |= {f"{decoder}.layers.{layer}": "cpu" for layer in range(layers)}
    places = {f"model.{part}": device for part, device in places.items()} | {"lm_head": "cpu"}
    places |= {f"model.{part}": "cpu" for part, _ in plain.model.named_parameters(recurse=False)}
    model = dispatch_model(families.build(name), places, force_hooks=True)
    batch = families.batch(name, plain, samples=2)
    with vtprune.prune(model, spec(method, positions="original")) as session:
        output = generate(model, batch.inputs)
    assert_recomputed(plain, batch, session.report, output)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("method", METHODS)
def test_prompts_beyond_the_context_window(method, positions):
    """The prompt is longer than the model was made for, what is left of it is not: neither is refused."""
    model = families.build("llava", max_position_embeddings=48)
    batch = families.batch("llava", model)
    assert min(inputs["input_ids"].shape[1] for inputs in batch.singles[1:]) > 40
    assert batch.inputs["input_ids"].shape[1] > 48
    with vtprune.prune(model, spec(method, positions=positions)) as session:
        output = generate(model, batch.inputs)
    assert_recomputed(model, batch, session.report, output, positions)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "idefics3", "mistral3"])
def test_prompts_given_as_embeddings(name, method):
    """With `inputs_embeds` the places of images are told by the placeholder's embedding, as transformers does."""
    model = families.shared(name)
    batch = families.batch(name, model, samples=2)
    inputs = dict(batch.inputs)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    methods = spec(method, positions="original")
    with vtprune.prune(model, methods) as session:
        by_ids = generate(model, batch.inputs)
        kept = [session.report.kept(sample).tolist() for sample in range(2)]
        by_embeddings = generate(model, inputs)
    assert kept == [session.report.kept(sample).tolist() for sample in range(2)]
    assert torch.equal(by_ids.sequences[:, -NEW:], by_embeddings.sequences)
    torch.testing.assert_close(torch.stack(by_ids.logits), torch.stack(by_embeddings.logits), atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", VARIED)
def test_what_cannot_be_pruned_is_refused_before_the_llm_runs(name):
    model = families.build(name)
    batch = families.batch(name, model, samples=1)
    ran = []
    model.get_decoder().layers[0].register_forward_hook(lambda *ignored: ran.append(1))
    with vtprune.prune(model, spec("fastv")) as session:
        with pytest.raises(vtprune.UnsupportedStageError, match="(?i)chunked|tokens were encoded"):
            generate(model, batch.inputs, prefill_chunk_size=8)
        assert not ran and session.report is None
        generate(model, batch.inputs)
    assert ran and session.report.keep_ratio < 1


@pytest.mark.parametrize("how", ["wrapped", "in place", "forward", "a layer"])
def test_compiled_models_are_refused(how):
    model = families.build("llava")
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.get_decoder().layers[3].compile(backend="eager")
    with pytest.raises(vtprune.UnsupportedModelError, match="compiled"):
        vtprune.prune(model, "fastv", keep_ratio=0.5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", VARIED)
def test_assisted_decoding(name, method):
    """Guesses, right and wrong, are checked against the pruned cache, several at a time."""
    model = families.shared(name)
    batch = families.batch(name, model, samples=1)
    with vtprune.prune(model, spec(method)) as session:
        greedy = generate(model, batch.inputs, max_new_tokens=12)
        counts = session.report.counts
        guessed = generate(model, batch.inputs, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy.sequences, guessed.sequences)
    assert torch.equal(counts, session.report.counts)


class Questions(vtprune.BeforeLLM):
    """Keeps the first tokens of every group and notes the question it was given."""

    name = "questions"
    signal = "text"
    seen: list = []

    def signals(self, shape):
        return (TextEmbeddings(),)

    def select(self, tokens):
        self.seen.append(tokens[TextEmbeddings()])
        return vtprune.Selection.of_indices(tokens, [torch.arange(k) for _, _, k in tokens.each()])


UNMARKED = ("dots3_note", "hy_v4_vl")
"""Families of which neither config nor processor tells what stands around an image, so that it counts as text."""


@pytest.mark.parametrize("name", families.NAMES)
def test_every_image_is_asked_the_text_after_it(name):
    """Of its own sample, from its end on; no marker, no separator, no token of another image, no padding."""
    model = families.shared(name)
    batch = families.batch(name, model)
    embed = model.get_input_embeddings()
    expected = []
    for inputs in batch.singles:
        ids = inputs["input_ids"][0].tolist()
        # In the batches' prompts every image, and every tile of one, is followed by the same closing text.
        last = max(column for column, token in enumerate(ids) if token in batch.visual_ids)
        language = [token for token in ids[last + 1 :] if families.FIRST_WORD <= token < families.IMAGE]
        expected.append(embed(torch.tensor(language)))
    Questions.seen.clear()
    with vtprune.prune(model, Questions(keep_ratio=0.5)) as session:
        generate(model, batch.inputs, max_new_tokens=1)
    (questions,) = Questions.seen
    assert session.report.keep_ratio < 1
    endings = [[bool(torch.equal(q[-len(e) :], e)) for e in expected] for q in questions]
    assert all(any(row) for row in endings)
    assert {row.index(True) for row in endings} == set(range(len(expected)))
    assert name in UNMARKED or any(torch.equal(q, expected[0]) for q in questions)


def joined(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Two tensors one after the other along `dim`, the smaller one padded with zeros in all other dimensions."""
    shape = [max(sizes) for sizes in zip(first.shape, second.shape, strict=True)]
    parts = []
    for part in (first, second):
        whole = part.new_zeros(
            [n if i == dim else size for i, (n, size) in enumerate(zip(part.shape, shape, strict=True))]
        )
        whole[tuple(slice(n) for n in part.shape)] = part
        parts.append(whole)
    return torch.cat(parts, dim)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "internvl", "idefics3", "mistral3"])
def test_a_second_turn_brings_a_second_image(name, method, positions):
    """The first turn's cache, pruned, is continued by a prompt whose image is of another size."""
    model = families.shared(name)
    singles = families.batch(name, model).singles
    one, two = singles[0], singles[2]
    with vtprune.prune(model, spec(method, positions=positions)) as session:
        first = generate(model, one)
        kept = kept_columns(session.report, 0, 0)
        ids = torch.cat([first.sequences, two["input_ids"][:, 1:]], 1)
        images = {key: value for key, value in two.items() if key not in ("input_ids", "attention_mask")}
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
        second = generate(model, turn, **{CACHE: first[CACHE]})
        again = kept_columns(session.report, 0, 0)
    assert all(len(columns) and int(columns.min()) >= first.sequences.shape[1] for columns in again)
    assert len(again[-1]) < int(torch.isin(two["input_ids"], torch.tensor([families.IMAGE])).sum())
    kept = [torch.cat(layer) for layer in zip(kept, again, strict=True)]
    # Idefics3 stacks the tiles of one sample along the second dimension.
    whole = {key: joined(one[key], images[key], dim=int(name == "idefics3")) for key in images}
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **whole}
    logits = torch.stack(second.logits, 1)[0]
    generated = second.sequences[0, -len(logits) :]
    expected = recompute(model, whole, generated[:-1], kept, positions)[-len(logits) :]
    torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)

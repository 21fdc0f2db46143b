# SPDX-License-Identifier: Apache-2.0
"""Promise 3: a batch gives each sample what it gets alone."""

import pytest
import torch

import vtprune

from . import models
from .methods import every_method, every_method_and_model, spec
from .models import IMAGE_TOKEN, batch_of_three, prompts
from .reference import ATOL, assert_method_recomputed, depth, generate, kept_columns, recompute

pytestmark = pytest.mark.release


@pytest.mark.parametrize("padding_side", ["left", "right"])
@every_method_and_model()
def test_padded_batch(model_name, name, padding_side):
    """Right padding, too: a pruned call drops padding, so that generation goes on from the last real token."""
    model = models.shared(model_name)
    batch = batch_of_three(model)
    with vtprune.prune(model, spec(name)) as session:
        together = generate(model, batch.inputs(padding_side))
        kept = [kept_columns(session.report, batch, sample, depth(model), padding_side) for sample in range(3)]
        for sample in range(3):
            single = batch.one(sample)
            alone = generate(model, single.inputs())
            for layer, columns in enumerate(kept_columns(session.report, single, 0, depth(model))):
                assert columns.tolist() == kept[sample][layer].tolist()
            for ours, theirs in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(ours[sample], theirs[0], atol=ATOL, rtol=0)
            new = len(alone.logits)
            assert torch.equal(together.sequences[sample, -new:], alone.sequences[0, -new:])


@pytest.mark.parametrize(
    "layouts", [("tItttt", "ttIttItttttt"), ("tItttt", "t" * 90)], ids=["images", "longest-has-none"]
)
@pytest.mark.parametrize("padding_side", ["left", "right"])
@every_method()
def test_padded_forward(gqa, name, padding_side, layouts):
    """Logits of all surviving columns, in place, for scoring; also where the batch gets no shorter."""
    batch = prompts(gqa, *layouts)
    with vtprune.prune(gqa, spec(name, positions="original")) as session:
        logits = gqa(**batch.inputs(padding_side), use_cache=False).logits
    assert logits.shape[:2] == batch.inputs()["input_ids"].shape
    for sample, ids in enumerate(batch.ids):
        kept = kept_columns(session.report, batch, sample, depth(gqa), padding_side)
        sources = session.report.sources(sample, 0)
        expected = recompute(gqa, ids, batch.images[sample], kept, "original", sources)
        alive = ~expected.isnan().any(-1)
        first = batch.first_column(sample, padding_side)
        got = logits[sample, first : first + len(ids)]
        torch.testing.assert_close(got[alive], expected[alive], atol=ATOL, rtol=0)


@pytest.mark.parametrize("longest", [15, 90])
@every_method()
def test_samples_with_and_without_images(gqa, name, longest):
    """Also where the longest sample has no image, so that the batch gets no shorter."""
    batch = prompts(gqa, "ttItttt", "tttt", "t" * longest, "tItIttt")
    with vtprune.prune(gqa, spec(name, positions="compact")) as session:
        output = generate(gqa, batch.inputs())
    assert session.report.counts[1:3].sum() == 0
    assert all(len(session.report.kept(1, layer)) == 0 for layer in range(depth(gqa)))
    assert_method_recomputed(gqa, batch, session.report, output, name, "compact")


@pytest.mark.parametrize("name", ["vtc_cls", "divprune", "mmtok", "random", "uniform", "pool"])
def test_each_image_gets_its_own_budget_before_the_llm(gqa, name):
    """Two images in a prompt keep as many tokens each as one image alone."""
    batch = batch_of_three(gqa)
    with vtprune.prune(gqa, spec(name)) as session:
        generate(gqa, batch.inputs(), new_tokens=1)
    n = models.tokens_per_image(gqa)
    visual = (batch.inputs()["input_ids"][1] == IMAGE_TOKEN).nonzero().flatten()
    kept = session.report.kept(1, 0)
    halves = [int(torch.isin(kept, visual[:n]).sum()), int(torch.isin(kept, visual[n:]).sum())]
    assert halves[0] == halves[1] == int(session.report.counts[0, 0])


def test_each_sample_has_its_own_question(gqa):
    """`text=` as ids, one question a sample, is what a text-guided method goes by instead of the prompt."""
    batch = prompts(gqa, *["tItttt"] * 3)
    batch = type(batch)(batch.ids, batch.images[:1] * 3)  # one picture, three questions
    questions = [torch.tensor(ids) for ids in ([7, 11, 30], [90], [7, 11, 30])]

    def chosen(text):
        with vtprune.prune(gqa, spec("mmtok"), text=text) as session:
            generate(gqa, batch.inputs(), new_tokens=1)
        return [session.report.kept(sample, 0).tolist() for sample in range(3)]

    asked = chosen(questions)
    assert asked[0] == asked[2] != asked[1]
    assert chosen(questions[1]) == [asked[1]] * 3


def test_the_order_of_a_batch_does_not_matter(gqa):
    """Randomness is seeded by the prompt, not by the row."""
    batch = batch_of_three(gqa)
    turned = type(batch)(batch.ids[::-1], batch.images[::-1])
    with vtprune.prune(gqa, spec("random")) as session:
        generate(gqa, batch.inputs(), new_tokens=1)
        kept = [session.report.kept(sample, 0).tolist() for sample in range(3)]
        generate(gqa, turned.inputs(), new_tokens=1)
        assert kept == [session.report.kept(sample, 0).tolist() for sample in (2, 1, 0)]

# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: the attention of the raters, merging between layers, and the published counts."""

import pytest
import torch

import vtprune
from vtprune import SparseVLM
from vtprune.attention import Places, RowContext
from vtprune.ops.token_recycling import recycle_dropped
from vtprune.testing import families
from vtprune.testing.recompute import visual_columns
from vtprune.tokens import ModelShape

SHAPE = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)
CUTS = (2, 4)
MARKERS = {"qwen2_5_vl": 1, "qwen3_vl": 1, "gemma3": 2}
"""Columns that a family's processor puts right behind an image, which are no text."""
PLUS = {"recycle": 0, "undo_rotation": True, "heads": 2, "positions": "original"}


class Watched:
    """A prefill in a session on an eager model: attention, and states before and after every cut."""

    def __init__(self, name: str, **settings):
        self.name = name
        self.model = families.shared(name, "eager")
        self.inputs = families.batch(name, self.model).singles[1]
        self.weights, self.before, self.after, self.rope = {}, {}, {}, {}
        layers = vtprune.adapter_for(self.model).decoder_layers
        with vtprune.prune(self.model, SparseVLM(layers=CUTS, **settings)) as session, torch.no_grad():
            watches = [
                layers[0].register_forward_pre_hook(lambda m, args, kw: self._enter(0, args, kw), with_kwargs=True)
            ]
            for cut in CUTS:
                watches += [
                    layers[cut - 1].register_forward_pre_hook(self._rope(cut), with_kwargs=True),
                    layers[cut - 1].self_attn.register_forward_hook(self._weigh(cut)),
                    layers[cut - 1].register_forward_hook(self._leave(cut)),
                    layers[cut].register_forward_pre_hook(
                        lambda m, args, kw, cut=cut: self._enter(cut, args, kw), with_kwargs=True
                    ),
                ]
            self.model(**self.inputs)
            for watch in watches:
                watch.remove()
        self.report = session.report
        self.text = torch.arange(self.inputs["input_ids"].shape[1])
        self.text = self.text[~torch.isin(self.text, visual_columns(self.model, self.inputs))]

    def _enter(self, layer, args, kwargs):
        self.after[layer] = (args[0] if args else kwargs["hidden_states"])[0]

    def _rope(self, cut):
        return lambda module, args, kwargs: self.rope.update({cut: kwargs["position_embeddings"]})

    def _weigh(self, cut):
        return lambda module, args, output: self.weights.update({cut: output[1][0]})

    def _leave(self, cut):
        return lambda module, args, output: self.before.update({cut: output[0]})

    def places(self, alive):
        """Places of columns in the sequence of all visual columns."""
        return torch.searchsorted(torch.cat([self.text, alive]).sort().values, alive)

    def raters(self):
        """Columns of the raters."""
        entering = visual_columns(self.model, self.inputs)
        text = self.text[self.text > entering[-1]]
        text = text[MARKERS.get(self.name, 0) :]
        votes = (self.after[0][entering] @ self.after[0][text].T).softmax(-1).mean(0)
        assert len(text) > 1 and 0 < int((votes > votes.mean()).sum()) < len(text)
        return text[votes > votes.mean()]

    def rows(self, cut):
        """Rows of the raters among the columns alive before a cut, (raters,), and visual columns alive there."""
        alive = self.report.kept(0, cut - 1)
        columns = torch.cat([self.text, alive]).sort().values
        return torch.searchsorted(columns, self.raters()), alive


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "paligemma2"])
def test_raters_choose_and_what_they_drop_is_merged(name):
    """Counts, tokens, and the states that enter the layer after each cut."""
    watched = Watched(name, schedule=(0.7, 0.4), recycle=1.0)
    merged_any = False
    for cut, share in zip(CUTS, (0.7, 0.4), strict=True):
        rows, alive = watched.rows(cut)
        left, places = watched.report.kept(0, cut), watched.places(alive)
        assert len(left) == int(share * len(watched.report.visual[0]))
        scores = watched.weights[cut].mean(0)[rows][:, places].mean(0)
        runs = (torch.nn.functional.pad(places.diff() > 1, (1, 0))).cumsum(0)
        keep, features, sources = recycle_dropped(watched.before[cut][places], scores, len(left), 1.0, runs=runs)
        assert torch.equal(alive[keep], left)
        torch.testing.assert_close(watched.after[cut][watched.places(left)], features[keep], atol=1e-4, rtol=1e-4)
        # For tokens that were merged by an earlier cut, the report follows the token that they went into.
        merged_into = watched.report.sources(0, cut)[torch.searchsorted(watched.report.visual[0], alive)]
        expected = torch.where(sources >= 0, torch.searchsorted(left, alive[sources.clamp(min=0)]), -1)
        assert torch.equal(merged_into, expected)
        merged_any |= len(sources[sources >= 0]) > len(left)
    assert merged_any


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "pixtral"])
def test_version_two_divides_by_the_rotation_and_looks_at_some_heads(name):
    watched = Watched(name, schedule=(0.7, 0.4), **PLUS)
    for cut in CUTS:
        rows, alive = watched.rows(cut)
        left, places = watched.report.kept(0, cut), watched.places(alive)
        weights = watched.weights[cut]
        cos, sin = watched.rope[cut]
        columns = torch.arange(cos.shape[1])[None]
        attention = vtprune.adapter_for(watched.model).decoder_layers[cut - 1].self_attn
        context = RowContext(attention, Places(columns, (cos, sin)), torch.ones_like(columns).bool(), None, None)
        weights = (weights[:, rows] / context.position_logits(rows[None]))[..., places].mean(1)
        scores = weights[weights.sum(-1).argsort(descending=True)[:2]].mean(0)
        kept = torch.isin(alive, left)
        assert 0 < int(kept.sum()) < len(kept)
        assert scores[kept].min() >= scores[~kept].max() - 1e-5


@torch.no_grad()
def merged_between_layers(model, inputs, generated, report):
    """Logits of the last prompt token and of what was generated, (1 + generated, vocabulary), all in one pass without a
    cache, with tokens averaged where the report says so."""
    decoder, visual = vtprune.adapter_for(model).language_model, visual_columns(model, inputs)
    hidden = model.get_input_embeddings()(torch.cat([inputs["input_ids"][0], generated]))
    hidden[visual] = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    columns, alive = torch.arange(len(hidden)), visual
    for index, layer in enumerate(decoder.layers):
        left = report.kept(0, index)
        if len(left) < len(alive):
            merged_into = report.sources(0, index)[torch.searchsorted(visual, alive)]
            states = hidden[torch.searchsorted(columns, alive)]
            means = torch.stack([states[merged_into == place].mean(0) for place in range(len(left))])
            assert merged_into[merged_into >= 0].bincount().max() > 1
            hidden[torch.searchsorted(columns, left)] = means
            rows = torch.isin(columns, left) | ~torch.isin(columns, visual)
            columns, hidden, alive = columns[rows], hidden[rows], left
        ranks = torch.arange(len(hidden))
        rope = decoder.rotary_emb(hidden[None], ranks[None])
        mask = torch.zeros(1, 1, *[len(hidden)] * 2).masked_fill(ranks > ranks[:, None], -torch.inf)
        hidden = layer(hidden[None], attention_mask=mask, position_embeddings=rope, position_ids=ranks[None])[0]
    assert len(alive) < len(visual)
    return model.lm_head(decoder.norm(hidden))[-len(generated) - 1 :]


def test_generation_goes_on_from_merged_tokens():
    model = families.shared("llava")
    inputs = families.batch("llava", model).singles[1]
    options = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [families.IMAGE]}
    with vtprune.prune(model, SparseVLM(layers=CUTS, schedule=(0.7, 0.4), recycle=1.0)) as session:
        output = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    generated = output.sequences[0, inputs["input_ids"].shape[1] :]
    expected = merged_between_layers(model, inputs, generated[:-1], session.report)
    torch.testing.assert_close(torch.cat(output.logits), expected, atol=1e-4, rtol=0)


# Ministral 3 scales queries by positions, which a plain call counts from the padding on.
@pytest.mark.parametrize(
    "name", [name for name in families.PRUNED_INSIDE if name not in ("ministral3", "mistral_small4")]
)
@torch.no_grad()
def test_a_batch_merges_what_each_sample_merges_alone(name):
    model = families.shared(name)
    batch = families.batch(name, model)
    with vtprune.prune(model, "sparsevlm", keep_ratio=0.4) as session:
        logits, together = model(**batch.inputs).logits[:, -1], session.report
        for sample, inputs in enumerate(batch.singles):
            first, own = batch.first_column(sample), model(**inputs).logits[0, -1]
            torch.testing.assert_close(logits[sample], own, atol=1e-4, rtol=0)
            for layer in range(together.depth):
                kept = together.kept(sample, layer) - first
                assert kept.tolist() == session.report.kept(0, layer).tolist()
                assert torch.equal(together.sources(sample, layer), session.report.sources(0, layer))
    assert (together.counts[:, -1] < together.counts[:, 0]).all()


def test_counts_hold_merged_tokens():
    entering, one = torch.tensor([576]), torch.tensor([1])
    assert SparseVLM().cuts(SHAPE) == (3, 7, 16)
    assert SparseVLM().budgets(SHAPE, entering, one).T.tolist() == [[309, 204, 113]]
    plus = SparseVLM(schedule=(0.521, 0.3473, 0.205))
    assert plus.budgets(SHAPE, entering, one).T.tolist() == [[300, 200, 118]]
    with pytest.raises(vtprune.ConfigError, match="do not increase"):
        SparseVLM(schedule=(0.5, 0.6, 0.1))
    with pytest.raises(vtprune.ConfigError, match="heads"):
        SparseVLM(heads=0)

# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: merging in the encoder, thresholds, key tokens, eviction from the cache."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import cosine_similarity
from torch.utils.flop_counter import FlopCounterMode

import vtprune
from vtprune.cost import encoder_flops
from vtprune.methods.mustdrop import MustDrop
from vtprune.testing import families
from vtprune.testing.recompute import recompute
from vtprune.tokens import ModelShape

SHAPE = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)
NEW = 5
both_attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


# -- a vision tower that merges, one image at a time, window by window -------------------------------------------------


def towers(model, kind="image"):
    base = model.model
    tower = {"image": getattr(base, "image_tower", None), "video": getattr(base, "video_tower", None)}[kind]
    return tower or base.vision_tower


def windows(side, height, width):
    for top, left in itertools.product(range(0, side - height + 1, height), range(0, side - width + 1, width)):
        yield [(top + y) * side + left + x for y, x in itertools.product(range(height), range(width))]


def likeness(patches):
    """Mean cosine of all pairs of different patches."""
    pairs = list(itertools.combinations(range(len(patches)), 2))
    return sum(cosine_similarity(patches[i], patches[j], dim=0) for i, j in pairs) / len(pairs)


def embedded(tower, pixels):
    hidden = tower.embeddings(pixels[None])
    return tower.pre_layrnorm(hidden) if hasattr(tower, "pre_layrnorm") else hidden


def attention_rows(layer, hidden):
    """(heads, n, n) of one sequence."""
    normed, attention = layer.layer_norm1(hidden), layer.self_attn
    q, k = (
        p(normed)[0].unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
        for p in (attention.q_proj, attention.k_proj)
    )
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


def merged_tower(tower, pixels, threshold, window=(3, 3), at_most=None, prefix=1):
    """States (tokens, dim) at the input of each layer and the output of the last, scattered back to all patches; and
    the CLS attention of the last layer over the remaining patches, with the first patch that each of them is from."""
    hidden = embedded(tower, pixels)
    groups = [[i] for i in range(hidden.shape[1])]
    states = []
    for index, layer in enumerate(tower.encoder.layers):
        states.append(hidden)
        attention = attention_rows(layer, hidden)
        hidden = layer(hidden, None)
        if index == 0:
            side = round((hidden.shape[1] - prefix) ** 0.5)
            alike = [[prefix + i for i in w] for w in windows(side, *window)]
            scores = [(likeness(hidden[0, w]).item(), w) for w in alike]
            passing = sorted([s for s in scores if s[0] >= threshold], reverse=True)[:at_most]
            taken = {i for _, w in passing for i in w}
            groups = [[i] for i in range(hidden.shape[1]) if i not in taken] + [w for _, w in passing]
            hidden = torch.stack([hidden[0, g].mean(0) for g in groups])[None]
    states.append(hidden)
    total = sum(map(len, groups))

    def scattered(state):
        if state.shape[1] == total:
            return state[0]
        out = torch.empty(total, state.shape[-1])
        for row, group in zip(state[0], groups, strict=True):
            out[group] = row
        return out

    return [scattered(state) for state in states], attention[:, 0], groups


def likenesses(model, kind, images, window, prefix):
    tower, found = towers(model, kind), []
    for pixels in images:
        hidden = tower.encoder.layers[0](embedded(tower, pixels), None)[0]
        side = round((len(hidden) - prefix) ** 0.5)
        found += [likeness(hidden[[prefix + i for i in w]]).item() for w in windows(side, *window)]
    return found


def between(values, rank):
    """A threshold that the given number of values reach, and that is not close to any value."""
    values = sorted(values, reverse=True)
    return (values[rank - 1] + values[rank]) / 2


def clip_flops(model, sequences):
    return encoder_flops(model.config.vision_config, sequences, has_cls=True, gated_mlp=False)


@torch.no_grad()
@both_attentions
@pytest.mark.parametrize("feature_layer", [-2, -1, [0, -2]])
def test_the_encoder_merges_windows_and_the_projector_sees_them_all(attention, feature_layer):
    """Crops of one call merge different numbers of windows, so their sequences are padded."""
    model = families.build("llava", attention)
    if feature_layer != -2:
        if isinstance(feature_layer, list):
            model.model.multi_modal_projector.linear_1 = torch.nn.Linear(64, 32)
        model.config.vision_feature_layer = feature_layer
    inputs = families.batch("llava", model).inputs
    images = inputs["pixel_values"]
    threshold = between(likenesses(model, "image", images, (3, 2), 1), 7)
    seen = []
    with vtprune.prune(model, MustDrop(similarity=threshold, window=(3, 2), evict=False), strict=False) as session:
        watch = model.model.multi_modal_projector.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        model(**inputs)
        watch.remove()
    sizes, left, whole, flops = set(), [], 0, 0
    tower = towers(model)
    for pixels, got in zip(images, seen[0], strict=True):
        states, _, groups = merged_tower(tower, pixels, threshold, (3, 2))
        chosen = feature_layer if isinstance(feature_layer, list) else [feature_layer]
        torch.testing.assert_close(got, torch.cat([states[i][1:] for i in chosen], -1), atol=1e-5, rtol=1e-5)
        sizes.add(len(groups))
        flops += clip_flops(model, [[36, *[len(groups) - 1] * 3]])
        # a window of three rows and two columns takes the place of the left patch of its middle row
        left += sorted(whole + group[2 if len(group) == 6 else 0] - 1 for group in groups if group[0])
        whole += sum(map(len, groups)) - 1
    assert len(sizes) > 1, "all crops merged alike, so that nothing was padded"
    report = session.report
    assert report.counts[:, 0].sum() == sum(report.original_tokens) - 7 * 5
    columns = [(sample, column) for sample in range(3) for column in report.visual[sample].tolist()]
    kept = [(sample, column) for sample in range(3) for column in report.kept(sample, 0).tolist()]
    assert kept == [columns[place] for place in left]
    assert report.encoder_flops == flops < clip_flops(model, [36] * len(images))


@torch.no_grad()
def test_the_report_counts_what_the_encoder_computes():
    # torch counts nothing for sdpa on a CPU.
    model = families.shared("llava", "eager")
    inputs = families.batch("llava", model).singles[0]
    with (
        vtprune.prune(model, MustDrop(similarity=-1.0, keep_ratio=0.5, key_share=0.0)) as session,
        FlopCounterMode(display=False) as counter,
    ):
        model(**inputs)
    assert session.report.counts[0, 0] == 20  # of 36; of four windows two are merged
    counted = counter.get_flop_counts()["LlavaForConditionalGeneration.model.vision_tower"]
    assert session.report.encoder_flops == sum(counted.values())


@torch.no_grad()
def test_in_the_reference_all_crops_merge_as_many_windows():
    model = families.shared("llava")
    inputs = families.batch("llava", model).inputs
    images = inputs["pixel_values"]
    each = [likenesses(model, "image", [pixels], (3, 2), 1) for pixels in images]
    threshold = between([score for scores in each for score in scores], 10)
    fewest = min(sum(score >= threshold for score in scores) for scores in each)
    assert 0 < fewest < 10 / len(images)
    method = MustDrop(similarity=threshold, window=(3, 2), reference_quirks=True)
    with vtprune.prune(model, method, strict=False) as session:
        model(**inputs)
    gone = sum(session.report.original_tokens) - int(session.report.counts[:, 0].sum())
    assert gone == len(images) * fewest * 5


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "media", "prefix"), [("llava_next", "image", 1), ("video_llava", "video", 1), ("paligemma", "image", 0)]
)
def test_other_encoders(name, media, prefix):
    """Crops of a mosaic; a CLS token that also goes to the LLM; SigLIP, which has no CLS token."""
    model = families.shared(name)
    inputs = families.batch(name, model, media=media).inputs
    images = inputs["pixel_values" if media == "image" else "pixel_values_videos"].flatten(0, -4)
    if name == "llava_next":  # its processor pads with crops that are not encoded
        counts = vtprune.adapter_for(model).crops(inputs)
        images = torch.cat([crops[:n] for crops, n in zip(inputs["pixel_values"], counts, strict=True)])
    found = likenesses(model, media, images, (2, 2), prefix)
    threshold = between(found, len(found) // 3)
    seen = []
    method = MustDrop(similarity=threshold, window=(2, 2), key_share=0.08 * prefix, evict=False)
    with vtprune.prune(model, method, strict=False) as session:
        watch = model.model.multi_modal_projector.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        model(**inputs)
        watch.remove()
    adapter = vtprune.adapter_for(model)
    states = [merged_tower(towers(model, media), pixels, threshold, (2, 2), prefix=prefix)[0] for pixels in images]
    chosen = torch.stack([state[adapter.shape.feature_layer + 1] for state in states])
    if not prefix:
        chosen = towers(model).post_layernorm(chosen)
    chosen = chosen[:, int(adapter.has_cls and adapter.cuts_cls(media)) :]
    torch.testing.assert_close(seen[0].flatten(0, -3), chosen, atol=1e-5, rtol=1e-5)
    report = session.report
    gone = sum(report.original_tokens) - int(report.counts[:, 0].sum())
    # some merged patches of a mosaic are in the padding, and an empty row also loses its newline token
    assert gone == 3 * (len(found) // 3) if name != "llava_next" else gone > 0
    for sample in range(report.samples):
        into = report.sources(sample, 0)
        assert (into >= 0).all()
        assert torch.bincount(into).max() == 4


@torch.no_grad()
@both_attentions
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_all_stages_together_are_the_recomputed_ones(name, positions, attention):
    """The reference gets its features from the encoder in this session; its merging is tested above."""
    model = families.shared(name, attention)
    batch = families.batch(name, model)
    method = MustDrop(similarity=0.1, window=(2, 2), keep_ratio=0.4, layers=(2, 4, 6), positions=positions)
    options = dict(max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True)
    options |= dict(suppress_tokens=list(batch.visual_ids))
    with vtprune.prune(model, method) as session:
        together, report = model.generate(**batch.inputs, **options), session.report
        for sample, inputs in enumerate(batch.singles):
            first = batch.first_column(sample)
            single = model.generate(**inputs, **options)
            own = session.report
            kept, cached = ([show(sample, i) - first for i in range(8)] for show in (report.kept, report.cached))
            assert [len(k) for k in kept] != [len(c) for c in cached]
            assert len(kept[0]) < report.original_tokens[sample]
            for i in range(8):
                assert own.kept(0, i).tolist() == kept[i].tolist()
                assert own.cached(0, i).tolist() == cached[i].tolist()
                assert cached[i].tolist() == kept[-1 if 1 <= i < 6 else i].tolist()
            for output, row in ((together, sample), (single, 0)):
                generated = output.sequences[row, -NEW:]
                sources = report.sources(sample, 0)
                expected = recompute(model, inputs, generated[:-1], kept, positions, sources, cached)[-NEW:]
                torch.testing.assert_close(torch.stack(output.logits, 1)[row], expected, atol=1e-4, rtol=0)


# -- inside the LLM ----------------------------------------------------------------------------------------------------


def watched(model, method, inputs):
    """Attention of every decoder layer as the pruned model computes it, and the report."""
    weights = {}

    def watch(index):
        return lambda module, args, output: weights.update({index: output[1][0]})

    with vtprune.prune(model, method, strict=False) as session:
        handles = [
            layer.self_attn.register_forward_hook(watch(i)) for i, layer in enumerate(model.get_decoder().layers)
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()
    return weights, session.report


def key_columns(model, inputs, report, share, **merging):
    """Columns that CLS attends to most in each image, merged or not, from a tower that runs one image at a time."""
    columns, start = set(), 0
    for pixels in inputs["pixel_values"]:
        _, row, groups = merged_tower(towers(model), pixels, **merging)
        scores = {group[len(group) // 2]: s for group, s in zip(groups, row.mean(0).tolist(), strict=True) if group[0]}
        best = sorted(scores, key=scores.get, reverse=True)[: math.ceil(len(scores) * share)]
        columns |= {int(report.visual[0][start + patch - 1]) for patch in best}
        start += sum(map(len, groups)) - 1
    return columns


@torch.no_grad()
@pytest.mark.parametrize("key_share", [0.0, 0.08, 0.2])
@pytest.mark.parametrize("thresholds", [(0.03, 1.0), (1.0, 0.02), (0.03, 0.02), (0.0, 1.0), None])
def test_what_goes_inside_the_llm(thresholds, key_share):
    """Tokens are chosen by the attention that the pruned model computes before every cut; None: by a budget."""
    model = families.shared("llava", "eager")
    inputs = families.batch("llava", model).singles[1]
    merging = dict(threshold=between(likenesses(model, "image", inputs["pixel_values"], (3, 3), 1), 2))
    ours = dict(similarity=merging["threshold"], key_share=key_share, layers=(2, 4, 5))
    if thresholds is None:
        whole, single = 0.001, 0.002
        ours |= dict(keep_ratio=0.4)
    else:
        whole, single = thresholds
    method = MustDrop(global_threshold=whole, individual_threshold=single, **ours)
    weights, report = watched(model, method, inputs)
    keys = key_columns(model, inputs, report, key_share, **merging) if key_share else set()
    ids = inputs["input_ids"][0]
    text = (ids != families.IMAGE).nonzero()[:, 0]
    assert report.counts[0, 0] == report.original_tokens[0] - 2 * 8
    assert keys <= set(report.kept(0, 0).tolist())
    dropped = 0
    for cut in (2, 4, 5):
        alive, left = report.kept(0, cut - 1), report.kept(0, cut)
        columns = torch.cat([text, alive]).sort().values
        after = torch.searchsorted(columns, text[text > alive.max()])
        rows = weights[cut - 1].mean(0)[after][:, torch.searchsorted(columns, alive)]
        total, peak = rows.sum(0), rows.amax(0)
        spared = torch.tensor([column in keys for column in alive.tolist()])
        stays = torch.isin(alive, left)
        if thresholds is None:
            strength = torch.maximum(total / total.sum() / whole, peak / single)
            others = ~spared
            assert stays[spared].all() or not stays[others].any()
            if (stays & others).any() and (~stays & others).any():
                assert strength[stays & others].min() >= strength[~stays & others].max() * (1 - 1e-4)
        else:
            expected = (total >= whole * total.sum()) | (peak >= single) | spared
            assert stays.tolist() == expected.tolist()
        dropped += int((~stays).sum())
    assert dropped > 0 or thresholds == (0.0, 1.0)


@torch.no_grad()
@pytest.mark.parametrize("similarity", [0.8, 0.1, -1.0, None])
@pytest.mark.parametrize("budget", [{"keep_ratio": 0.2}, {"keep_ratio": 0.5}, {"keep_ratio": 0.9}, {"keep_tokens": 5}])
def test_budgets_are_met_whatever_is_merged(budget, similarity):
    model = families.shared("llava")
    batch = families.batch("llava", model)
    with vtprune.prune(model, MustDrop(**budget, similarity=similarity)) as session:
        model(**batch.inputs)
    counts = session.report.counts
    for row, whole, inputs in zip(counts, session.report.original_tokens, batch.singles, strict=True):
        asked = budget.get("keep_ratio", 0) * whole or budget["keep_tokens"] * len(inputs["pixel_values"])
        # the last count, which applies to half of the layers, is rounded
        assert row.float().mean().item() == pytest.approx(asked, abs=0.26)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_the_published_setting():
    merge, within, evict = MustDrop().parts(SHAPE)
    assert (merge.cuts(SHAPE), merge.window, merge.similarity) == ((0,), (3, 3), 0.8)
    assert within.cuts(SHAPE) == (3, 7, 11, 15) and within.key_share == 0.08
    assert within.prompt_budgets(SHAPE, *map(torch.tensor, ([309], [1], [576]))).tolist() == [[-1]] * 4
    # layers before the first cut keep everything; layers after the last cut have no more tokens than the last one
    assert evict.layers(SHAPE) == tuple(range(2, 15))
    (alone,) = MustDrop(similarity=None, evict=False).parts(SHAPE)
    assert alone.cuts(SHAPE) == (3, 7, 11, 15)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": (1, 1)}, "has nothing to merge"),
        ({"merge_layer": 23}, "must be within 0..22"),
        ({"keep_ratio": 0.5, "individual_threshold": 0.0}, "both thresholds"),
        ({"layers": (4, 4)}, "must ascend"),
    ],
)
def test_settings_that_make_no_sense(fields, message):
    with pytest.raises(vtprune.ConfigError, match=message):
        MustDrop(**fields).check_budget(SHAPE)


def test_the_floor_is_what_the_first_layers_hold():
    with pytest.raises(vtprune.BudgetError, match=r"9\.4%") as error:
        MustDrop(keep_ratio=0.05).check_budget(SHAPE)
    assert error.value.floor == 3 / 32


@torch.no_grad()
def test_more_tokens_than_an_image_has():
    model = families.shared("llava")
    inputs = families.batch("llava", model).singles[1]
    with vtprune.prune(model, MustDrop(keep_tokens=37)), pytest.raises(vtprune.BudgetError, match="larger than the"):
        model(**inputs)
    with vtprune.prune(model, MustDrop(keep_tokens=36, similarity=-1.0)) as session:
        model(**inputs)
    assert session.report.keep_ratio == 1.0


def test_encoders_that_cannot_merge_or_mark():
    with pytest.raises(vtprune.UnsupportedStageError, match="CLS token"):
        vtprune.prune(families.shared("paligemma"), MustDrop())
    with pytest.raises(vtprune.UnsupportedStageError, match="cannot be merged inside the vision encoder of Qwen2-VL"):
        vtprune.prune(families.shared("qwen2_vl"), MustDrop(key_share=0.0))
    vtprune.prune(families.shared("qwen2_vl"), MustDrop(key_share=0.0, similarity=None))


@torch.no_grad()
def test_nothing_is_merged_where_several_patches_become_one_token():
    model = families.shared("internvl")
    inputs = families.batch("internvl", model).inputs
    plain = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    with vtprune.prune(model, MustDrop(similarity=-1.0, keep_ratio=0.5)) as session:
        merged = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        model(**inputs)
    assert torch.equal(torch.cat(list(plain)), torch.cat(list(merged)))
    assert session.report.counts[:, 0].tolist() == session.report.original_tokens


@torch.no_grad()
def test_features_from_elsewhere_are_refused():
    model = families.shared("llava")
    inputs = families.batch("llava", model).singles[0]
    output = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with (
        vtprune.prune(model, MustDrop(keep_ratio=0.5)),
        pytest.raises(vtprune.UnsupportedStageError, match="computed elsewhere"),
    ):
        model(**inputs, mm_encoder_outputs={"image": output})

# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: which tokens are dominant, the features of a contextual token, the two counts."""

import pytest
import torch

import vtprune
from vtprune.signals import EncoderKeys, EncoderSaliency
from vtprune.testing import families
from vtprune.tokens import ModelShape, VisualTokens

SHAPE = ModelShape(encoder_layers=4, decoder_layers=8, feature_layer=2, has_cls=True)
REQUESTS = (EncoderSaliency(2), EncoderKeys(2, heads="mean"))


def images(k: int, lengths=(40, 64)) -> VisualTokens:
    generator = torch.Generator().manual_seed(0)
    longest = max(lengths)
    signals = {
        REQUESTS[0]: torch.rand(len(lengths), longest, generator=generator),
        REQUESTS[1]: torch.randn(len(lengths), longest, 3, generator=generator),
    }
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    features = torch.randn(len(lengths), longest, 8, generator=generator) * valid[..., None]
    budget = torch.full((len(lengths),), k)
    return VisualTokens(features=features, valid=valid, budget=budget, signals=signals, shape=SHAPE)


@pytest.mark.parametrize(("k", "contextual"), [(0, 0), (1, 0), (12, 2), (20, 3), (32, 5), (40, 6)])
def test_chosen_tokens_and_merged_features(k, contextual):
    tokens = images(k)
    selection = vtprune.VisionZip(keep_tokens=k).select(tokens)
    assert selection.keep.sum(1).tolist() == [k, k]
    for group, length in enumerate(tokens.lengths.tolist()):
        score = tokens[REQUESTS[0]][group, :length]
        dominant = sorted(score.argsort(descending=True)[: k - contextual].tolist())
        rest = [token for token in range(length) if token not in dominant]
        centres = rest[:: len(rest) // contextual][:contextual] if contextual else []
        assert selection.keep[group].nonzero()[:, 0].tolist() == sorted(dominant + centres)
        assert torch.equal(selection.features[group, dominant], tokens.features[group, dominant])
        keys = tokens[REQUESTS[1]][group]
        for place in centres:
            members = (selection.sources[group] == place).nonzero()[:, 0]
            torch.testing.assert_close(selection.features[group, place], tokens.features[group, members].mean(0))
            for member in set(members.tolist()) - {place}:
                alike = torch.nn.functional.cosine_similarity(keys[member], keys[centres], dim=1)
                assert centres[int(alike.argmax())] == place


@pytest.mark.parametrize(("k", "contextual"), [(32, 5), (64, 10), (128, 20), (192, 30)])
def test_published_counts(k, contextual):
    tokens = images(k, lengths=(576,))
    selection = vtprune.VisionZip(keep_tokens=k).select(tokens)
    sizes = selection.sources[0].bincount(minlength=576)[selection.keep[0]]
    assert int((sizes > 1).sum()) <= contextual and int(sizes.sum()) == 576
    changed = (selection.features != tokens.features).any(-1)
    assert int(changed.sum()) == int((sizes > 1).sum()) > contextual // 2


def test_without_contextual_tokens_the_rest_is_dropped():
    tokens = images(12)
    selection = vtprune.VisionZip(keep_tokens=12, contextual_share=0).select(tokens)
    best = torch.where(tokens.valid, tokens[REQUESTS[0]], -1).topk(12).indices.sort().values
    assert torch.equal(selection.keep.nonzero()[:, 1].view(2, 12), best)
    assert torch.equal(selection.features, tokens.features)
    assert torch.equal(selection.sources >= 0, selection.keep)


def test_only_contextual_tokens():
    selection = vtprune.VisionZip(keep_tokens=8, contextual_share=1).select(images(8))
    assert selection.keep[0].nonzero()[:, 0].tolist() == list(range(0, 40, 5))
    assert selection.keep[1].nonzero()[:, 0].tolist() == list(range(0, 64, 8))
    assert (selection.sources[0, :40] >= 0).all() and (selection.sources[0, 40:] == -1).all()


@torch.no_grad()
def test_keys_and_attention_are_of_the_layer_that_the_projector_reads():
    model = families.shared("llava")
    inputs = families.batch("llava", model).singles[0]
    shape = vtprune.adapter_for(model).shape
    layer = model.model.vision_tower.encoder.layers[shape.feature_layer].self_attn
    seen, entering = {}, []
    watches = [
        layer.k_proj.register_forward_hook(lambda module, args, output: seen.update(keys=output)),
        layer.q_proj.register_forward_hook(lambda module, args, output: seen.update(queries=output)),
        model.model.multi_modal_projector.register_forward_hook(lambda m, args, output: seen.update(features=output)),
    ]
    with vtprune.prune(model, "visionzip", keep_ratio=0.5, contextual_share=0.25) as session:
        watches.append(
            model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
        )
        model(**inputs)
    for watch in watches:
        watch.remove()
    heads, features = layer.num_heads, seen["features"][0]
    queries, keys = (seen[name][0].unflatten(-1, (heads, -1)).transpose(0, 1) for name in ("queries", "keys"))
    attention = (queries[:, :1] @ keys.mT * layer.head_dim**-0.5).softmax(-1)[:, 0, 1:].sum(0)
    k = round(len(features) * 0.5)
    contextual = round(k * 0.25)
    dominant = sorted(attention.topk(k - contextual).indices.tolist())
    rest = [token for token in range(len(features)) if token not in dominant]
    centres = rest[:: len(rest) // contextual][:contextual]
    directions = torch.nn.functional.normalize(keys.mean(0)[1:], dim=-1)
    groups = {place: [place] for place in dominant + centres}
    for token in set(rest) - set(centres):
        groups[centres[int((directions[token] @ directions[centres].T).argmax())]].append(token)
    first = int(session.report.visual[0][0])
    assert (session.report.kept(0, 0) - first).tolist() == sorted(groups)
    expected = torch.stack([features[groups[place]].mean(0) for place in sorted(groups)])
    torch.testing.assert_close(entering[0][0, first : first + k], expected, atol=1e-5, rtol=1e-4)

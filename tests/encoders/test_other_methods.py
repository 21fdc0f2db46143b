# SPDX-License-Identifier: Apache-2.0
"""MCTF, Zero-TPrune, TCA and the variants of ToMe inside real encoders, against their operations between layers that
are written out."""

import pytest
import torch

import vtprune
from vtprune.adapters import find_encoder
from vtprune.ops.condensation import condensation
from vtprune.ops.multi_criteria_fusion import fused_attention, fusion
from vtprune.ops.seeded_random import seeded_uniform
from vtprune.ops.soft_matching import kth_matching, random_matching
from vtprune.ops.token_reduction import Reduction
from vtprune.ops.weighted_page_rank import rank_pruning

from . import hosts, reference
from .test_tome import entering

NAMES = ["clip", "siglip", "vit", "dinov2-registers", "timm-options", "timm-map", "open_clip", "open_clip-norms"]
SCALE = (hosts.WIDTH // hosts.HEADS) ** -0.5


class Written:
    """One image on its way through the layers of a host."""

    def __init__(self, name):
        self.model = hosts.shared(name)
        self.adapter = find_encoder(self.model)
        self.layers = reference.layers_of(list(self.adapter.layers))
        self.protected = self.adapter.prefix_tokens
        self.images = hosts.pixels()

    def start(self, image):
        self.x, self.sizes, self.into = entering(self.model, self.images)[image], None, None

    def attention(self, layer):
        """queries, keys, values and attention (heads, tokens, tokens) of the tokens in a layer."""
        q, k, v = layer.qkv(layer.norm(self.x))
        scores = q @ k.transpose(1, 2) * SCALE
        return q, k, v, (scores if self.sizes is None else scores + self.sizes.log()[0]).softmax(-1)

    def attend(self, layer, weights, values):
        self.x = self.x + layer.out((weights @ values).transpose(0, 1).flatten(1))

    def reduce(self, reduction, sizes=True):
        self.x = reduction.features(self.x[None])[0]
        self.sizes = reduction.sizes(self.sizes) if sizes else None
        self.into = reduction.trace(self.into)

    def check(self, method, run, spread):
        seen = []
        handle = self.adapter.layers[-1].register_forward_hook(lambda module, args, output: seen.append(output))
        with vtprune.prune(self.model, method) as session:
            hosts.encode(self.model, self.images)
        handle.remove()
        for image in range(2):
            self.start(image)
            run()
            assert session.report.sources(image).tolist() == self.into[0].tolist()
            expected = self.x[self.into[0]] if spread else self.x
            torch.testing.assert_close(seen[0][image], expected, rtol=1e-5, atol=1e-5)
        return session.report


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_mctf(name, ahead):
    written = Written(name)

    def run():
        for index, layer in enumerate(written.layers):
            values, weights = written.attention(layer)[2:]
            if index == 0:
                written.attend(layer, weights, values)
                written.x = written.x + layer.mlp(written.x)
                continue
            importance = weights.mean((0, 1))[None]
            if ahead == 0:
                written.attend(layer, weights, values)
                written.x = written.x + layer.mlp(written.x)
            fused = fusion(written.x[None], importance, 4, sizes=written.sizes, protected=written.protected)
            written.reduce(fused)
            if ahead:
                values, again = written.attention(layer)[2:]
                written.attend(layer, fused_attention(weights[None], fused)[0] if ahead == 1 else again, values)
                written.x = written.x + layer.mlp(written.x)

    report = written.check(vtprune.MCTF(r=4, one_step_ahead=ahead), run, spread=True)
    assert report.counts == (36, 32, 28, 24)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_zero_tprune(name):
    written = Written(name)
    has_cls = written.adapter.has_cls

    def run():
        for index, layer in enumerate(written.layers):
            q, k, values, weights = written.attention(layer)
            written.attend(layer, weights, values)
            written.x = written.x + layer.mlp(written.x)
            if index in (1, 2):
                keep = {1: 27, 2: 18}[index]
                options = {"iterations": 1, "cls_start": has_cls, "variances": (0.01, 0.7), "scale": SCALE}
                pruned = rank_pruning(q[None], k[None], keep, similar=4, protected=written.protected, **options)
                written.reduce(pruned, sizes=False)

    report = written.check(vtprune.ZeroTPrune(keep_ratio=0.5, layers=(1, 2), iterations=1), run, spread=False)
    assert report.counts == (36, 27, 18, 18)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("siglip", "timm-map")])
@torch.no_grad()
def test_tca(name):
    written = Written(name)

    def run():
        for index, layer in enumerate(written.layers):
            *_, values, weights = written.attention(layer)
            written.attend(layer, weights, values)
            if index in (1, 3):
                options = {"protected": written.protected}
                written.reduce(condensation(written.x[None], weights.mean(0)[None, 0], 0.1, **options), sizes=False)
            written.x = written.x + layer.mlp(written.x)

    report = written.check(vtprune.TCA(drop_rate=0.1, layers=(1, 3)), run, spread=False)
    assert report.counts == (36, 30, 30, 24)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_kth_and_random_merging(name):
    written = Written(name)

    def run(choose):
        for index, layer in enumerate(written.layers):
            _, keys, values, weights = written.attention(layer)
            written.attend(layer, weights, values)
            options = {"sizes": written.sizes, "protected": written.protected}
            if (reduction := choose(index, keys.mean(0)[None], options)) is not None:
                written.reduce(reduction)
            written.x = written.x + layer.mlp(written.x)

    def kth(index, metric, options):
        return kth_matching(metric, 3, **options) if index in (0, 2) else None

    def random(index, metric, options):
        return random_matching(metric, 5, seeded_uniform([index], 7, metric.shape[1]), **options)

    report = written.check(vtprune.ToMe(variant="kth", k=3, layers=(0, 2)), lambda: run(kth), spread=True)
    assert report.counts == (12, 12, 4, 4)
    report = written.check(vtprune.ToMe(variant="random", r=5, seed=7), lambda: run(random), spread=True)
    assert report.counts == (31, 26, 21, 16)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_random_and_uniform_patches(name):
    written = Written(name)

    def run(left_of):
        for index, layer in enumerate(written.layers):
            *_, values, weights = written.attention(layer)
            written.attend(layer, weights, values)
            patches = list(range(written.protected, len(written.x)))
            places = [*range(written.protected), *sorted(patches[i] for i in left_of(index, len(patches)))]
            written.reduce(Reduction.gather(torch.tensor([places]), len(written.x)), sizes=False)
            written.x = written.x + layer.mlp(written.x)

    def random(index, patches):
        return seeded_uniform([index], 7, patches)[0].sort(descending=True).indices[: patches - 5].tolist()

    def uniform(index, patches):
        left = patches - 5
        return [int((i + 0.5) * patches / left) for i in range(left)]

    report = written.check(vtprune.RandomPatches(r=5, seed=7), lambda: run(random), spread=False)
    assert report.counts == (31, 26, 21, 16)
    report = written.check(vtprune.UniformPatches(r=5), lambda: run(uniform), spread=False)
    assert report.counts == (31, 26, 21, 16)


@pytest.mark.parametrize("method", ["random_patches", "uniform_patches", "glsim_patches"])
@torch.no_grad()
def test_patches_are_dropped_on_the_schedule_of_tome(method):
    model, images = hosts.shared("clip"), hosts.pixels(3)
    plain = hosts.encode(model, images)
    for budget in ({"keep_ratio": 0.5}, {"keep_ratio": 0.1}, {"keep_tokens": 20}, {"r": [5, 7, 0, 6]}, {"r": 15}):
        with vtprune.prune(model, "tome", **budget) as session:
            hosts.encode(model, images)
            expected = session.report.counts
        with vtprune.prune(model, method, **budget) as session:
            together = hosts.encode(model, images)
            assert session.report.counts == expected
            alone = hosts.encode(model, images[2:])
        for key, value in together.items():
            torch.testing.assert_close(value[2:], alone[key], rtol=1e-5, atol=1e-5)
    with vtprune.prune(model, method, keep_ratio=1.0):
        same = hosts.encode(model, images)
    assert all(torch.equal(value, plain[key]) for key, value in same.items())
    with (
        pytest.raises(vtprune.BudgetError, match=f"{method} takes away at most half of the patches in a layer"),
        vtprune.prune(model, method, keep_tokens=2),
    ):
        hosts.encode(model, images)


@pytest.mark.parametrize("metric", ["cosine", "l1", "l2"])
@torch.no_grad()
def test_glsim_patches_drops_what_is_least_like_the_cls_token(metric):
    """Of each image other patches; the first layer's output is that of the plain model."""
    model, images = hosts.shared("clip"), hosts.pixels(3)
    behind = []
    handle = find_encoder(model).layers[0].register_forward_hook(lambda module, args, output: behind.append(output))
    hosts.encode(model, images)
    handle.remove()
    cls, patches = behind[0][:, :1], behind[0][:, 1:]
    scores = {
        "cosine": torch.nn.functional.cosine_similarity(cls, patches, dim=-1),
        "l1": -(cls - patches).abs().mean(-1),
        "l2": -(cls - patches).square().mean(-1),
    }[metric]
    with vtprune.prune(model, "glsim_patches", r=[10], metric=metric) as session:
        hosts.encode(model, images)
    gone = [(session.report.sources(image)[1:] < 0).nonzero().flatten().tolist() for image in range(3)]
    assert gone == scores.topk(10, largest=False).indices.sort().values.tolist()
    assert len(set(map(tuple, gone))) == 3
    with pytest.raises(vtprune.UnsupportedStageError, match="ranks by similarity to a CLS token.*none: tome, mctf"):
        vtprune.prune(hosts.shared("siglip"), "glsim_patches", r=3)


def test_seeds_draw_other_patches():
    model, images = hosts.shared("clip"), hosts.pixels()
    left = []
    for seed in (0, 1, 0):
        with torch.no_grad(), vtprune.prune(model, "random_patches", keep_ratio=0.5, seed=seed) as session:
            hosts.encode(model, images)
        left.append([session.report.sources(image).tolist() for image in range(2)])
    assert left[0] == left[2] != left[1] and left[0][0] == left[0][1]


@pytest.mark.parametrize("method", ["auroracap", "tinychart", "mctf", "zero_tprune", "tca"])
@torch.no_grad()
def test_budgets_and_published_schedules(method):
    model, images = hosts.make("clip"), hosts.pixels(3)
    plain = hosts.encode(model, images)
    published = {
        "auroracap": (29, 22, 15, 8),
        "tinychart": (18, 9, 5, 3),
        "mctf": (36, 20, 10, 9),
        "zero_tprune": (36, 32, 25, 17),
        "tca": (36, 30, 24, 21),
    }
    with vtprune.prune(model, method) as session:
        together = hosts.encode(model, images)
        assert session.report.counts == published[method]
        alone = [hosts.encode(model, image[None]) for image in images]
    for key, value in together.items():
        torch.testing.assert_close(value, torch.cat([single[key] for single in alone]), rtol=1e-5, atol=1e-5)
    for budget, left in (({"keep_ratio": 0.5}, 18), ({"keep_tokens": 20}, 20)):
        with vtprune.prune(model, method, **budget) as session:
            hosts.encode(model, images)
        count = session.report.final_tokens
        assert count == left or (method == "tca" and left - 3 <= count <= left)
    with vtprune.prune(model, method, keep_ratio=1.0) as session:
        same = hosts.encode(model, images)
    assert all(torch.equal(value, plain[key]) for key, value in same.items())


def test_published_budgets_are_those_of_the_papers():
    aurora = vtprune.AuroraCap(token_kept_ratio=0.1).schedule(48, 729, 1)
    assert 729 - sum(aurora[:47]) == 118
    assert 2916 - sum(vtprune.TinyChart().schedule(26, 2916, 0)) == 732
    assert 197 - sum(vtprune.MCTF().schedule(12, 196, 1)) == 21
    condensed = vtprune.TCA().schedule(12, 196, 1)
    assert [197 - sum(condensed[: layer + 1]) for layer in (3, 6, 9)] == [143, 104, 77]
    condensed = vtprune.TCA(drop_rate=0.035).schedule(12, 196, 1)
    assert [197 - sum(condensed[: layer + 1]) for layer in (3, 6, 9)] == [182, 167, 155]
    assert vtprune.ZeroTPrune().schedule(12, 196, 1) == [0, 0, 20, 0, 0, 36, 0, 0, 42, 0, 0, 0]
    assert vtprune.ToMe(r=13).schedule(12, 196, 1) == [13] * 12


def test_tca_says_how_few_patches_it_can_leave():
    with pytest.raises(vtprune.BudgetError, match="of 64 patches, layers .* leave .* at least; 1 were asked") as caught:
        vtprune.TCA(keep_tokens=1, layers=(3,)).schedule(6, 64, 1)
    fewest = round(caught.value.floor * 64)
    assert 1 < fewest <= 6  # four means and a sum, or fewer
    assert 64 - sum(vtprune.TCA(keep_tokens=fewest, layers=(3,)).schedule(6, 64, 1)) == fewest
    with pytest.raises(vtprune.BudgetError, match="leave"):
        vtprune.TCA(keep_tokens=fewest - 1, layers=(3,)).schedule(6, 64, 1)


@torch.no_grad()
def test_mctf_hands_out_the_attention_that_it_used():
    """One step ahead: CLS attends to itself as it would have done before patches merged."""
    model, images = hosts.make("clip"), hosts.pixels(2)
    model.set_attn_implementation("eager")
    plain = model(images, output_attentions=True).attentions
    with vtprune.prune(model, "mctf") as session:
        ahead = model(images, output_attentions=True).attentions
    for weights, rows in zip(ahead, session.report.entered, strict=True):
        assert weights.shape[2:] == (rows, rows)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    torch.testing.assert_close(ahead[1][..., 0, 0], plain[1][..., 0, 0])
    assert ahead[1].shape != plain[1].shape

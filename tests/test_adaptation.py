# SPDX-License-Identifier: Apache-2.0
"""A classifier that adapts, against the whole of it written out: layers, anchors, reservoir and correction."""

import io
import math
import threading

import numpy as np
import open_clip
import pytest
import torch
from encoders import hosts, reference
from encoders.test_engine import untouched
from encoders.test_tome import entering
from PIL import Image
from torch.nn.functional import normalize

import vtprune
from vtprune.adaptation import AdaptingClassifier
from vtprune.adapters import find_encoder
from vtprune.classify import ZeroShotClassifier
from vtprune.eval.digitscenes.open_clip_model import build_open_clip_tokenizer
from vtprune.testing import families

# Hosts and classes whose random features are such that each class is predicted several times.
CLASSES = {"clip-model": ["red", "green", "blue"], "open_clip-model": ["green", "blue"]}
LAYERS = (1, 3)
OPTIONS = dict(reservoir=3, layers=LAYERS, scale=0.5, strength=1.5, beta=4.0)


def classifier_of(name="clip-model", **more):
    model, tokenizer = hosts.make(name, seed=2), build_open_clip_tokenizer()
    if name == "open_clip-model":
        options = dict(padding="max_length", max_length=8, truncation=True, return_tensors="pt")
        return ZeroShotClassifier(model, lambda texts: tokenizer(texts, **options).input_ids, CLASSES[name], **more)
    return ZeroShotClassifier(model, tokenizer, CLASSES[name], ["a {} digit", "{}"], **more)


def adapting(name="clip-model", **options):
    return AdaptingClassifier(classifier_of(name), "tca", **OPTIONS | options)


def images(count=24):
    return hosts.pixels(count, seed=1)


class Written:
    """One image at a time, without hooks. Weights of layers and the features of the classes are the host's."""

    def __init__(self, name, classifier, anchored=True):
        self.name, self.model, self.text, self.anchored = name, classifier.model, classifier.text_features, anchored
        self.layers = reference.layers_of(list(find_encoder(self.model).layers))
        self.kept = [[] for _ in classifier.classes]
        self.anchors = None

    def condensed(self, x, attention):
        patches, rate = x[1:], 0.1
        left = math.ceil((1 - rate) * len(patches))
        clustered = 2 * (len(patches) - left + 1)
        order = attention.argsort(descending=True)
        stay, cluster, rest = order[: left - clustered], order[left - clustered : left], order[left:]
        points, centres = patches[cluster], [0]
        while len(centres) < 4:
            centres.append(int((points[:, None] - points[centres]).norm(dim=2).amin(1).argmax()))
        distances = (points[:, None] - points[centres]).norm(dim=2)
        weights = (1 / distances.amin(1)).masked_fill(distances.amin(1) == 0, 1)
        belongs = distances.argmin(1)
        means = [(weights[belongs == c] @ points[belongs == c]) / weights[belongs == c].sum() for c in range(4)]
        return torch.cat([x[:1], patches[stay], torch.stack(means), (attention[rest] @ patches[rest])[None]])

    def encode(self, x):
        """(tokens, dim) -> logits (classes,) and CLS tokens (layers, dim)"""
        behind = []
        for index, layer in enumerate(self.layers):
            read = x
            if index in LAYERS and self.anchors is not None and self.anchored:
                candidates = self.anchors[:, index - 1]
                read = torch.cat([candidates[torch.cosine_similarity(candidates, x[0], dim=1).argmax()][None], x])
            q, k, v = layer.qkv(layer.norm(read))
            first = len(read) - len(x)
            weights = (q @ k.transpose(1, 2) * (hosts.WIDTH // hosts.HEADS) ** -0.5).softmax(-1)[:, first:]
            x = x + layer.out((weights @ v).transpose(0, 1).flatten(1))
            if index in LAYERS:
                x = self.condensed(x, weights[:, 0, first + 1 :].mean(0))
            x = x + layer.mlp(x)
            behind.append(x[0])
        feature = reference.output_of(self.name)[1](self.model, x, torch.ones(len(x))).flatten()
        return self.model.logit_scale.exp() * self.text @ normalize(feature, dim=0), torch.stack(behind)

    def learn(self, logits, own):
        """Insert a sample, and say what its logits become."""
        logarithms = logits.log_softmax(0)
        kept = self.kept[int(logits.argmax())]
        kept.append((float(-(logarithms.exp() * logarithms).sum()), own))
        if len(kept) > OPTIONS["reservoir"]:
            means = [normalize(cls.mean(0), dim=0) for _, cls in kept]
            others = [sum(float(a @ b) for b in means if b is not a) / (len(means) - 1) for a in means]
            scores = [entropy + other for (entropy, _), other in zip(kept, others, strict=True)]
            del kept[scores.index(max(scores))]
        kept.sort(key=lambda sample: sample[0])
        depths = torch.linspace(0, 1, len(self.layers))
        layer_weights = (depths / OPTIONS["scale"]).exp() / (depths / OPTIONS["scale"]).exp().sum()
        corrected = logits.clone()
        for label, samples in enumerate(self.kept):
            for _, cls in samples:
                affinity = layer_weights @ torch.cosine_similarity(own, cls, dim=1)
                corrected[label] += OPTIONS["strength"] * torch.exp(-OPTIONS["beta"] * (1 - affinity))
        return corrected

    def batch(self, tokens):
        encoded = [self.encode(x) for x in tokens]
        logits = torch.stack([self.learn(*image) for image in encoded])
        if min(map(len, self.kept)) > 1:
            self.anchors = torch.stack([torch.stack([cls for _, cls in kept]).mean(0) for kept in self.kept])
        return logits


@pytest.mark.parametrize("sizes", [[1] * 24, [9, 6, 1, 8]], ids=["singles", "batches"])
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_a_stream_as_written_out(name, sizes):
    adaptive = adapting(name)
    written = Written(name, adaptive.classifier)
    unanchored = Written(name, adaptive.classifier, anchored=False)
    tokens = entering(adaptive.classifier.model, images())
    on = differs = 0
    for pixels, rows in zip(images().split(sizes), tokens.split(sizes), strict=True):
        anchors = written.anchors is not None
        expected, logits = written.batch(rows), adaptive(pixels)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
        differs += not torch.allclose(unanchored.batch(rows), expected, rtol=1e-3, atol=1e-3)
        assert adaptive.report.entered == (37, 37 + anchors, 31, 31 + anchors)
        assert adaptive.report.counts == (36, 30, 30, 24) and adaptive.report.images == len(pixels)
        on += anchors
    assert on == differs > 0
    assert untouched(adaptive.classifier.model)


@torch.no_grad()
def test_a_batch_is_its_images_in_order_and_anchors_are_of_before():
    single, batched = adapting(), adapting()
    alone = []
    for pixels in images():
        alone.append(single(pixels[None]))
        if single.report.entered[1] == 38:  # the first with anchors
            break
    before = images()[: len(alone) - 1]
    torch.testing.assert_close(batched(before), torch.cat(alone[:-1]), rtol=1e-5, atol=1e-4)
    assert len(before) > 6 and batched.report.entered[1] == 37
    torch.testing.assert_close(batched(images()[len(before)][None]), alone[-1], rtol=1e-5, atol=1e-4)
    assert batched.report.entered[1] == 38


@torch.no_grad()
def test_what_is_learnt_is_saved_loaded_and_forgotten():
    first, second = adapting(), adapting()
    fresh = first(images(2))
    first(images())
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    expected = first(images(2))
    second.load_state_dict(state)
    assert torch.equal(second(images(2)), expected) and second.report.entered[1] == 38
    assert not torch.allclose(expected, fresh, atol=0.1)
    copy = second.state_dict()
    for name in ("entropies", "cls"):
        kept = copy[name].clone()
        second(hosts.pixels(20, seed=5))
        assert torch.equal(copy[name], kept) and not torch.equal(second.state_dict()[name], kept)
    second.reset()
    assert torch.equal(second(images(2)), fresh)


def test_a_state_that_does_not_fit_changes_nothing():
    target = adapting()
    with torch.no_grad():
        target(images(5))
    before, state = target.state_dict(), adapting().state_dict()
    other = adapting(reservoir=2).state_dict()
    for wrong, words in (
        (other, r"entropies are \(3, 2\), and \(3, 3\) are needed"),
        (state | {"cls": state["cls"][..., :-1]}, r"cls are \(3, 3, 4, 31\), and \(3, 3, 4, 32\)"),
        (state | {"classes": ["red", "blue", "green"]}, "is of the classes .'red', 'blue', 'green'"),
        ({"cls": state["cls"]}, "expected .'classes', 'cls', 'entropies'"),
    ):
        with pytest.raises(vtprune.ConfigError, match=words):
            target.load_state_dict(wrong)
    assert_same(target.state_dict(), before)


def assert_same(state, other):
    assert state["classes"] == other["classes"] and state["entropies"].isfinite().any()
    assert torch.equal(state["entropies"], other["entropies"]) and torch.equal(state["cls"], other["cls"])


@torch.no_grad()
def test_other_classes_need_a_reset():
    adaptive = adapting()
    adaptive(images(3))
    adaptive.classifier.set_classes(["blue", "red"])
    for act in (lambda: adaptive(images(3)), adaptive.state_dict, lambda: adaptive.load_state_dict({})):
        with pytest.raises(vtprune.ConfigError, match="other classes or templates.*call reset"):
            act()
    adaptive.reset()
    assert adaptive(images(3)).shape == (3, 2) and adaptive.state_dict()["entropies"].isfinite().sum() == 3


@torch.no_grad()
def test_modes_of_torch_mix():
    mixed, plain = adapting(), adapting()
    with torch.inference_mode():
        mixed.reset()
        mixed(images(8))
        state = mixed.state_dict()
    mixed.load_state_dict(state)
    mixed(images()[8:])
    with torch.inference_mode():
        inferred = mixed(images(2))
    for part in (images(8), images()[8:]):
        plain(part)
    assert torch.equal(inferred, plain(images(2))) and mixed.report.entered[1] == 38


def test_gradients_are_those_of_the_classifier_in_a_session():
    adaptive, pixels = adapting(), images(3).requires_grad_()
    adaptive(pixels).sum().backward()
    found, pixels.grad = pixels.grad, None
    with vtprune.prune(adaptive.classifier.model, "tca", layers=LAYERS):
        adaptive.classifier(pixels).sum().backward()
    torch.testing.assert_close(found, pixels.grad)
    assert not adaptive.state_dict()["cls"].requires_grad


@torch.no_grad()
def test_another_dtype_of_the_model():
    adaptive = adapting()
    half = AdaptingClassifier(classifier_of(), adaptive.method)
    half.classifier.model.bfloat16()
    for part in images().split(8):
        logits, expected = half(part), adaptive(part)
    assert logits.dtype == torch.bfloat16 and half.state_dict()["cls"].dtype == torch.float32
    assert half.report.entered[1] == 38
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is one device")
@torch.no_grad()
def test_samples_follow_the_model_to_its_device():
    moving, staying = adapting(), adapting()
    for device, part in zip(("cpu", "cuda", "cpu"), images().split(8), strict=True):
        moving.classifier.model.to(device)
        torch.testing.assert_close(moving(part).cpu(), staying(part), rtol=1e-3, atol=1e-2)
    assert moving.report.entered[1] == 38


@torch.no_grad()
def test_predictions_come_from_corrected_logits():
    adaptive, other = adapting(strength=50.0), adapting(strength=50.0)
    names = CLASSES["clip-model"]
    said = adaptive.predict(images())
    assert said == [names[i] for i in other(images()).argmax(1)] != other.classifier.predict(images())
    drawn = [Image.fromarray(np.full((24, 24, 3), shade, np.uint8)) for shade in (0, 90)]
    with pytest.raises(vtprune.ConfigError, match="preprocess="):
        adaptive.predict(drawn)
    shaded = classifier_of(preprocess=lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    assert set(AdaptingClassifier(shaded, {"name": "tca", "reservoir": 3}).predict(drawn)) <= set(names)


@torch.no_grad()
def test_without_condensation_logits_are_corrected_only():
    adaptive = adapting(keep_ratio=1.0, layers=None)
    plain = adaptive.classifier(images())
    logits = adaptive(images())
    assert (logits >= plain).all() and (logits - plain).amax(1).min() >= OPTIONS["strength"] * 0.999
    assert adaptive.report.keep_ratio == 1.0


# -- other users of the model ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_error_on_the_way_leaves_no_hook_and_no_sample():
    adaptive = adapting()
    adaptive(images(4))
    before, report, model = adaptive.state_dict(), adaptive.report, adaptive.classifier.model

    def fail(module, args, output):
        raise RuntimeError("on the way")

    handle = find_encoder(model).layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on the way"):
        adaptive(images(2))
    handle.remove()
    assert untouched(model) and adaptive.report is report
    assert_same(adaptive.state_dict(), before)
    twin = adapting()
    twin.load_state_dict(before)
    assert torch.equal(adaptive(images(2)), twin(images(2)))


@torch.no_grad()
def test_another_thread_meanwhile_has_the_model_unpruned():
    adaptive, alone = adapting(), adapting()
    expected, plain = alone(images(3)), adaptive.classifier(images(5))
    layer = find_encoder(adaptive.classifier.model).layers[2]
    outputs = []

    def classify():
        with torch.no_grad():
            outputs.append(adaptive.classifier(images(5)))

    def interrupt(module, args, output):
        handle.remove()
        thread = threading.Thread(target=classify)
        thread.start()
        thread.join()

    handle = layer.register_forward_hook(interrupt)
    assert torch.equal(adaptive(images(3)), expected)
    assert torch.equal(outputs[0], plain)
    assert_same(adaptive.state_dict(), alone.state_dict())


@torch.no_grad()
def test_threads_take_turns():
    """Without condensation there are no anchors, so the order does not matter for what is kept."""
    options = dict(reservoir=40, keep_ratio=1.0, layers=None)
    together, alone = adapting(**options), adapting(**options)

    def work(pixels):
        with torch.no_grad():
            for image in pixels:
                together(image[None])

    threads = [threading.Thread(target=work, args=(part,)) for part in images().split(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for image in images():
        alone(image[None])
    assert_same(together.state_dict(), alone.state_dict())
    assert alone.state_dict()["entropies"].isfinite().sum() == 24


@torch.no_grad()
def test_a_session_that_is_open_is_in_the_way():
    adaptive = adapting()
    model = adaptive.classifier.model
    with (
        vtprune.prune(model, "tome", r=2, strict=False),
        pytest.raises(vtprune.VTPruneError, match="active on this model already"),
    ):
        adaptive(images(2))
    assert untouched(model) and adaptive.state_dict()["entropies"].isinf().all()


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "error", "words"),
    [
        ("tca", {}, vtprune.ConfigError, "needs reservoir"),
        ("tome", {"r": 3}, vtprune.ConfigError, "tome adapts nothing"),
        ("tca", {"reservoir": 3, "layers": (4,)}, vtprune.ConfigError, "layers 0..3"),
        ("tca", {"reservoir": 3, "keep_tokens": 0}, vtprune.BudgetError, "no patches"),
        ("tca", {"reservoir": 0}, vtprune.ConfigError, "reservoir=0"),
        ("tca", {"reservoir": 3, "scale": 0}, vtprune.ConfigError, "scale=0"),
        ("tca", {"beta": 3, "strength": 1}, vtprune.ConfigError, "strength, beta: only with reservoir"),
    ],
)
def test_methods_that_cannot_adapt(method, options, error, words):
    with pytest.raises(error, match=words):
        AdaptingClassifier(classifier_of(), method, **options)


def test_models_without_a_cls_token_or_known_layers():
    tokenizer = build_open_clip_tokenizer()
    siglip = ZeroShotClassifier(hosts.make("siglip-model"), tokenizer, ["red", "blue"])
    with pytest.raises(vtprune.UnsupportedStageError, match="tca reads the attention of a CLS token"):
        AdaptingClassifier(siglip, "tca", reservoir=3)
    vision = open_clip.CLIPVisionCfg(layers=(1, 1, 1, 1), image_size=32, width=8)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=50, width=16, heads=2, layers=1)
    resnet = open_clip.CLIP(12, vision, text).eval()
    classifier = ZeroShotClassifier(resnet, lambda texts: torch.ones(len(texts), 8, dtype=torch.long), ["red", "blue"])
    with pytest.raises(vtprune.UnsupportedModelError, match="vision encoder of this CLIP is none of those"):
        AdaptingClassifier(classifier, "tca", reservoir=3)


@pytest.mark.parametrize("model", ["clip-model", "llava"])
def test_a_session_alone_has_no_logits(model):
    model = hosts.make(model) if model in hosts.NAMES else families.shared(model)
    with pytest.raises(vtprune.ConfigError, match="reservoir=3 adapts a zero-shot classifier.*AdaptingClassifier"):
        vtprune.prune(model, {"name": "tca", "reservoir": 3})

# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune import Recoverable
from vtprune.ops.attention import attention_rows
from vtprune.ops.outliers import local_outlier_factor, outlier_share
from vtprune.ops.recoverable_compression import (
    counts_within,
    dynamic_counts,
    gather_rest,
    lowered,
    main_tokens,
    recover,
    text_scores,
)
from vtprune.signals import EncoderKeys, EncoderOutput, EncoderSaliency, JointSpace
from vtprune.tokens import ModelShape

from . import Vector, close, handles, one_group, same

SHAPE = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)


@handles("recoverable_lof")
def outliers(v: Vector) -> None:
    for name in ("a", "b", "c"):
        for k in (10, 20):
            close(local_outlier_factor(v[f"{name}.x"], k), v[f"{name}.k{k}.lof"], rtol=1e-5)
            assert outlier_share(v[f"{name}.x"], k) == v[f"{name}.k{k}.ratio"]
    # The choice among equally near neighbours is undefined, so the factors of duplicates are not compared.
    assert outlier_share(v["dup.x"], 20) == v["dup.k20.ratio"]


@handles("recoverable_text_score")
def text(v: Vector) -> None:
    close(text_scores(v["text_feat"], v["visual_projected"][:, 1:])[None], v["similarity"], rtol=1e-5)


def visual_scores(v: Vector):
    """CLS attention of the last layer, with all heads as one."""
    queries, keys = v["q_cls"][:, None, None], v["k"][:, None]
    scores = attention_rows(queries, keys, scale=keys.shape[-1] ** -0.5)[0, 0, 0, 1:]
    close(scores, v["cls_attn"][0], rtol=1e-5)
    return scores


@handles("recoverable_main*")
def published(v: Vector) -> None:
    features, keys, visual, text = v["hidden"][0, 1:], v["k"][0, 1:], visual_scores(v), v["text_sim"][0]
    counts = tuple(dynamic_counts(visual, text, features.shape[-1], reference_quirks=True).tolist())
    assert counts == (v["idx_vision_desc"].shape[1], v["idx_text_desc"].shape[1], v["num_centers"])
    seen = main_tokens(visual, text, counts[0], 0)
    same(seen.nonzero()[:, 0], v["idx_vision_desc"][0].sort().values)
    close(lowered(text, seen), v["text_sim_after"][0])
    keep = main_tokens(visual, text, *counts[:2])
    same(keep.nonzero()[:, 0], v["idx_main"])
    factors = (
        (local_outlier_factor(visual, 20), "vision"),
        (local_outlier_factor(lowered(text, seen), 20), "text"),
        (local_outlier_factor(visual[~keep], 10), "other"),
    )
    for factor, name in factors:
        assert float((factor > 1.5).double().mean()) == v[f"ratio_{name}"]
        if name != "text":  # many of those coincide, see above
            # Differences of close scores: the recorded ones come from scores with another rounding error.
            close(factor, v[f"lof_{name}"], rtol=1e-3)

    merged = recover(features, keys, visual, text, (*counts, int(counts[2] > 0)), reference_quirks=True)
    close(merged.features, v["out"], rtol=1e-5, atol=1e-6)
    centres = v["idx_other"][0, v["center_local_idx_desc"][0]]
    same(merged.places[0, :-1], torch.cat((v["idx_main"], centres)))

    # The method leaves the same tokens in their places; a space of two dimensions gives it the recorded text scores.
    along = text[:, None] * 2**0.5
    signals = {
        EncoderSaliency(23): visual[None],
        EncoderKeys(23): keys[None],
        EncoderOutput(23): torch.cat((along, (1 - along.square()).sqrt()), dim=1)[None],
        JointSpace("recorded"): (torch.tensor([[1.0, 0.0]]), torch.eye(2)),
    }
    method = Recoverable(text_tower="recorded", reference_quirks=True)
    selection = method.select(one_group(features, -1, signals, SHAPE))
    places = merged.places[0]
    same(selection.keep[0].nonzero()[:, 0], places.sort().values)
    close(selection.features[0, places], v["out"][0], rtol=1e-5, atol=1e-6)

    counts = counts_within(visual, text, features.shape[-1], None).tolist()
    sane = recover(features, keys, visual, text, counts)
    assert sane.places.shape[1] == sum(counts) and counts[3] == 1
    assert (sane.sources >= 0).all() and set(sane.sources[0].tolist()) == set(sane.places[0].tolist())


@handles("recoverable_alt*")
def independent_choices(v: Vector) -> None:
    """The variant that chooses text tokens independently of the visual ones."""
    features, keys, visual, text = v["hidden"][0, 1:], v["k"][0, 1:], visual_scores(v), v["text_sim"][0]
    keep = torch.zeros(len(visual), dtype=torch.bool)
    for scores in (visual, text):
        keep |= main_tokens(scores, scores, int(len(scores) * outlier_share(scores, 10)), 0)
    same(keep.nonzero()[:, 0], v["idx_main"])
    centres = int(len(visual) * outlier_share(visual[~keep], 10))
    assert centres == v["num_centers"]
    merged = gather_rest(
        features, keys, visual, text, keep, int(keep.sum()), centres, remainder=True, reference_quirks=True
    )
    close(merged.features, v["out"], rtol=1e-5, atol=1e-6)
    same(merged.places[0, len(v["idx_main"]) : -1], v["idx_other"][0, v["center_local_idx_desc"][0]])

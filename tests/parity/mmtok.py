# SPDX-License-Identifier: Apache-2.0
import json

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.image_processing_utils import select_best_resolution

from vtprune import MMTok
from vtprune.ops.coverage import coverage_matrices, coverage_order, max_coverage
from vtprune.ops.keywords import keywords
from vtprune.signals import EncoderFeatures, TextEmbeddings
from vtprune.tokens import ModelShape

from . import Vector, close, handles, kept, one_group, same
from .layouts import mosaic_order, padding_patches
from .mmtok_llava_next import through_a_session

REFERENCE_TARGET = 64
"""The reference's Qwen2.5-VL entry point returns all tokens, padding included, where they are no more than this: it
compares their number with a default and not with what was asked for."""


def settings(v: Vector) -> dict[str, float]:
    return dict(alpha=v["alpha"], tau_text=v["tv_temp"], tau_visual=v["vv_temp"])


def order_among(allowed: Tensor, by_text: Tensor, by_visual: Tensor, k: int, alpha: float) -> tuple[Tensor, Tensor]:
    """`coverage_order` among some tokens; the others, which are padding in the reference, still have to be covered."""
    order, gains = coverage_order(by_text[:, allowed], by_visual[:, allowed], k, alpha=alpha)
    return allowed[order], gains


def without(excluded, n: int) -> Tensor:
    """(candidates,) indices below n that are not excluded."""
    return torch.tensor([index for index in range(n) if index not in set(map(int, excluded))], dtype=torch.long)


@handles("mmtok_core_*")
def coverage(v: Vector) -> None:
    features, encoder_features, text = v["vision_tokens"], v["vision_tokens_clip"], v["text_tokens"]
    excluded = v["exclude_indices"]
    by_text, by_visual = coverage_matrices(
        features, encoder_features, text, tau_text=v["tv_temp"], tau_visual=v["vv_temp"]
    )
    close(by_text, v["P"])
    if "Q" in v:
        close(by_visual, v["Q"])
    else:
        close(by_visual[0], v["Q_row0"])
        close(by_visual.sum(0), v["Q_colsum"])

    order, gains = order_among(without(excluded, len(features)), by_text, by_visual, v["k"], v["alpha"])
    # These two cases have nearly equal gains: the set is defined, but not the order.
    if v.case not in ("mmtok_core_llava_k192", "mmtok_core_kn"):
        same(order, v["selection_order"])
        close(gains, v["gains"], rtol=1e-4, atol=1e-7)
    chosen = order.sort().values
    same(chosen, v["selected_sorted"])
    close(features[chosen], v["selected_tokens"])

    if not len(excluded):
        method = MMTok(keep_tokens=v["k"], **settings(v))
        shape = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)
        signals = {EncoderFeatures(): encoder_features[None], TextEmbeddings(keywords=True): [text]}
        same(kept(method, one_group(features, v["k"], signals, shape)), v["selected_sorted"])


@handles("mmtok_quirk_pad_exhaust")
def more_asked_for_than_candidates(v: Vector) -> None:
    matrices = coverage_matrices(
        v["vision_tokens"], v["vision_tokens_clip"], v["text_tokens"], tau_text=v["tv_temp"], tau_visual=v["vv_temp"]
    )
    n = len(v["vision_tokens"])
    candidates = without(v["exclude_indices"], n)
    chosen, _ = order_among(candidates, *matrices, v["k"], v["alpha"])
    assert sorted(chosen.tolist()) == candidates.tolist() and len(candidates) == v["n_candidates"]
    # The reference fills up with index 0, repeated.
    filled = torch.cat((chosen, chosen.new_zeros(min(v["k"], n) - len(chosen))))
    same(filled.sort().values, v["selected_sorted"])


@handles("mmtok_quirk_target_ge_n")
def more_asked_for_than_tokens(v: Vector) -> None:
    chosen = max_coverage(v["vision_tokens"], v["vision_tokens_clip"], v["text_tokens"], v["target"])
    same(chosen, v["selected_sorted"])
    close(v["vision_tokens"][chosen], v["selected_tokens"])


@handles("mmtok_quirk_qwen_le64")
def early_return(v: Vector) -> None:
    inputs = (v["vision_tokens"], v["vision_tokens_clip"], v["text_tokens"], v["requested"])
    assert len(max_coverage(*inputs, tau_text=0.01)) == v["requested"] < len(v["vision_tokens"]) <= REFERENCE_TARGET
    same(torch.arange(len(v["vision_tokens"])), v["selected_sorted"])  # the defect
    close(v["vision_tokens"], v["selected_tokens"])


@handles("mmtok_text_keywords")
def text(v: Vector) -> None:
    found = [keywords(str(text)) for text in v["text_in"]]
    assert found == v["keywords_out"].tolist()
    assert [text.split() for text in found] == [json.loads(str(words)) for words in v["words_out"]]


@handles("mmtok_padding_indices")
def padding(v: Vector) -> None:
    for prefix, overlap in (("idx", False), ("idx_overlap", True)):
        patches, offsets = v[f"{prefix}_concat"], v[f"{prefix}_offsets"].tolist()
        for (width, height), begin, end in zip(v["sizes_wh"].tolist(), offsets, offsets[1:], strict=False):
            assert padding_patches(width, height, overlap=overlap) == sorted(patches[begin:end].tolist())


@handles("mmtok_llava*")
def llava_path(v: Vector) -> None:
    """From encoder features to the LLM's input: projection, choice in each crop, reading order, assembly."""
    encoder_features = v["hidden_m2"][:, 1:]
    projected = linear(encoder_features, v["proj_weight"], v["proj_bias"])
    text = v["embed_weight"][v["text_ids"]]
    assert keywords(" ".join(v["text_words"].tolist())).split() == v["text_words"].tolist()
    width, height = v["image_wh"].tolist()
    excluded = padding_patches(width, height) if v.case == "mmtok_llava15_pad" else []
    assert excluded == sorted(v["exclude_indices"].tolist())
    chosen = [
        order_among(
            without(excluded, len(features)),
            *coverage_matrices(features, encoded, text, tau_text=v["tv_temp"], tau_visual=v["vv_temp"]),
            v["k_per_crop"],
            v["alpha"],
        )[0]
        .sort()
        .values
        for features, encoded in zip(projected, encoder_features, strict=True)
    ]
    same(torch.stack(chosen), v["kept_per_crop"])

    crops = torch.arange(len(chosen)).repeat_interleave(v["k_per_crop"])
    patches = torch.cat(chosen)
    if len(chosen) > 1:
        pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        resolution = select_best_resolution((height, width), pinpoints)
        order = mosaic_order(crops, patches, tiles_across=resolution[1] // 336, side=24)
        crops, patches = crops[order], patches[order]
        through_a_session(v, resolution)
    tokens = projected[crops, patches]
    sources = torch.stack((crops, patches), dim=1)
    if v.case == "mmtok_llava_next_single":
        tokens = torch.cat((tokens, v["image_newline"][None]))
        sources = torch.cat((sources, torch.tensor([[-1, -1]])))
    same(sources, v["image_src_crop_patch"])
    ids = v["input_ids"]
    place = ids.tolist().index(-200)
    before, after = v["embed_weight"][ids[:place]], v["embed_weight"][ids[place + 1 :]]
    close(torch.cat((before, tokens, after)), v["inputs_embeds"], atol=1e-6)

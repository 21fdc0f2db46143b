# SPDX-License-Identifier: Apache-2.0
import json

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2Model

from vtprune import HoliTom
from vtprune.attention import Places, RowContext, decoder_attention_rows
from vtprune.ops.density_peaks import (
    density_peak_order,
    density_peaks,
    merge_clusters,
    scaled_distances,
    spread_and_separation,
)
from vtprune.ops.inner_llm_merging import absorb_dropped
from vtprune.ops.segmentation import segment_frames, still_positions, temporal_similarity
from vtprune.ops.video_merging import STATIC, MergedVideo, effective_ratio, merge_video
from vtprune.signals import AttentionReceived
from vtprune.tokens import Grid, ModelShape
from vtprune.transformers_private import CACHE

from . import Vector, close, handles, one_per_group, same
from .layouts import reading_order, with_newlines

SHAPE = ModelShape(encoder_layers=26, decoder_layers=28, feature_layer=25, has_cls=False)


@handles(
    "holitom_default", "holitom_r10t65", "holitom_tok196", "holitom_grid", "holitom_single", "holitom_twoframes",
    "holitom_maxwin4", "holitom_nobeta", "holitom_allstatic", "holitom_nostatic", "holitom_clip1", "holitom_tiny",
    "holitom_fixD_*",
)  # fmt: skip
def before_the_llm(v: Vector) -> None:
    p = json.loads(v["params_json"])
    # The models pool frames themselves, before any method.
    features, saliency = v["pooled_feat"], v["pooled_attn"]
    similarity = temporal_similarity(features)
    close(similarity, v["feature_sim"], atol=1e-6)
    still = similarity > p["T"]
    segments, saved = segment_frames(still, p["MAX_WINDOW_SIZE"])
    same(segments, v["segments"])
    assert saved == v["total_reduced"]
    same(still_positions(still, segments), v["static_mask"])
    assert abs(effective_ratio(p["RETAIN_RATIO"], saliency.numel(), saved) - v["retain_ratio_eff"]) < 1e-12

    parameters = dict(
        threshold=p["T"],
        max_window=p["MAX_WINDOW_SIZE"],
        context_share=p["D"],
        neighbours=p["K"],
        centre_weight=None if p["NO_BETA"] else p["BETA"],
    )
    video = merge_video(features, saliency, p["RETAIN_RATIO"], **parameters, reference_quirks=True)
    columns = p["pooled_side"] if p["mm_newline_position"] == "grid" else None
    whole = [_segment(v, number, video, columns) for number in range(len(segments))]
    emitted = torch.cat(whole) if columns else with_newlines(torch.cat(whole))
    same(emitted, with_newlines(reading_order(video.part, by_part=columns is None), columns))
    close(_rows(v, video, emitted), v["out"], atol=1e-6)

    # The method leaves the same tokens, in the order of the frames.
    (method,) = HoliTom(keep_ratio=p["RETAIN_RATIO"], inner_share=1.0, reference_quirks=True, **parameters).parts(SHAPE)
    places = Grid(p["pooled_side"], p["pooled_side"])
    selection = method.select(
        one_per_group(
            features.flatten(0, 1)[None],
            round(p["RETAIN_RATIO"] * saliency.numel()),
            signals={AttentionReceived(SHAPE.feature_layer): saliency.flatten()[None]},
            shape=SHAPE,
            crops=torch.arange(len(features)).repeat_interleave(len(places))[None],
            layouts=((places,) * len(features),),
            kinds=("video",),
        )
    )
    same(selection.keep[0], video.keep.flatten())
    close(selection.features[selection.keep], video.features[video.keep])
    same(selection.sources[0], video.sources.flatten())

    exact = merge_video(features, saliency, p["RETAIN_RATIO"], **parameters)
    assert exact.keep.sum() == min(round(p["RETAIN_RATIO"] * saliency.numel()), saliency.numel() - saved)


def _segment(v: Vector, number: int, video: MergedVideo, columns: int | None) -> Tensor:
    """Check one segment. Returns its result, with the newline tokens of rows but without that of the video."""
    first, last = video.segments[number].tolist()
    part = video.part.clone()
    part[:first], part[last + 1 :] = -1, -1
    positions = part.shape[1]
    by_part = reading_order(part, by_part=True)
    kinds = part.flatten()[by_part]
    dynamic, static = by_part[kinds != STATIC], by_part[kinds == STATIC]
    kept = v[f"seg{number}_dyn_keep_pos"]
    same(dynamic % positions, kept.flatten())
    same(dynamic // positions, torch.arange(first, last + 1).repeat_interleave(kept.shape[1]))
    close(_rows(v, video, dynamic), v[f"seg{number}_dyn_feat"].flatten(0, 1), atol=1e-6)
    if first < last:
        same(static - first * positions, v[f"seg{number}_static_keep_pos"])
        close(_rows(v, video, static), v[f"seg{number}_static_feat"], atol=1e-6)
        means = v["pooled_feat"][first : last + 1].mean(0)[v["static_mask"][number]]
        close(means, v[f"seg{number}_static_mean"], atol=1e-6)
    emitted = with_newlines(reading_order(part), columns) if columns else by_part
    close(_rows(v, video, emitted), v[f"seg{number}_out"], atol=1e-6)
    return emitted


def _rows(v: Vector, video: MergedVideo, order: Tensor) -> Tensor:
    return torch.cat((video.features.flatten(0, 1), v["image_newline"][None]))[order]


@handles("holitom_dp")
def segmentation(v: Vector) -> None:
    for threshold in (0.8, 0.9):
        still = v["feature_sim"] > threshold
        for window in (1024, 2, 3, 5):
            segments, saved = segment_frames(still, window)
            same(segments, v[f"segments_tau{threshold}_mw{window}"])
            assert saved == v[f"reduced_tau{threshold}_mw{window}"]
    pairs = torch.triu_indices(24, 24, offset=1).T
    gains = torch.zeros(24, 24)
    counts = still_positions(v["feature_sim"] > 0.8, pairs).sum(1)
    gains[pairs[:, 0], pairs[:, 1]] = (counts * (pairs[:, 1] - pairs[:, 0])).float()
    close(gains, v["gain_tau0.8"])


@handles("holitom_dpc")
def clustering(v: Vector) -> None:
    points = v["x"]
    distances = scaled_distances(points)
    apart = ~torch.eye(points.shape[1], dtype=torch.bool)
    for clusters, neighbours in ((8, 7), (5, 5), (20, 7), (3, 3)):
        name = f"c{clusters}k{neighbours}_"
        # In the reference a point's distance to itself is up to a few thousandths.
        close(distances[:, apart], v[f"{name}dist"][:, apart])
        spread, separation = spread_and_separation(distances, neighbours)
        density = (-spread).exp()
        close(density, v[f"{name}density"])
        close(separation, v[f"{name}delta"])
        close(density * separation, v[f"{name}score"], rtol=1e-4)
        same(density_peak_order(distances, clusters, neighbours), v[f"{name}index_center"])
        centres, assigned = density_peaks(points, clusters, neighbours)
        same(centres, v[f"{name}index_center"].sort().values)
        for weight, merged in ((0.6, "beta0.6"), (0.25, "beta0.25"), (None, "nobeta")):
            close(merge_clusters(points, centres, assigned, weight), v[f"{name}merged_{merged}"], atol=1e-6)


@handles("holitom_inner")
def inside_the_llm(v: Vector) -> None:
    for case in "abcd":
        hidden, attention = v[f"{case}_hidden_in"][0], v[f"{case}_attn"][0]
        start, n = v[f"{case}_v_start"], v[f"{case}_v_num"]
        visual = slice(start, start + n)
        weights = attention.mean(0)[-1, visual]
        keep, merged, sources = absorb_dropped(hidden[visual], weights, round(n * (1 - v[f"{case}_r"])))
        columns = _columns(keep, start, len(hidden))
        same(columns, v[f"{case}_keep_index"])
        same(columns, v[f"{case}_position_ids"][0])
        same(weights.masked_fill(~keep, -1).argsort(descending=True)[: keep.sum()] + start, v[f"{case}_topk_index"])
        same((~keep).nonzero()[:, 0] + start, v[f"{case}_nontopk_index"])
        same(sources[~keep] + start, v[f"{case}_merge_target"])
        after = hidden.clone()
        after[visual] = merged
        close(after[columns], v[f"{case}_hidden_out"][0], atol=1e-6)


def _columns(keep: Tensor, start: int, length: int) -> Tensor:
    """Columns of a sequence that are left when some visual ones are dropped."""
    alive = torch.ones(length, dtype=torch.bool)
    alive[start : start + len(keep)] = keep
    return alive.nonzero()[:, 0]


def _decode(model: Qwen2Model, v: Vector, p: dict, causal: bool) -> tuple[list[Tensor], Tensor, DynamicCache, Tensor]:
    """A prefill with the merge before layer k, layer k-1 causal or (as in the reference) not: the input of every layer,
    the columns left from layer k on, the cache, and the normalised output."""
    hidden, cache, inputs, received = v["inputs_embeds"], DynamicCache(), [], None
    columns, k, n = torch.arange(hidden.shape[1]), p["HOLITOM_k"], p["v_num"]
    for index, layer in enumerate(model.layers):
        if index == k:
            visual = slice(p["v_start"], p["v_start"] + n)
            keep, merged, _ = absorb_dropped(hidden[0, visual], received[visual], round(n * (1 - p["HOLITOM_r"])))
            hidden = torch.cat((hidden[:, : visual.start], merged[None], hidden[:, visual.stop :]), dim=1)
            columns = _columns(keep, visual.start, len(columns))
            hidden = hidden[:, columns]
        inputs.append(hidden)
        mask = torch.ones(1, 1, len(columns), len(columns), dtype=torch.bool)
        if causal or index != k - 1:
            mask = mask.tril()
        rope = model.rotary_emb(hidden, columns[None])
        if index == k - 1:
            received = _last_row(layer, hidden, rope)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rope, **{CACHE: cache})
    return inputs, columns, cache, model.norm(hidden)


def _last_row(layer: nn.Module, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Attention of the last token in a layer, averaged over heads: (columns,)."""
    normed, attention = layer.input_layernorm(hidden), layer.self_attn
    last = torch.tensor([[hidden.shape[1] - 1]])
    context = RowContext(
        attention=attention,
        places=Places(torch.arange(hidden.shape[1])[None], rope),
        real=torch.ones(hidden.shape[:2], dtype=torch.bool),
        past_keys=None,
        past_real=None,
    )
    rows = decoder_attention_rows(attention.q_proj(normed[:, -1:]), attention.k_proj(normed), last, context)
    return rows[0].mean(0)[0]


def _step(model: Qwen2Model, embedding: Tensor, position: int, cache: DynamicCache) -> Tensor:
    """One decoded token that sees all columns of each layer's cache."""
    rope = model.rotary_emb(embedding, torch.tensor([[position]]))
    for layer in model.layers:
        embedding = layer(embedding, attention_mask=None, position_embeddings=rope, **{CACHE: cache})
    return model.norm(embedding)


@handles("holitom_e2e_inner")
@torch.no_grad()
def through_a_decoder(v: Vector) -> None:
    p = json.loads(v["params_json"])
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = Qwen2Config(
        vocab_size=len(v["w:embed_tokens.weight"]),
        rms_norm_eps=p["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": p["rope_theta"]},
        **{name: p[name] for name in names},
    )
    model = Qwen2Model(config).eval()
    model.load_state_dict(v.weights())

    inputs, columns, cache, last = _decode(model, v, p, causal=False)
    same(columns, v["position_ids_from_layer_k"][0])
    same(torch.tensor([cache.get_seq_length(layer) for layer in range(len(inputs))]), v["cache_lens_after_prefill"])
    for layer, hidden in enumerate(inputs):
        close(hidden, v[f"layer{layer}_input"], rtol=2e-3, atol=1e-4)
    close(last, v["prefill_last_hidden"], rtol=2e-3, atol=1e-4)
    for step, embedding in enumerate(v["decode_embeds"][0]):
        answer = _step(model, embedding[None, None], 60 + step, cache)
        close(answer[0], v["decode_last_hidden"][:, step], rtol=2e-3, atol=1e-4)

    # In a causal layer the attention of the last row is the same, and so is the choice of tokens.
    causal, same_columns, *_ = _decode(model, v, p, causal=True)
    same(same_columns, columns)
    for layer in range(p["HOLITOM_k"]):
        close(causal[layer], v[f"layer{layer}_input"], rtol=2e-3, atol=1e-4)

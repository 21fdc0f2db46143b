# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import vtprune
from vtprune import MustDrop
from vtprune.ops.attention import attention_rows
from vtprune.ops.cls_attention import cls_score
from vtprune.ops.dual_attention import dual_attention, dual_attention_filter, key_tokens
from vtprune.ops.window_merging import window_merging, window_similarity
from vtprune.transformers_private import CACHE, scored

from . import Vector, close, handles, same
from .aim import heads


@handles("mustdrop_spatial")
def spatial_merging(v: Vector) -> None:
    for case in ("img576", "b2", "w22", "none", "all", "r1"):
        hidden, window = v[f"{case}_hidden"], tuple(v[f"{case}_window"].tolist())
        side = round((hidden.shape[1] - 1) ** 0.5)
        index = torch.arange(side * side).view(1, 1, side, side).float()
        windows = torch.nn.functional.unfold(index, window, stride=window)[0].T.long()
        close(window_similarity(hidden[:, 1:], windows), v[f"{case}_similarity_map"], atol=1e-6)

        settings = dict(window=window, threshold=v[f"{case}_threshold"], prefix=1)
        merged = window_merging(hidden, (side, side), **settings, reference_quirks=True)
        close(merged.features, v[f"{case}_merged"], atol=1e-6)
        assert merged.valid.all()
        same(merged.sizes, v[f"{case}_size"].long())
        for sources, places, expected in zip(merged.sources, merged.places, v[f"{case}_sources"], strict=True):
            for place, members in zip(places, expected, strict=True):
                same((sources == place).nonzero()[:, 0], members[members >= 0])

        # By default every image merges all of its own windows that pass.
        merged = window_merging(hidden, (side, side), **settings)
        passing = (v[f"{case}_similarity_map"] >= v[f"{case}_threshold"]).sum(1)
        same(merged.valid.sum(1), hidden.shape[1] - passing * (len(windows[0]) - 1))
        assert int(passing.min()) == v[f"{case}_r"]


@handles("mustdrop_keyset")
def key_set(v: Vector) -> None:
    for case in ("full577", "merged", "crops", "tiny"):
        rows, expected = v[f"{case}_cls_attn_rows"][..., 1:], v[f"{case}_key_index"]
        marked = key_tokens(rows)
        assert marked.sum(1).eq(v[f"{case}_left_tokens"]).all()
        same(marked.nonzero()[:, 1].view_as(expected), expected.sort(dim=1).values)
        same(cls_score(rows.unsqueeze(1)).argsort(dim=1, descending=True)[:, : expected.shape[1]], expected)
        # The tokens of the crops, one crop after another.
        same(marked.flatten().nonzero()[:, 0], v[f"{case}_key_index_flat_with_crop_offset"].sort().values)


@handles("mustdrop_filter")
def filtering(v: Vector) -> None:
    for case in ("a", "b", "k1", "glob", "indiv", "off", "paper64"):
        start, count = v[f"{case}_v_start"], v[f"{case}_v_num"]
        total, peak = dual_attention(v[f"{case}_attn_text_rows"][..., start : start + count])
        close(total[0], v[f"{case}_sum"])
        close(peak[0], v[f"{case}_max"])
        thresholds = dict(global_threshold=v[f"{case}_global_thr"], individual_threshold=v[f"{case}_individual_thr"])
        kept = dual_attention_filter(total, peak, **thresholds)
        same(kept[0].nonzero()[:, 0], v[f"{case}_keep"])
        if min(thresholds.values()) > 0:
            # A budget of as many tokens as the thresholds leave gives the same tokens.
            same(dual_attention_filter(total, peak, **thresholds, budget=kept.sum(1)), kept)


@handles("mustdrop_stages")
def stages(v: Vector) -> None:
    start, tail = v["v_start"], v["text_num"]
    lengths = v["lens"].tolist()
    columns = torch.arange(lengths[0])
    key = torch.zeros(lengths[0], dtype=torch.bool)
    key[v["key_set"] + start] = True
    present = []
    for stage in range(4):
        present.append(columns)
        visual = slice(start, len(columns) - tail)
        total, peak = dual_attention(v[f"stage{stage}_attn_text_rows"][..., visual])
        kept = dual_attention_filter(
            total,
            peak,
            global_threshold=v["global_thr"],
            individual_threshold=v["individual_thr"],
            spared=key[columns[visual]][None],
        )[0]
        same(kept.nonzero()[:, 0], v[f"stage{stage}_vis_indices"])
        kept = torch.nn.functional.pad(kept, (start, tail), value=True)
        same(kept.nonzero()[:, 0], v[f"stage{stage}_merged_indices"])
        columns = columns[kept]
        same(columns, v[f"stage{stage}_original_token"])
        same(key[columns][start:].nonzero()[:, 0], v[f"stage{stage}_key_set_after"])
        same(torch.arange(len(columns)), v[f"stage{stage}_position_ids_after"])

    present.append(columns)
    assert [len(stage) for stage in present] == lengths
    for stage in range(4):
        same(survivors(present[stage], columns), v[f"composed_index_stage{stage}"])
    cuts = v["pruning_layers"]
    for layer in range(32):
        here = present[int((cuts < layer).sum())]
        assert len(here) == v["cache_len_before"][layer]
        # Layers before the first cut keep everything.
        index = survivors(here, columns if layer >= cuts[0] else here)
        assert len(index) == v["cache_len_after"][layer]
        if f"kv{layer}_key_in" in v:
            close(v[f"kv{layer}_key_in"][:, :, index], v[f"kv{layer}_key_out"])


def survivors(present: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
    """Places of the finally remaining columns among those in a layer's cache."""
    return torch.isin(present, final).nonzero()[:, 0]


@handles("mustdrop_e2e_llama")
@torch.no_grad()
def through_a_decoder(v: Vector) -> None:
    settings = json.loads(v["params_json"])
    start, count, tail = settings["v_start"], settings["v_num"], settings["text_num"]
    weights = v.weights()
    config = LlamaConfig(
        vocab_size=len(weights["lm_head.weight"]),
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_theta"]},
        tie_word_embeddings=False,
        **{
            key: value
            for key, value in settings.items()
            if key.startswith(("num_", "hidden_", "intermediate_", "rms_"))
        },
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    decoder, cuts = model.model, settings["pruning_layers"]
    hidden, cache = v["inputs_embeds"], DynamicCache(config=config)
    columns = torch.arange(start + count + tail)[None]
    spared = torch.zeros_like(columns, dtype=torch.bool)
    spared[:, v["key_set"] + start] = True

    present = []
    for index, layer in enumerate(decoder.layers):
        assert hidden.shape[1] == v["seq_len_per_layer_prefill"][index]
        if f"layer{index}_input" in v:
            close(hidden, v[f"layer{index}_input"], rtol=1e-4, atol=1e-5)
        present.append(columns)
        # After each cut positions are counted again.
        positions = torch.arange(hidden.shape[1])[None]
        if f"prefill_position_ids_layer{index}" in v:
            same(positions[0], v[f"prefill_position_ids_layer{index}"])
        rope = decoder.rotary_emb(hidden, positions)
        entering = hidden
        hidden = layer(hidden, position_embeddings=rope, **{CACHE: cache})
        if index in cuts:
            rows = text_rows(layer, entering, rope, tail)
            visual = slice(start, hidden.shape[1] - tail)
            kept = dual_attention_filter(
                *dual_attention(rows[..., visual]),
                global_threshold=settings["global_thr"],
                individual_threshold=settings["individual_thr"],
                spared=spared.gather(1, columns)[:, visual],
            )
            kept = torch.nn.functional.pad(kept, (start, tail), value=True)
            columns, hidden = columns[kept][None], hidden[kept][None]

    for index, entries in enumerate(cache.layers):
        if index >= cuts[0]:
            left = survivors(present[index][0], columns[0])
            entries.keys, entries.values = entries.keys[:, :, left], entries.values[:, :, left]
    logits = [model.lm_head(decoder.norm(hidden[:, -1:]))]
    same(lengths_of(cache), v["cache_len_after_step"][0])
    for step in range(3):
        hidden = decoder.embed_tokens(logits[-1].argmax(-1))
        for index, layer in enumerate(decoder.layers):
            # In the reference a new token's position is the length of the layer's cache, even if its keys were stored
            # with other positions.
            position = torch.tensor([[cache.get_seq_length(index)]])
            assert position == v["decode_query_position_per_layer"][step, index]
            rope = decoder.rotary_emb(hidden, position)
            hidden = layer(hidden, position_embeddings=rope, **{CACHE: cache})
        logits.append(model.lm_head(decoder.norm(hidden)))
        same(lengths_of(cache), v["cache_len_after_step"][step + 1])
    logits = torch.cat(logits, dim=1)
    close(logits, v["logits_per_step"], rtol=1e-4, atol=1e-5)
    same(logits.argmax(-1), v["generated_ids"][:, 1:])


def text_rows(layer, entering: Tensor, rope: tuple[Tensor, Tensor], text: int) -> Tensor:
    """(1, heads, text, n) attention of the last tokens in a layer that was given (1, n, dim)."""
    normed = layer.input_layernorm(entering)
    attention, columns = layer.self_attn, torch.arange(entering.shape[1])[None]
    both = scored(attention, attention.q_proj(normed), attention.k_proj(normed), rope, columns)
    causal = torch.ones(1, 1, entering.shape[1], entering.shape[1], dtype=torch.bool).tril()
    return attention_rows(both.queries[:, :, -text:], both.keys, scale=both.scale, mask=causal[:, :, -text:])


def lengths_of(cache: DynamicCache) -> Tensor:
    return torch.tensor([cache.get_seq_length(layer) for layer in range(len(cache.layers))])


@handles("mustdrop_e2e_clip")
@torch.no_grad()
def through_an_encoder(v: Vector) -> None:
    settings = json.loads(v["params_json"])
    window, threshold, share = tuple(settings.pop("window")), settings.pop("threshold"), settings.pop("keep_rate")
    side = settings["image_size"] // settings["patch_size"]
    model = CLIPVisionModel(CLIPVisionConfig(**settings)).eval()
    weights = {key.removeprefix("vision_model."): value for key, value in v.weights().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing and set(unexpected) <= {"embeddings.position_ids"}

    hidden = model.pre_layrnorm(model.embeddings(v["pixel_values"]))
    layers = model.encoder.layers
    for layer in layers[:-1]:
        hidden = layer(hidden, None)
        if layer is layers[0]:
            merged = window_merging(hidden, (side, side), window, threshold=threshold, prefix=1, reference_quirks=True)
            hidden = merged.features
            close(hidden, v["hidden1_after_merge"], rtol=1e-4, atol=1e-5)
    close(hidden[:, 1:], v["features_hidden_minus2_patches"], rtol=1e-4, atol=1e-5)
    last = layers[-1]
    normed, head_dim = last.layer_norm1(hidden), last.self_attn.head_dim
    queries, keys = (
        heads(last.self_attn.q_proj(normed[:, :1]), head_dim),
        heads(last.self_attn.k_proj(normed), head_dim),
    )
    rows = attention_rows(queries, keys, scale=head_dim**-0.5)[:, :, 0, 1:]
    same(key_tokens(rows, share=share)[0].nonzero()[:, 0], v["key_index"][0].sort().values)
    close(last(hidden, None), v["last_hidden_state"], rtol=1e-4, atol=1e-5)
    by_the_method(v, model, merged.places[0, 1:] - 1, MustDrop(similarity=threshold, window=window, key_share=share))


def by_the_method(v: Vector, tower: CLIPVisionModel, places: Tensor, method: MustDrop) -> None:
    """The same inside a session. places: the patches of the reference's tokens, in the order of the reference."""
    count, image = tower.embeddings.num_patches, 5
    text = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=8, num_attention_heads=2, pad_token_id=0
    )
    model = LlavaForConditionalGeneration._from_config(
        LlavaConfig(vision_config=tower.config, text_config=text, image_token_index=image)
    ).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    # Thresholds that no token reaches leave only the key tokens.
    method = dataclasses.replace(method, global_threshold=2.0, individual_threshold=2.0, positions="original")
    with vtprune.prune(model, method) as session:
        model(input_ids=torch.tensor([[1] + [image] * count + [2, 3]]), pixel_values=v["pixel_values"])
    close(seen[0][:, places], v["features_hidden_minus2_patches"], rtol=1e-4, atol=1e-5)
    same(session.report.kept(0, 0) - 1, places.sort().values)
    same(session.report.kept(0) - 1, places[v["key_index"][0]].sort().values)

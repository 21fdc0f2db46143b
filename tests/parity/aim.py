# SPDX-License-Identifier: Apache-2.0
import json

import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralVisionConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vtprune import AIM, prune
from vtprune.ops.bipartite_merging import bipartite_match, bipartite_merging
from vtprune.ops.page_rank import attention_ranks, over_heads
from vtprune.ops.selection import top_k_mask
from vtprune.tokens import ModelShape
from vtprune.transformers_private import CACHE, scored

from . import Vector, close, handles, one_per_group, same

SHAPE = ModelShape(encoder_layers=26, decoder_layers=28, feature_layer=25, has_cls=False)
MERGES = ("p4375_", "p125_", "n169_", "n196r24_", "n7r1_", "n2r1_", "n5r99_", "b1n49_", "")


STATES = 5e-5
"""Hidden states are of size 13 and have gone through several layers: processors round them differently."""


@handles("aim_merge_*")
def merging(v: Vector) -> None:
    prefixes = [prefix for prefix in MERGES if f"{prefix}round0_out" in v]
    assert prefixes
    for prefix in prefixes:
        features, metric = v[f"{prefix}x" if f"{prefix}x" in v else "x"], None
        if v.case == "aim_merge_image":
            metric = v["metric"]
        tokens, compared, index = features, features if metric is None else metric, 0
        while (key := f"{prefix}round{index}") + "_out" in v:
            # With a separate metric, the next round of the reference compares tokens by the merged metric.
            if metric is None or index == 0:
                partner, similarity = bipartite_match(compared)
                order = similarity.argsort(dim=1, descending=True)
                same(order, v[f"{key}_src_order"])
                same(partner, v[f"{key}_best_dst"])
                close(similarity, v[f"{key}_best_sim"], atol=1e-6)
            left = tokens.shape[1] - v[f"{key}_r"]
            merged = bipartite_merging(features, left, metric=metric, reference_quirks=True)
            close(merged.features, v[f"{key}_out"], atol=1e-6)
            assert merged.sizes.sum(1).eq(features.shape[1]).all()
            if metric is None:
                merge, _ = AIM(keep_ratio=0.1, reference_quirks=True).parts(SHAPE)
                selection = merge.select(one_per_group(features, left))
                order = merged.places.argsort(dim=1).unsqueeze(-1)
                expected = v[f"{key}_out"].gather(1, order.expand_as(merged.features))
                close(selection.features[selection.keep], expected.flatten(0, 1), atol=1e-6)
            tokens = compared = v[f"{key}_out"]
            index += 1
        # By default the first round leaves the same tokens, in their original order.
        left = features.shape[1] - v[f"{prefix}round0_r"]
        ordered = bipartite_merging(features, left, metric=metric)
        assert (ordered.places.diff(dim=1) > 0).all()
        recorded = bipartite_merging(features, left, metric=metric, reference_quirks=True).places.argsort(dim=1)
        expected = v[f"{prefix}round0_out"].gather(1, recorded.unsqueeze(-1).expand_as(ordered.features))
        close(ordered.features, expected, atol=1e-6)


@handles("aim_importance")
def importance(v: Vector) -> None:
    settings = {"": {}, "_tau1_it3_d015": dict(temperature=1.0, iterations=3, damping=0.15)}
    for prefix in "abcdm":
        logits = v[f"{prefix}_logits"]
        mask = logits > -1e30
        # Scores of these "queries" and "keys" are the recorded ones.
        inputs = logits.masked_fill(~mask, 0), torch.eye(logits.shape[-1]).expand_as(logits)
        if prefix == "m":
            assert not mask[..., ~v["m_keep"]].any()
        for suffix, setting in settings.items():
            if f"{prefix}_importance{suffix}" in v:
                scores = over_heads(attention_ranks(*inputs, scale=1.0, mask=mask[:, :1], **setting))
                close(scores, v[f"{prefix}_importance{suffix}"])


def alive_by_layer(full: int, empty: int, depth: int, entering: int) -> list[int]:
    """Visual tokens at the input of every decoder layer by the method's steps, rounded down as in the reference."""
    shape = ModelShape(encoder_layers=24, decoder_layers=depth, feature_layer=22, has_cls=True)
    shares = torch.ones(depth, dtype=torch.double)
    for layer, share in AIM(layers=(full, empty)).steps(shape).items():
        shares[layer:] = share
    return (entering * shares + 1e-9).long().tolist()


@handles("aim_select")
def selection(v: Vector) -> None:
    for full, empty, depth, key in ((14, 22, 28, "qwen28"), (13, 21, 32, "llama32")):
        # Recorded for layers counted from 1, so the rate after a layer is the rate of the next one.
        assert alive_by_layer(full, empty, depth + 1, 1000)[1:] == (v[f"retain_rate_{key}"] * 1000).long().tolist()
    for prefix in ("qwen", "llama", "odd", "one_visual", "batch2"):
        scores = v[f"{prefix}_scores"]
        depth, batch, length = scores.shape
        columns = torch.arange(length)
        begin, end, _ = v[f"{prefix}_boundaries"].unbind(1)
        visual = (columns >= begin[:, None]) & (columns < end[:, None])
        entering = int(visual[0].sum())
        full = 13 if prefix == "llama" else 14
        counts = alive_by_layer(full, full + 8, depth + 1, entering)
        alive = visual
        for layer in range(depth):
            assert counts[layer + 1] + length - entering == v[f"{prefix}_keep_num"][layer]
            alive = top_k_mask(scores[layer], alive, torch.tensor([counts[layer + 1]] * batch))
            same(alive | ~visual, v[f"{prefix}_mask_after_layer"][layer])


def heads(x: Tensor, head_dim: int) -> Tensor:
    """(batch, n, heads * head_dim) -> (batch, heads, n, head_dim)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


@handles("aim_e2e_qwen2")
@torch.no_grad()
def through_a_decoder(v: Vector) -> None:
    """Prefill and decode in one pass over the prompt and its recorded answer. Tokens are masked and never removed."""
    settings = json.loads(v["params_json"])
    begin, end, length = settings["boundaries"]
    weights = v.weights()
    config = Qwen2Config(
        vocab_size=len(weights["lm_head.weight"]),
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_theta"]},
        tie_word_embeddings=False,
        **{
            key: value
            for key, value in settings.items()
            if key.startswith(("num_", "hidden_", "intermediate_", "rms_"))
        },
    )
    model = Qwen2ForCausalLM(config).eval()
    model.load_state_dict(weights)
    prompt, answer = v["inputs_embeds"], v["generated_ids"][:, :-1]
    hidden = torch.cat((prompt, model.model.embed_tokens(answer)), dim=1)
    # In the reference's decoding the positions fall back to the number of text tokens after the first step, and the
    # first layer no longer sees the visual tokens. Neither changes the prefill or the first step.
    positions = torch.cat((torch.arange(length), v["step_position_ids"][1:]))[None]
    total = positions.shape[1]
    columns = torch.arange(total)
    visual = (columns >= begin) & (columns < end)
    causal = columns <= columns[:, None]
    defect = visual & (columns > length)[:, None]
    depth = config.num_hidden_layers
    counts = [*alive_by_layer(14, 22, depth, end - begin), 0]
    cos, sin = model.model.rotary_emb(hidden, positions)

    alive = visual
    for index, layer in enumerate(model.model.layers):
        visible = alive | ~visual
        same(visible[:length], v["visible_keys_prefill"][index])
        mask = causal & visible & ~defect if index == 0 else causal & visible
        same(mask[length:].sum(1), v["decode_visible_key_count"][:, index])
        if f"layer{index}_input" in v:
            close(hidden[:, :length], v[f"layer{index}_input"], rtol=1e-4, atol=STATES)
        normed = layer.input_layernorm(hidden[:, :length])
        attention, rope = layer.self_attn, (cos[:, :length], sin[:, :length])
        both = scored(attention, attention.q_proj(normed), attention.k_proj(normed), rope, positions[:, :length])
        visible = mask[None, None, :length, :length]
        scores = over_heads(attention_ranks(both.queries, both.keys, scale=both.scale, mask=visible))
        hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=(cos, sin))
        alive = torch.nn.functional.pad(
            top_k_mask(scores, alive[None, :length], torch.tensor([counts[index + 1]]))[0], (0, total - length)
        )
    logits = model.lm_head(model.model.norm(hidden))[:, length - 1 :]
    close(logits, v["logits_per_step"], rtol=1e-4, atol=1e-5)
    same(logits.argmax(-1), v["generated_ids"])
    through_a_session(v)


@torch.no_grad()
def through_a_session(v: Vector) -> None:
    """The same by the method itself, on a model whose visual features are the recorded ones: prefill and first step."""
    settings, weights = json.loads(v["params_json"]), v.weights()
    begin, end, length = settings["boundaries"]
    prompt = v["inputs_embeds"][0]
    text = torch.cat((prompt[:begin], prompt[end:]))
    words = len(weights["lm_head.weight"])
    image_token = words + len(text)
    fields = {k: value for k, value in settings.items() if k.startswith(("num_", "hidden_", "intermediate_", "rms_"))}
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=64, patch_size=8
        ),
        text_config=Qwen2Config(
            vocab_size=image_token + 1,
            rope_parameters={"rope_type": "default", "rope_theta": settings["rope_theta"]},
            tie_word_embeddings=False,
            **fields,
        ),
        image_token_index=image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    # Separate words for the recorded embeddings of the prompt's text; the answer never uses them.
    rows = (text, torch.zeros(1, text.shape[1]))
    weights["model.embed_tokens.weight"] = torch.cat((weights["model.embed_tokens.weight"], *rows))
    head = weights.pop("lm_head.weight")
    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    model.get_decoder().load_state_dict(weights)
    model.lm_head.weight[:words], model.lm_head.weight[words:] = head, 0
    visual = prompt[begin:end]
    model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: visual.view_as(output))

    ids = torch.full((1, length), image_token)
    ids[0, :begin] = torch.arange(words, words + begin)
    ids[0, end:] = torch.arange(words + begin, image_token)
    mask = torch.ones_like(ids)
    pixels = {"pixel_values": torch.zeros(1, 3, 32, 64), "image_sizes": torch.tensor([[32, 64]])}
    method = AIM(keep_ratio=AIM(keep_ratio=1.0).average(SHAPE), removal="masking")
    inputs: dict[int, Tensor] = {}
    layers = model.get_decoder().layers
    watches = [
        layer.register_forward_pre_hook(lambda module, args, i=i: inputs.setdefault(i, args[0]))
        for i, layer in enumerate(layers)
    ]
    with prune(model, method) as session:
        prefill = model(input_ids=ids, attention_mask=mask, **pixels)
        for watch in watches:
            watch.remove()
        answer = v["generated_ids"][:, :1]
        step = model(
            input_ids=answer,
            **{CACHE: prefill[CACHE]},
            attention_mask=torch.ones(1, length + 1, dtype=torch.long),
        )
    assert bool(mask.all())
    for layer in range(len(layers)):
        visible = torch.ones(length, dtype=torch.bool)
        visible[begin:end] = torch.isin(torch.arange(begin, end), session.report.kept(0, layer))
        same(visible, v["visible_keys_prefill"][layer])
        if f"layer{layer}_input" in v:
            close(inputs[layer], v[f"layer{layer}_input"], rtol=1e-4, atol=STATES)
        assert session.report.kv_lengths[0, layer] == length
    for logits, recorded in ((prefill.logits[:, -1], 0), (step.logits[:, -1], 1)):
        close(logits[:, :words], v["logits_per_step"][:, recorded], rtol=1e-4, atol=1e-5)

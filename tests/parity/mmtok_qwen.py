# SPDX-License-Identifier: Apache-2.0
import json

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_window_index

from vtprune.ops.coverage import max_coverage

from . import Vector, close, handles, same


def recorded_model(v: Vector) -> Qwen2_5_VLForConditionalGeneration:
    config = json.loads(v["config_json"])
    # Recorded under transformers 4, which spelt the rotary embedding's parameters in another way.
    text = config["text_config"]
    del config["rope_scaling"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).eval()
    model.load_state_dict(v.weights())
    return model


def encode(model: Qwen2_5_VLForConditionalGeneration, v: Vector) -> tuple[Tensor, Tensor]:
    """Merged tokens and the mean of the patches behind each, both (tokens, dim) in raster order."""
    visual = model.model.visual
    blocks = []
    handle = visual.merger.register_forward_pre_hook(lambda module, args: blocks.append(args[0]))
    merged = visual(v["pixel_values"], grid_thw=v["image_grid_thw"]).pooler_output
    handle.remove()
    # The encoder works in window order; merged tokens leave it in raster order.
    vision = model.config.vision_config
    window_order, _ = get_vision_window_index(
        v["image_grid_thw"], vision.spatial_merge_size, vision.window_size, vision.patch_size
    )
    pooled = blocks[0].reshape(len(merged), -1, blocks[0].shape[-1]).mean(1)
    return merged, pooled[window_order.argsort()]


@handles("mmtok_qwen_e2e_*")
@torch.no_grad()
def prefill_and_decode(v: Vector) -> None:
    model = recorded_model(v)
    ids, grid = v["input_ids"][None], v["image_grid_thw"]
    merged, pooled = encode(model, v)
    close(merged, v["merged_embeds"], rtol=1e-4, atol=1e-5)
    close(pooled, v["pooled_premerger"], rtol=1e-4, atol=1e-5)

    embed = model.get_input_embeddings()
    requested = int(v["retain_ratio"] * len(merged))
    assert requested == v["requested_k"]
    inputs = (merged, pooled, embed(v["text_ids"]), requested)
    chosen = max_coverage(*inputs, tau_text=0.01, reference_quirks=True)
    same(chosen, v["selected_sorted"])
    assert len(max_coverage(*inputs, tau_text=0.01)) == requested

    visual = (ids[0] == model.config.image_token_id).nonzero()[:, 0]
    alive = torch.ones(ids.shape[1], dtype=torch.bool)
    alive[visual] = False
    alive[visual[chosen]] = True
    embeddings = embed(ids)
    embeddings[0, visual] = merged
    embeddings = embeddings[:, alive]
    close(embeddings[0], v["lm_inputs_embeds"], rtol=1e-4, atol=1e-5)
    assert v["lm_attention_mask"].all() and len(v["lm_attention_mask"]) == alive.sum()
    token_types = (ids == model.config.image_token_id).int()
    positions, deltas = model.model.get_rope_index(ids, image_grid_thw=grid, mm_token_type_ids=token_types)
    same(deltas, v["rope_deltas"])
    positions = positions[:, :, alive]
    same(positions[:, 0], v["lm_position_ids"])

    cache, answer, logits = DynamicCache(config=model.config.text_config), [], []
    for step in range(len(v["gen_ids"])):
        if step:
            embeddings = embed(torch.tensor([[answer[-1]]]))
            # Counted as if nothing had been pruned.
            positions = (deltas + ids.shape[1] + step - 1).expand(3, 1, 1)
            same(positions[:, 0, 0], v["decode_position_ids"][step - 1])
        hidden = model.model.language_model(
            inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        if step == 0:
            close(hidden[0], v["prefill_last_hidden"], rtol=1e-4, atol=2e-4)
        logits.append(model.lm_head(hidden[0, -1]))
        answer.append(int(logits[-1].argmax()))
        same(torch.tensor([layer.keys.shape[-2] for layer in cache.layers]), v["kv_len"][step])
    same(torch.tensor(answer), v["gen_ids"])
    close(torch.stack(logits), v["gen_logits"], rtol=1e-4, atol=2e-4)

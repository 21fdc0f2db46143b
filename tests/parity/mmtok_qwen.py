# SPDX-License-Identifier: Apache-2.0
import json

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import vtprune
from vtprune import MMTok
from vtprune.ops.coverage import max_coverage
from vtprune.transformers_private import CACHE

from . import Vector, close, handles, same
from .mmtok import REFERENCE_TARGET


def recorded_model(v: Vector) -> Qwen2_5_VLForConditionalGeneration:
    config = json.loads(v["config_json"])
    # Recorded under transformers 4, which spelt the rotary embedding's parameters in another way.
    text = config["text_config"]
    del config["rope_scaling"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).eval()
    model.load_state_dict(v.weights())
    model.generation_config.eos_token_id = None
    return model


@handles("mmtok_qwen_e2e_*")
@torch.no_grad()
def generation(v: Vector) -> None:
    model, steps = recorded_model(v), len(v["gen_ids"])
    ids, grid = v["input_ids"][None], v["image_grid_thw"]
    is_image = ids == model.config.image_token_id
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=is_image.int(),
        pixel_values=v["pixel_values"],
        image_grid_thw=grid,
    )
    n = int(is_image.sum())
    requested = int(v["retain_ratio"] * n)
    assert requested == v["requested_k"]
    # The reference keeps all tokens of small images, for any budget.
    asked = n if v.case == "mmtok_qwen_e2e_nopr48" else requested
    received, hidden, lengths, pooled = [], [], [], []
    decoder = model.model.language_model
    with vtprune.prune(
        model, MMTok(keep_tokens=asked, tau_text=0.01, positions="original"), text=v["text_ids"]
    ) as session:
        handles = [
            model.model.visual.merger.register_forward_hook(lambda module, args, out: pooled.append(args[0])),
            decoder.register_forward_pre_hook(lambda module, args, given: received.append(given), with_kwargs=True),
            decoder.norm.register_forward_hook(lambda module, args, out: hidden.append(out[0])),
            model.register_forward_hook(
                lambda module, args, out: lengths.append([layer.keys.shape[-2] for layer in out[CACHE].layers])
            ),
        ]
        output = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        for handle in handles:
            handle.remove()
        features = model.get_image_features(inputs["pixel_values"], grid).pooler_output[0]
    close(features, v["merged_embeds"], rtol=1e-4, atol=1e-5)
    of_tokens = session.adapter.projector_inputs("image", {"image_grid_thw": grid}, pooled[0])
    close(of_tokens, v["pooled_premerger"], rtol=1e-4, atol=1e-5)

    first = int(is_image[0].int().argmax())
    same(session.report.kept(0) - first, v["selected_sorted"])
    prefill = received[0]
    close(prefill["inputs_embeds"][0], v["lm_inputs_embeds"], rtol=1e-4, atol=1e-5)
    assert v["lm_attention_mask"].all() and len(v["lm_attention_mask"]) == prefill["inputs_embeds"].shape[1]
    same(prefill["position_ids"][1:, 0], v["lm_position_ids"])
    same(model.model.rope_deltas, v["rope_deltas"])
    # Decoded tokens are counted as if nothing had been pruned.
    same(torch.stack([given["position_ids"][1:, 0, 0] for given in received[1:]]), v["decode_position_ids"])
    same(torch.tensor(lengths), v["kv_len"])
    close(hidden[0], v["prefill_last_hidden"], rtol=1e-4, atol=2e-4)
    same(output.sequences[0, -steps:], v["gen_ids"])
    close(torch.cat(output.logits), v["gen_logits"], rtol=1e-4, atol=2e-4)

    # The defect of the reference: it keeps all of few tokens. Ours meets the budget.
    choice = (features, of_tokens, model.get_input_embeddings()(v["text_ids"]), requested)
    chosen = max_coverage(*choice, tau_text=0.01)
    assert len(chosen) == requested
    same(torch.arange(len(features)) if len(features) <= REFERENCE_TARGET else chosen, v["selected_sorted"])

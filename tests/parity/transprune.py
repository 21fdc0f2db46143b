# SPDX-License-Identifier: Apache-2.0

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vtprune
from vtprune import TransPrune
from vtprune.attention import decoder_attention_rows
from vtprune.ops.token_transition import token_transition
from vtprune.signals import InstructionAttention
from vtprune.tokens import ModelShape
from vtprune.transformers_private import CACHE

from . import Vector, close, handles, kept, one_group, recording, rotary, row_context, same


@handles("transprune_ttv_*")
def transition(v: Vector) -> None:
    attention, mlp = (v["attn_in"], v["attn_out"]), (v["ffn_in"], v["ffn_out"])
    close(token_transition(*attention, reference_quirks=True), v["ttv_attn"])
    close(token_transition(*mlp, reference_quirks=True), v["ttv_ffn"])
    close(token_transition(*attention, reference_quirks=True) + token_transition(*mlp, reference_quirks=True), v["ttv"])
    # The default softmax is over each sample alone, as in a batch of one.
    singles = [token_transition(x[None], y[None], reference_quirks=True)[0] for x, y in zip(*attention, strict=True)]
    close(token_transition(*attention), torch.stack(singles))


@handles("transprune_stage*")
def stage(v: Vector) -> None:
    features, n, start = v["features"], v["n_img_current"], v["image_start"]
    length, dim = features.shape
    image, text = slice(start, start + n), torch.arange(start + n, length)[None]
    ratios, index = v["ratio_list"].tolist()[1:], v["stage"]
    method = TransPrune(layers=tuple(range(1, len(ratios) + 1)), schedule=tuple(ratios))
    shape = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)
    counts = method.budgets(shape, torch.tensor([v["n_img_original"]]), torch.tensor([1]))
    assert counts[index, 0] == v["keep"]

    normed = rms_norm(features, (dim,), v["input_layernorm_weight"], v["rms_norm_eps"])[None]
    head_dim = dim // v["num_heads"]
    context = row_context(rotary(v["position_ids"], head_dim, v["rope_theta"]), v["num_heads"], head_dim)
    queries, keys = linear(normed[:, text[0]], v["q_proj_weight"]), linear(normed, v["k_proj_weight"])
    rows = decoder_attention_rows(queries, keys, text, context)
    attention = rows.mean(1)[:, :, image].mean(1)
    close(attention[0], v["iga_raw"])
    transitions = v["ttv_layers"][:, image].sum(0)[None]
    close(transitions[0], v["ttv_acc_raw"])

    both = {
        request: attention if request == InstructionAttention() else transitions for request in method.signals(shape)
    }
    tokens = one_group(features[image], v["keep"], both, shape, layer=index + 1)
    close(method.scores(tokens)[0], v["score"])
    close(_alone("iga", method).scores(tokens)[0], v["iga_norm"])
    close(_alone("ttv", method).scores(tokens)[0], v["ttv_norm"])

    chosen = kept(method, tokens)
    same(chosen, v["kept_img_idx"])
    columns = torch.cat((torch.arange(start), chosen + start, text[0]))
    same(columns, v["kept_full_idx"])
    close(features[columns], v["new_features"])
    close(v["ttv_layers"][:, columns], v["new_ttv_layers"])
    assert method.positions == "compact"
    same(torch.arange(len(columns)), v["new_position_ids"])


def _alone(score: str, method: TransPrune) -> TransPrune:
    return TransPrune(layers=method.layers, schedule=method.schedule, score=score)


def llava_around(v: Vector) -> tuple[LlavaForConditionalGeneration, Tensor]:
    """The recorded Llama inside a LLaVA model that encodes any pixels to the recorded embeddings, and the prompt."""
    weights = v.weights()
    vocabulary, dim = weights["model.embed_tokens.weight"].shape
    mlp = weights["model.layers.0.mlp.gate_proj.weight"].shape[0]
    text_ids, start, n = v["text_ids"], v["image_start"], v["n_img"]
    # The image's placeholder is a token that neither the prompt nor the answer uses.
    image_token = next(i for i in range(vocabulary) if i not in {*text_ids.tolist(), *v["gen_ids"].tolist()})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=8, patch_size=4
        ),
        text_config=LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=dim,
            intermediate_size=mlp,
            num_hidden_layers=v["num_layers"],
            num_attention_heads=v["num_heads"],
            rms_norm_eps=v["rms_norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": v["rope_theta"]},
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        ),
        image_token_index=image_token,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.lm_head.weight.data.copy_(weights.pop("lm_head.weight"))
    model.model.language_model.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    ids = torch.cat((text_ids[:start], torch.full((n,), image_token), text_ids[start:]))[None]
    features = v["inputs_embeds"][start : start + n]
    model.model.get_image_features = lambda pixel_values, **options: BaseModelOutputWithPooling(
        pooler_output=[features]
    )
    return model, ids


@handles("transprune_e2e_*")
@torch.no_grad()
def through_a_session(v: Vector) -> None:
    model, ids = llava_around(v)
    pixels = torch.zeros(1, 3, 8, 8)
    cuts, start, n = tuple(v["pruning_layers_1based"].tolist()), v["image_start"], v["n_img"]
    parameters = dict(
        layers=cuts,
        schedule=tuple(v["ratios"].tolist()),
        measure=tuple((v["accumulating_layers_1based"] - 1).tolist()),
    )
    RecordingTransPrune, recorded = recording(TransPrune)
    with vtprune.prune(model, RecordingTransPrune(**parameters)) as session:
        output = model(input_ids=ids, pixel_values=pixels, use_cache=True, output_hidden_states=False)
        report = session.report
    same(torch.tensor([layer.keys.shape[-2] for layer in output[CACHE].layers]), v["kv_len_per_layer_prefill"])
    alive = torch.arange(start, start + n)
    for index, cut in enumerate(cuts):
        close(recorded[index], v[f"score_stage{index}"], rtol=1e-4, atol=1e-6)
        same(report.kept(0, cut) - start, v[f"kept_stage{index}"])
        alive = report.kept(0, cut)
        assert len(alive) + ids.shape[1] - n == len(v[f"position_ids_after_stage{index}"])

    method = TransPrune(**parameters)
    states = []
    decoder = model.model.language_model
    handle = decoder.norm.register_forward_hook(lambda module, args, output: states.append(output))
    with vtprune.prune(model, method):
        answer = model.generate(
            input_ids=ids,
            pixel_values=pixels,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(v["gen_ids"]),
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    handle.remove()
    close(states[0][0], v["prefill_last_hidden"], rtol=1e-4, atol=1e-4)
    same(answer.sequences[0, ids.shape[1] :], v["gen_ids"])
    close(torch.cat(answer.logits), v["gen_logits"], rtol=1e-4, atol=1e-4)
    stored = torch.tensor([layer.keys.shape[-2] for layer in answer[CACHE].layers])
    same(stored, v["kv_len_per_layer_end"])

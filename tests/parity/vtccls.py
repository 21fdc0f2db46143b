# SPDX-License-Identifier: Apache-2.0
import json

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vtprune
from vtprune import VTCCls
from vtprune.ops.cls_attention import cls_score
from vtprune.signals import ClsAttention
from vtprune.tokens import ModelShape

from . import Vector, close, handles, kept, one_group, recording, same


def project(v: Vector, features: Tensor) -> Tensor:
    return linear(gelu(linear(features, v["proj_w0"], v["proj_b0"])), v["proj_w1"], v["proj_b1"])


@handles("vtccls_l*", "vtccls_row24*", "vtccls_k*")
def scores(v: Vector) -> None:
    rows, features, k = v["cls_rows"], v["hidden_m2"][1:], v["k"]
    depth = len(rows)
    shape = ModelShape(encoder_layers=depth, decoder_layers=32, feature_layer=depth - 2, has_cls=True)
    method = VTCCls(start_layer=v["start_layer"], keep_tokens=k)
    layers = method.layers(shape)
    patch_rows = rows[list(layers)][..., 1:]
    close(cls_score(patch_rows), v["score"], rtol=1e-4)

    chosen = kept(method, one_group(features, k, {ClsAttention(layers): patch_rows[None]}, shape))
    same(chosen, v["kept_idx"])
    close(features[chosen], v["kept_features"])
    # The reference projects only the kept features; here all features are projected before the choice.
    close(project(v, features)[chosen], v["projected"], rtol=1e-4, atol=1e-6)


@handles("vtccls_e2e_clip_*")
def through_a_session(v: Vector) -> None:
    """The recorded CLIP tower and projector inside a LLaVA model, whose LLM has to receive the recorded features."""
    vision = CLIPVisionConfig(**json.loads(v["config_json"]))
    width, image_token = v["proj_b1"].shape[0], 10
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(
            vocab_size=11,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=1024,
        ),
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    weights = {key.removeprefix("vision_model."): value for key, value in v.weights().items()}
    missing, unexpected = model.model.vision_tower.load_state_dict(weights, strict=False)
    assert not missing and set(unexpected) <= {"embeddings.position_ids"}
    names = {
        "linear_1.weight": "proj_w0",
        "linear_1.bias": "proj_b0",
        "linear_2.weight": "proj_w1",
        "linear_2.bias": "proj_b1",
    }
    model.model.multi_modal_projector.load_state_dict({name: v[key] for name, key in names.items()})

    patches = len(v["score"])
    ids = torch.tensor([[1, 2] + [image_token] * patches + [3, 4, 5]])
    entering = []
    first_layer = model.model.language_model.layers[0]
    handle = first_layer.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    projected = []
    reading = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: projected.append(args[0])
    )
    RecordingVTCCls, recorded = recording(VTCCls)
    method = RecordingVTCCls(start_layer=v["start_layer"], keep_tokens=v["k"])
    with torch.no_grad(), vtprune.prune(model, method) as session:
        model(input_ids=ids, pixel_values=v["pixel_values"][None])
    handle.remove()
    reading.remove()

    close(recorded[0], v["score"], rtol=1e-4)
    close(projected[0][0], v["features_all"], rtol=1e-4, atol=3e-5)
    same(session.report.kept(0, 0) - 2, v["kept_idx"])
    close(projected[0][0, v["kept_idx"]], v["kept_features"], rtol=1e-4, atol=3e-5)
    close(entering[0][0, 2:-3], v["projected"], rtol=1e-4, atol=3e-5)

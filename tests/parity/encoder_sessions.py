# SPDX-License-Identifier: Apache-2.0
"""Recorded layers inside a real encoder, run in a session: timm's blocks and CLIP's layers of transformers."""

import re

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

import vtprune
from vtprune.methods.in_layers import InLayers

from . import Vector, close, same


def run_in_session(v: Vector, method: InLayers, *, class_token: bool = True) -> None:
    """Check what every layer puts out, and where the tokens went."""
    weights, x = v.weights(), v["x_in"]
    depth, dim = 1 + max(int(name.split(".")[0]) for name in weights), x.shape[-1]
    if "0.norm1.weight" in weights:
        width = len(weights["0.mlp.fc1.bias"])
        model: nn.Module = VisionTransformer(
            img_size=8, patch_size=4, embed_dim=dim, depth=depth, num_heads=v["heads"], mlp_ratio=width / dim,
            class_token=class_token, global_pool="", num_classes=0,
        )  # fmt: skip
        layers, call = model.blocks, model.blocks
    else:
        config = CLIPVisionConfig(
            hidden_size=dim, intermediate_size=len(weights["0.mlp.fc1.bias"]), num_hidden_layers=depth,
            num_attention_heads=v["heads"], image_size=8, patch_size=4, hidden_act="gelu",
        )  # fmt: skip
        model = CLIPVisionModel(config)
        layers, call = model.encoder.layers, lambda x: model.encoder(inputs_embeds=x)
    model.eval()
    layers.load_state_dict(weights)
    eps = v["ln_eps"] if "ln_eps" in v else v["eps"]
    for name, module in layers.named_modules():
        if re.search(r"norm_?[12]$", name):
            module.eps = eps
    outputs: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda module, args, output: outputs.append(output)) for layer in layers]
    with torch.no_grad(), vtprune.prune(model, method) as session:
        call(x)
    for handle in handles:
        handle.remove()
    sources = torch.stack([session.report.sources(image) for image in range(len(x))])
    if "group_of_token" in v:
        same(sources, v["group_of_token"])
    for index, output in enumerate(outputs[:-1]):
        close(output, v[f"x_out.{index}"], rtol=1e-5, atol=1e-5)
    last = v[f"x_out.{depth - 1}"]  # every token has its row again
    close(outputs[-1], last.gather(1, sources[..., None].expand(-1, -1, dim)), rtol=1e-5, atol=1e-5)
    sizes = torch.stack([torch.bincount(into, minlength=last.shape[1]) for into in sources])
    same(sizes.float(), v[f"size.{depth - 1}"])

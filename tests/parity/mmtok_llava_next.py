# SPDX-License-Identifier: Apache-2.0
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

import vtprune
from vtprune import MMTok

from . import Vector, close, same

TOWER = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)


def recorded_model(v: Vector) -> LlavaNextForConditionalGeneration:
    """LLaVA-NeXT with the recorded projector (one linear layer) and word embeddings, and one more for the image."""
    words = v["embed_weight"]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=336, patch_size=14),
        text_config=LlamaConfig(**TOWER, vocab_size=len(words) + 1, max_position_embeddings=8192),
        image_token_index=len(words),
        projector_hidden_act="linear",
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    projector = model.model.multi_modal_projector
    projector.linear_1.weight.copy_(v["proj_weight"])
    projector.linear_1.bias.copy_(v["proj_bias"])
    torch.nn.init.eye_(projector.linear_2.weight)
    projector.linear_2.bias.zero_()
    model.get_input_embeddings().weight[:-1] = words
    return model


@torch.no_grad()
def through_a_session(v: Vector, resolution: tuple[int, int]) -> None:
    """A mosaic of tiles, pruned while the model runs on the recorded features of the encoder.

    The reference chooses among the padding around an image, too, where the model cuts it off, and drops all newline
    tokens: so the image is as large as its mosaic here, and newlines are left out of the comparison.
    """
    model, encoder_features = recorded_model(v), v["hidden_m2"]
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: (encoder_features[:, 1:],))
    inputs = dict(
        pixel_values=torch.zeros(1, len(encoder_features), 3, 336, 336), image_sizes=torch.tensor([resolution])
    )
    (medium,) = vtprune.adapter_for(model).media("image", inputs, ())
    ids = v["input_ids"].tolist()
    place = ids.index(-200)
    ids[place : place + 1] = [model.config.image_token_id] * len(medium)

    method = MMTok(keep_tokens=v["k_per_crop"], alpha=v["alpha"], tau_text=v["tv_temp"], tau_visual=v["vv_temp"])
    received = []
    with vtprune.prune(model, method, text=v["text_ids"]) as session:
        model.get_decoder().register_forward_pre_hook(
            lambda module, args, given: received.append(given["inputs_embeds"][0]), with_kwargs=True
        )
        model(input_ids=torch.tensor([ids]), **inputs)
    kept = session.report.kept(0, 0) - place
    newline = medium.crops[kept] < 0
    patches = torch.zeros_like(medium.crops)
    for crop, grid in enumerate(medium.grids):
        patches[medium.crops == crop] = torch.arange(len(grid))
    kept = kept[~newline]
    same(torch.stack((medium.crops[kept], patches[kept]), dim=1), v["image_src_crop_patch"])
    after = len(ids) - place - len(medium)
    is_newline = torch.cat((torch.zeros(place), newline, torch.zeros(after))).bool()
    assert newline.any() and len(received[0]) == len(is_newline)
    close(received[0][~is_newline], v["inputs_embeds"], atol=1e-6)

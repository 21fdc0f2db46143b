# SPDX-License-Identifier: Apache-2.0
"""A CLIP and a SigLIP of transformers with random weights, for images of 28 pixels and the words of DigitScenes."""

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from vtprune.eval.digitscenes.open_clip_model import VOCABULARY


def transformers_model(kind):
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    ids = {
        f"{name}_token_id": VOCABULARY.index(word) for name, word in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))
    }
    text = dict(small, vocab_size=len(VOCABULARY), max_position_embeddings=10, projection_size=32, **ids)
    vision = dict(small, image_size=28, patch_size=7)
    if kind == "clip":
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).eval()
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    nn.init.constant_(model.logit_bias, -2.5)
    return model

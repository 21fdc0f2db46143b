# SPDX-License-Identifier: Apache-2.0
"""Every model type for which transformers builds a covered class has its adapter."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, ShieldGemma2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

import vtprune
from vtprune.adapters import list_adapters
from vtprune.testing import families

pytestmark = pytest.mark.release


def test_all_types_of_a_covered_class_are_covered():
    covered = {name.partition("/")[0] for name in list_adapters()}
    classes = {CLASSES[name] for name in covered if name in CLASSES}
    assert len(classes) >= 14
    assert {name for name, cls in CLASSES.items() if cls in classes} <= covered


@torch.no_grad()
def test_shieldgemma_2_is_a_gemma_3():
    gemma = families.build("gemma3")
    fields = gemma.config.to_dict()
    config = ShieldGemma2Config(**{key: value for key, value in fields.items() if key != "model_type"})
    model = AutoModelForImageTextToText.from_config(config).eval()
    assert type(model) is type(gemma) and model.config.model_type == "shieldgemma2"
    model.load_state_dict(gemma.state_dict())
    inputs = families.batch("gemma3", gemma).inputs
    logits = []
    for one in (gemma, model):
        with vtprune.prune(one, "fastv", keep_ratio=0.5) as session:
            logits.append(one(**inputs).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    assert session.report.keep_ratio < 0.6

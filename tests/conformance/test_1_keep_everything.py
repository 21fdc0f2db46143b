# SPDX-License-Identifier: Apache-2.0
"""Promise 1: keep everything = untouched, bit for bit."""

import pytest
import torch

import vtprune

from . import models
from .methods import every_method, every_method_and_model, keep_everything
from .models import batch_of_three
from .reference import generate


@every_method_and_model()
def test_generation_is_bit_identical(model_name, name):
    model = models.shared(model_name)
    inputs = batch_of_three(model).inputs()
    plain = generate(model, inputs)
    with vtprune.prune(model, keep_everything(name)) as session:
        kept = generate(model, inputs)
    assert torch.equal(plain.sequences, kept.sequences)
    assert all(map(torch.equal, plain.logits, kept.logits))
    assert session.report.keep_ratio == 1.0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@every_method()
def test_forward_is_bit_identical(name, padding_side, attention):
    model = models.shared("gqa", attention)
    inputs = batch_of_three(model).inputs(padding_side)
    plain = model(**inputs).logits
    with vtprune.prune(model, keep_everything(name)):
        assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model(**inputs, use_cache=False).logits, plain)


@every_method()
def test_sampling_is_identical_under_the_same_seed(gqa, name):
    inputs = batch_of_three(gqa).inputs()
    torch.manual_seed(5)
    plain = generate(gqa, inputs, do_sample=True)
    torch.manual_seed(5)
    with vtprune.prune(gqa, keep_everything(name)):
        kept = generate(gqa, inputs, do_sample=True)
    assert torch.equal(plain.sequences, kept.sequences)

# SPDX-License-Identifier: Apache-2.0
"""Every method on an accelerator chooses and answers as on the CPU, which the other tests are about.

`VTPRUNE_TEST_DEVICE` names the device; default is a GPU, if there is one.
"""

import os

import pytest
import torch

import vtprune

from . import models
from .methods import every_method_and_model, spec
from .models import batch_of_three
from .reference import generate

DEVICE = os.environ.get("VTPRUNE_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else None)

pytestmark = pytest.mark.skipif(DEVICE is None, reason="there is no GPU")


@every_method_and_model()
def test_a_method_does_on_a_device_what_it_does_on_the_cpu(model_name, name):
    plain = models.shared(model_name)
    batch = batch_of_three(plain)
    with vtprune.prune(plain, spec(name, positions="compact")) as expected:
        theirs = generate(plain, batch.inputs(), new_tokens=4)
    model = models.build(model_name).to(DEVICE)
    inputs = {key: value.to(DEVICE) for key, value in batch.inputs().items()}
    with vtprune.prune(model, spec(name, positions="compact")) as session:
        ours = generate(model, inputs, new_tokens=4)
    assert ours.sequences.device.type == torch.device(DEVICE).type
    assert torch.equal(session.report.counts.cpu(), expected.report.counts)
    for sample in range(3):
        for layer in range(expected.report.depth):
            kept = session.report.kept(sample, layer).cpu()
            assert torch.equal(kept, expected.report.kept(sample, layer)), f"sample {sample}, layer {layer}"
    torch.testing.assert_close(torch.stack(ours.logits).cpu(), torch.stack(theirs.logits), atol=1e-3, rtol=1e-3)

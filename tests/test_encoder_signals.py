# SPDX-License-Identifier: Apache-2.0
"""Adapters whose account of the encoder does not fit the visual tokens are caught, not believed."""

from __future__ import annotations

import pytest
import torch
from conformance import families

import vtprune
from vtprune.adapters.internvl import InternVL
from vtprune.errors import VTPruneError


class Careless(InternVL):
    """Takes the defaults, as if each patch became a visual token; four of them do."""

    patch_values = vtprune.Adapter.patch_values


class Forgetful(InternVL):
    """As if the projector's input were one row a patch, without the last."""

    def projector_inputs(self, kind, inputs, features):
        return super().projector_inputs(kind, inputs, features)[:-1]


@pytest.mark.parametrize(
    ("adapter", "method", "override"),
    [
        (Careless, {"name": "vispruner", "keep_ratio": 0.5}, "patch_values"),  # attention received, keys
        (Careless, {"name": "vtc_cls", "keep_ratio": 0.5}, "patch_values"),  # rows of the CLS token
        (Careless, {"name": "glsim", "keep_ratio": 0.5}, "patch_values"),  # an encoder layer's output
        (Careless, {"name": "mustdrop", "keep_ratio": 0.5}, "patch_values"),  # merging inside the encoder
        (Forgetful, {"name": "mmtok", "keep_ratio": 0.5}, "projector_inputs"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else None,
)
@torch.no_grad()
def test_rows_that_do_not_fit_are_an_error_that_names_what_to_override(monkeypatch, adapter, method, override):
    model = families.build("internvl")
    monkeypatch.setattr("vtprune.session.adapter_for", adapter)
    inputs = families.batch("internvl", model).inputs
    with vtprune.prune(model, method), pytest.raises(VTPruneError, match=f"{adapter.__name__} gives .*`{override}`"):
        model(**inputs)
    monkeypatch.undo()
    with vtprune.prune(model, method) as session:
        model(**inputs)
    assert session.report.keep_ratio < 1

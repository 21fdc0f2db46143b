# SPDX-License-Identifier: Apache-2.0
"""`check_adapter`: whether what an adapter states about a model is so, and whether the promises hold on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

import vtprune
from vtprune.testing.batching import batch_of, padded
from vtprune.testing.cases import Case, PromiseBroken, Refused, Result
from vtprune.testing.method_kit import message
from vtprune.testing.promises import ALL_CHECKS, run_checks
from vtprune.testing.statements import STATEMENTS, Look


def check_adapter(model: Any, inputs: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]) -> list[Result]:
    """Raise PromiseBroken, an AssertionError, unless the adapter of a model states what is so, and promises hold on it.

    First what the adapter states is compared with the model: depths, the layer that the projector reads, the CLS token,
    the layout of its images, and the encoder's values of each visual token. If that is so, all promises are checked
    with a method before the LLM and one inside it, the attention that methods are shown included. Takes a few seconds
    with a tiny model. A grid whose rows and columns are confused is not noticed.

    Args:
        model: a loaded model, in evaluation mode, whose adapter is registered; tiny random weights do.
        inputs: of two samples or more with images, of different lengths, as a processor gives them, padded on the left;
            or a list with the inputs of each sample. Several images in one of them, of different sizes, show more.
    Returns:
        What every check found. One that cannot be made has the status "refused", e.g. because the recompute does not
        know the model.
    Raises:
        PromiseBroken: its message names what is not so, what was measured and what is allowed. ConfigError: the inputs
            are not as above. UnsupportedModelError: no adapter is registered for the model.
    """
    adapter = vtprune.adapter_for(model)
    where = f"{type(adapter).__name__} on {type(model).__name__}"
    together = padded(model, inputs)
    look = Look(adapter, together)
    results = [replace(_stated(name, look), check=name) for name in STATEMENTS]
    if not _broken(results):
        case = Case(model, batch_of(adapter, inputs, together))
        results += run_checks(case, checks=tuple(ALL_CHECKS))
    results = [replace(result, where=where) for result in results]
    if broken := _broken(results):
        meanings = {name: statement.broken for name, statement in STATEMENTS.items()}
        raise PromiseBroken(message("this adapter breaks", broken, meanings), results)
    return results


def _broken(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if result.status in ("failed", "error")]


def _stated(name: str, look: Look) -> Result:
    try:
        return STATEMENTS[name].run(look)
    except Refused as reason:
        return Result(name, "", "refused", detail=str(reason))
    except Exception as error:
        return Result(name, "", "error", detail=f"{type(error).__name__}: {error}")

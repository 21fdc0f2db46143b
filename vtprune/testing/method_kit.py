# SPDX-License-Identifier: Apache-2.0
"""`check_method`: whether a method keeps the library's promises, on the tiny model of every family."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import vtprune
from vtprune.errors import ConfigError
from vtprune.methods import build_method
from vtprune.methods.base import Method
from vtprune.plugins import load_plugins
from vtprune.testing import families as tiny
from vtprune.testing.batching import batch_of, padded
from vtprune.testing.cases import Case, PromiseBroken, Result
from vtprune.testing.promises import ALL_CHECKS, run_checks, told

CHECKS_OF_METHODS = tuple(name for name, check in ALL_CHECKS.items() if check.methods is None)
"""What is asked of any method."""

OPEN = "session"
"""What stands for the name of a check where no session can be opened."""


def check_method(
    method: Method | type[Method] | str | Mapping[str, Any],
    families: Iterable[str | Case] | None = None,
    media: Sequence[str] = ("image",),
) -> list[Result]:
    """Raise PromiseBroken, an AssertionError, unless a method keeps every promise on every family that it works on.

    Asking for everything changes no bit; a padded batch of three gives each sample what it gets alone; a pruned KV
    cache gives what the same tokens give without one, in a second turn, too; text stays, and the report counts what the
    cache holds; nothing is left on the model; chance and the attention back end are not touched. Takes about a second a
    family and medium.

    Args:
        method: a class, which is given `keep_ratio=0.5` if it needs a budget; or an object, a registered name, a
            mapping with `name`. A budget under which tokens go is needed: keeping everything proves nothing.
        families: names of `vtprune.testing.families.NAMES`, of which those that the installed transformers lacks are
            left out; or a `vtprune.testing.Case` for a model that is not among them. Default: all names but those in
            `families.KINDRED`, in which little is new, and the models of other packages (`models_of_others`).
        media: what prompts hold, of "image", "video" and "mixed" (both); each family is shown what it takes of these.
    Returns:
        What every check found. A family that refuses the method by name (UnsupportedStageError when the session opens)
        has one result with the status "refused". So has a check that cannot be made: the recompute does not know tokens
        that come back while decoding, and it may not give the logits of the unpruned model.
    Raises:
        PromiseBroken: its message names family, medium, promise, what was measured and what is allowed; or every family
            refuses the method. ConfigError, BudgetError: the method cannot be built, or a name is unknown.
    """
    built = _built(method)
    results = [result for where, case in _cases(families, media) for result in _checked(where, case, built)]
    if not results:
        raise ConfigError(f"nothing to check: none of these families takes {', '.join(media)}")
    broken = [result for result in results if result.status in ("failed", "error")]
    if broken:
        raise PromiseBroken(message(f"{built.name} breaks", broken), results)
    if not any(result.passed for result in results):
        reasons = "\n".join(f"* {result.where}: {result.detail}" for result in results)
        raise PromiseBroken(f"every family refuses {built.name}:\n{reasons}", results)
    return results


def message(subject: str, broken: Sequence[Result], meanings: Mapping[str, str] | None = None) -> str:
    """One line a broken promise. meanings: of checks that are not in `ALL_CHECKS`."""
    meanings = {name: check.broken for name, check in ALL_CHECKS.items()} | {OPEN: _UNOPENED} | dict(meanings or {})
    lines = [f"* {told(result, meanings[result.check])}" for result in broken]
    count = "1 promise" if len(lines) == 1 else f"{len(lines)} promises"
    return "\n".join([f"{subject} {count}:", *lines])


_UNOPENED = "the method cannot be used on this model, and only UnsupportedStageError says so to a user"


def _built(method: Method | type[Method] | str | Mapping[str, Any]) -> Method:
    if isinstance(method, type):
        return method(keep_ratio=0.5) if method.needs_budget else method()
    return build_method(method)


def _cases(families: Iterable[str | Case] | None, media: Sequence[str]) -> Iterable[tuple[str, Case]]:
    """Each case, and what it is called."""
    kinds = dict.fromkeys(kind for own in tiny.MEDIA.values() for kind in own)
    if isinstance(media, str) or not set(media) <= kinds.keys():
        raise ConfigError(f"media={media!r}: expected some of {', '.join(kinds)}, in a list")
    different = (name for name in tiny.NAMES if name not in tiny.KINDRED)
    for family in (*different, *models_of_others()) if families is None else families:
        if isinstance(family, Case):
            yield type(family.model).__name__, family
            continue
        if family not in tiny.NAMES:
            raise ConfigError(f"family {family!r}: expected one of {', '.join(tiny.NAMES)}, or a Case")
        shown = [kind for kind in media if kind in tiny.MEDIA[family]]
        if shown and tiny.is_available(family):
            model = tiny.build(family)
            for kind in shown:
                yield f"{family}, {kind}", Case(model, tiny.batch(family, model, media=kind))


@functools.cache
def models_of_others() -> tuple[Case, ...]:
    """Tiny models that packages outside bring for their adapters.

    An entry point in the group `vtprune.test_models` names a function without arguments, which returns a model and
    inputs as `check_adapter` takes them. Six decoder layers are enough for every method of this library.
    """
    cases: list[Case] = []

    def register(make: Callable[[], tuple[Any, Any]]) -> None:
        model, inputs = make()
        cases.append(Case(model, batch_of(vtprune.adapter_for(model), inputs, padded(model, inputs))))

    load_plugins("vtprune.test_models", register)
    return tuple(cases)


def _checked(where: str, case: Case, method: Method) -> list[Result]:
    try:
        case.session(method)
    except vtprune.UnsupportedStageError as error:
        return [Result(OPEN, method.name, "refused", detail=str(error), where=where)]
    except Exception as error:
        return [Result(OPEN, method.name, "error", detail=f"{type(error).__name__}: {error}", where=where)]
    return [replace(result, where=where) for result in run_checks(case, [method], CHECKS_OF_METHODS)]

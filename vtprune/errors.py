# SPDX-License-Identifier: Apache-2.0
"""The errors of vtprune: one family, so that `except VTPruneError` catches whatever this library refuses."""


class VTPruneError(Exception):
    """Base class of every error that vtprune raises on purpose."""


class UnsupportedModelError(VTPruneError):
    """This model, or what was given as one, cannot be pruned; the message says why, and what would help."""


class UnsupportedStageError(VTPruneError):
    """The model, or the way it is run, cannot give what the method needs (e.g. CLS attention without a CLS token)."""


class UncheckedError(UnsupportedStageError):
    """Whether the model can give what the method needs shows only when its weights are there; they are on `meta`."""


class BudgetError(VTPruneError):
    """The budget is malformed, larger than the image, or under the floor of the method."""

    def __init__(self, message: str, *, floor: float | None = None):
        super().__init__(message)
        self.floor = floor
        """Smallest keep ratio the method can reach on this model, when the budget was under it."""


class ConfigError(VTPruneError):
    """A configuration is wrong: the message names the place, the key and what was expected."""


class NothingPrunedError(VTPruneError):
    """Pruning was asked for, visual tokens came, and none was dropped (raised only when `strict=True`)."""


def shown(value: object) -> str:
    """A value as an error message gives it: its repr, at most 200 characters of it; its type if it has no repr."""
    try:
        text = repr(value)
    except Exception:  # of a huge integer, or of an object whose own code fails
        return f"something of the type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:197]}..."

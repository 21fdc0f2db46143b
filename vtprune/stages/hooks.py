# SPDX-License-Identifier: Apache-2.0
"""What hooks share: hidden states in the arguments of a layer, which transformers passes by place or by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vtprune.errors import VTPruneError


def hidden_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def with_hidden(args: tuple, kwargs: dict[str, Any], hidden: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The same arguments with other hidden states, as a forward pre-hook returns them."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


class Uncopied:
    """Base of what hooks are bound to, so that whatever copies a model with hooks on it reaches this."""

    def __deepcopy__(self, memo):
        raise VTPruneError(
            "a model cannot be copied or pickled while a vtprune session is on it; end the session first"
        )

    def __reduce__(self):
        return self.__deepcopy__({})


class Wrapped:
    """A method of one object, wrapped until `remove`."""

    def __init__(self, owner: nn.Module, name: str, wrap):
        self.owner, self.name = owner, name
        self.before = owner.__dict__.get(name)
        setattr(owner, name, wrap(getattr(owner, name)))

    def remove(self) -> None:
        if self.before is None:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)

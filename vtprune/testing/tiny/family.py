# SPDX-License-Identifier: Apache-2.0
"""What is needed to build a tiny model of a family, and prompts for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vtprune.testing.media import Layout


@dataclass(frozen=True)
class Family:
    """A model family, as a tiny model with random weights."""

    class_name: str
    """Its class in transformers; a release that lacks it still has the others."""
    config: Callable[..., Any]
    """Makes its config from fields of the text config."""
    layouts: Mapping[str, Layout]
    """"image", "video" -> how its processor lays them out."""
    token_types: Callable[[Tensor], dict[str, Tensor]] | None = None
    """Column types that its processor adds, from the ids (batch, length)."""
    carries_state: bool = False
    """Whether its language model has layers that carry a state from token to token: nothing can go inside it."""
    attention_unread: bool = False
    """Whether the attention of its language model's layers cannot be read: few methods can act inside it."""
    always_eager: bool = False
    """Whether its language model does what sdpa cannot."""
    images_first: bool = False
    """Whether its processor puts all images before the first token."""
    package: str = "transformers"
    """A package that its model needs."""
    mixes_kinds: bool = True
    """Whether a call may hold images and videos, if it takes both."""
    mend: Callable[[Any], None] | None = None
    """What is done to a new model: what makes it run on releases of transformers that cannot run it, or weights that
    are not as usual."""
    since: tuple[int, int] = (0, 0)
    """The first release of transformers in which the class does what its processor asks of it."""
    kindred: bool = False
    """Whether little is new in it: the tests then run one medium and one back end a method, and few of these cells by
    default."""

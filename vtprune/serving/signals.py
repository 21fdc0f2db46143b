# SPDX-License-Identifier: Apache-2.0
"""Which signals a server can read of its own vision encoder, and the numbers and texts that stand for a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from vtprune.adapters import Adapter
from vtprune.adapters.llava import Llava
from vtprune.errors import UnsupportedStageError
from vtprune.methods.base import BeforeLLM
from vtprune.ops.seeded_random import text_key
from vtprune.signals import EncoderSignal, JointSpace, SampleKeys, TextEmbeddings
from vtprune.stages.question import special_ids


def check_readable(method: BeforeLLM, adapter: Adapter) -> None:
    """Raise UnsupportedStageError for a signal that a server's vision encoder does not give."""
    deepest = adapter.shape.feature_layer
    for signal in method.signals(adapter.shape):
        name = f"{method.name}: {type(signal).__name__}"
        if isinstance(signal, JointSpace):
            raise UnsupportedStageError(f"{name} needs a text tower beside the model, which is not built for servers")
        if not isinstance(signal, EncoderSignal):
            raise UnsupportedStageError(f"{name} is not built for servers")
        if signal.needs_clip:
            raise UnsupportedStageError(f"{name} reads {signal.needs_clip}, which a server does not load")
        taps = signal.taps(adapter.shape)
        layers = (*taps.cls_rows, *taps.received, *taps.keys, *taps.outputs)
        if layers and not isinstance(adapter, Llava):
            raise UnsupportedStageError(
                f"{name} reads layers of the vision encoder, which servers do of CLIP and SigLIP towers only; "
                "methods that read none work: mmtok, divprune, cdpruner"
            )
        if layers and max(layers) > deepest:
            raise UnsupportedStageError(
                f"{name} reads encoder layer {max(layers)}, and a server loads layers 0..{deepest}, for the projector "
                "reads no later one"
            )


def reads_text(method: BeforeLLM, adapter: Adapter) -> bool:
    return any(isinstance(signal, TextEmbeddings) for signal in method.signals(adapter.shape))


def draws(method: BeforeLLM, adapter: Adapter) -> bool:
    """Whether a method draws at random."""
    return any(isinstance(signal, SampleKeys) for signal in method.signals(adapter.shape))


def prompt_key(ids: Sequence[int], adapter: Adapter) -> int:
    """The number of a prompt's text that `SampleKeys` begins with. ids: the prompt, placeholders included."""
    visual = set(adapter.visual_token_ids.values())
    return text_key([token for token in ids if token not in visual])


def questions(ids: Sequence[int], kind: str, count: int, adapter: Adapter) -> list[list[int]]:
    """The question to each medium of a kind: see `TextEmbeddings`.

    ids: the prompt, with one placeholder a medium. count: how many media of the kind came.
    """
    # What else a processor puts around media is not there yet: a server does that when it makes room for them.
    apart = {*adapter.visual_token_ids.values(), *adapter.marker_token_ids, *special_ids(adapter)}
    text = [token not in apart for token in ids]
    found = []
    for place in [place for place, token in enumerate(ids) if token == adapter.visual_token_ids[kind]][:count]:
        after = [token for token, is_text in zip(ids[place:], text[place:], strict=True) if is_text]
        found.append(after or [token for token, is_text in zip(ids, text, strict=True) if is_text])
    return found

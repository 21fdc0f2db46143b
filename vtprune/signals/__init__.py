# SPDX-License-Identifier: Apache-2.0
"""What a method may ask the model for. A signal says what is recorded for it, and how it is read from that.

A method lists its signals in `Method.signals()` and reads them as `tokens[signal]`. It may bring signals of its
own, frozen dataclasses derived from `EncoderSignal`, `LayerSignal` or `CacheSignal`, after the stage they are read at.
A signal may look at what its view offers. The method gets what it returns on the device of the features.
"""

from vtprune.signals.cache import CacheSignal, CacheView
from vtprune.signals.encoder import (
    AttentionReceived,
    ClsAttention,
    EncoderFeatures,
    EncoderKeys,
    EncoderOutput,
    EncoderRecord,
    EncoderSaliency,
    EncoderSignal,
    EncoderView,
    JointSpace,
    Taps,
    TextEmbeddings,
)
from vtprune.signals.layers import InstructionAttention, LastQueryAttention, LayerSignal, LayerView, SampleKeys

__all__ = [
    "AttentionReceived",
    "CacheSignal",
    "CacheView",
    "ClsAttention",
    "EncoderFeatures",
    "EncoderKeys",
    "EncoderOutput",
    "EncoderRecord",
    "EncoderSaliency",
    "EncoderSignal",
    "EncoderView",
    "InstructionAttention",
    "JointSpace",
    "LastQueryAttention",
    "LayerSignal",
    "LayerView",
    "SampleKeys",
    "Taps",
    "TextEmbeddings",
]

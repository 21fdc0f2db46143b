# SPDX-License-Identifier: Apache-2.0
"""How queries, keys and values of an encoder layer are read, and how its attention is biased: one class a kind of
attention module."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import linear

from vtprune.errors import UnsupportedStageError
from vtprune.transformers_private import attention_back_end

Projection = Literal["queries", "keys", "values"]
"""What an attention module projects its input to."""
_ORDER: tuple[Projection, ...] = ("queries", "keys", "values")
Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Arguments of a call, by place and by name."""


def _joined(context: Tensor) -> Tensor:
    """(batch, heads, tokens, head dim) -> (batch, tokens, dim)"""
    return context.transpose(1, 2).flatten(2)


class LayerAttention(ABC):
    """The self-attention module of one encoder layer, called with (batch, tokens, dim)."""

    heads: int
    scale: float
    """Factor of the scores."""
    _mask: str = "attn_mask"
    """Name of the argument for the mask."""

    def __init__(self, module: Any):
        self.module: Any = module

    def tap(self, projection: Projection) -> nn.Module | None:
        """The module whose output `read` wants for a projection; None: the attention module's own input."""
        return None

    @abstractmethod
    def read(self, projection: Projection, value: Tensor) -> Tensor:
        """(batch, heads, tokens, head dim): a projection, norms applied, from what `tap` says."""

    @abstractmethod
    def project(self, projection: Projection, hidden: Tensor) -> Tensor:
        """The same from the module's input (batch, tokens, dim), computed now."""

    @abstractmethod
    def attended(self, context: Tensor) -> Tensor:
        """(batch, tokens, dim): what the module puts out for the values that its heads have averaged, (batch, heads,
        tokens, head dim)."""

    def mask(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The mask that the module is called with; None without one."""
        return kwargs.get(self._mask)

    def with_bias(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], bias: Tensor | None) -> Call:
        """The same call with another mask: bias (batch, tokens) is added to the scores of each key. None: no mask."""
        return args, {**kwargs, self._mask: None if bias is None else bias[:, None, None]}

    def check_bias(self) -> None:  # noqa: B027 (most modules can)
        """Raise UnsupportedStageError if scores cannot be biased."""


class TransformersAttention(LayerAttention):
    """An attention module of transformers with three projections, whose back end is called with the mask."""

    _mask = "attention_mask"

    def __init__(self, module: Any):
        super().__init__(module)
        self.heads = module.config.num_attention_heads
        self.scale = module.head_dim**-0.5

    def tap(self, projection: Projection) -> nn.Module | None:
        return getattr(self.module, f"{projection[0]}_proj")

    def read(self, projection: Projection, value: Tensor) -> Tensor:
        return value.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project(self, projection: Projection, hidden: Tensor) -> Tensor:
        return self.read(projection, getattr(self.module, f"{projection[0]}_proj")(hidden))

    def attended(self, context: Tensor) -> Tensor:
        out = self.module.out_proj if hasattr(self.module, "out_proj") else self.module.o_proj
        return out(_joined(context))

    def mask(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return args[1] if len(args) > 1 else super().mask(args, kwargs)

    def with_bias(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], bias: Tensor | None) -> Call:
        if bias is not None:
            self.check_bias()
        # The mask comes by place or by name.
        return super().with_bias(args[:1], kwargs, bias)

    def check_bias(self) -> None:
        back_end = attention_back_end(self.module.config)
        if back_end not in ("sdpa", "eager"):
            raise UnsupportedStageError(
                f"the attention back end {back_end!r} takes no bias for merged tokens; load the model with "
                "attn_implementation='sdpa', or set prop_attn=False"
            )


class TimmAttention(LayerAttention):
    """timm's `Attention`: one projection for all three, then norms of queries and keys (identities without them)."""

    def __init__(self, module: Any):
        super().__init__(module)
        self.heads = module.num_heads
        self.scale = module.scale

    def tap(self, projection: Projection) -> nn.Module | None:
        taps = {"queries": self.module.q_norm, "keys": self.module.k_norm, "values": self.module.qkv}
        return taps[projection]

    def read(self, projection: Projection, value: Tensor) -> Tensor:
        if projection != "values":
            return value  # the norms are called head by head
        return self._part(value, 2)

    def _part(self, value: Tensor, part: int) -> Tensor:
        return value.unflatten(-1, (3, self.heads, -1))[:, :, part].transpose(1, 2)

    def project(self, projection: Projection, hidden: Tensor) -> Tensor:
        projected = self._part(self.module.qkv(hidden), _ORDER.index(projection))
        norms = {"queries": self.module.q_norm, "keys": self.module.k_norm}
        return norms[projection](projected) if projection in norms else projected

    def attended(self, context: Tensor) -> Tensor:
        module = self.module
        if getattr(module, "gate", None) is not None:
            raise UnsupportedStageError("the attention of this encoder of timm has a gate, which is not supported here")
        return module.proj_drop(module.proj(module.norm(_joined(context))))

    def mask(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return True if kwargs.get("is_causal") else super().mask(args, kwargs)

    def check_bias(self) -> None:
        if self._mask not in inspect.signature(type(self.module).forward).parameters:
            raise UnsupportedStageError(
                "the attention of this release of timm takes no mask; update timm, or set prop_attn=False"
            )


class TorchAttention(LayerAttention):
    """torch's `MultiheadAttention`, called with three times the same tensor."""

    def __init__(self, module: Any):
        super().__init__(module)
        self.heads = module.num_heads
        self.scale = module.head_dim**-0.5

    def read(self, projection: Projection, value: Tensor) -> Tensor:
        part = _ORDER.index(projection)
        weight, bias = self.module.in_proj_weight.chunk(3)[part], self.module.in_proj_bias
        projected = linear(value, weight, None if bias is None else bias.chunk(3)[part])
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project(self, projection: Projection, hidden: Tensor) -> Tensor:
        return self.read(projection, hidden)

    def attended(self, context: Tensor) -> Tensor:
        out = self.module.out_proj
        return linear(_joined(context), out.weight, out.bias)

    def mask(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        mask = super().mask(args, kwargs)
        return kwargs.get("key_padding_mask") if mask is None else mask

    def with_bias(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], bias: Tensor | None) -> Call:
        # A float mask of keys is added to their scores; the other mask would need a copy for each head.
        return args, {**kwargs, "key_padding_mask": bias}


class OpenClipAttention(TorchAttention):
    """open_clip's own `Attention`, of blocks with norms in their attention: packed weights like torch's."""

    def __init__(self, module: Any):
        LayerAttention.__init__(self, module)
        self.heads = module.num_heads
        self.scale = module.scale

    def tap(self, projection: Projection) -> nn.Module | None:
        return {"queries": self.module.ln_q, "keys": self.module.ln_k}.get(projection)

    def read(self, projection: Projection, value: Tensor) -> Tensor:
        return super().read(projection, value) if projection == "values" else value

    def project(self, projection: Projection, hidden: Tensor) -> Tensor:
        projected = super().read(projection, hidden)
        norm = self.tap(projection)
        return projected if norm is None else norm(projected)

    def attended(self, context: Tensor) -> Tensor:
        module = self.module
        if module.head_scale is not None:
            context = context * module.head_scale
        return module.out_drop(module.out_proj(module.ln_inner(_joined(context))))

    def mask(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return LayerAttention.mask(self, args, kwargs)

    def with_bias(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], bias: Tensor | None) -> Call:
        return LayerAttention.with_bias(self, args, kwargs, bias)

# SPDX-License-Identifier: Apache-2.0
"""Inside the layers of a vision encoder: hooks that let the sequence get shorter before, in or behind a layer.

A layer computes `x + a(attention(x))` and then `x + end(mlp(second_norm(x)))`. Where tokens go between the two, the
second norm is handed the rows that are left, and so the MLP runs on them. What `end` puts out no longer fits the tokens
that the layer adds it to, so it is kept here, nothing is added in its place, and the layer's output becomes the sum of
both. LayerScale, drop path and norms are the layer's own throughout.

A method may let a layer's attention read one row more. It stands behind the tokens that the attention is called with,
and is taken off again from what the attention puts out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.encoder import EncoderAdapter, LayerParts
from vtprune.callers import ThreadAware, Underway
from vtprune.errors import UnsupportedStageError, VTPruneError
from vtprune.methods.in_layers import InLayers, LayerTokens, Projection
from vtprune.stages.choosing import Profile, counting
from vtprune.stages.encoder_pass import EncoderPass
from vtprune.stages.hooks import Uncopied, hidden_of


@dataclass
class _Following:
    """What one thread encodes."""

    batch: EncoderPass | None = None


class LayerCalls(Uncopied, ThreadAware[_Following]):
    """Hooks on the layers of one vision encoder that merge or drop tokens while it runs; each thread's calls alone."""

    def __init__(
        self,
        adapter: EncoderAdapter,
        method: InLayers,
        finished: Callable[[EncoderPass], None],
        *,
        profile: Profile,
        last: int | None = None,
        follows: Callable[[], bool] = lambda: True,
    ):
        """For an encoder in a vision-language model, `last` is its last layer whose output anything reads. No layer
        behind it takes tokens away then, and each layer puts out a row for every token, so that shapes outside the
        layers do not change.

        finished: is given each batch behind the last layer. follows: whether a batch that comes now is the session's.
        """
        super().__init__(_Following)
        self._last, self._follows, self._profile = last, follows, profile
        self.adapter, self.method, self.finished = adapter, method, finished
        self.protected = adapter.prefix_tokens
        self.prunes = method.keep_ratio != 1.0
        self.reached = self._active = False
        self._underway = Underway()
        self._parts: list[LayerParts] = [adapter.parts(layer) for layer in adapter.layers]
        self._replaces = type(method).attention_behind is not InLayers.attention_behind
        self._extends = type(method).extra_row is not InLayers.extra_row
        if self._extends and method.place == "before":
            raise UnsupportedStageError(
                f"{method.name} acts before layers, and has an extra row for their attention; only methods that act "
                "between attention and MLP, or behind layers, can have one"
            )
        # Before a layer its projections are computed ahead, so there is nothing to record.
        self._tapped = method.reads if method.place != "before" else ()
        if method.biases:
            for parts in self._parts:
                parts.attention.check_bias()

    def install(self) -> Iterator[RemovableHandle]:
        """Yields what takes each hook off again, as soon as it is on."""
        self._active, self.reached = True, False
        for index, (layer, parts) in enumerate(zip(self.adapter.layers, self._parts, strict=True)):
            yield layer.register_forward_pre_hook(self._before_layer(index, parts), with_kwargs=True)
            attention = parts.attention
            yield attention.module.register_forward_pre_hook(self._before_attention(index, parts), with_kwargs=True)
            for projection in self._tapped:
                if (tapped := attention.tap(projection)) is not None:
                    yield tapped.register_forward_hook(self._take(projection))
            if self._replaces:
                yield attention.module.register_forward_hook(self._after_attention(parts), prepend=True)
            if self._extends:
                yield attention.module.register_forward_hook(self._without_extra)
            yield parts.second_norm.register_forward_pre_hook(self._before_mlp(index, parts))
            yield parts.end.register_forward_hook(self._after_branch)
            # transformers collects states and attention by hooks of its own, which are to see what is left.
            yield layer.register_forward_hook(self._after_layer(index, parts), prepend=True, always_call=True)

    def stop(self) -> None:
        """Let later calls run as they are. Waits for images that another thread encodes."""
        self._active = False
        self._underway.wait_for_others()

    def end(self) -> None:
        """Forget this thread's images."""
        super().end()
        self._underway.end()

    # -- hooks, in the order of a layer -------------------------------------------------------------------------

    def _before_layer(self, index: int, parts: LayerParts):
        def hook(module, args, kwargs):
            hidden, with_rows = _input(args, kwargs)
            if index == 0:
                self._begin(hidden)
            now = self.now.batch
            if now is None:
                return None
            now.to(hidden.device)
            if self._last is not None and now.sources is not None:
                hidden = _rows(hidden, now.places)
            changed = with_rows(hidden)
            if not now.schedule[index]:
                return changed
            if self.method.place != "before":
                if (row := self.method.extra_row(index, hidden)) is not None:
                    now.extra = parts.first_norm(row[:, None])
                return changed

            normed = parts.first_norm(hidden)

            def read(projection):
                return parts.attention.project(projection, normed)

            reduced = self._reduced(now, index, parts, hidden, read)
            return changed if reduced is None else with_rows(reduced)

        return hook

    def _begin(self, hidden: Tensor) -> None:
        """Begin to follow the images whose tokens (images, tokens, dim) enter the first layer."""
        self.end()
        if not self._follows():
            return
        if not self._active:  # another thread removes the session at this moment
            return
        self._underway.begin()
        if not self._active:
            return self.end()
        self.reached = True
        images, tokens = hidden.shape[:2]
        schedule = self._schedule(tokens)
        if any(schedule) and torch.is_grad_enabled() and self.adapter.recomputes:
            raise UnsupportedStageError(
                "gradient checkpointing runs the layers of the vision encoder twice, so nothing can be merged or "
                "dropped in them; turn it off"
            )
        self.now.batch = EncoderPass(images, tokens, schedule)

    def _schedule(self, tokens: int) -> list[int]:
        """How many tokens each layer is to take away of an image with so many."""
        depth, patches = len(self._parts), tokens - self.protected
        if self._last is None:
            return self.method.schedule(depth, patches, self.protected)
        # A budget is met where the language model's tokens come from; a number for each layer holds for all layers.
        has_budget = self.method.keep_ratio is not None or self.method.keep_tokens is not None
        counted = self._last + 1 if has_budget else depth
        schedule = self.method.schedule(counted, patches, self.protected)[: self._last + 1]
        return [*schedule, *[0] * (depth - len(schedule))]

    def _before_attention(self, index: int, parts: LayerParts):
        def hook(module, args, kwargs):
            now, hidden = self.now.batch, hidden_of(args, kwargs)
            if now is None:  # somebody calls this layer alone
                return None
            if index == 0 and any(now.schedule):
                _check_unmasked(parts.attention.mask(args, kwargs))
            if now.extra is not None:
                longer = torch.cat([hidden, now.extra], dim=1)
                args, kwargs = _replaced(args, kwargs, hidden, longer)
                hidden = longer
            now.entered.append(hidden.shape[1])
            now.recorded["input"] = hidden
            if now.ahead is not None:
                # What it puts out is replaced, so it computes one row only.
                return parts.attention.with_bias(*_replaced(args, kwargs, hidden, hidden[:, :1]), None)
            if now.sources is None and now.extra is None:
                return None
            bias = None
            if self.method.biases and now.sizes is not None:
                bias = now.sizes.log().to(hidden.dtype)
                bias = bias if now.extra is None else pad(bias, (0, 1))
            return parts.attention.with_bias(args, kwargs, bias)

        return hook

    def _take(self, projection: str):
        def hook(module, args, output):
            if self.now.batch is not None:
                self.now.batch.recorded[projection] = output

        return hook

    def _after_attention(self, parts: LayerParts):
        def hook(module, args, output):
            now = self.now.batch
            if now is None or now.ahead is None:
                return None
            values = parts.attention.project("values", now.recorded["input"])
            ahead, now.ahead = now.ahead, None
            attended = parts.attention.attended(ahead.attend(values))
            if isinstance(output, tuple) and any(map(torch.is_tensor, output[1:])):  # the weights were asked for
                return attended, ahead.weights().to(values.dtype)
            return _with_first(output, attended)

        return hook

    def _without_extra(self, module, args, output):
        now = self.now.batch
        if now is None or now.extra is None:
            return None
        now.extra = None
        attended = output[0] if isinstance(output, tuple) else output
        return _with_first(output, attended[:, :-1])

    def _before_mlp(self, index: int, parts: LayerParts):
        def hook(module, args):
            now = self.now.batch
            if now is None:
                return None
            if self.method.place == "between" and now.schedule[index]:
                now.reduced = self._reduced(now, index, parts, args[0], self._recorded(now, parts))
            rows = args[0] if now.reduced is None else now.reduced
            now.in_mlp.append(rows.shape[1])
            return (rows, *args[1:])

        return hook

    def _recorded(self, now: EncoderPass, parts: LayerParts) -> Callable[[Projection], Tensor]:
        """Reads projections that the layer's attention has computed."""

        def read(projection):
            name = "input" if parts.attention.tap(projection) is None else projection
            return parts.attention.read(projection, now.recorded[name])

        return read

    def _reduced(
        self, now: EncoderPass, index: int, parts: LayerParts, hidden: Tensor, read: Callable[[Projection], Tensor]
    ) -> Tensor | None:
        """What the method leaves of the tokens (images, tokens, dim) at its place in a layer: (images, rows, dim). None
        if nothing is to change."""
        tokens = LayerTokens(
            hidden=hidden,
            protected=self.protected,
            sizes=now.sizes,
            layer=index,
            remove=now.schedule[index],
            layers=len(self._parts),
            has_cls=self.adapter.has_cls,
            scale=parts.attention.scale,
            biases=self.method.biases,
            read=read,
        )
        with counting(now, self._profile):
            reduction = self.method.reduce(tokens)
            if reduction is None:
                return None
            if self.method.place == "before":
                now.ahead = self.method.attention_behind(tokens, reduction)
        now.apply(reduction)
        return reduction.features(hidden)

    def _after_branch(self, module, args, output):
        now = self.now.batch
        if now is None or now.reduced is None:
            return None
        now.branch = output
        return output.new_zeros(())  # nothing is added to the tokens

    def _after_layer(self, index: int, parts: LayerParts):
        def hook(module, args, output):
            now = self.now.batch
            if now is None:
                return None
            if output is None:  # an error ends the call
                return self.end()
            if now.reduced is not None:
                if now.branch is None:
                    self.end()
                    raise VTPruneError(
                        f"the adapter {type(self.adapter).__name__} states as `end` a module that layer {index} did "
                        "not call behind its MLP"
                    )
                output = now.reduced + now.branch
                now.reduced = now.branch = None
            if self.method.place == "behind" and now.schedule[index]:
                reduced = self._reduced(now, index, parts, output, self._recorded(now, parts))
                output = output if reduced is None else reduced
            now.recorded.clear()
            now.left.append(output.shape[1])
            if index == len(self._parts) - 1:
                self.end()
                self.finished(now)
            elif self._last is None:
                return output
            if now.sources is None or (self.method.drops and self._last is None):
                return output
            return _rows(output, now.sources)

        return hook


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    """(images, n, dim), (images, m) -> (images, m, dim): these rows of the values, zero for row -1."""
    taken = values.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, values.shape[2]))
    return taken.masked_fill((rows < 0)[..., None], 0)


def _input(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], tuple[tuple, dict[str, Any]]]]:
    """The hidden states that a layer is called with, and what puts others in their place."""
    if args:
        return args[0], lambda hidden: ((hidden, *args[1:]), kwargs)
    name = next(name for name, value in kwargs.items() if torch.is_tensor(value))
    return kwargs[name], lambda hidden: (args, {**kwargs, name: hidden})


def _replaced(args: tuple, kwargs: Mapping[str, Any], old: Tensor, new: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The same arguments with one tensor in place of another. torch's attention is called with it three times."""
    by_name = {name: new if value is old else value for name, value in kwargs.items()}
    return tuple(new if value is old else value for value in args), by_name


def _with_first(output: Any, attended: Tensor) -> Any:
    """What an attention module puts out, alone or first of several, with another tensor in its place."""
    return (attended, *output[1:]) if isinstance(output, tuple) else attended


def _check_unmasked(mask: Any) -> None:
    """Raise UnsupportedStageError if a mask hides tokens."""
    hides = mask is not None
    if torch.is_tensor(mask):
        hides = bool((~mask if mask.dtype == torch.bool else mask != 0).any())
    if hides:
        raise UnsupportedStageError(
            "this vision encoder was called with an attention mask, and tokens that are masked cannot be merged or "
            "dropped; call it without one"
        )

# SPDX-License-Identifier: Apache-2.0
"""The lines of `bench.jsonl`: what identifies a row, and the numbers that follow from its passes."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

import torch

import vtprune
from vtprune import cost
from vtprune.adapters import Adapter
from vtprune.eval.bench.config import BenchConfig
from vtprune.eval.bench.passes import Holding, Inputs, Pass, interpolated
from vtprune.eval.bench.rows import Row
from vtprune.eval.bench.stopwatch import Spread, paired
from vtprune.eval.results.records import Record
from vtprune.eval.running.cells import versions


def of_row(row: Row) -> Record:
    """The fields that identify a row."""
    return {
        "label": row.label,
        "method": None if row.method is None else json.loads(json.dumps(row.method, default=str)),
        "keep_ratio": row.keep_ratio,
        "status": row.status,
        "reason": row.reason,
        "floor": row.floor,
    }


def numbers(holding: Holding, passes: list[Pass], full: list[Pass], inputs: Inputs, model: Any) -> Record:
    """The measurements of a row; `full` holds the passes of the full model."""
    text_config, adapter = model.config.get_text_config(), vtprune.adapter_for(model)
    visual = (inputs["input_ids"] == adapter.visual_token_ids["image"]).sum(1).tolist()
    length, layers = inputs["input_ids"].shape[1], text_config.num_hidden_layers
    unpruned = sum(cost.llm_prefill_flops(text_config, [count] * layers, length - count) for count in visual)
    head = len(visual) * cost.lm_head_flops(text_config)
    report = holding.report
    decoder = unpruned if report is None else report.prefill_flops
    whole_encoder = _encoder_flops(adapter, inputs)
    encoder = whole_encoder if report is None else report.encoder_flops
    without = holding.selection_flops + decoder + head
    first_token = None if encoder is None else encoder + without
    lengths = list(full[0].steps)
    speedups = {
        "prefill": paired([p.prefill for p in passes], [p.prefill for p in full]),
        "first_token": paired([p.first_token for p in passes], [p.first_token for p in full]),
    }
    answers = {n: paired([p.answer(n) for p in passes], [p.answer(n) for p in full]) for n in lengths}
    ideal = (unpruned + head) / (decoder + head)
    ideal_first_token = first_token and (whole_encoder + unpruned + head) / first_token
    return {
        "visual_tokens": mean(visual),
        "final_tokens": mean(visual if report is None else report.final_tokens),
        "measured_keep_ratio": 1.0 if report is None else report.keep_ratio,
        "prefill_flops": decoder + head,
        "encoder_flops": encoder,
        "selection_flops": holding.selection_flops,
        "first_token_flops": first_token,
        "seconds": {
            "encoder": _spread(p.encoder for p in passes),
            "selector": _spread(p.selector for p in passes),
            "prefill": _spread(p.prefill for p in passes),
            "first_token": _spread(p.first_token for p in passes),
            "per_token": {str(n): _spread(s for p in passes for s in p.steps[n]) for n in lengths},
            "answer": {str(n): _spread(p.answer(n) for p in passes) for n in lengths},
        },
        "peak_bytes": holding.peak_bytes,
        "kv_bytes": holding.kv_bytes,
        "auxiliary_bytes": holding.auxiliary_bytes,
        "ideal_prefill_speedup": ideal,
        "ideal_first_token_speedup": ideal_first_token,
        "speedup": {
            **{name: spread.to_dict() for name, spread in speedups.items()},
            "answer": {str(n): spread.to_dict() for n, spread in answers.items()},
        },
        "graphs": max(p.graphs for p in passes),
        "realised": speedups["prefill"].median / ideal,
        "realised_first_token": ideal_first_token and speedups["first_token"].median / ideal_first_token,
    }


def _encoder_flops(adapter: Adapter, inputs: Inputs) -> int | None:
    """FLOPs of the vision encoder of the full model; None if they are not counted."""
    if adapter.encoder_uncounted:
        return None
    sequences = adapter.encoder_sequences("image", inputs)
    return cost.encoder_flops(
        adapter.vision_config,
        sequences,
        has_cls=adapter.has_cls,
        gated_mlp=adapter.gated_encoder_mlp,
        mlp_width=adapter.encoder_mlp_width,
    )


def beside_plain(
    plain: Mapping[int, list[float]], widths: Sequence[int], passes: Sequence[Pass], full: Sequence[Pass]
) -> Record:
    """The speed-ups that the model without a session reaches at the lengths of a row.

    Each layer takes its share of the seconds of a prefill as wide as its input. The encoder is that of the full model.

    Args:
        plain: width of a prompt -> seconds of its prefill, round by round. Widths between these are interpolated.
        widths: columns of each decoder layer's input, or one number for all layers.
        passes: of the row.
        full: passes of the full model.
    """
    seconds = []
    for number in range(len(passes)):
        points = sorted((width, samples[number]) for width, samples in plain.items())
        seconds.append(mean(interpolated(points, width) for width in widths))
    first_token = [p.encoder + spent for p, spent in zip(full, seconds, strict=True)]
    return {
        "plain_prefill_speedup": paired(seconds, [p.prefill for p in full]).to_dict(),
        "plain_first_token_speedup": paired(first_token, [p.first_token for p in full]).to_dict(),
        "of_plain": paired([p.prefill for p in passes], seconds).median,
        "of_plain_first_token": paired([p.first_token for p in passes], first_token).median,
    }


def of_batch_size(model: Any, inputs: Inputs, config: BenchConfig, batch: int) -> Record:
    """The fields that all rows of a batch size share."""
    device = torch.cuda.get_device_name(model.device) if config.on_gpu else platform.machine()
    return {
        "batch_size": batch,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "decoder_layers": model.config.get_text_config().num_hidden_layers,
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "config": config.resolved(),
    }


def _spread(samples: Iterator[float]) -> Record:
    return Spread(tuple(samples)).to_dict()

# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune import FastV
from vtprune.signals import LastQueryAttention
from vtprune.tokens import ModelShape

from . import Vector, close, handles, kept, one_group, same


@handles("fastv_*")
def selection(v: Vector) -> None:
    image = slice(v["start"], v["start"] + v["length"])
    method = FastV(layer=2, share=1 - v["r"])
    shape = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)
    budget = int(method.budgets(shape, torch.tensor([v["length"]]), torch.tensor([1]))[0, 0])
    assert budget == v["n_keep"]

    (request,) = method.signals(shape)
    assert request == LastQueryAttention(1)
    signals = {request: v["last_query_attn"][..., image]}
    tokens = one_group(v["hidden"][0, image], budget, signals, shape, layer=2)

    columns = torch.arange(v["hidden"].shape[1])
    visual = (columns >= image.start) & (columns < image.stop)
    alive = ~visual
    alive[kept(method, tokens) + image.start] = True
    same(columns[alive], v["keep_indices"])
    # Original positions: those of the surviving columns.
    assert method.positions == "original"
    same(columns[alive], v["position_ids"][0])
    close(v["hidden"][:, alive], v["hidden_out"])

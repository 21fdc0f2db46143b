# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune import DivPrune
from vtprune.ops.diversity import diversity_order
from vtprune.tokens import ModelShape

from . import Vector, handles, kept, one_group, same


@handles("divprune_*")
def selection(v: Vector) -> None:
    features, method = v["features"], DivPrune(keep_ratio=v["ratio"])
    k = int(method.budgets(torch.tensor([len(features)]), torch.tensor([0])))
    assert k == len(v["keep_idx"])
    everything = torch.ones(1, len(features), dtype=torch.bool)
    same(diversity_order(features[None], everything, k)[0], v["select_order"])
    shape = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)
    same(kept(method, one_group(features, k, {}, shape)), v["keep_idx"])

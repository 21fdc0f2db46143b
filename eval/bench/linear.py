# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a float32 model on a CPU, computed by oneDNN, for the full model and all methods alike.

torch hands matrix products in float32 to MKL. On processors of AMD, MKL takes 1.3 to 2 times as long as oneDNN, and
most of all for few rows. Short inputs would look worse than they are, and the full model slower than it has to be.
Products in bfloat16 and float16 go to oneDNN anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def onednn_available() -> bool:
    """Whether torch was built with oneDNN."""
    return torch.backends.mkldnn.is_available()


class OneDNNLinear(nn.Module):
    """A linear layer of oneDNN. `torch.utils.mkldnn` has one, too, but in TorchScript, which torch is giving up."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight.detach().to_mkldnn()
        self.bias = None if linear.bias is None else linear.bias.detach().to_mkldnn()

    def forward(self, states: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        return torch.ops.aten.mkldnn_linear(states.to_mkldnn(), self.weight, self.bias).to_dense()


def use_onednn(model: nn.Module) -> None:
    """Replaces the linear layers of the encoder, the projector and the decoder layers in place.

    The LM head stays, because it sees one row a sample and may share its weight with the embedding.
    """
    for module in list(model.base_model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, OneDNNLinear(child))

# SPDX-License-Identifier: Apache-2.0
"""What the CLS token of a vision encoder looks at, summed over layers."""

from torch import Tensor

from vtprune.errors import ConfigError


def ensemble_layers(num_layers: int, start: int) -> range:
    """The encoder layers (0-based) whose CLS rows are summed: ``start`` up to the last but one.

    The last layer's output is not read by LLaVA, so its attention is left out. VTC-CLS, arXiv 2412.05819.

    Args:
        num_layers: layers of the encoder.
        start: first layer; negative counts from the end, so -2 is the last but one alone.

    Raises:
        ConfigError: no layer is left.
    """
    layers = range(num_layers)[start:-1]
    if not layers:
        raise ConfigError(
            f"start layer {start} leaves no layer of an encoder with {num_layers}: the last one is never counted, "
            f"so it must be in [{-num_layers}, {num_layers - 2}]"
        )
    return layers


def cls_score(rows: Tensor) -> Tensor:
    """Sum over layers of the head-averaged attention that CLS pays to each patch (VTC-CLS, arXiv 2412.05819).

    Args:
        rows: ``(layers, ..., heads, 1 + patches)`` post-softmax rows of the CLS query; column 0 is CLS itself.

    Returns:
        ``(..., patches)`` float32. Not renormalised: the share that went to CLS is lost.
    """
    return rows.float().mean(dim=-2).sum(dim=0)[..., 1:]

# SPDX-License-Identifier: Apache-2.0
"""MustDrop's window merging: each window of the grid whose tokens are similar becomes one token."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.ops.merging import Merged
from vtprune.ops.selection import top_k_mask


def window_similarity(features: Tensor, windows: Tensor) -> Tensor:
    """Mean cosine over all pairs of different tokens of each window.

    Args:
        features: ``(images, tokens, dim)``.
        windows: ``(windows, members)`` long, the tokens of each window, at least two a window.

    Returns:
        ``(images, windows)`` float32.
    """
    members = normalize(features.float(), dim=-1, eps=1e-8)[:, windows]
    # The square of a sum contains every pair twice, and every token with itself once.
    pairs = members.sum(dim=2).square().sum(dim=-1) - members.square().sum(dim=(-1, -2))
    return pairs / (windows.shape[1] * (windows.shape[1] - 1))


@torch.no_grad()
def window_merging(
    features: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int] = (3, 3),
    *,
    threshold: float = 0.8,
    at_least: int | Tensor = 0,
    prefix: int = 0,
    reference_quirks: bool = False,
) -> Merged:
    """Merge the windows of a grid of tokens whose mean similarity reaches a threshold (MustDrop, arXiv 2411.10803).

    A merged window becomes the mean of its tokens. It takes the place of the token nearest to its centre; of equally
    near tokens the upper left one. Windows do not overlap.

    Deviations: every image merges all its windows that pass; in the reference all images of a batch (the crops of one
    image) merge as many windows as the image with the fewest. Tokens stay in raster order; in the reference merged
    tokens come first. Rows and columns that do not fill a window stay unmerged; the reference needs a square grid that
    windows fill completely.

    Args:
        features: ``(images, prefix + rows * columns, dim)``, the grid in raster order.
        grid: ``(rows, columns)``.
        window: ``(rows, columns)`` of a window, at least two tokens.
        threshold: smallest mean cosine of the pairs of different tokens with which a window is merged; with -1 all
            windows pass.
        at_least: number of tokens to leave, prefix included; one number or ``(images,)`` long. Of the windows that pass
            only as many are merged as this allows, the most similar ones first. With ``threshold=-1`` the number of
            tokens left is above it by less than a window's tokens, as long as there are enough windows.
        prefix: number of tokens before the grid (a CLS token); they are never merged.
        reference_quirks: use the reference's count and order: after the prefix the merged windows by falling
            similarity, then the other tokens.

    Returns:
        The tokens that are left. Features keep their dtype (means are taken in float32).
    """
    images, tokens, dim = features.shape
    windows, centre = _windows(grid, window, features.device)
    windows = windows + prefix
    count, members = windows.shape
    if prefix + grid[0] * grid[1] != tokens:
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} behind {prefix} tokens does not hold {tokens} tokens")
    similarity = window_similarity(features, windows)
    passing = similarity >= threshold
    merges = passing.sum(1)
    if reference_quirks:
        merges = merges.amin().expand(images)
    allowed = (tokens - torch.as_tensor(at_least, device=features.device)).clamp_min(0) // (members - 1)
    merged = top_k_mask(similarity, passing, merges.minimum(allowed))

    places = torch.arange(tokens, device=features.device).repeat(images, 1)
    centres = windows[:, centre]
    sources = places.clone()
    sources[:, windows] = torch.where(merged.unsqueeze(-1), centres.unsqueeze(-1), sources[:, windows])
    means = features[:, windows].float().mean(dim=2).to(features.dtype)
    features = features.clone()
    features[:, centres] = torch.where(merged.unsqueeze(-1), means, features[:, centres])

    key = places.clone()
    if reference_quirks:
        key[:, prefix:] += count
        rank = similarity.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        key[:, centres] = torch.where(merged, prefix + rank, key[:, centres])
    gone = sources != places
    remaining = int((~gone).sum(1).amax())
    order = key.masked_fill(gone, tokens + count).argsort(dim=1, stable=True)[:, :remaining]
    padding = gone.gather(1, order)
    features = features.gather(1, order.unsqueeze(-1).expand(-1, -1, dim)).masked_fill(padding.unsqueeze(-1), 0)
    return Merged(features, order.masked_fill(padding, -1), sources)


def _windows(grid: tuple[int, int], window: tuple[int, int], device: torch.device) -> tuple[Tensor, int]:
    """``(windows, members)`` raster indices of the tokens of each window, and which member is at the centre."""
    (rows, columns), (height, width) = grid, window
    if height * width < 2:
        raise ValueError(f"a window of {height} x {width} has nothing to merge: it needs two tokens at least")
    down, across = rows // height, columns // width
    index = torch.arange(rows * columns, device=device).view(rows, columns)[: down * height, : across * width]
    index = index.reshape(down, height, across, width).transpose(1, 2).reshape(down * across, height * width)
    return index, (height - 1) // 2 * width + (width - 1) // 2

# SPDX-License-Identifier: Apache-2.0
"""Bipartite soft matching (ToMe): the most similar pairs of tokens merge, between the layers of an encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.errors import VTPruneError
from vtprune.ops.bipartite_merging import bipartite_match
from vtprune.ops.token_reduction import Reduction


def layer_counts(layers: int, r: int | tuple[int, float] | Sequence[int]) -> list[int]:
    """How many tokens every layer merges (ToMe, arXiv 2210.09461).

    Args:
        layers: number of layers, at least 1.
        r: one number for all layers; or a list with a number for each layer, where missing ones are 0; or a tuple of
            the mean ``r`` and ``inflect`` in [-1, 1]. The counts then change by equal steps from ``r * (1 - inflect)``
            in the first layer to ``r * (1 + inflect)`` in the last one, rounded down. -1 is the paper's decreasing
            schedule. A single layer merges the mean. All numbers are at least 0.

    Returns:
        One number for each layer. A layer merges fewer tokens if it has too few (:func:`soft_matching`).

    Raises:
        VTPruneError: a number is negative, ``inflect`` is out of its range, or there are more numbers than layers.
    """
    if isinstance(r, int):
        r = (r, 0.0)
    if isinstance(r, tuple):
        mean, inflect = r
        if mean < 0 or abs(inflect) > 1:
            raise VTPruneError(f"r is {r}; expected (r, inflect) with r >= 0 and inflect in [-1, 1]")
        if layers == 1:
            return [mean]
        first = int(mean * (1 - inflect))
        step = (2 * mean - 2 * first) / (layers - 1)
        return [int(first + step * layer) for layer in range(layers)]
    if len(r) > layers or min(r, default=0) < 0:
        raise VTPruneError(f"r is {list(r)}; expected at most {layers} numbers (one a layer), none negative")
    return [*r, *[0] * (layers - len(r))]


@torch.no_grad()
def soft_matching(metric: Tensor, r: int, *, sizes: Tensor | None = None, protected: int = 0) -> Reduction | None:
    """Merge the ``r`` most similar pairs of an even and an odd token (ToMe, arXiv 2210.09461).

    Every even token finds the odd token with the largest cosine. The ``r`` even tokens with the largest cosines go into
    their partners; several may go into the same one. A row is the mean of its tokens, weighted by their sizes.

    Order of the rows: protected tokens, then the unmerged even tokens, then the odd tokens. If tokens are protected,
    the unmerged even tokens keep their order. If none are, they are sorted by falling cosine, as in the reference. The
    order decides which tokens are even in the next layer.

    Deviations: the reference protects a CLS token, or a CLS and a distillation token; here, any number of tokens at the
    front. The cosine with a zero vector is 0, not NaN. Of equal cosines the first token merges. NaN in the metric is
    not looked for: that would wait for the device in every layer.

    Args:
        metric: ``(batch, tokens, dim)``, what tokens are compared by. ToMe: the mean of the keys over heads.
        r: number of tokens to merge. At most half of the tokens that are not protected do.
        sizes: ``(batch, tokens)`` how many original tokens each token stands for. Default: 1 each.
        protected: number of tokens at the front (CLS, registers) that neither merge nor are merged into.

    Returns:
        ``tokens - r`` rows; None if nothing is to be merged.
    """
    batch, tokens, _ = metric.shape
    r = min(r, (tokens - protected) // 2)
    if r <= 0:
        return None
    places = torch.arange(tokens, device=metric.device)
    may_merge = (places >= protected).expand(batch, -1)
    partner, similarity = bipartite_match(metric, may_merge)
    # Protected tokens have similarity -inf and come last.
    order = similarity.argsort(dim=1, descending=True, stable=True)
    merged, unmerged = 2 * order[:, :r], 2 * order[:, r:]
    if protected:
        unmerged = unmerged.sort(dim=1).values
    left = torch.cat([unmerged, places[1::2].expand(batch, -1)], dim=1)
    goes = places.repeat(batch, 1).scatter(1, merged, 2 * partner.gather(1, order[:, :r]) + 1)
    return Reduction.join(left, goes, sizes, protected=protected)


@torch.no_grad()
def kth_matching(
    metric: Tensor, k: int, *, sizes: Tensor | None = None, protected: int = 0, reference_quirks: bool = False
) -> Reduction | None:
    """Keep every ``k``-th token and merge all others (a variant of ToMe, arXiv 2210.09461).

    Of ``k`` tokens in a row, the last one stays. Every other token goes into the token with the largest cosine among
    those that stay. A row is the mean of its tokens, weighted by their sizes. The rows keep their order.

    Deviations: the tokens behind the last full run of ``k`` are merged like the others; the reference drops them. The
    reference protects no token.

    Args:
        metric: ``(batch, tokens, dim)``, what tokens are compared by.
        k: length of a run, at least 1.
        sizes: ``(batch, tokens)`` how many original tokens each token stands for. Default: 1 each.
        protected: number of tokens at the front (CLS, registers) that stay as they are; the runs begin behind them.
        reference_quirks: drop the tokens behind the last full run.

    Returns:
        ``protected + (tokens - protected) // k`` rows; None if ``k`` is 1 or there is no full run.
    """
    batch, tokens, _ = metric.shape
    runs = (tokens - protected) // k
    if k == 1 or runs == 0:
        return None
    places = torch.arange(tokens, device=metric.device)
    full = protected + runs * k
    in_runs = places[protected:full].view(runs, k)
    stays, moving = in_runs[:, -1], torch.cat([in_runs[:, :-1].flatten(), places[full:]])
    nearest = stays[_cosines(metric[:, moving], metric[:, stays]).argmax(dim=2)]
    goes = places.repeat(batch, 1).index_copy(1, moving, nearest)
    if reference_quirks:
        goes[:, full:] = -1
    return Reduction.join(torch.cat([places[:protected], stays]).expand(batch, -1), goes, sizes)


@torch.no_grad()
def random_matching(
    metric: Tensor, r: int, draws: Tensor, *, sizes: Tensor | None = None, protected: int = 0
) -> Reduction | None:
    """Merge ``r`` random tokens (a variant of ToMe, arXiv 2210.09461).

    Each of them goes into the token with the largest cosine among all others. A row is the mean of its tokens, weighted
    by their sizes.

    Deviations: the rows keep the order of the tokens, while the reference shuffles them. The reference protects no
    token.

    Args:
        metric: ``(batch, tokens, dim)``, what tokens are compared by.
        r: number of tokens to merge; at least one token that is not protected stays.
        draws: ``(batch, tokens)`` random numbers below 1; the tokens with the smallest ones merge.
        sizes: ``(batch, tokens)`` how many original tokens each token stands for. Default: 1 each.
        protected: number of tokens at the front (CLS, registers) that neither merge nor are merged into.

    Returns:
        ``tokens - r`` rows; None if nothing is to be merged.
    """
    batch, tokens, dim = metric.shape
    r = min(r, tokens - protected - 1)
    if r <= 0:
        return None
    places = torch.arange(tokens, device=metric.device)
    order = draws.to(metric.device).masked_fill(places < protected, 1).argsort(dim=1, stable=True)
    # Protected tokens come last; stable sorting leaves them in their order, behind all draws below 1.
    merged, left = order[:, :r], order[:, r:].sort(dim=1).values
    moving, staying = (metric.gather(1, index.unsqueeze(-1).expand(-1, -1, dim)) for index in (merged, left))
    cosines = _cosines(moving, staying).masked_fill((left < protected).unsqueeze(1), -torch.inf)
    goes = places.repeat(batch, 1).scatter(1, merged, left.gather(1, cosines.argmax(dim=2)))
    return Reduction.join(left, goes, sizes)


def _cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """(batch, n, dim) and (batch, m, dim) -> (batch, n, m) float32; zero vectors have cosine 0."""
    rows, columns = (normalize(x.float(), dim=-1, eps=1e-8) for x in (rows, columns))
    return rows @ columns.transpose(1, 2)

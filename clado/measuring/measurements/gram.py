"""Losses of single options, and Gram matrices of their changes of the outputs."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clado.measuring.kinds.gram import SAMPLE_SEED, SAMPLED_VALUES, TEMPERATURES, kind
from clado.measuring.plan import Tile
from clado.measuring.sweep import each_option
from clado.measuring.workbench import Array, Workbench, to_numpy


def measure(bench: Workbench, tile: Tile) -> Array:
    """(2 + T K, 1 + K) sums over the images of a sample block.

    Row 0: what `singles` gives, of the same forwards. Row 1: 0 and Σ_n rᵀ u, with the gradient r of the loss at the float outputs
    (p − y; zero for KL). Then K rows for each of TEMPERATURES: 0 and Σ_n u_kᵀ F_n u_l. With classes, F = diag(q) − q qᵀ of
    q = softmax(z / temperature). With v = √q (u − qᵀu) that is the Gram matrix of v, positive semidefinite up to rounding.
    Other criteria give v as a linear map of u (`PackedCriterion.root`), at every temperature the same. Only one pass of u is held
    at a time.
    """
    k = bench.space.num_options
    device, criterion = bench.network.device, bench.packed_criterion
    sums = np.zeros(kind.shape(bench.space))
    first = torch.zeros(k, dtype=torch.float64, device=device)
    grams = torch.zeros((len(TEMPERATURES), k, k), dtype=torch.float64, device=device)
    for part in bench.passes(tile.sample_block):
        loss = part.loss(criterion)
        sums[0, 0] += to_numpy(loss(part.float_logits)).sum()
        dtype = torch.promote_types(part.float_logits.dtype, torch.float32)
        reference = part.float_logits.to(dtype)
        slope = criterion.slope(part.float_logits, part.labels)
        root = None if criterion.root is None else _sampled(criterion.root(part.float_logits, part.labels))
        v: Tensor | None = None
        for options, logits in each_option(bench, part):
            sums[0, [1 + option for option in options]] += to_numpy(loss(logits)).sum(1)
            u = logits - reference  # exact up to its last digit; sums over samples are float64
            where = torch.tensor(options, device=device)
            if slope is not None:
                first[where] += (u * slope).sum((1, 2))
            values = u if root is None else root(u).to(dtype)
            v = values.new_zeros((k, *values.shape[1:])) if v is None else v  # a layer in float changes nothing
            v[where] = values
        assert v is not None  # there are options
        if root is None:
            _add_products(grams, v, torch.stack([(part.float_logits.double() / t).softmax(-1) for t in TEMPERATURES]))
        else:
            grams += _products(v)
    whole = grams.tril() + grams.tril(-1).mT
    sums[0, [1 + option for option in bench.space.float_options]] = sums[0, 0]
    sums[1, 1:], sums[2:, 1:] = to_numpy(first), to_numpy(whole).reshape(-1, k)
    return sums


def _sampled(root: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The root with at most `SAMPLED_VALUES` values (R, N, V) of each sample. Scaled so that sums of products are unbiased.

    The same values are used for every sample and option. So the Gram matrix stays positive semidefinite, and does not depend on
    how samples are cut into passes.
    """

    def sampled(u: Tensor) -> Tensor:
        rows: list[Tensor] = []
        for row in u:  # one option at a time, because all values of large outputs would take too much memory
            v = root(row.unsqueeze(0))[0]
            if (count := v.shape[1]) > SAMPLED_VALUES:
                v = v[:, torch.from_numpy(_drawn(count)).to(v.device)] * (count / SAMPLED_VALUES) ** 0.5
            rows.append(v)
        return torch.stack(rows)

    return sampled


@cache
def _drawn(count: int) -> NDArray[np.int64]:
    """The indices of the values that are kept, ascending."""
    return np.sort(np.random.default_rng(SAMPLE_SEED).choice(count, SAMPLED_VALUES, replace=False))


def _products(v: Tensor) -> Tensor:
    """The Gram matrix (K, K) of v (K, N, V), float64."""
    gram = torch.zeros((len(v), len(v)), dtype=torch.float64, device=v.device)
    for sample in v.transpose(0, 1):
        x = sample.double()
        gram += x @ x.T
    return gram


def _add_products(grams: Tensor, u: Tensor, q: Tensor) -> None:
    """Adds the products v vᵀ of v = √q (u − qᵀu) to grams (T, K, K), float64: on and below the diagonal, and a bit above.

    u (K, N, C), q (T, N, C). A CPU takes a few samples at a time, so that they stay in its cache. Each product has the
    type of u. That is twice as fast, and as exact as differences of logits. A GPU computes all in float64.
    """
    on_cpu = u.device.type == "cpu"
    dtype, elements, rows = (u.dtype, 4096, 32) if on_cpu else (torch.float64, 2**16, 1024)
    q, roots = q.to(dtype), q.sqrt().to(dtype)
    at_once = max(1, elements // u.shape[-1])
    for first in range(0, u.shape[1], at_once):
        samples = slice(first, first + at_once)
        x = u[:, samples].to(dtype)
        means = torch.matmul(x.transpose(0, 1), q[:, samples].permute(1, 2, 0))  # (n, K, T)
        for t, gram in enumerate(grams):
            v = ((x - means[..., t].T[..., None]) * roots[t, samples]).flatten(1)
            for start in range(0, len(v), rows):
                stop = min(start + rows, len(v))
                gram[start:stop, :stop] += v[start:stop] @ v[:stop].T

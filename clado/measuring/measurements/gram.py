"""Losses of single options, and Gram matrices of what they change in the logits."""

import numpy as np
import torch
from torch import Tensor

from clado import criteria
from clado.measuring.kinds.gram import TEMPERATURES, kind
from clado.measuring.plan import Tile
from clado.measuring.sweep import each_option
from clado.measuring.workbench import Array, Workbench, to_numpy


def measure(bench: Workbench, tile: Tile) -> Array:
    """(2 + T K, 1 + K) sums over the images of a sample block.

    Row 0: what `singles` gives, of the same forwards. Row 1: 0 and Σ_n (p − y)ᵀ u (zero for KL). Then K rows for each of
    TEMPERATURES: 0 and Σ_n u_kᵀ F_n u_l, where F = diag(q) − q qᵀ of q = softmax(z / temperature). With v = √q (u − qᵀu) that is
    the Gram matrix of v: positive semidefinite up to rounding. Only one pass of u is held at a time.
    """
    k = bench.space.num_options
    device = bench.network.device
    sums = np.zeros(kind.shape(bench.space))
    first = torch.zeros(k, dtype=torch.float64, device=device)
    grams = torch.zeros((len(TEMPERATURES), k, k), dtype=torch.float64, device=device)
    for part in bench.passes(tile.sample_block):
        criterion = part.criterion(bench.criterion)
        sums[0, 0] += to_numpy(criterion(part.float_logits)).sum()
        dtype = torch.promote_types(part.float_logits.dtype, torch.float32)
        reference = part.float_logits.to(dtype)
        slope = criteria.residual(bench.criterion, part.float_logits, part.labels)
        u = torch.empty((k, *reference.shape), dtype=dtype, device=device)
        for options, logits in each_option(bench, part):
            sums[0, [1 + option for option in options]] += to_numpy(criterion(logits)).sum(1)
            where = torch.tensor(options, device=device)
            u[where] = logits - reference  # exact but for its own last digit; sums over samples are float64
            if slope is not None:
                first[where] += (u[where] * slope).sum((1, 2))
        _add_products(grams, u, torch.stack([(part.float_logits.double() / t).softmax(-1) for t in TEMPERATURES]))
    whole = grams.tril() + grams.tril(-1).mT
    sums[1, 1:], sums[2:, 1:] = to_numpy(first), to_numpy(whole).reshape(-1, k)
    return sums


def _add_products(grams: Tensor, u: Tensor, q: Tensor) -> None:
    """Adds the products v vᵀ of v = √q (u − qᵀu) to grams (T, K, K), float64: on and below the diagonal, and a bit above.

    u (K, N, C), q (T, N, C). A CPU takes a few samples at a time, which its cache holds from step to step. Each product is in the
    type of u. That is twice as fast, and as exact as differences of logits are. A GPU computes all in float64.
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

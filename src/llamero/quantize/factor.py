"""The factor of an inverse, in place: what GPTQ asks of a second moment, in the memory of one matrix.

Block by block, so that every product has the same inner length whatever the number of threads, and the same bytes come
out (a library's own factorization of a large matrix depends on it). Only triangles are computed: 2/3 d^3 operations,
where a factorization followed by solving for the identity takes 4/3 d^3 (Golub & Van Loan, Matrix Computations, 4.2).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llamero.model.device import one_thread

BLOCK = 512
"""Rows of a block."""


def inverse_factor(
    h: Float[Tensor, "d d"], order: Int[Tensor, " d"], *, added: Float[Tensor, " d"]
) -> Float[Tensor, "d d"] | None:
    """Return upper triangular `u` with `u.T @ u` the inverse of `h` in another order, or `None` where there is none.

    With rows and columns reversed, the inverse of the Cholesky factor is `u`, reversed: one factorization where
    inverting first would take two. One matrix of the size of `h` is held beside it, and a few rows.

    Args:
        h: Symmetric matrix.
        order: Of its rows and columns.
        added: To the diagonal of `h`.
    """
    back = order.flip(0)
    a = torch.empty_like(h)
    for rows in _blocks(len(h)):
        a[rows] = h[back[rows]][:, back]
    a.diagonal().add_(added[back])
    if not _cholesky(a):
        return None
    _invert(a)
    _turn(a)
    return a if bool(a.isfinite().all()) else None


def _blocks(size: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]


def _cholesky(a: Tensor) -> bool:
    """Put the Cholesky factor into the lower triangle; the rest is left as it is. Return whether there is one."""
    blocks = _blocks(len(a))
    for number, here in enumerate(blocks):
        with one_thread():
            corner, info = torch.linalg.cholesky_ex(a[here, here])
        if int(info) != 0:
            return False
        a[here, here] = corner
        if number + 1 == len(blocks):
            return True
        below = slice(here.stop, len(a))
        with one_thread():
            column = torch.linalg.solve_triangular(corner.T, a[below, here], upper=True, left=False)
        a[below, here] = column
        for later in blocks[number + 1 :]:
            under = slice(later.start, len(a))
            rows = column[later.start - here.stop :]
            a[under, later].addmm_(rows, rows[: later.stop - later.start].T, alpha=-1)
    return True


def _invert(a: Tensor) -> None:
    """Replace the lower triangle by its inverse, and what is above it by zeros."""
    for here in _blocks(len(a)):
        before, below = slice(0, here.start), slice(here.stop, len(a))
        with one_thread():
            eye = torch.eye(here.stop - here.start, dtype=a.dtype, device=a.device)
            corner = torch.linalg.solve_triangular(a[here, here].tril(), eye, upper=False)
        column = a[below, here].clone()
        a[here, before] = corner @ a[here, before]
        a[here, here] = corner
        a[below, before].addmm_(column, a[here, before], alpha=-1)
        a[below, here] = -(column @ corner)
        a[here, below] = 0


def _turn(a: Tensor) -> None:
    """Reverse rows and columns."""
    flat, half = a.view(-1), a.numel() // 2
    step = len(a) * BLOCK
    for start in range(0, half, step):
        stop = min(start + step, half)
        first, last = flat[start:stop], flat[len(flat) - stop : len(flat) - start]
        kept = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(kept)

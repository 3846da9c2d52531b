"""Blocks of softmax attention that return their log-sum-exp, so that blocks can be merged.

`masked` is the oracle: any mask, at least float32, three lines of mathematics. `documents` is what training
runs: each document attends to itself causally and no mask is ever built. `batched` serves rows of keys with a
bias (a tree of prefixes, pages of a cache), and `merge` joins what two blocks of keys have to say.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

_SHARES_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether this torch lets heads share keys."""

_as_on_cuda: ContextVar[bool] = ContextVar("as_on_cuda", default=False)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Let `documents` go the way of CUDA with the tensors of another device: those of a plan, which have no numbers."""
    token = _as_on_cuda.set(True)
    try:
        yield
    finally:
        _as_on_cuda.reset(token)


def masked(
    q: Float[Tensor, "queries heads d"],
    k: Float[Tensor, "keys kv d"],
    v: Float[Tensor, "keys kv d"],
    mask: Bool[Tensor, "queries keys"],
) -> tuple[Float[Tensor, "queries heads d"], Float[Tensor, "queries heads"]]:
    """Return attention under any mask (True = may look) and its log-sum-exp; every query must see a key."""
    bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
    out, lse = _batched_plain(q[None], k[None], v[None], bias[None])
    return out[0], lse[0]


def batched(
    q: Float[Tensor, "batch queries heads d"],
    k: Float[Tensor, "batch keys kv d"],
    v: Float[Tensor, "batch keys kv d"],
    bias: Float[Tensor, "#batch #queries keys"] | None = None,
) -> tuple[Float[Tensor, "batch queries heads d"], Float[Tensor, "batch queries heads"]]:
    """Return attention of each row to its own keys, with a bias on the scores, and its log-sum-exp.

    Args:
        q: Queries.
        k: Keys; heads share them in groups.
        v: Values.
        bias: 0 where a query may look, -inf where not, float32; `None` lets all look at all.
    """
    if q.device.type != "cpu":
        return _batched_plain(q, k, v, bias)
    qs, ks, vs = (x.transpose(1, 2) for x in (q, k, v))
    if bias is not None:
        bias = bias[:, None].to(wide_dtype(q.dtype))  # for float64 torch would read float32 bits as float64, unasked
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(qs, ks, vs, 0.0, False, attn_mask=bias)
    return out.transpose(1, 2), lse.transpose(1, 2)


SCORES = 2**27
"""Scores that exist at a time where they must."""


def whole(
    q: Float[Tensor, "queries heads d"], k: Float[Tensor, "keys kv d"], v: Float[Tensor, "keys kv d"]
) -> tuple[Float[Tensor, "queries heads d"], Float[Tensor, "queries heads"]]:
    """Return attention of all queries to all keys, and its log-sum-exp; on CUDA it carries no gradient."""
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        borders = (torch.tensor([0, len(x)], dtype=torch.int32, device=q.device) for x in (q, k))
        out, lse = _varlen(q, k, v, *borders, len(q), len(k), window_size=(-1, -1))
        return out, lse.detach()
    rows = len(q) if q.device.type == "cpu" else max(1, SCORES // (len(k) * q.shape[1]))
    parts = [batched(part[None], k[None], v[None]) for part in q.split(rows)]
    if len(parts) == 1:
        return parts[0][0][0], parts[0][1][0]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts])


def _batched_plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    groups, wide = q.shape[2] // k.shape[2], wide_dtype(q.dtype)
    keys, values = (x.to(wide).repeat_interleave(groups, dim=2) for x in (k, v))  # (batch, keys, heads, d)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), keys) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias[:, None]
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
    return out.to(q.dtype), scores.logsumexp(-1).transpose(1, 2)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of scores and log-sum-exp: float32, or float64 for inputs of that."""
    return torch.promote_types(dtype, torch.float32)


def merge(
    a: tuple[Float[Tensor, "queries heads d"], Float[Tensor, "queries heads"]],
    b: tuple[Float[Tensor, "queries heads d"], Float[Tensor, "queries heads"]],
) -> tuple[Float[Tensor, "queries heads d"], Float[Tensor, "queries heads"]]:
    """Return attention to two blocks of keys from attention to each (Milakov & Gimelshein 2018, arXiv:1805.02867)."""
    lse = torch.logaddexp(a[1], b[1])
    share = (b[1] - lse).exp()[..., None]
    return torch.lerp(a[0].to(lse.dtype), b[0].to(lse.dtype), share).to(a[0].dtype), lse


def documents(
    q: Float[Tensor, "tokens heads d"],
    k: Float[Tensor, "tokens kv d"],
    v: Float[Tensor, "tokens kv d"],
    lengths: Sequence[int],
) -> tuple[Float[Tensor, "tokens heads d"], Float[Tensor, "tokens heads"]]:
    """Return causal attention within each of the documents that lie one after the other.

    The log-sum-exp carries no gradient.
    """
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return packed(q, k, v, borders.to(q.device), max(lengths, default=0))


def packed(
    q: Float[Tensor, "tokens heads d"],
    k: Float[Tensor, "tokens kv d"],
    v: Float[Tensor, "tokens kv d"],
    borders: Int[Tensor, " borders"],
    longest: int,
) -> tuple[Float[Tensor, "tokens heads d"], Float[Tensor, "tokens heads"]]:
    """Return what `documents` returns, told where they lie by a tensor, which a compiled program takes as it comes.

    Args:
        q: Queries.
        k: Keys; heads share them in groups.
        v: Values.
        borders: First token of each document, and the end of the last, int32, on the device of the queries.
        longest: At least the tokens of the longest.
    """
    on_cuda = q.is_cuda or (not torch.compiler.is_compiling() and _as_on_cuda.get())
    if on_cuda and q.dtype in (torch.float16, torch.bfloat16):
        out, lse = _packed_cuda(q, k, v, borders, longest)
    elif q.device.type in ("cpu", "meta") and not on_cuda:
        out, lse = torch.ops.llamero.attend_documents(q, k, v, borders)
    else:
        out, lse = masked(q, k, v, same_document(borders.diff().tolist(), device=q.device))
    return out, lse.detach()


def rounded_up(length: int) -> int:
    """Return the next power of two: there are few of them, and each number would be a program of its own."""
    return 1 << max(0, length - 1).bit_length()


def same_document(lengths: Sequence[int], *, device: torch.device | str = "cpu") -> Bool[Tensor, "tokens tokens"]:
    """Return the dense mask that `documents` never builds: same document, and not later."""
    sizes = torch.tensor(lengths, device=device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=device), sizes)
    return (document[:, None] == document[None, :]).tril()


@torch.library.custom_op("llamero::attend_documents", mutates_args=(), device_types="cpu")
def _attend_documents(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    """One call of torch's CPU flash attention per run of documents of equal length.

    An operator with a gradient written by hand, because slicing under autograd would copy all of q, k and v once per
    document, and because the compiler must not look inside: what lies here depends on the lengths of documents.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=wide_dtype(q.dtype))
    for start, count, length in _runs(borders.diff().tolist()):
        qs, ks, vs, os, ls = (_fold(x, start, count, length) for x in (q, k, v, out, lse))
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(qs, ks, vs, 0.0, True)
        os.copy_(part)
        ls.copy_(part_lse)
    return out, lse


@torch.library.custom_op("llamero::attend_documents_backward", mutates_args=(), device_types="cpu")
def _attend_documents_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, borders: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
    for start, count, length in _runs(borders.diff().tolist()):
        qs, ks, vs, os, ls, gs = (_fold(x, start, count, length) for x in (q, k, v, out, lse, grad))
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(gs, qs, ks, vs, os, ls, 0.0, True)
        for whole, part in zip(grads, parts, strict=True):
            _fold(whole, start, count, length).copy_(part)
    return grads[0], grads[1], grads[2]


@_attend_documents.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))


@_attend_documents_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, borders: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_gradient(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, borders = inputs
    ctx.save_for_backward(q, k, v, *output, borders)


def _gradient(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, borders = ctx.saved_tensors
    return *torch.ops.llamero.attend_documents_backward(grad_out, q, k, v, out, lse, borders), None


_attend_documents.register_autograd(_gradient, setup_context=_keep_for_gradient)

DEAR = (torch.ops.llamero.attend_documents.default, torch.ops.torch_attn._varlen_attn.default)
"""The operators behind `packed`: what they return is kept where cheaper things are computed again."""


def _runs(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (first token, documents, length of each) for every run of neighbours of one length."""
    runs: list[tuple[int, int, int]] = []
    position = 0
    for length in lengths:
        if runs and runs[-1][2] == length:
            start, count, _ = runs[-1]
            runs[-1] = (start, count + 1, length)
        elif length:
            runs.append((position, 1, length))
        position += length
    return runs


def _fold(x: Tensor, start: int, count: int, length: int) -> Tensor:
    """Return `count` documents of `x` as (count, heads, length, …), a view."""
    return x[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)


def _packed_cuda(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    return _varlen(q, k, v, borders, borders, longest, longest, window_size=(-1, 0))


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, *where: Tensor | int, window_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return torch's attention of rows of any length; `where` are borders and longest of queries and keys."""
    shares: dict[str, Any] = {}
    if _SHARES_HEADS:
        shares["enable_gqa"] = q.shape[1] != k.shape[1]
    elif q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    aux: Any = AuxRequest(lse=True)
    out, lse = varlen_attn(q, k, v, *where, window_size=window_size, return_aux=aux, **shares)  # type: ignore[arg-type]
    return out, lse.T


def tree_mask(parents: Int[Tensor, " keys"], queries: int) -> Bool[Tensor, "queries keys"]:
    """Return which keys the last `queries` nodes of a tree may see: themselves and their ancestors.

    Args:
        parents: Index of each node's parent, -1 for a root; a parent stands before its children.
        queries: How many nodes, from the end, ask.
    """
    mask = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for start, stop, parent in chains(parents.tolist()):
        if parent >= 0:
            mask[start:stop] = mask[parent]
        mask[start:stop, start:stop] = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
    return mask[len(parents) - queries :].to(parents.device)


def chains(parents: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (start, stop, parent of the first) of the runs of nodes that each follow the node before them."""
    found: list[tuple[int, int, int]] = []
    for node, parent in enumerate(parents):
        if parent >= node:
            raise ValueError(f"node {node} stands before its parent {parent}")
        if found and parent == node - 1:
            start, _, first = found[-1]
            found[-1] = (start, node + 1, first)
        else:
            found.append((node, node + 1, parent))
    return found

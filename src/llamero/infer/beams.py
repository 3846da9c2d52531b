"""Beam search: several beginnings of an answer at a time, and in the end the one that is likeliest per token.

The rules are those of `transformers`: a beginning's score is the sum of its processed log-probabilities; an answer
that ended, by a stop token or at its greatest length, counts by its mean; the search stops once there are as many ended
answers as beams and the best beginning is, by its mean so far, no better than the worst of them (length penalty 1, no
early stopping). Where the sampling draws, candidates are drawn without replacement instead of being the likeliest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llamero.core.errors import LlameroError
from llamero.infer.context import device_of, rotation_of
from llamero.infer.generate import STEP_TOKENS, Request, total_length
from llamero.infer.kv import PagedCache
from llamero.infer.sampler import processed
from llamero.model.llama import Llama


class _Beam(NamedTuple):
    """A beginning."""

    ids: tuple[int, ...]
    score: float
    """Sum of its log-probabilities."""
    row: int
    """In the cache; once it goes on, of the beginning that it goes on from."""


@torch.inference_mode()
def beam_search(model: Llama, request: Request, *, beams: int) -> list[int]:
    """Return the ids of the best answer, the stop token among them if one ends it.

    Args:
        model: The model.
        request: The prompt and how to go on; a temperature of 0 takes the likeliest candidates, else they are drawn.
            Stop strings are not heeded.
        beams: Beginnings that are followed at a time.
    """
    if request.sampling.stop_strings:
        raise ValueError("beams do not know stop strings")
    length = total_length(model, request, where="the prompt")
    most = length - len(request.prompt)
    weight = model.model.norm.weight
    cache = PagedCache(model.config, dtype=weight.dtype, device=weight.device)
    generator = torch.Generator().manual_seed(request.sampling.seed)
    row = cache.add()
    logits = _logits(model, cache, [row], [request.prompt[:STEP_TOKENS]], length)
    for start in range(STEP_TOKENS, len(request.prompt), STEP_TOKENS):
        logits = _logits(model, cache, [row], [request.prompt[start : start + STEP_TOKENS]], length)
    running, ended = [_Beam((), 0.0, row)], list[_Beam]()
    while running:
        found = _candidates(request, running, logits, beams, generator)
        stops = [beam.ids[-1] in request.sampling.stop_ids or len(beam.ids) == most for beam in found]
        ended += [beam for beam, stop in zip(found[:beams], stops, strict=False) if stop]
        ended = sorted(ended, key=_mean, reverse=True)[:beams]
        going = sorted((b for b, stop in zip(found, stops, strict=True) if not stop), key=_score, reverse=True)[:beams]
        if not going or (len(ended) == beams and _mean(going[0]) <= _mean(ended[-1])):
            break
        running = _onward(cache, running, going)
        logits = _logits(model, cache, [b.row for b in running], [b.ids[-1:] for b in running], length)
    if not ended:
        raise LlameroError(
            "no answer ended among the likeliest candidates", fix="sample with fewer restrictions, or take fewer beams"
        )
    return list(ended[0].ids)


def _score(beam: _Beam) -> float:
    return beam.score


def _mean(beam: _Beam) -> float:
    return beam.score / len(beam.ids)


def _logits(
    model: Llama, cache: PagedCache, rows: Sequence[int], ids: Sequence[Sequence[int]], length: int
) -> Float[Tensor, "rows vocab"]:
    """Return what comes after the last of some new tokens of each row."""
    counts = [len(each) for each in ids]
    starts = [cache.length(row) for row in rows]
    layout = cache.reserve(rows, counts)
    rotation = rotation_of(model, starts, counts, [length] * len(rows))
    flat = torch.tensor([id for each in ids for id in each], device=device_of(model))
    hidden = model.hidden(flat, rotation, layout, cache)
    logits = model.lm_head(hidden[(torch.tensor(counts).cumsum(0) - 1).to(hidden.device)]).float()
    if logits.isnan().any():
        raise LlameroError(
            "NaN among the logits",
            fix="load the model in float32 or bfloat16 if it is float16; else its weights are broken",
        )
    return logits


def _candidates(
    request: Request,
    running: Sequence[_Beam],
    logits: Float[Tensor, "rows vocab"],
    beams: int,
    generator: torch.Generator,
) -> list[_Beam]:
    """Return continuations by one token, so many that `beams` of them do not stop; likeliest or first drawn first."""
    sampling, vocabulary = request.sampling, logits.shape[-1]
    log_p = logits.log_softmax(-1).cpu()
    seen = torch.zeros_like(log_p, dtype=torch.bool)
    for number, beam in enumerate(running):
        seen[number, [*request.prompt, *beam.ids]] = True
    ends = [id for id in sampling.stop_ids if id < vocabulary]
    if len(running[0].ids) < sampling.min_new_tokens:
        log_p[:, ends] = -torch.inf
    total = processed(log_p, seen, sampling) + torch.tensor([beam.score for beam in running])[:, None]
    flat = total.flatten()
    keys = flat
    if sampling.temperature != 0:  # the largest of values with Gumbel noise are a draw without replacement
        uniform = torch.rand(flat.shape, generator=generator, dtype=torch.float64)
        keys = flat.double() - (-uniform.log()).log()
    many = min(max(2, 1 + len(ends)) * beams, int(flat.isfinite().sum()))
    chosen = keys.topk(many).indices.tolist()
    return [
        _Beam((*running[at // vocabulary].ids, at % vocabulary), float(flat[at]), running[at // vocabulary].row)
        for at in chosen
    ]


def _onward(cache: PagedCache, before: Sequence[_Beam], going: Sequence[_Beam]) -> list[_Beam]:
    """Return the beginnings with rows of their own: what several go on from is copied, what none does is forgotten."""
    taken: set[int] = set()
    after: list[_Beam] = []
    for beam in going:
        row = cache.copy(beam.row) if beam.row in taken else beam.row
        taken.add(beam.row)
        after.append(beam._replace(row=row))
    for beam in before:
        if beam.row not in taken:
            cache.remove(beam.row)
    return after

"""Log-likelihoods of continuations, without computing a token twice: the walk through a tree of requests.

What a pass of the walk finds does not depend on which passes ran before it, in which process, or whether anything was
interrupted: the tree is cut into passes once, from all requests, and a pass whose path is missing has it computed by
the same passes again. So processes that share the work, and a run that goes on where another was killed, end with the
same bits as one process does.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llamero.core import progress
from llamero.core.errors import LlameroError
from llamero.infer import prefix_tree
from llamero.infer.context import context_length, device_of, rope_length
from llamero.infer.finished import Finished, Others, Part, fingerprint
from llamero.infer.path_cache import PathCache, bytes_needed
from llamero.infer.prefix_tree import PrefixTree, Range, Sequences
from llamero.infer.score import Pair, Scored, Softmax, token_log_probs
from llamero.model.attention import Tree
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama

PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a forward pass, by the device's type; others are as the CPU."""


@dataclass(frozen=True)
class Work:
    """Everything that requests ask of a model."""

    tree: PrefixTree
    passes: tuple[Range, ...]
    places: tuple[int, ...]
    """Which sequence answers each request; equal requests share one."""
    lost: tuple[int, ...]
    """Tokens that the context of each request lost on its left."""
    first: tuple[int, ...]
    """The first request of each sequence."""

    @property
    def tokens(self) -> int:
        """Return the tokens to compute."""
        return len(self.tree)

    @property
    def longest(self) -> int:
        """Return how many tokens the cache must hold: a path and its pass."""
        return max((int(self.tree.depths[start]) + stop - start for start, stop in self.passes), default=0)

    def bytes_needed(self, config: LlamaConfig, dtype: torch.dtype) -> int:
        """Return the memory of keys and values; the pass itself takes what any forward pass of its tokens does."""
        return bytes_needed(config, dtype, self.longest)


def prepare(config: LlamaConfig, requests: Sequence[Pair], *, pass_tokens: int, max_length: int | None = None) -> Work:
    """Return what requests ask of a model, cut into passes.

    Args:
        config: Of the model.
        requests: (context, continuation) ids; neither may be empty.
        pass_tokens: Tokens of a forward pass.
        max_length: Tokens the model may see at a time; `None` is its own context.

    Raises:
        LlameroError: A request cannot be scored; `where` names it.
    """
    limit = context_length(config) if max_length is None else max_length
    unique: dict[tuple[bytes, int], int] = {}
    sequences: list[Sequences] = []
    places, lost, first = [], [], []
    for number, (context, continuation) in enumerate(requests):
        ids, cut = whole(context, continuation, limit=limit, vocabulary=config.vocab_size, where=f"request {number}")
        key = ids.tobytes(), len(continuation)
        if key not in unique:
            unique[key] = len(sequences)
            first.append(number)
            sequences.append(Sequences(ids[:-1], ids[-len(continuation) :], rope_length(config, len(ids) - 1)))
        places.append(unique[key])
        lost.append(cut)
    tree = prefix_tree.grow(sequences)
    return Work(tree, tuple(tree.passes(pass_tokens)), tuple(places), tuple(lost), tuple(first))


def whole(
    context: Sequence[int], continuation: Sequence[int], *, limit: int, vocabulary: int | None, where: str
) -> tuple[prefix_tree.Ids, int]:
    """Return the ids of a request, and how many of them its context lost on its left.

    Args:
        context: Ids.
        continuation: Ids; the last of them is not fed to the model.
        limit: Tokens that the model sees at a time.
        vocabulary: Rows that it has for tokens; `None` where nobody knows.
        where: What errors call the request.

    Raises:
        LlameroError: It cannot be scored.
    """
    if not len(continuation):
        raise LlameroError("the continuation is empty: there is nothing to score", where=where)
    if not len(context):
        raise LlameroError(
            "the context is empty: nothing predicts the first token",
            where=where,
            fix="begin with the beginning-of-text token (or the end-of-text token, as older harnesses do)",
        )
    room = limit + 1 - len(continuation)
    if room < 1:
        raise LlameroError(
            f"the continuation has {len(continuation)} tokens, the model sees {limit} at a time", where=where
        )
    ids = np.array([*context, *continuation], dtype=np.int64)
    wrong = ids[(ids < 0) | (ids >= vocabulary)] if vocabulary is not None else ids[ids < 0]
    if len(wrong):
        raise LlameroError(
            f"token {wrong[0]} is outside the model's vocabulary of {vocabulary}",
            where=where,
            fix="use the tokenizer that belongs to the model",
        )
    cut = max(0, len(context) - room)
    return ids[cut:].astype(np.int32), cut


@torch.inference_mode()
def log_likelihoods(
    model: Llama,
    requests: Sequence[Pair],
    *,
    pass_tokens: int | None = None,
    max_length: int | None = None,
    softmax: Softmax = "float32",
    kept: Path | None = None,
    others: Others | None = None,
) -> list[Scored]:
    """Return the log-likelihood of each continuation after its context, in the order of the requests.

    Whatever requests begin with alike is computed once.

    Args:
        model: The model.
        requests: (context, continuation) ids; neither may be empty.
        pass_tokens: Tokens of a forward pass, `PASS_TOKENS` by default.
        max_length: Tokens the model may see at a time; contexts lose what is too much on their left, and
            `Scored.truncated` says how much. `None` is the model's own context.
        softmax: `model` rounds each log-probability and the sum to the dtype of the model.
        kept: Directory where what is finished is kept, so that a run that was killed goes on.
        others: Processes that share the work; each returns all scores.

    Raises:
        LlameroError: A request cannot be scored, or the answer is not a number; `where` names it.
    """
    dtype = model.model.norm.weight.dtype
    tokens = pass_tokens or PASS_TOKENS.get(device_of(model).type, PASS_TOKENS["cpu"])
    work = prepare(model.config, requests, pass_tokens=tokens, max_length=max_length)
    together = nullcontext() if others is None else others.together()
    finished = Finished(kept, _identity(model, work, softmax), others)
    own = _own_share(work, finished, others)
    with together, _memory_named(model, work, tokens):
        for number, part in _walk(model, work, own, softmax):
            _refuse_nan(work, part)
            finished.add(number, part)
    sums, greedy = np.zeros(len(work.first)), np.ones(len(work.first), dtype=bool)
    for places, found, likeliest in finished.all():
        np.add.at(sums, places, found)
        greedy[places[~likeliest]] = False
    if softmax == "model":
        sums = torch.from_numpy(sums).to(dtype).double().numpy()
    return [
        Scored(float(sums[place]), bool(greedy[place]), len(request[1]), cut)
        for place, request, cut in zip(work.places, requests, work.lost, strict=True)
    ]


@contextmanager
def _memory_named(model: Llama, work: Work, tokens: int) -> Iterator[None]:
    """Say what did not fit, and what would."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = work.bytes_needed(model.config, model.model.norm.weight.dtype) / 2**30
        raise LlameroError(
            f"the device has no memory left for keys and values ({size:.2f} GiB) and a pass of {tokens:,} tokens",
            fix="use bfloat16, a quantized version of the model, or a larger device",
        ) from error


def _identity(model: Llama, work: Work, softmax: Softmax) -> list[str]:
    """Return what decides every bit of what is found."""
    arrays = (work.tree.ids, work.tree.parents, work.tree.asked_nodes, work.tree.asked_ids, work.tree.asked_places)
    digests = [hashlib.sha256(np.ascontiguousarray(each).tobytes()).hexdigest() for each in arrays]
    return [fingerprint(model), *digests, str(work.passes), softmax, torch.__version__, device_of(model).type]


def _own_share(work: Work, finished: Finished, others: Others | None) -> list[int]:
    """Return the passes that this process is to finish."""
    left = [number for number in range(len(work.passes)) if number not in finished]
    if others is None:
        return left
    return prefix_tree.shares(work.tree, work.passes, left, others.size)[others.rank]


def _walk(model: Llama, work: Work, wanted: Sequence[int], softmax: Softmax) -> Iterator[tuple[int, Part]]:
    """Yield what the wanted passes find."""
    tree, run = work.tree, prefix_tree.needed(work.tree, work.passes, set(wanted))
    weight = model.model.norm.weight
    longest = max((_keys(work, number) for number in run), default=0)
    cache = PathCache(model.config, longest, dtype=weight.dtype, device=weight.device)
    asked, last = set(wanted), None
    with progress.Line("score", total=sum(_nodes(work, number) for number in run), unit="tokens") as line:
        for number in run:
            here = work.passes[number]
            if last is not None:
                cache.keep(prefix_tree.slots(tree, last, here[0]))
            start, stop = np.searchsorted(tree.asked_nodes, here)
            nodes, rows = np.unique(tree.asked_nodes[start:stop] - here[0], return_inverse=True)
            hidden = _forward(model, cache, tree, here, nodes if len(nodes) else np.zeros(1, dtype=np.int64))
            if number in asked:
                yield number, _found(model, tree, slice(start, stop), (hidden, rows), softmax)
            last = here
            line.advance(here[1] - here[0])


def _nodes(work: Work, number: int) -> int:
    start, stop = work.passes[number]
    return stop - start


def _keys(work: Work, number: int) -> int:
    return int(work.tree.depths[work.passes[number][0]]) + _nodes(work, number)


def _forward(model: Llama, cache: PathCache, tree: PrefixTree, here: Range, nodes: prefix_tree.Ids) -> Tensor:
    """Return the last hidden states of some nodes of a pass; none of the others goes through the last MLP."""
    device, part = device_of(model), slice(*here)
    cache.begin(int(tree.depths[here[0]]))
    layout = Tree(torch.from_numpy(prefix_tree.local_parents(tree, here)).to(device), here[1] - here[0])
    lengths = tree.lengths[part].tolist()
    positions = torch.from_numpy(tree.depths[part].astype(np.int64)).to(device)
    rotation = model.rotation(positions, lengths[:1] if len(set(lengths)) == 1 else lengths)
    ids = torch.from_numpy(tree.ids[part].astype(np.int64)).to(device)
    return model.hidden(ids, rotation, layout, cache, only=torch.from_numpy(nodes).to(device))


def _found(
    model: Llama, tree: PrefixTree, asked: slice, seen: tuple[Tensor, prefix_tree.Ids], softmax: Softmax
) -> Part:
    """Return what is asked in a pass: sums per sequence, and whether all its tokens were the likeliest.

    Args:
        model: The model.
        tree: The tree.
        asked: Which of what is asked of the tree.
        seen: Hidden states, and the row of them that each of what is asked is about.
        softmax: As of `log_likelihoods`.
    """
    hidden, rows = seen
    targets, places = (torch.from_numpy(each[asked].astype(np.int64)) for each in (tree.asked_ids, tree.asked_places))
    found, likeliest = token_log_probs(model, hidden, torch.from_numpy(rows.astype(np.int64)), targets)
    if softmax == "model":
        found = found.to(hidden.dtype).double()
    unique, inverse = places.unique(return_inverse=True)
    sums = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, inverse, found)
    greedy = torch.ones(len(unique), dtype=torch.bool)
    greedy[inverse[~likeliest]] = False
    return unique.numpy(), sums.numpy(), greedy.numpy()


def _refuse_nan(work: Work, part: Part) -> None:
    places, sums, _ = part
    broken = [work.first[place] for place in places[np.isnan(sums)].tolist()]
    if broken:
        raise LlameroError(
            "NaN among the logits",
            where=f"request {min(broken)}",
            fix="load the model in float32 or bfloat16 if it is float16; else its weights are broken",
        )

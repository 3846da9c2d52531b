"""How many tokens a model takes, and which rotation each of them gets when sequences meet in one forward pass."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama
from llamero.model.rope import Dynamic, Linear, Yarn
from llamero.text.tokenizer import Tokenizer


def context_length(config: LlamaConfig) -> int:
    """Return the longest sequence that the model is meant for.

    `max_position_embeddings` is the stretched length for llama3 and usually for yarn, the original one for
    linear and dynamic scaling: the reading of vLLM and of the models' own cards.
    """
    match config.rope:
        case Linear(factor=factor) | Dynamic(factor=factor):
            return int(config.max_position_embeddings * factor)
        case Yarn(factor=factor, original_context=original):
            return max(config.max_position_embeddings, int(original * factor))
        case _:
            return config.max_position_embeddings


def rope_length(config: LlamaConfig, length: int) -> int:
    """Return one number for all lengths at which the frequencies of a sequence are the same."""
    match config.rope:
        case Dynamic(original_context=original):
            return max(length, original)
        case _:
            return config.max_position_embeddings


def rotation_of(
    model: Llama, starts: Sequence[int], counts: Sequence[int], lengths: Sequence[int]
) -> Float[Tensor, "tokens half 2"]:
    """Return the rotations of stretches of tokens that lie one after the other.

    Args:
        model: The model.
        starts: Position of the first token of each stretch in its own sequence.
        counts: Tokens of each stretch.
        lengths: Full length of each stretch's sequence.
    """
    device = device_of(model)
    first = torch.tensor(starts) - torch.tensor([0, *counts[:-1]]).cumsum(0)
    positions = torch.arange(sum(counts)) + first.repeat_interleave(torch.tensor(counts))
    known = [rope_length(model.config, length) for length in lengths]
    if len(set(known)) == 1:
        return model.rotation(positions.to(device), known[:1])
    each = [length for length, count in zip(known, counts, strict=True) for _ in range(count)]
    return model.rotation(positions.to(device), each)


def device_of(model: Llama) -> torch.device:
    """Return where the model lives."""
    return model.model.norm.weight.device


def check_ids(model: Llama, ids: Sequence[int], *, where: str) -> None:
    """Refuse ids that the model has no row for.

    Args:
        model: The model.
        ids: Token ids.
        where: Which text they are of, for the error.
    """
    vocabulary = model.config.vocab_size
    bad = [id for id in (min(ids), max(ids)) if not 0 <= id < vocabulary] if ids else []
    if bad:
        raise LlameroError(
            f"token {bad[0]} is outside the model's vocabulary of {vocabulary}",
            where=where,
            fix="use the tokenizer that belongs to the model",
        )


def check_tokenizer(model: Llama, tokenizer: Tokenizer, *, where: str | Path) -> None:
    """Refuse a tokenizer with ordinary tokens that the model has no row for; special ones may be left unused."""
    rows = model.config.vocab_size
    special = {tokenizer.id(token) for token in tokenizer.special_tokens}
    beyond = [id for id in range(rows, len(tokenizer)) if id not in special]
    if beyond:
        raise LlameroError(
            f"the tokenizer has {len(tokenizer)} tokens, the model has rows for {rows}: it belongs to another model",
            where=where,
            fix="use the tokenizer that came with the model",
        )

"""Files of tiktoken ranks (Llama 3) as byte-level BPE models of `tokenizers` that give the same ids.

A line holds the base64 of a token's bytes and its rank, which is its id and its priority in merging.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What Llama 3 never merges across (meta-llama/llama3, llama/tokenizer.py)."""

ONE_DIGIT_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
"""What Qwen 2 never merges across."""

LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)
"""The 256 special tokens of the first Llama 3 release, in the order of their ids."""

_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


def looks_like_tiktoken(head: bytes) -> bool:
    """True if a file begins with a line of ranks."""
    return _LINE.match(head) is not None


def from_tiktoken(path: Path, special: Sequence[str] = LLAMA3_SPECIAL) -> tokenizers.Tokenizer:
    """Return the byte-level BPE of a file of ranks.

    Args:
        path: One `base64 rank` line per token.
        special: Special tokens; they take the ids after the highest rank, in this order.
    """
    ranks = _read_ranks(path)
    letters = _byte_letters()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={written[token]: rank for token, rank in ranks.items()},
            merges=_merges(ranks, written),
            ignore_merges=True,  # a piece of text that is a token as a whole becomes it at once, as in tiktoken
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return backend


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise LlameroError(
                "not a line of tiktoken ranks (base64, space, rank)",
                where=f"{path}:{number}",
                fix="fetch the file again",
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise LlameroError(
            f"the ranks are not 0 to {len(ranks) - 1}, each once", where=path, fix="fetch the file again"
        )
    return ranks


def _merges(ranks: dict[bytes, int], written: dict[bytes, str]) -> list[tuple[str, str]]:
    """Return every split of a token into two tokens, lowest rank first."""
    found: list[tuple[int, int, int, bytes, bytes]] = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], left, right))
    found.sort()
    return [(written[left], written[right]) for *_, left, right in found]


def _byte_letters() -> list[str]:
    """Return the visible letter that byte-level BPE writes for each byte (GPT-2's table)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in visible}
    hidden = (byte for byte in range(256) if byte not in letters)
    letters |= {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]

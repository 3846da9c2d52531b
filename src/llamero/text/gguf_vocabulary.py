"""Tokenizers that GGUF files carry in their metadata, as `tokenizers` models that give the same ids.

Two kinds are a Llama's: SentencePiece pieces with scores (`llama`), and byte-level BPE with merges (`gpt2`). Of the
latter a file does not say how a text is split before it is merged, only a name (`tokenizer.ggml.pre`) that llama.cpp
knows an expression for (src/llama-vocab.cpp); a name that does not stand below is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from llamero.core.errors import LlameroError, did_you_mean
from llamero.text.sentencepiece_bpe import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Scored, from_pieces
from llamero.text.tiktoken_bpe import LLAMA3_SPLIT, ONE_DIGIT_SPLIT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

KEY = "tokenizer.ggml."
KIND = f"{KEY}model"
"""Key that a file has if it carries a tokenizer."""

NEW_PRE = "name it with the `gguf` package: gguf-new-metadata --pre-tokenizer NAME OLD.gguf NEW.gguf"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Pre(NamedTuple):
    """How a text is split before it is merged.

    Args:
        split: Makes the parts, of `tokenizers`.
        ignore_merges: A part that is a token as a whole becomes it at once.
        add_bos: Whether a text begins with the beginning-of-text token where the file does not say.
    """

    split: pre_tokenizers.PreTokenizer
    ignore_merges: bool = False
    add_bos: bool = False


def _split(*expressions: str) -> pre_tokenizers.PreTokenizer:
    """Cut at the matches of each expression in turn, then write bytes as letters."""
    steps = [pre_tokenizers.Split(Regex(each), behavior="isolated") for each in expressions]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


PRE: dict[str, Pre] = {
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"),
        Pre(_split(LLAMA3_SPLIT), ignore_merges=True, add_bos=True),
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx"), Pre(_split(LLAMA3_SPLIT))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), Pre(_split(ONE_DIGIT_SPLIT))),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "exaone4"), Pre(_gpt2())),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), Pre(_digits_gpt2())
    ),
    "tekken": Pre(_split(_TEKKEN), ignore_merges=True, add_bos=True),
    "default": Pre(_split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
"""Every way of splitting that is known, by its name in GGUF files. To add one: a line here, and one in its test."""


class FromGguf(NamedTuple):
    """A backend and what the metadata say of it; the arguments of `Tokenizer`."""

    backend: tokenizers.Tokenizer
    bos: str | None
    eos: str | None
    unk: str | None
    pad: str | None
    add_bos: bool
    chat_template: str | None


def from_metadata(metadata: Mapping[str, Any], *, where: Path | str) -> FromGguf:
    """Return the tokenizer that the metadata of a GGUF file describe.

    Args:
        metadata: Keys and plain values.
        where: The file, for errors.

    Raises:
        LlameroError: There is none, it is of a kind that is no Llama's, or its lists do not fit each other.
    """
    kind = metadata.get(KIND)
    if kind is None:
        raise LlameroError("the file carries no tokenizer", where=where, fix="convert the model again, with one")
    if kind not in _KINDS:
        raise LlameroError(
            f"its tokenizer is of the kind `{kind}`; only {' and '.join(f'`{each}`' for each in _KINDS)} are a Llama's",
            where=where,
        )
    tokens = _Tokens(metadata, where)
    return _KINDS[kind](metadata, tokens, where)


class _Tokens:
    """The vocabulary of a file."""

    def __init__(self, metadata: Mapping[str, Any], where: Path | str) -> None:
        self._metadata, self._where = metadata, where
        self.texts: list[str] = self.listed("tokens", len(metadata.get(f"{KEY}tokens", ())))
        if not self.texts:
            raise LlameroError(f"`{KEY}tokens` is empty", where=where)
        known: dict[str, int] = {}
        for id, text in enumerate(self.texts):
            if not _is_text(text):
                raise LlameroError(f"token {id} is no UTF-8 text ({text!r})", where=where)
            if text in known:
                raise LlameroError(f"token {text!r} has the ids {known[text]} and {id}", where=where)
            known[text] = id
        types = f"{KEY}token_type" in metadata
        self.types: list[int] = self.listed("token_type", len(self.texts)) if types else [NORMAL] * len(self.texts)

    def listed(self, name: str, length: int) -> list[Any]:
        """Return a list that must be there, and have this length."""
        found = self._metadata.get(KEY + name)
        if not isinstance(found, list):
            raise LlameroError(f"`{KEY}{name}` is missing", where=self._where)
        if len(found) != length:
            raise LlameroError(f"`{KEY}{name}` has {len(found)} entries for {length} tokens", where=self._where)
        return found

    def named(self, part: str, default: int | None = None) -> str | None:
        """Return the token that plays a part, such as `bos`; an id without a token means that there is none."""
        id = self._metadata.get(f"{KEY}{part}_token_id", default)
        return self.texts[id] if id is not None and 0 <= id < len(self.texts) else None

    def add_to(self, backend: tokenizers.Tokenizer, types: Sequence[int]) -> None:
        """Let tokens of some types be found in a text as they are, before it is split; those for control are special.

        They must be known by the ids that they have in the file.
        """
        added = [
            AddedToken(text, normalized=False, special=type != USER_DEFINED)
            for text, type in zip(self.texts, self.types, strict=True)
            if type in types
        ]
        backend.add_tokens(added)


def _is_text(token: str) -> bool:
    """Return whether a token was UTF-8 in the file: other bytes are read as surrogates."""
    return token.isascii() or not any("\ud800" <= character <= "\udfff" for character in token)


def _spm(metadata: Mapping[str, Any], tokens: _Tokens, where: Path | str) -> FromGguf:
    """SentencePiece BPE."""
    changes = {
        "a character map (NFKC or other)": metadata.get(f"{KEY}precompiled_charsmap"),
        "removal of extra spaces": metadata.get(f"{KEY}remove_extra_whitespaces"),
        "spaces as suffix": metadata.get(f"{KEY}treat_whitespace_as_suffix"),
    }
    unknown = [name for name, present in changes.items() if present]
    if unknown:
        raise LlameroError(
            f"a SentencePiece model with {', '.join(unknown)}, which is not reproduced here", where=where
        )
    scores = tokens.listed("scores", len(tokens.texts))
    pieces = [Scored(*each) for each in zip(tokens.texts, scores, tokens.types, strict=True)]
    unk = tokens.named("unknown", default=0)
    if unk is None:
        raise LlameroError("no token stands for what is unknown", where=where)
    backend = from_pieces(pieces, unk=tokens.texts.index(unk), dummy_space=metadata.get(f"{KEY}add_space_prefix", True))
    tokens.add_to(backend, [USER_DEFINED])
    bos, eos = tokens.named("bos", default=1), tokens.named("eos", default=2)
    return _with_conventions(metadata, tokens, FromGguf(backend, bos, eos, unk, None, bos is not None, None))


def _bpe(metadata: Mapping[str, Any], tokens: _Tokens, where: Path | str) -> FromGguf:
    """Byte-level BPE."""
    name = metadata.get(f"{KEY}pre")
    if name not in PRE:
        problem = (
            "the file does not say how its tokenizer splits a text (`tokenizer.ggml.pre`), as those before May 2024"
            if name is None
            else f"its tokenizer splits texts by `{name}`, which is not known here"
        )
        near = "" if name is None else did_you_mean(name, PRE)
        raise LlameroError(problem, where=where, fix=f"{near}; {NEW_PRE}" if near else NEW_PRE)
    pre = PRE[name]
    merges = metadata.get(f"{KEY}merges")
    if not isinstance(merges, list):
        raise LlameroError(f"`{KEY}merges` is missing", where=where)
    pairs = [tuple(merge.split(" ")) for merge in merges]
    first = _first_added(tokens.types)
    vocabulary = {text: id for id, text in enumerate(tokens.texts[:first])}
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise LlameroError(f"merge {' '.join(pair)!r} is not of tokens of the vocabulary", where=where)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre.ignore_merges))
    backend.pre_tokenizer = pre.split
    backend.decoder = decoders.ByteLevel()
    tokens.add_to(backend, [CONTROL, UNKNOWN, USER_DEFINED])
    bos, eos, unk = tokens.named("bos"), tokens.named("eos"), tokens.named("unknown")
    return _with_conventions(
        metadata, tokens, FromGguf(backend, bos, eos, unk, None, pre.add_bos and bos is not None, None)
    )


def _first_added(types: Sequence[int]) -> int:
    """Return the id from which on all tokens are added ones: no merge makes them, and no text that spells them."""
    first = len(types)
    while first and types[first - 1] in (CONTROL, UNKNOWN, USER_DEFINED):
        first -= 1
    return first


def _with_conventions(metadata: Mapping[str, Any], tokens: _Tokens, made: FromGguf) -> FromGguf:
    return made._replace(
        pad=tokens.named("padding"),
        add_bos=metadata.get(f"{KEY}add_bos_token", made.add_bos),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


_KINDS = {"llama": _spm, "gpt2": _bpe}
"""Every kind of tokenizer that a Llama has, by its name in GGUF files."""

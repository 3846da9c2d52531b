"""A tokenizer as the metadata of a GGUF file; `gguf_vocabulary` reads them back.

How a text is split before it is merged has only a name there, which is found by the tokenizer's own expression. What
was written is read back and must give the same ids, or the file is not made.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import tokenizers
from tokenizers import models

from llamero.core.errors import LlameroError
from llamero.core.gguf import Value
from llamero.text.gguf_vocabulary import KEY, PRE, from_metadata
from llamero.text.sentencepiece_bpe import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from llamero.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Json = dict[str, Any]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` of `tokenizers` splits by where it is told to."""

PROBES = (
    "The quick brown fox doesn't jump over 1,234,567 lazy dogs; it's 3.14159 o'clock!",
    "def f(x):\n    return {'a': [x ** 2, -1]}  # done\r\n\n\n\t\ttabs\tand  two   three    spaces ",
    "Ünïcödé — “quotes” … 日本語のテキスト 한국어 Русский עברית हिन्दी 👩‍👩‍👧‍👦 🦙",
    "   leading, trailing   ",
    "aaaaaaaaaaaaaaaaaaaa 0000000000 ||||==== <s></s> e\u0301 \u00a0\u2003",
    "",
)
"""Texts that a tokenizer and its copy must agree on."""


class Written(NamedTuple):
    """Metadata, and what of the tokenizer is not in them."""

    values: dict[str, Value]
    notes: tuple[str, ...]


def to_metadata(
    tokenizer: Tokenizer, *, vocab_size: int, ends: Sequence[int] = (), scores: Mapping[str, float] | None = None
) -> Written:
    """Return the metadata of a tokenizer.

    Args:
        tokenizer: To be written.
        vocab_size: Rows of the model's embedding; ids without a token get a name that no text has.
        ends: Ids that end a generation, where there are more than the tokenizer's own.
        scores: Of the pieces of a SentencePiece model; without them those that give the same order of merges.

    Raises:
        LlameroError: The tokenizer has more ids than the model, or is of a kind that GGUF files do not hold.
    """
    spec: Json = json.loads(tokenizer.backend.to_str())
    if len(tokenizer) > vocab_size:
        raise LlameroError(
            f"the tokenizer has {len(tokenizer)} ids, the model's vocabulary {vocab_size}",
            where="tokenizer.json",
            fix="the tokenizer is of another model, or the embedding was never resized for its new tokens",
        )
    texts, types = _tokens(tokenizer, spec, vocab_size)
    if spec["model"].get("type") == "BPE" and spec["model"].get("byte_fallback"):
        values, notes = _sentencepiece(tokenizer, spec, texts, types, scores)
    elif spec["model"].get("type") == "BPE" and _writes_bytes(spec):
        values, notes = _bytes(spec, texts)
    else:
        raise LlameroError(
            f"a tokenizer of type {spec['model'].get('type')} that is neither SentencePiece's BPE nor one of bytes",
            where="tokenizer.json",
            fix="publish another layout than GGUF",
        )
    values[f"{KEY}tokens"] = Value("string", texts)
    values[f"{KEY}token_type"] = Value("int32", types)
    values |= _parts(tokenizer, ends)
    if tokenizer.chat_template is not None:
        values["tokenizer.chat_template"] = Value("string", tokenizer.chat_template)
    _check(tokenizer, values)
    return Written(values, (*notes, *_unnamed_ends(tokenizer, ends)))


def _tokens(tokenizer: Tokenizer, spec: Json, vocab_size: int) -> tuple[list[str], list[int]]:
    """Return text and type of every id."""
    added: dict[int, Json] = {token["id"]: token for token in spec["added_tokens"]}
    bytes_too = spec["model"].get("byte_fallback", False)
    by_id = {id: text for text, id in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    texts, types = [], []
    for id in range(vocab_size):
        text = by_id.get(id)
        if text is None:
            text, kind = f"[PAD{id}]", UNUSED
        elif text == tokenizer.unk:
            kind = UNKNOWN
        elif id in added:
            kind = CONTROL if added[id]["special"] else USER_DEFINED
        else:
            kind = BYTE if bytes_too and _is_byte(text) else NORMAL
        texts.append(text)
        types.append(kind)
    return texts, types


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _parts(tokenizer: Tokenizer, ends: Sequence[int]) -> dict[str, Value]:
    """Return which tokens play which part, and what a text begins with."""
    unk = None if tokenizer.unk is None else tokenizer.id(tokenizer.unk)
    more = [id for id in ends if id != tokenizer.eos_id]
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "unknown": unk,
        "padding": tokenizer.pad_id,
        "eot": more[0] if more else None,
        "eom": more[1] if len(more) > 1 else None,
    }
    return {
        **{f"{KEY}{part}_token_id": Value("uint32", id) for part, id in ids.items() if id is not None},
        f"{KEY}add_bos_token": Value("bool", tokenizer.add_bos),
        f"{KEY}add_eos_token": Value("bool", False),
    }


def _unnamed_ends(tokenizer: Tokenizer, ends: Sequence[int]) -> tuple[str, ...]:
    more = [id for id in ends if id != tokenizer.eos_id][2:]
    return (f"GGUF files name three tokens that end a text; left out: ids {more}",) if more else ()


# -- SentencePiece


def _sentencepiece(
    tokenizer: Tokenizer, spec: Json, texts: list[str], types: list[int], scores: Mapping[str, float] | None
) -> tuple[dict[str, Value], tuple[str, ...]]:
    known = _scores(spec, texts, types) if scores is None else scores
    listed = [known.get(text, 0.0) if kind == NORMAL else 0.0 for text, kind in zip(texts, types, strict=True)]
    values = {
        f"{KEY}model": Value("string", "llama"),
        f"{KEY}pre": Value("string", "default"),
        f"{KEY}scores": Value("float32", listed),
        f"{KEY}add_space_prefix": Value("bool", tokenizer.dummy_space != "none"),
    }
    first = tokenizer.dummy_space == "first"
    note = "readers of GGUF also put a space before what follows a special token; this tokenizer does so only at first"
    return values, (note,) if first else ()


def _scores(spec: Json, texts: list[str], types: list[int]) -> dict[str, float]:
    """Return scores that fall in the order in which merges make pieces; SentencePiece's own are such."""
    made = dict.fromkeys("".join(_pair(merge)) for merge in spec["model"]["merges"])
    rest = [text for text, kind in zip(texts, types, strict=True) if kind == NORMAL and text not in made]
    return {text: -float(number) for number, text in enumerate([*made, *rest])}


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


# -- bytes


def _writes_bytes(spec: Json) -> bool:
    return any(step[0] == "bytes" for step in _steps(spec["pre_tokenizer"]))


def _bytes(spec: Json, texts: list[str]) -> tuple[dict[str, Value], tuple[str, ...]]:
    name, notes = _pre(spec)
    if spec["normalizer"] is not None:
        notes = (*notes, f"readers of GGUF do not apply its normalizer {spec['normalizer']['type']}")
    merges = [" ".join(_pair(merge)) for merge in spec["model"]["merges"]]
    values = {
        f"{KEY}model": Value("string", "gpt2"),
        f"{KEY}pre": Value("string", name),
        f"{KEY}merges": Value("string", merges),
    }
    return values, notes


def _pre(spec: Json) -> tuple[str, tuple[str, ...]]:
    """Return the name under which readers know how this tokenizer splits a text."""
    mine, whole = _steps(spec["pre_tokenizer"]), bool(spec["model"].get("ignore_merges"))
    same = [name for name, pre in PRE.items() if _steps(_spec_of(name)) == mine]
    exact = [name for name in same if PRE[name].ignore_merges == whole]
    if exact:
        return exact[0], ()
    if same:
        difference = "take" if PRE[same[0]].ignore_merges else "do not take"
        return same[0], (f"readers of GGUF {difference} a part that is a token as it is, before any merge",)
    expressions = [step[1] for step in mine if step[0] == "split"]
    raise LlameroError(
        f"GGUF files have no name for how this tokenizer splits a text: {' then '.join(expressions) or mine}",
        where="tokenizer.json: pre_tokenizer",
        fix=f"known are: {', '.join(PRE)}; if llama.cpp knows another, add it to `llamero.text.gguf_vocabulary.PRE`",
    )


def _spec_of(name: str) -> Json:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = PRE[name].split
    return json.loads(backend.to_str())["pre_tokenizer"]


def _steps(pre: Json | None) -> list[tuple[str, ...]]:
    """Return what a pre-tokenizer does, one step after another, the same for two that do the same."""
    if pre is None:
        return []
    kind = pre["type"]
    if kind == "Sequence":
        return [step for part in pre["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel" and not pre["add_prefix_space"]:
        return [*([("split", _GPT2)] if pre.get("use_regex", True) else []), ("bytes",)]
    if kind == "Split" and pre["behavior"] == "Isolated" and not pre["invert"] and "Regex" in pre["pattern"]:
        return [("split", pre["pattern"]["Regex"])]
    if kind == "Digits" and pre["individual_digits"]:
        return [("split", r"\p{N}")]
    return [("other", json.dumps(pre, sort_keys=True))]


# -- the proof


def _check(tokenizer: Tokenizer, values: Mapping[str, Value]) -> None:
    """Refuse metadata from which another tokenizer would be read."""
    plain = {key: value.value for key, value in values.items()}
    again = Tokenizer(**from_metadata(plain, where="the GGUF file to be written")._asdict())
    step = max(1, len(tokenizer) // 4096)
    own = tokenizer.decode(sorted(range(0, len(tokenizer), step), key=lambda id: (id * 7919) % 65537))
    for text in (*PROBES, own):
        ours, theirs = tokenizer.encode(text), again.encode(text)
        if ours != theirs:
            same = next(i for i in range(len(ours) + 1) if ours[:i] != theirs[:i])
            near = slice(max(0, same - 4), same + 4)
            raise LlameroError(
                f"GGUF files cannot hold this tokenizer: of {tokenizer.decode(ours[near])!r} it makes {ours[near]}, "
                f"read back {theirs[near]}",
                where="tokenizer.json",
                fix="publish another layout than GGUF",
            )

"""One tokenizer for all stages: text to ids and back, over the `tokenizers` library.

It never adds a beginning or an end of its own: who renders a conversation or packs a document says where they go.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from llamero.core import gguf
from llamero.core.errors import LlameroError
from llamero.text.gguf_vocabulary import from_metadata
from llamero.text.sentencepiece_bpe import from_sentencepiece, looks_like_sentencepiece
from llamero.text.tiktoken_bpe import LLAMA3_SPECIAL, from_tiktoken, looks_like_tiktoken
from llamero.text.tokenizer_config import TokenizerConfig, read_json
from llamero.text.words import words_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from llamero.text.words import Words

Json = dict[str, Any]


class Encoded(NamedTuple):
    """Ids of a text, and for each the first character it stands for and the one after its last."""

    ids: list[int]
    spans: list[tuple[int, int]]


class Tokenizer:
    """Text to ids and back.

    Args:
        backend: What does the work; belongs to this object from now on.
        bos: Begins a text.
        eos: Ends a text.
        unk: Stands for what the vocabulary cannot write.
        pad: Fills a batch.
        add_bos: This tokenizer's own convention: a text begins with `bos`.
        chat_template: The model's own Jinja.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos: str | None,
        eos: str | None,
        unk: str | None = None,
        pad: str | None = None,
        add_bos: bool = False,
        chat_template: str | None = None,
    ) -> None:
        if add_bos and bos is None:
            raise LlameroError(
                "the tokenizer puts a beginning-of-text token in front, but names none",
                where="tokenizer_config.json",
                fix="set `bos_token`, or `add_bos_token: false`",
            )
        self.backend = backend
        self.bos, self.eos, self.unk, self.pad = bos, eos, unk, pad
        self.add_bos = add_bos
        self.chat_template = chat_template
        backend.no_truncation()
        backend.no_padding()
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        for token in (bos, eos, unk, pad):
            if token is None or token in special:
                continue
            if self.id(token) is None:
                raise LlameroError(
                    f"the tokenizer names {token!r} as a special token, but its vocabulary has no such token",
                    where="tokenizer_config.json",
                    fix="add the token to tokenizer.json (`added_tokens`) or take the name away",
                )
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        self._variants: dict[tuple[bool, bool], tokenizers.Tokenizer] = {(True, False): backend}

    def __len__(self) -> int:
        """The number of rows that an embedding needs: the highest id + 1."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def __getstate__(self) -> Json:
        return {key: value for key, value in self.__dict__.items() if key not in ("_variants", "words")}

    def __setstate__(self, state: Json) -> None:
        self.__dict__.update(state)
        self._variants = {(True, False): self.backend}

    @property
    def bos_id(self) -> int | None:
        """Id of `bos`."""
        return None if self.bos is None else self.id(self.bos)

    @property
    def eos_id(self) -> int | None:
        """Id of `eos`."""
        return None if self.eos is None else self.id(self.eos)

    @property
    def pad_id(self) -> int | None:
        """Id of `pad`."""
        return None if self.pad is None else self.id(self.pad)

    def id(self, token: str) -> int | None:
        """The id of a token, None if there is no such token."""
        return self.backend.token_to_id(token)

    def token(self, id: int) -> str:
        """The token of an id, as the vocabulary writes it."""
        token = self.backend.id_to_token(id)
        if token is None:
            raise ValueError(f"no token has id {id}; the vocabulary has {len(self)} ids")
        return token

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Every special token, by id."""
        added = self.backend.get_added_tokens_decoder()
        return tuple(token.content for _, token in sorted(added.items()) if token.special)

    @cached_property
    def greedy_tokens(self) -> tuple[str, ...]:
        """Special tokens that swallow the space around them, or need it."""
        added = self.backend.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.lstrip or token.rstrip or token.single_word)

    def encode(self, text: str, *, special: bool = False, continues: bool = False) -> list[int]:
        """Ids of a text, without any beginning or end.

        Args:
            text: Any text.
            special: Special tokens that are spelled out in the text become their ids; else they are ordinary text.
            continues: The text goes on where another ended, so that no dummy space is put before it.
        """
        if special or self.words is None:
            return self._whole(text, special=special, continues=continues).ids
        return self.encode_array(text, continues=continues).tolist()

    def encode_array(self, text: str, *, continues: bool = False) -> NDArray[np.int32]:
        """Ids of a text that holds no special tokens; options as in `encode`."""
        if self.words is None:
            return np.array(self.encode(text, continues=continues), dtype=np.int32)
        return np.frombuffer(self.words.encode(text, continues=continues), dtype=np.int32)

    def encode_batch(self, texts: Sequence[str], *, special: bool = False, continues: bool = False) -> list[list[int]]:
        """Ids of many texts; options as in `encode`."""
        if not special and self.words is not None:
            return [self.encode(text, continues=continues) for text in texts]
        encodings = self._variant(special, continues).encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_spans(self, text: str, *, continues: bool = False) -> Encoded:
        """Ids of a text that holds no special tokens, and which characters each stands for."""
        encoding = self._whole(text, continues=continues)
        return Encoded(encoding.ids, encoding.offsets)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of some ids; special tokens are spelled out or left out."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    @cached_property
    def words(self) -> Words | None:
        """The words that this tokenizer's ordinary text can be looked up by, None if it has to be taken whole."""
        return words_of(self.backend)

    @cached_property
    def dummy_space(self) -> Literal["none", "first", "fragments"]:
        """Where this tokenizer puts a space that nobody wrote.

        Before the text only ("first"), or before each stretch of text between special tokens ("fragments").
        """
        if self.words is not None:
            return "fragments" if self.words.dummy else "none"
        spec: Json = json.loads(self.backend.to_str())
        schemes = [scheme for scheme, _ in _dummy_spaces(spec)]
        if "fragments" in schemes:
            return "fragments"
        return "first" if schemes else "none"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides which ids a text gets."""
        spec: Json = json.loads(self.backend.to_str())
        decides = {key: spec[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        decides |= {"bos": self.bos, "eos": self.eos, "add_bos": self.add_bos}
        canonical = json.dumps(decides, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def with_tokens(self, extra: Sequence[str]) -> Tokenizer:
        """A tokenizer that has these special tokens too: new ones take the next ids, in order."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in extra])
        return Tokenizer(
            backend,
            bos=self.bos,
            eos=self.eos,
            unk=self.unk,
            pad=self.pad,
            add_bos=self.add_bos,
            chat_template=self.chat_template,
        )

    def save(
        self,
        directory: str | Path,
        *,
        chat_template: str | None = None,
        model_max_length: int | None = None,
    ) -> None:
        """Write the files from which `transformers` loads a tokenizer with the same ids.

        Args:
            directory: Made if it is not there.
            chat_template: Jinja to write instead of the tokenizer's own.
            model_max_length: Tokens that the model was made for.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.post_processor = self._post_processor()
        # not backend.save: of a full disk that says so little that nobody could name it
        (directory / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8", newline="")
        named = {"bos_token": self.bos, "eos_token": self.eos, "unk_token": self.unk, "pad_token": self.pad}
        special = {key: token for key, token in named.items() if token is not None}
        config: Json = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "add_bos_token": self.add_bos,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        jinja = self.chat_template if chat_template is None else chat_template
        if jinja is not None:
            config["chat_template"] = jinja
            (directory / "chat_template.jinja").write_text(jinja, encoding="utf-8", newline="")
        _write_json(directory / "tokenizer_config.json", config)
        _write_json(directory / "special_tokens_map.json", special)

    def _post_processor(self) -> processors.TemplateProcessing:
        """What makes other software put `bos` in front, if that is this tokenizer's convention."""
        if not self.add_bos:
            return processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
        assert self.bos is not None  # held by __init__
        assert self.bos_id is not None
        return processors.TemplateProcessing(
            single=f"{self.bos}:0 $A:0",
            pair=f"{self.bos}:0 $A:0 {self.bos}:1 $B:1",
            special_tokens=[(self.bos, self.bos_id)],
        )

    def _whole(self, text: str, *, special: bool = False, continues: bool = False) -> tokenizers.Encoding:
        """What the backend makes of a text, taken whole."""
        return self._variant(special, continues).encode(text, add_special_tokens=False)

    def _variant(self, special: bool, continues: bool) -> tokenizers.Tokenizer:
        """The backend for a pair of `encode`'s options, made when first asked for."""
        continues = continues and self.dummy_space != "none"
        if (special, continues) not in self._variants:
            self._variants[special, continues] = self._made_variant(special, continues)
        return self._variants[special, continues]

    def _made_variant(self, special: bool, continues: bool) -> tokenizers.Tokenizer:
        added = self.backend.get_added_tokens_decoder().values()
        if not (special or continues) and all(token.special for token in added):
            variant = tokenizers.Tokenizer(self.backend.model)  # shares the vocabulary, and knows no added token
            if self.backend.normalizer is not None:
                variant.normalizer = self.backend.normalizer
            if self.backend.pre_tokenizer is not None:
                variant.pre_tokenizer = self.backend.pre_tokenizer
            return variant
        spec: Json = json.loads(self.backend.to_str())
        spec["post_processor"] = None  # it adds tokens, and some move the spans
        if continues:
            for _, remove in _dummy_spaces(spec):
                remove()
        variant = tokenizers.Tokenizer.from_str(json.dumps(spec))
        variant.encode_special_tokens = not special
        return variant


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model directory, of one of its files, or of a model in GGUF.

    Args:
        path: A directory (its tokenizer.json is preferred to its tokenizer.model), or such a file; what
            tokenizer_config.json and its companions beside the file say is heeded. Or a GGUF file, or a directory with
            nothing but one: it carries its tokenizer.

    Raises:
        LlameroError: There is no such file, or it is none that can be read.
    """
    in_gguf = gguf.find(Path(path))
    if in_gguf is not None:
        return Tokenizer(**from_metadata(gguf.read_header(in_gguf).metadata, where=in_gguf)._asdict())
    file = _find(Path(path))
    config = TokenizerConfig(file.parent)
    if file.suffix == ".json":
        return _from_json(file, config)
    with file.open("rb") as stream:
        head = stream.read(4096)
    if looks_like_tiktoken(head):
        return _from_ranks(file, config)
    if looks_like_sentencepiece(head):
        return _from_pieces(file, config)
    raise LlameroError(
        "neither a SentencePiece model nor a file of tiktoken ranks",
        where=file,
        fix="fetch the file again (a Git LFS pointer is a text file of three lines)",
    )


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise LlameroError("no such file or directory", where=path, fix="give a model directory")
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return path / name
    raise LlameroError(
        "no tokenizer.json and no tokenizer.model here", where=path, fix="copy the tokenizer of the base model"
    )


def train_bpe(
    texts: Iterator[str],
    *,
    vocab_size: int,
    special: Sequence[str] = ("<unk>", "<s>", "</s>"),
    split_digits: bool = True,
) -> Tokenizer:
    """A byte-level BPE learned from texts; the same texts give the same tokenizer.

    Args:
        texts: What to learn from.
        vocab_size: Ids in all: special tokens, 256 bytes, and merges.
        special: They take the ids from 0 on; `<unk>`, `<s>` and `</s>` get their usual parts.
        split_digits: Every digit is a token of its own, which helps a small model to calculate.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    by_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    by_digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([by_digits, by_words]) if split_digits else by_words
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    size = backend.get_vocab_size()
    if size != vocab_size:
        raise LlameroError(
            f"the texts give {size} tokens, not the {vocab_size} asked for",
            where="vocab_size",
            fix=f"ask for {size}, or give more text" if size < vocab_size else f"ask for at least {size}",
        )

    def part(token: str) -> str | None:
        return token if token in special else None

    return Tokenizer(backend, bos=part("<s>"), eos=part("</s>"), unk=part("<unk>"), add_bos="<s>" in special)


def _from_json(file: Path, config: TokenizerConfig) -> Tokenizer:
    if "model" not in read_json(file):
        raise LlameroError("not a tokenizer.json: it holds no `model`", where=file, fix="fetch the file again")
    backend = tokenizers.Tokenizer.from_file(str(file))
    bos = config.token("bos_token")
    add_bos = config.add_bos
    if add_bos is None:  # then the post-processor alone decides, as it does for other software
        first = backend.encode("", add_special_tokens=True).ids[:1]
        add_bos = bos is not None and first == [backend.token_to_id(bos)]
    return Tokenizer(
        backend,
        bos=bos,
        eos=config.token("eos_token"),
        unk=config.token("unk_token"),
        pad=config.token("pad_token"),
        add_bos=add_bos,
        chat_template=config.chat_template,
    )


def _from_pieces(file: Path, config: TokenizerConfig) -> Tokenizer:
    converted = from_sentencepiece(file)
    return _with_listed_tokens(
        Tokenizer(
            converted.backend,
            bos=converted.bos,
            eos=converted.eos,
            unk=converted.unk,
            add_bos=converted.bos is not None and config.add_bos is not False,
        ),
        config,
        pad=converted.pad,
    )


def _from_ranks(file: Path, config: TokenizerConfig) -> Tokenizer:
    special = tuple(config.added.values()) or LLAMA3_SPECIAL
    backend = from_tiktoken(file, special)
    return _with_listed_tokens(
        Tokenizer(
            backend,
            bos=config.token("bos_token") or LLAMA3_SPECIAL[0],
            eos=config.token("eos_token") or LLAMA3_SPECIAL[1],
            add_bos=config.add_bos is not False,
        ),
        config,
        pad=None,
    )


def _with_listed_tokens(base: Tokenizer, config: TokenizerConfig, *, pad: str | None) -> Tokenizer:
    """Add what the configuration lists beyond the vocabulary file, at the ids that it gives."""
    backend = base.with_tokens(list(config.added.values())).backend if config.added else base.backend
    for id, token in config.added.items():
        if backend.token_to_id(token) != id:
            raise LlameroError(
                f"{token!r} is listed with id {id}, after this vocabulary it gets {backend.token_to_id(token)}",
                where=config.file,
                fix="take the tokenizer files from one and the same model",
            )
    return Tokenizer(
        backend,
        bos=config.token("bos_token") or base.bos,
        eos=config.token("eos_token") or base.eos,
        unk=config.token("unk_token") or base.unk,
        pad=config.token("pad_token") or pad,
        add_bos=base.add_bos,
        chat_template=config.chat_template,
    )


def _dummy_spaces(spec: Json) -> Iterator[tuple[Literal["first", "fragments"], Any]]:
    """Yield, for each part of a tokenizer.json that writes a dummy space, where it does and how to stop it."""
    for parent in ("normalizer", "pre_tokenizer"):
        holder = spec[parent]
        if holder is None:
            continue
        steps: list[Json] = [holder, *holder.get("normalizers", []), *holder.get("pretokenizers", [])]
        for step in steps:
            if step["type"] == "Prepend":
                yield "fragments", lambda step=step: step.update(prepend="")
            elif step["type"] == "Metaspace" and step["prepend_scheme"] != "never":
                where = "first" if step["prepend_scheme"] == "first" else "fragments"
                yield where, lambda step=step: step.update(prepend_scheme="never")
            elif step["type"] == "ByteLevel" and step["add_prefix_space"]:
                yield "fragments", lambda step=step: step.update(add_prefix_space=False)


def _write_json(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

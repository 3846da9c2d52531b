"""The vocabulary of a release: the base's own or one trained here, and extra tokens whose ids are given once.

Ids and the true size follow from the tokenizer alone. Padding to a multiple (Megatron's 128 × tensor-parallel) belongs
to how a model is laid out over devices: it reaches neither data nor an exported file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llamero.core import files, progress
from llamero.core.errors import LlameroError
from llamero.corpus.samples import Chat
from llamero.data.config import DataConfig, MixtureConfig, VocabularyConfig
from llamero.data.read import Reading
from llamero.text.render import chat_template, generation_config
from llamero.text.tokenizer import Tokenizer, load_tokenizer, train_bpe


def prepare_tokenizer(
    data: DataConfig, start: Path | VocabularyConfig, *, template: str, root: Path, out: Path
) -> dict[str, Any]:
    """Write the tokenizer of a release: the base's own, or one trained here; extra tokens and chat template added.

    Args:
        data: Names the extra tokens, and the mixture to train a tokenizer on.
        start: The base model's directory, or the tokenizer to train.
        template: Name of the chat template.
        root: Directory that relative data paths start from.
        out: Where the tokenizer files go.

    Returns:
        The true size with and without the extra tokens, the ids of these, which of them the base had already (`kept`),
        and, of a base on disk, the rows of its embedding.

    Raises:
        LlameroError: An extra token cannot be one.
    """
    if isinstance(start, VocabularyConfig):
        texts = _texts(data.mixtures[start.mixture], root)
        base = train_bpe(texts, vocab_size=start.size, split_digits=start.split_digits)
    else:
        base = load_tokenizer(start)
    kept = refuse_unfit_tokens(data.extra_tokens, base)
    tokenizer = base.with_tokens(data.extra_tokens)
    if template == "auto" and tokenizer.chat_template is None:
        tokenizer.save(out)  # fine as long as nobody chats: rendering a chat says what is missing
    else:
        tokenizer.save(out, chat_template=chat_template(template, tokenizer))
        files.write_json(out / "generation_config.json", generation_config(template, tokenizer))
    added = {token: tokenizer.id(token) for token in data.extra_tokens}
    files.write_json(out / "special_tokens.json", {t: tokenizer.id(t) for t in tokenizer.special_tokens})
    return {
        "size": len(tokenizer),
        "base_size": len(base),
        "base_rows": None if isinstance(start, VocabularyConfig) else _rows(start),
        "extra_tokens": added,
        "kept": kept,
        "digest": tokenizer.digest,
    }


def refuse_unfit_tokens(extra: Sequence[str], base: Tokenizer) -> list[str]:
    """Refuse extra tokens that cannot be special ones; return those that the base has already.

    A token of the base that is marked as added (special or not) keeps its id. A piece of ordinary text is refused: as
    a special token it would be cut out of every text that has it, so `them` would no longer be what the base learned.

    Raises:
        LlameroError: A token is ordinary text.
    """
    added = {token.content for token in base.backend.get_added_tokens_decoder().values()}
    for token in extra:
        if token not in added and base.id(token) is not None:
            raise LlameroError(
                f"{token!r} is ordinary text of the base's vocabulary (id {base.id(token)}); as a special token it "
                "would be cut out of every text that has it",
                where="data.extra_tokens",
                fix=f"choose a spelling that no text has, such as <|{token.strip('<|>▁ ') or 'token'}|>",
            )
    return [token for token in extra if token in added]


def _rows(base: Path) -> int | None:
    """Return how many rows the embedding of a base has, if there is a model beside its tokenizer."""
    config = base / "config.json"
    return json.loads(config.read_text(encoding="utf-8")).get("vocab_size") if config.is_file() else None


def _texts(mixture: MixtureConfig, root: Path) -> Iterator[str]:
    for source in mixture.sources:
        found = Reading(source, root).samples()
        for _, sample in progress.track(found, f"read {source.source}", unit="samples"):
            if isinstance(sample, Chat):
                yield from (message.text for message in sample.messages)
            else:
                yield sample.text

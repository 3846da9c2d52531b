"""data: mixtures of sources in, tokenized datasets and their statistics out; and the vocabulary they share."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from llamero.core import files, progress
from llamero.core.errors import LlameroError
from llamero.corpus import megatron
from llamero.corpus.sources import Chat, Sample
from llamero.data import stats
from llamero.data.config import DataConfig, MixtureConfig, SourceConfig, VocabularyConfig
from llamero.data.read import Reading
from llamero.data.stats import SourceStats
from llamero.text.messages import SCAFFOLD, Role
from llamero.text.pieces import Rendered
from llamero.text.render import chat_template, generation_config, render
from llamero.text.tokenizer import Tokenizer, load_tokenizer, train_bpe

SPLITS = ("train", "val")
ROLE_DTYPE = np.uint16
"""Role files are what Megatron takes for a vocabulary of 16: u16."""


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
        Sizes and added ids.
    """
    if isinstance(start, VocabularyConfig):
        texts = _texts(data.mixtures[start.mixture], root)
        base = train_bpe(texts, vocab_size=start.size, split_digits=start.split_digits)
    else:
        base = load_tokenizer(start)
    tokenizer = base.with_tokens(data.extra_tokens)
    if template == "auto" and tokenizer.chat_template is None:
        tokenizer.save(out)  # fine as long as nobody chats: rendering a chat says what is missing
    else:
        tokenizer.save(out, chat_template=chat_template(template, tokenizer))
        files.write_json(out / "generation_config.json", generation_config(template, tokenizer))
    added = {token: tokenizer.id(token) for token in data.extra_tokens}
    files.write_json(out / "special_tokens.json", {t: tokenizer.id(t) for t in tokenizer.special_tokens})
    return {"size": len(tokenizer), "base_size": len(base), "extra_tokens": added, "digest": tokenizer.digest}


def tokenize_mixture(
    name: str, mixture: MixtureConfig, *, tokenizer: Path, template: str, root: Path, seed: int, out: Path
) -> dict[str, Any]:
    """Write `train` and `val` as Megatron pairs of tokens and roles, with statistics; return these.

    Raises:
        LlameroError: A row does not fit, or nothing in the whole mixture would be learned.
    """
    encoder = _Encoder(load_tokenizer(tokenizer), template, mixture.min_assistant_tokens)
    counts: dict[str, list[SourceStats]] = {split: [] for split in SPLITS}
    dtype = megatron.token_dtype(len(encoder.tokenizer))
    with ExitStack() as stack:
        writers = {
            split: (
                stack.enter_context(megatron.Writer(out / f"{split}-text", dtype)),
                stack.enter_context(megatron.Writer(out / f"{split}-role", ROLE_DTYPE)),
            )
            for split in SPLITS
        }
        for source in mixture.sources:
            here = {split: SourceStats(source.source) for split in SPLITS}
            for split, ids, roles in _encode_source(source, encoder, root, seed, here):
                writers[split][0].add(ids)
                writers[split][1].add(roles)
            for split in SPLITS:
                counts[split].append(here[split])
    if stats.total(counts["train"]).supervised_tokens == 0:
        raise LlameroError(
            f"mixture `{name}` has no token to learn: {_why_nothing(counts['train'])}",
            fix="look at the skipped rows, and whether assistants say anything",
        )
    for split in SPLITS:
        files.write_atomically(out / f"{split}_stats.txt", stats.text(f"{name}-{split}", counts[split]))
    summary: dict[str, Any] = {"mixture": name}
    for split in SPLITS:
        sources = [part.to_json() for part in counts[split]]
        summary[split] = {"sources": sources, "total": stats.total(counts[split]).to_json()}
    files.write_json(out / "stats.json", summary)
    return summary


def _why_nothing(parts: list[SourceStats]) -> str:
    reasons = sum((part.skipped for part in parts), start=stats.Counter())
    said = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
    return f"{sum(part.processed for part in parts)} samples read; skipped: {said or 'none'}"


def _texts(mixture: MixtureConfig, root: Path) -> Iterator[str]:
    for source in mixture.sources:
        for found in progress.track(Reading(source, root), f"read {source.source}", unit="samples"):
            sample = found.sample
            if isinstance(sample, Chat):
                yield from (message.text for message in sample.messages)
            else:
                yield sample.text


class _Encoder:
    """Turns samples into ids and roles."""

    def __init__(self, tokenizer: Tokenizer, template: str, min_assistant_tokens: int) -> None:
        self.tokenizer = tokenizer
        unknown = None if tokenizer.unk is None else tokenizer.id(tokenizer.unk)
        self.unknown = -1 if unknown is None else unknown  # no id is -1
        self._template, self._least = template, min_assistant_tokens

    def __call__(self, sample: Sample) -> tuple[list[int], list[int], int]:
        """Return ids, roles and the number of supervised tokens."""
        if not isinstance(sample, Chat):
            return self._document(sample.text)
        said = render(sample.messages, self._template, self.tokenizer)
        return list(said.ids), _roles(said), sum(said.learned)

    def too_little(self, sample: Sample, supervised: int) -> bool:
        """Return whether nothing would be learned, or the assistant of a chat says less than the mixture asks for."""
        return supervised < (max(1, self._least) if isinstance(sample, Chat) else 1)

    def _document(self, text: str) -> tuple[list[int], list[int], int]:
        tokenizer = self.tokenizer
        head = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        tail = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
        body = tokenizer.encode(text)
        if not body:
            return [], [], 0  # the end alone teaches nothing
        ids = head + body + tail
        roles = [Role.TEXT + SCAFFOLD] * len(head) + [int(Role.TEXT)] * (len(ids) - len(head))
        return ids, roles, len(ids) - 1  # the first token follows nothing


def _roles(said: Rendered) -> list[int]:
    """Return a role per token; what an assistant says but must not teach is marked as the template's."""
    return [
        role if learned or role % SCAFFOLD != Role.ASSISTANT else Role.ASSISTANT + SCAFFOLD
        for role, learned in zip(said.roles, said.learned, strict=True)
    ]


def _encode_source(
    source: SourceConfig, encoder: _Encoder, root: Path, seed: int, here: dict[str, SourceStats]
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield split, ids and roles of every accepted sample, and count all."""
    reading = Reading(source, root)
    kept_for_validation = 0
    for number, found in enumerate(progress.track(reading, f"tokenize {source.source}", unit="samples")):
        most = source.max_val_set if source.max_val_set is not None else number + 1
        drawn = _chance(seed, source.source, number, "val") < source.val_split
        split = "val" if drawn and kept_for_validation < most else "train"
        try:
            ids, roles, supervised = encoder(found.sample)
        except LlameroError as error:
            if not reading.skip(error.problem):
                problem = f"{error.where}: {error.problem}" if error.where else error.problem
                raise LlameroError(problem, where=found.where, fix=error.fix) from error
            continue
        if encoder.too_little(found.sample, supervised):
            here[split].skipped["too few assistant tokens" if supervised else "nothing to learn"] += 1
            continue
        once_more = _chance(seed, source.source, number, "weight") < source.weight % 1
        copies = 1 if split == "val" else int(source.weight) + once_more
        if copies == 0:
            here[split].skipped["left out by weight"] += 1
            continue
        kept_for_validation += split == "val"
        here[split].add(len(ids), supervised, copies=copies, unknown=ids.count(encoder.unknown))
        for _ in range(copies):
            yield split, ids, roles
    here["train"].skipped += reading.skipped
    for part in here.values():
        part.layout = reading.layout


def _chance(seed: int, source: str, number: int, purpose: str) -> float:
    """Return a number in [0, 1) that depends on the sample alone, so that any number of workers agree."""
    digest = hashlib.blake2b(f"{seed}/{source}/{number}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64

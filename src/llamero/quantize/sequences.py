"""The calibration text as sequences of equal length."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from llamero.core.errors import LlameroError
from llamero.corpus import layouts, megatron, rows
from llamero.corpus.samples import BadRowError, Document
from llamero.quantize.config import Calibration
from llamero.text.tokenizer import Tokenizer


def from_mixture(directory: Path, config: Calibration) -> list[Int[Tensor, " time"]]:
    """Return the first documents of a tokenized mixture, one after the other, cut into sequences."""
    documents = megatron.Reader(directory / "train-text")
    taken: list[np.ndarray] = []
    count = 0
    for document in documents:
        taken.append(np.asarray(document, dtype=np.int64))
        count += len(document)
        if count >= config.tokens:
            break
    return _cut(np.concatenate(taken), config, where=directory)


def from_text(path: Path, tokenizer: Tokenizer, config: Calibration) -> list[Int[Tensor, " time"]]:
    """Return the beginning of a text file, cut into sequences."""
    ids: list[int] = []
    for located in rows.rows(path):
        if located.row is None:
            raise LlameroError(located.problem, where=located.where, fix="mend the file")
        try:
            found = layouts.LAYOUTS["text"].read(located.row, layouts.Options())
        except BadRowError as error:
            raise LlameroError(
                str(error), where=located.where, fix="give rows with a `text`, or a .txt file"
            ) from error
        for document in found:
            assert isinstance(document, Document)
            ids += tokenizer.encode(document.text)
    return _cut(np.asarray(ids, dtype=np.int64), config, where=path)


def _cut(ids: np.ndarray, config: Calibration, *, where: Path) -> list[Int[Tensor, " time"]]:
    whole = min(len(ids), config.tokens) // config.sequence
    if whole * config.sequence < config.tokens - config.sequence:
        raise LlameroError(
            f"the calibration text has {len(ids)} tokens, {config.tokens} are asked for",
            where=where,
            fix="lower `calibration.tokens`, or give more text",
        )
    return [torch.from_numpy(ids[i * config.sequence : (i + 1) * config.sequence]) for i in range(whole)]

"""Files of a release: linked where the file system can, copied where it cannot, and their checksums."""

from __future__ import annotations

import errno
import os
import shutil
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from llamero.checkpoint import hf
from llamero.core import files, gguf, progress

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from llamero.publish.config import Sampling

CHECKSUMS = "checksums.txt"

PUBLISHED = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.gguf",
    "imatrix.dat",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""What of a model directory is published: what loaders read, and what licences ask to be passed on."""

PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Weights of old models; published only where there are no safetensors."""

_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def place_model(source: Path, target: Path, *, sampling: Sampling) -> None:
    """Put the files of a model into a directory of the release.

    Raises:
        LlameroError: The source is no model.
    """
    if gguf.find(source) is None:
        hf.read_config(source)
    patterns = PUBLISHED if any(source.glob("*.safetensors")) else PUBLISHED + PICKLES
    names = sorted(path.name for path in source.iterdir() if any(fnmatch(path.name, each) for each in patterns))
    target.mkdir(parents=True)
    for name in names:
        link_or_copy(source / name, target / name)
    _write_sampling(target, sampling)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it to where it can have none (another file system)."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(source, target)


def _write_sampling(directory: Path, sampling: Sampling) -> None:
    """Add the defaults of sampling to generation_config.json, in a new file: the linked one belongs to the source."""
    told = sampling.to_generation_config()
    if not told:
        return
    path = directory / "generation_config.json"
    if path.exists():
        said = hf.read_json(path)
    else:  # whoever finds this file looks for token ids nowhere else
        config = {} if gguf.find(directory) else hf.read_config(directory)
        said = {key: config[key] for key in _TOKEN_IDS if key in config}
    files.write_json(path, {**said, **told})


def write_checksums(root: Path, directories: Iterable[str]) -> list[Path]:
    """Write the SHA-256 of every file as `sha256sum -c` reads it; return the files."""
    found = sorted(path for name in directories for path in (root / name).rglob("*") if path.is_file())
    lines = [
        f"{files.sha256(path)}  {path.relative_to(root).as_posix()}\n"
        for path in progress.track(found, "checksums", unit="files")
    ]
    files.write_atomically(root / CHECKSUMS, "".join(lines))
    return found

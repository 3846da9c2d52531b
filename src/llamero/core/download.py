"""A MODEL is a directory, a GGUF file, or `owner/name[:revision]` of the hub."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llamero.core import files, gguf
from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Iterator

_HUB = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+?)(?::(?P<revision>[\w./-]+))?$")

_HUB_FILE = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[\w./-]+\.gguf)(?::(?P<revision>[\w./-]+))?$")
_PART = re.compile(r"-\d{5}-of-")
"""What the names of the files of a split model differ in."""

TOKENIZER_FILES = [
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
]
"""What a tokenizer is read from; the size of the embedding, in config.json, is told beside it."""
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "LICENSE*", "USE_POLICY*"]


def resolve_model(model: str | Path, *, weights: bool = True) -> Path:
    """Return the directory of a model, or its GGUF file; a hub name is downloaded (resumable, with the user's login).

    Args:
        model: Directory (one with nothing but a model in GGUF stands for that), GGUF file, or on the hub
            `owner/name[:revision]` or one file `owner/name/FILE.gguf[:revision]` (of a split model any of its files).
        weights: Whether they are wanted; else the files of the tokenizer are enough.
    """
    path = Path(model).expanduser()
    in_gguf = gguf.find(path)
    if in_gguf is not None or path.is_dir():
        return in_gguf or path
    file = None if path.is_absolute() else _HUB_FILE.match(str(model))
    if file is not None and not str(model).startswith("."):
        return _download(file["repo"], file["revision"], weights=True, file=file["file"])
    found = _HUB.match(str(model))
    if path.exists() or not found or str(model).startswith((".", "/", "~")):
        raise LlameroError(
            "neither a directory nor a GGUF file" if path.exists() else "no such model directory",
            where=model,
            fix="give a Hugging Face model directory, a GGUF file or `owner/name[:revision]`",
        )
    return _download(found["repo"], found["revision"], weights=weights)


def config_at_hand(model: str) -> Path | None:
    """Return the config.json of a hub model if the hub's cache has it; nothing is fetched."""
    found = _HUB.match(model)
    if found is None:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(found["repo"], "config.json", revision=found["revision"])
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None


def split_name(model: str) -> tuple[str, str | None]:
    """Return the repository and the revision of a hub name; a directory is returned as it is."""
    found = None if Path(model).is_dir() else _HUB.match(model)
    return (found["repo"], found["revision"]) if found else (model, None)


def cache() -> Path:
    """Return the directory that the hub's own files are kept in."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME)


def resolve_dataset(repo: str, pattern: str) -> Path:
    """Return the directory of a data set of the hub, in which the files that match are; downloaded if need be.

    Args:
        repo: `owner/name`.
        pattern: Of the files that are wanted.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(repo, f"{repo} (data set)", None):
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=[pattern]))


def _download(repo: str, revision: str | None, *, weights: bool, file: str | None = None) -> Path:
    """Return where the files of a hub model are, or one file of it, with those that it was split into."""
    from huggingface_hub import snapshot_download

    name = f"{repo}:{revision}" if revision else repo
    with _hub_errors(repo, name, revision):
        if file is not None:
            parts = _PART.sub("-*-of-", file)
            return _one(Path(snapshot_download(repo, revision=revision, allow_patterns=[parts])), file, name)
        wanted = PATTERNS if weights else TOKENIZER_FILES
        directory = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
        if weights and not any(directory.glob("*.safetensors")):
            older = [*PATTERNS, "pytorch_model*.bin", "*consolidated*.pth"]  # the last are Meta's own
            directory = Path(snapshot_download(repo, revision=revision, allow_patterns=older))
    return directory


@contextmanager
def _hub_errors(repo: str, name: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's library raises into what a user can act on."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage] (of whatever network library the hub's uses)
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise LlameroError(
            "the owner must grant you access first",
            where=name,
            fix=f"ask for it at https://huggingface.co/{repo}, then `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise LlameroError(f"{repo} has no revision `{revision}`", where=name) from error
    except RepositoryNotFoundError as error:
        raise LlameroError(
            "neither a directory here nor a model on the hub (or it is private)",
            where=name,
            fix="check the spelling; for a private model `hf auth login`",
        ) from error
    except HFValidationError as error:
        raise LlameroError(
            f"neither a directory here nor a possible name on the hub ({str(error).splitlines()[0]})", where=name
        ) from error
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and files.is_disk_full(error):
            raise files.no_room(error, name) from error
        raise LlameroError(
            f"not a directory here, and neither the hub nor its cache answers ({type(error).__name__})",
            where=name,
            fix="give a directory, or run once with a connection",
        ) from error


def _one(directory: Path, file: str, name: str) -> Path:
    found = gguf.find(directory / file) if (directory / file).is_file() else None
    if found is None:
        raise LlameroError(f"there is no file `{file}`", where=name, fix="check the spelling")
    return found

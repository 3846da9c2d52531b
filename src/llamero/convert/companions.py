"""The files beside the weights: tokenizer, generation settings, licence. They go along; a tokenizer is translated."""

import base64
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamero.checkpoint.gguf_names import generation_config
from llamero.convert.config import Target
from llamero.core import files as core_files
from llamero.core import gguf
from llamero.core.errors import LlameroError
from llamero.model.config import LlamaConfig
from llamero.model.rope import Llama3
from llamero.text.gguf_vocabulary import KIND
from llamero.text.tiktoken_bpe import LLAMA3_SPECIAL, LLAMA3_SPLIT, from_tiktoken, looks_like_tiktoken
from llamero.text.tokenizer import Tokenizer, load_tokenizer

CARRIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE*",
    "USE_POLICY*",
)
"""Patterns of what goes along as it is."""

LLAMA31_SPECIAL = (
    *LLAMA3_SPECIAL[:4],
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)
"""The special tokens since Llama 3.1, in the order of their ids."""


@dataclass(frozen=True)
class Companions:
    """What stands beside the weights of a model."""

    files: tuple[Path, ...]
    tokenizer: Tokenizer | None
    generation: Mapping[str, Any] = field(default_factory=dict)
    """What a GGUF file says of sampling, as generation_config.json has it."""


def find(directory: Path, config: LlamaConfig, *, also: Path | None = None) -> Companions:
    """Return the companions of a model.

    Args:
        directory: Where it is; a GGUF file holds its own.
        config: What it is.
        also: Where to look for a tokenizer.model if it is not there; Meta's releases share one among their models.
    """
    if gguf.find(directory) is not None:
        said = gguf.read_header(directory).metadata
        return Companions((), load_tokenizer(directory) if KIND in said else None, generation_config(said))
    files = [path for pattern in CARRIED for path in sorted(directory.glob(pattern))]
    names = {path.name for path in files}
    shared = None if also is None else also / "tokenizer.model"
    if not names & {"tokenizer.json", "tokenizer.model"}:
        if shared is None or not shared.exists():
            return Companions(tuple(files), None)
        files.append(shared)
    return Companions(tuple(files), _tokenizer(files, config))


def _tokenizer(files: list[Path], config: LlamaConfig) -> Tokenizer:
    by_name = {path.name: path for path in files}
    path = by_name.get("tokenizer.json") or by_name["tokenizer.model"]
    if path.suffix == ".model" and "tokenizer_config.json" not in by_name and _is_tiktoken(path):
        special = LLAMA31_SPECIAL if isinstance(config.rope, Llama3) else LLAMA3_SPECIAL
        return Tokenizer(from_tiktoken(path, special), bos=special[0], eos=special[1], add_bos=True)
    return load_tokenizer(path)


def _is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return looks_like_tiktoken(file.read(4096))


def write(found: Companions, directory: Path, to: Target, config: LlamaConfig) -> list[str]:
    """Write the companions of a model and return what the user should know of them."""
    for path in found.files:
        shutil.copyfile(path, directory / path.name)
    if found.generation and to == "hf":
        core_files.write_json(directory / "generation_config.json", found.generation)
    tokenizer = found.tokenizer
    if tokenizer is None:
        return ["there is no tokenizer in the source: none was written"]
    notes = []
    if len(tokenizer) > config.vocab_size:
        notes.append(f"the tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size} rows")
    names = {path.name for path in found.files}
    if to == "hf" and not names & {"tokenizer.json", "tokenizer_config.json"}:
        tokenizer.save(directory, model_max_length=config.max_position_embeddings)
        notes.append(f"tokenizer.json was made from {'tokenizer.model' if found.files else 'what the GGUF file says'}")
        if tokenizer.chat_template is None:
            notes.append("nothing names a chat template")
    if to != "hf" and "tokenizer.model" not in names:
        made = write_tiktoken(tokenizer, directory / "tokenizer.model")
        notes.append(
            "tokenizer.model (tiktoken ranks) was made from tokenizer.json"
            if made
            else "there is no tokenizer.model, and this tokenizer.json cannot be written as one: it went along as it is"
        )
    return notes


def write_tiktoken(tokenizer: Tokenizer, path: Path) -> bool:
    """Write a tokenizer as tiktoken ranks, and return whether that can be: whether reading them gives the same one."""
    spec: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    special = {token["id"]: token["content"] for token in spec["added_tokens"]}
    vocabulary: dict[str, int] = spec["model"].get("vocab") or {}
    ranks = {token: id for token, id in vocabulary.items() if id not in special}
    bytes_of = _bytes_of_letters()
    if spec["model"].get("type") != "BPE" or LLAMA3_SPLIT not in tokenizer.backend.to_str().replace("\\\\", "\\"):
        return False
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(c in bytes_of for token in ranks for c in token):
        return False
    lines = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        lines.append(base64.b64encode(bytes(bytes_of[letter] for letter in token)) + b" %d\n" % rank)
    path.write_bytes(b"".join(lines))
    try:
        again: dict[str, Any] = json.loads(from_tiktoken(path, [special[id] for id in sorted(special)]).to_str())
    except LlameroError:
        again = {"model": None, "added_tokens": []}
    same = again["model"] and all(again["model"][key] == spec["model"][key] for key in ("vocab", "merges"))
    if not same or {token["id"]: token["content"] for token in again["added_tokens"]} != special:
        path.unlink()
        return False
    return True


def _bytes_of_letters() -> dict[str, int]:
    """Return the byte that each visible letter of byte-level BPE stands for (GPT-2's table)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}

"""Data mixtures as Open-Assistant published them, in our words: key by key, and naming what has no counterpart.

The format is that of Open-Assistant's model/pretokenizer: sections of YAML, of which several may be applied one over
the other, each with a list of datasets. Model cards print them in fenced blocks.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from llamero.core.errors import LlameroError
from llamero.corpus import known
from llamero.recipe import lines

DEFAULTS = "defaults"
SPECIAL = ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>")
"""Tokens that Megatron's SentencePiece tokenizer adds by itself, before those it is asked for."""
EXTRA = "<|im_start|>,<|im_end|>"
"""What `vocab_extra_ids_list` is in the published defaults."""
VAL_SPLIT = 0.2
"""What the published loader keeps for validation where nothing is said."""

_RUN = "artifacts have their place in the run directory (`llamero run RECIPE --out DIR`)"
_BASE = "the tokenizer is the one of the recipe's `base`"
_SEED = "write `seed: {value}` at the top of the recipe"
_SECTION: Mapping[str, str] = {
    "output_dir": _RUN,
    "output_dir_suffix": _RUN,
    "rng_seed": _SEED,
    "tokenizer_type": _BASE,
    "vocab_file": _BASE,
    "cache_dir": "downloads lie in the hub's own cache; set HF_HOME to move it",
    "use_system_prefix": "the published pretokenizer never reads it; leave it out",
    "dataset_impl": "pairs of .bin and .idx that are mapped into memory (mmap) are what is always written",
    "max_count": "it counts accepted samples of all sources together; give each source a `limit` of rows",
    "compress": "pack the artifact's directory with tar",
}
"""Keys of a section that a mixture has no key for, and the way out."""
_DATASET: Mapping[str, str] = {
    "mode": "chats are learned as `sft`, or whatever the training stage says",
    "seed": _SEED,
    "manual_seed": _SEED,
    "cache_dir": _SECTION["cache_dir"],
    "data_path": "give `path`, relative to the recipe",
    "input_max_length": "it counts characters; the nearest is `max_tokens` of the mixture",
}
"""The same for the keys of a dataset."""
_OURS: Mapping[str, str] = {
    "fraction": "fraction",
    "size": "size",
    "val_split": "val_split",
    "max_val_set": "max_val_set",
    "lang": "lang",
    "top_k": "top_k",
    "input_file_path": "path",
    "hf_dataset_name": "hub",
    "data_files": "data_files",
    "max_char_len": "join_chars",
    "num_samples": "limit",
    "fill_min_length": "join_chars",
}
"""Keys of a dataset, and what they are called here."""
_NOTES: Mapping[str, str] = {
    "max_val_set": "what is over max_val_set is trained on; the published loader threw it away",
    "input_file_path": "path is relative to the recipe; input_file_path was relative to cache_dir",
    "num_samples": "limit takes the first rows; the published loader took num_samples after a shuffle",
    "fill_min_length": "join_chars is one more: fill_min_length joined until there were more characters than that",
}
"""What to know of a key that is mapped."""
_NUMBERS = ("fraction", "size", "max_val_set", "fill_min_length")
_OVERRULED: Mapping[str, str] = {"size": "fraction", "hf_dataset_name": "input_file_path"}
"""Keys of a dataset that the published loader passes over where another is there."""


_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "oasst_export": {"lang": "en", "hf_dataset_name": "OpenAssistant/oasst1"},
    "dolphin_mix": {"max_char_len": 8000},
}
"""Keys that published loaders take where nothing is said."""


@dataclass(frozen=True)
class Converted:
    """A mixture in our words."""

    yaml: str
    """A `data:` section for a recipe."""
    notes: list[str]
    """What was not in the original, or means something else here."""
    unmapped: list[str]
    """What has no counterpart, why, and the way out."""


def convert(text: str, section: str, *, where: str) -> Converted:
    """Return a published section as the `data:` of a recipe, its keys in the order of the original.

    Args:
        text: A YAML file of sections, or a model card that prints some.
        section: Name of a section; of several with commas between, the later win, and all win over `defaults`.
        where: Path of the text, for errors.

    Raises:
        LlameroError: There is no such section, or it has no datasets.
    """
    sections = _sections(text, where)
    keys: dict[str, Any] = {}
    placed: dict[str, yaml.Node] = {}
    names = [name.strip() for name in section.split(",")]
    for name in [*([DEFAULTS] if DEFAULTS in sections else []), *names]:
        if name not in sections:
            raise _no_section(name, sections, where)
        keys |= lines.value(sections[name])
        placed |= {key: child for key, _, child in lines.items(sections[name])}
    named = [name for name in names if lines.get(sections[name], "datasets") is not None]
    if not named:
        raise LlameroError(f"section `{section}` names no datasets", where=where, fix="add a section that has some")
    return _Conversion(named[-1], keys, placed).result()


def _sections(text: str, where: str) -> dict[str, yaml.Node]:
    """Return the sections of a file, or of the blocks of a page."""
    blocks = [(match.start(1), match[1]) for match in re.finditer(r"^```[^\n]*\n(.*?)^```", text, flags=re.S | re.M)]
    found: dict[str, yaml.Node] = {}
    for start, block in blocks or [(0, text)]:
        try:
            node = lines.parse("\n" * text.count("\n", 0, start) + block, where)
        except LlameroError:
            if not blocks or re.search(r"^\s+datasets:", block, flags=re.M):
                raise
            continue  # prompts, commands and tables of a page
        for name, key, child in lines.items(node):
            if isinstance(child, yaml.MappingNode):
                if name in found:
                    raise LlameroError(f"section `{name}` stands here twice", where=lines.at(key.start_mark))
                found[name] = child
    return found


def _no_section(name: str, sections: Mapping[str, object], where: str) -> LlameroError:
    near = difflib.get_close_matches(name, sections, n=max(1, len(sections)), cutoff=0.0)
    return LlameroError(
        f"there is no section `{name}`",
        where=where,
        fix=f"one of: {', '.join(near)}"
        if near
        else "give a file of pretokenizer sections, or a card that prints some",
    )


@dataclass
class _Conversion:
    """One section on its way; collects what there is to say about it."""

    name: str
    keys: Mapping[str, Any]
    placed: Mapping[str, yaml.Node]
    """Nodes of the keys, which know their lines."""
    notes: list[str] = field(default_factory=list)
    unmapped: list[str] = field(default_factory=list)

    def result(self) -> Converted:
        """Return everything."""
        mixture: list[str] = []
        for key, value in self.keys.items():
            if key == "datasets":
                mixture += ["sources:", *(f"  {line}" for line in self._sources())]
            elif key in ("filename_prefix", "min_assistant_tokens") and value is not None:
                mixture.append(f"{key}: {_flow(value)}")
            elif key == "write_json" and value:
                mixture.append("jsonl: true")
            elif key not in ("datasets_extra", "vocab_extra_ids_list", "eval_size") and value not in (None, ""):
                way_out = _SECTION.get(key, "the published pretokenizer has no such key; leave it out")
                self.unmapped.append(f"{key}: {way_out.format(value=value)}")
        head = ["data:", f"  extra_tokens: {_flow(self._extra_tokens())}", "  mixtures:", f"    {_flow(self.name)}:"]
        text = "\n".join([*head, *(f"      {line}" for line in mixture)])
        return Converted(text + "\n", self.notes, self.unmapped)

    def _extra_tokens(self) -> list[str]:
        listed = self.keys.get("vocab_extra_ids_list", EXTRA)
        if "vocab_extra_ids_list" not in self.keys:
            self.notes.append(f"vocab_extra_ids_list: not stated, the published default is {EXTRA}; written out")
        asked = [token for token in str(listed or "").strip('"').split(",") if token]
        if self.keys.get("tokenizer_type") == "FalconTokenizer":
            return asked
        self.notes.append(
            f"extra_tokens: begins with {' '.join(SPECIAL)}, which Megatron's SentencePiece tokenizer adds by itself; "
            f"after Llama-2's 32000 ids the next one is {32000 + len(SPECIAL)}"
        )
        return list(dict.fromkeys([*SPECIAL, *asked]))

    def _sources(self) -> list[str]:
        """Return a line for each dataset; of one that is not known, a comment."""
        written: list[str] = []
        seen: set[str] = set()
        for name, options, node in self._datasets():
            source = name.lower().replace("-", "_")
            if source in seen:
                raise LlameroError(
                    f"dataset `{name}` is named twice",
                    where=lines.at(node.start_mark),
                    fix="name it once, with `weight`",
                )
            seen.add(source)
            keys = {"source": source, **self._source_keys(source, options, node)}
            placed = known.lookup(source) or {"path", "hub"} & keys.keys()
            written.append(f"- {_flow(keys)}" if placed else f"# - {_flow(keys)}")
            if not placed:
                self.unmapped.append(f"{name}: no source of that name is known here; give it a `path` or a `hub`")
        if all(line.startswith("#") for line in written):
            problem = f"no dataset of section `{self.name}` is known here: {', '.join(sorted(seen)) or 'it lists none'}"
            raise LlameroError(
                problem, where=lines.at(self.placed["datasets"].start_mark), fix="write the recipe by hand"
            )
        return written

    def _datasets(self) -> list[tuple[str, dict[str, Any], yaml.Node]]:
        """Return name, keys and place of every dataset."""
        found: list[tuple[str, dict[str, Any], yaml.Node]] = []
        for key in ("datasets", "datasets_extra"):
            listed = self.placed.get(key)
            for node in listed.value if isinstance(listed, yaml.SequenceNode) else []:
                value = lines.value(node)
                entry = {value: None} if isinstance(value, str) else value
                options = list(entry.values()) if isinstance(entry, dict) else []
                if len(options) != 1 or not isinstance(options[0], dict | None):
                    raise LlameroError("a dataset is a name, or a name with keys", where=lines.at(node.start_mark))
                found.append((str(next(iter(entry))), options[0] or {}, node))
        return found

    def _source_keys(self, source: str, options: Mapping[str, Any], node: yaml.Node) -> dict[str, Any]:
        """Return the keys of a source in the order of the dataset's; then what its loader does without being asked."""
        stated = {key: value for key, value in options.items() if value is not None}
        for key in stated.keys() & set(_NUMBERS):
            if not isinstance(stated[key], int | float) or (key == "fraction" and stated[key] <= 0):
                raise LlameroError(f"`{key}: {stated[key]}` takes nothing", where=lines.at(node.start_mark))
        for key, value in {**_DEFAULTS.get(source, {}), "val_split": VAL_SPLIT}.items():
            if key not in stated and not (key == "hf_dataset_name" and "input_file_path" in stated):
                stated[key] = value
                self.notes.append(f"{source}: {key} is not stated, the published default {value} is written out")
        ours: dict[str, Any] = {}
        for key, value in stated.items():
            ours |= self._source_key(source, key, value, stated)
        cap = self.keys.get("eval_size")
        if cap:
            ours["max_val_set"] = min(ours.get("max_val_set", cap), cap)
            self.notes.append(f"{source}: eval_size {cap} caps every source, as its max_val_set")
        published = known.lookup(source)
        if published is not None and published.refusals:
            ours["refusals"] = True
            self.notes.append(f"{source}: the published loader leaves out refusals without being asked; written out")
        return ours

    def _source_key(self, source: str, key: str, value: Any, stated: Mapping[str, Any]) -> dict[str, Any]:
        """Return one key of a source, or say why there is none."""
        way_out = _no_counterpart(key, value, stated)
        if way_out:
            self.unmapped.append(f"{source}.{key}: {way_out.format(value=value)}")
            return {}
        if key in _NOTES:
            self.notes.append(f"{source}: {_NOTES[key]}")
        if key == "fraction":
            value = min(1, value)
        elif key == "fill_min_length":
            value += 1
        elif key == "lang" and isinstance(value, list):
            value = ",".join(value)
        return {_OURS[key]: value}


def _no_counterpart(key: str, value: Any, stated: Mapping[str, Any]) -> str | None:
    """Return the way out for a key that a source has no counterpart of."""
    if _OVERRULED.get(key) in stated:
        return f"{_OVERRULED[key]} stands beside it and decides; leave it out"
    if key == "data_files" and not isinstance(value, str):
        return "one file to a source; give each a source with a name of its own"
    if key == "max_val_set" and value == 0:
        return "0 caps nothing in the original; leave it out"
    return None if key in _OURS else _DATASET.get(key, "no such key is known here; leave it out")


def _flow(value: Any) -> str:
    """Return a value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text.removesuffix("...\n").strip()

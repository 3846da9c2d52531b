"""YAML that remembers where every key stood, so that an error can name its file and line.

What is worked on are PyYAML's nodes: a node knows the file and line it comes from, so parts of several files can be
put together and each key still says where it stands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


def read(path: Path) -> yaml.MappingNode:
    """Return what stands in a recipe's file.

    Raises:
        LlameroError: There is no such file, or it is not a mapping of keys, each written once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LlameroError("no such recipe", where=path, fix="`llamero run recipes/quickstart.yaml` is one") from error
    except IsADirectoryError as error:
        raise LlameroError("a recipe is a file, this is a directory", where=path) from error
    except UnicodeDecodeError as error:
        raise LlameroError(f"not UTF-8 text: {error.reason}", where=path) from error
    return parse(text, path)


def parse(text: str, path: str | Path) -> yaml.MappingNode:
    """Return the mapping in a text; `path` is the file it is from."""
    try:
        loader = yaml.SafeLoader(text)
        loader.name = str(path)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise LlameroError("a mapping of keys is wanted here", where=path)
        _refuse_twice(node)
        _flatten(node, loader)
    except yaml.YAMLError as error:
        raise _not_yaml(error, path) from error
    return node


def value(node: yaml.Node) -> Any:
    """Return the plain value of a node.

    Raises:
        LlameroError: A value is written as a kind of YAML that there is none of.
    """
    try:
        return yaml.SafeLoader("").construct_document(node)
    except yaml.YAMLError as error:
        raise _not_yaml(error, node.start_mark.name) from error


def _not_yaml(error: yaml.YAMLError, path: str | Path) -> LlameroError:
    if not isinstance(error, yaml.MarkedYAMLError):
        return LlameroError(f"not valid YAML: {error}", where=path)
    mark = error.problem_mark
    return LlameroError(f"not valid YAML: {error.problem}", where=at(mark) if mark else f"{path}:1")


def at(mark: yaml.Mark) -> str:
    """Return a place as `file:line`."""
    return f"{mark.name}:{mark.line + 1}"


def find(node: yaml.Node, place: Sequence[str | int]) -> str:
    """Return `file:line` of a key, or of the innermost thing around it that is there."""
    where = f"{node.start_mark.name}:1"
    for part in place:
        found = _child(node, part)
        if found is None:
            continue  # names that the schema adds (tags of a union) are not in the file
        node, where = found
    return where


def items(node: yaml.Node | None) -> Iterator[tuple[str, yaml.ScalarNode, yaml.Node]]:
    """Yield name, key and value of everything in a mapping; nothing of what is none."""
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield key.value, key, child


def get(node: yaml.Node | None, *names: str) -> yaml.Node | None:
    """Return what stands under a key, and under a key of that, if it is there."""
    for name in names:
        node = next((child for key, _, child in items(node) if key == name), None)
    return node


def _child(node: yaml.Node, part: str | int) -> tuple[yaml.Node, str] | None:
    for name, key, child in items(node):
        if name == str(part):
            return child, at(key.start_mark)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], at(node.value[part].start_mark)
    return None


def _refuse_twice(node: yaml.Node) -> None:
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_twice(child)
    seen: set[str] = set()
    for name, key, child in items(node):
        if name in seen:
            raise LlameroError(f"key `{name}` stands here twice", where=at(key.start_mark))
        seen.add(name)
        _refuse_twice(child)


def _flatten(node: yaml.Node, loader: yaml.SafeLoader) -> None:
    """Put what `<<: *anchor` stands for in its place; a key written beside it wins."""
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        last = {key.value if isinstance(key, yaml.ScalarNode) else id(key): (key, child) for key, child in node.value}
        node.value = list(last.values())
        for _, child in node.value:
            _flatten(child, loader)
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _flatten(child, loader)

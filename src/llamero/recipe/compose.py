"""Mixtures made of other mixtures: `extends` takes another's sources and keys, of this recipe or of another's file.

It is done before the recipe is checked, on nodes that know where they stand, so that the schema of a mixture knows
nothing of it and an error in an inherited key names the file and line of that key.
"""

from __future__ import annotations

import os
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from llamero.core.errors import LlameroError, did_you_mean
from llamero.recipe import lines

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXTENDS = "extends"
_NULL = "tag:yaml.org,2002:null"
_STRING = "tag:yaml.org,2002:str"
Pairs = dict[str, tuple[yaml.Node, yaml.Node]]
"""Key and value nodes by name, in order."""


def resolve(recipe: yaml.MappingNode, path: Path) -> yaml.MappingNode:
    """Return a recipe whose mixtures extend no other any more.

    Args:
        recipe: What stands in the file.
        path: The file.

    Raises:
        LlameroError: A mixture extends one that does not exist, or itself.
    """
    mixtures = lines.get(recipe, "data", "mixtures")
    if all(lines.get(mixture, EXTENDS) is None for _, _, mixture in lines.items(mixtures)):
        return recipe
    composer = _Composer(path, recipe)
    pairs: list[tuple[yaml.Node, yaml.Node]] = [
        (key, composer.mixture(path, name)) for name, key, _ in lines.items(mixtures)
    ]
    assert mixtures is not None  # it has mixtures
    return _with(recipe, "data", _with(lines.get(recipe, "data"), "mixtures", _mapping(pairs, mixtures)))


class _Composer:
    """Looks mixtures up, in as many files as they name."""

    def __init__(self, path: Path, recipe: yaml.MappingNode) -> None:
        self._home = path.resolve().parent
        self._files = {path.resolve(): recipe}
        self._open: list[tuple[Path, str]] = []

    def mixture(self, path: Path, name: str) -> yaml.Node:
        """Return a mixture that exists, with everything it extends."""
        node = lines.get(self._files[path.resolve()], "data", "mixtures", name)
        assert node is not None  # who asks has seen it
        extends = lines.get(node, EXTENDS)
        if path.resolve().parent != self._home:
            node = self._rebased(node, path)
        if not isinstance(node, yaml.MappingNode) or extends is None:
            return node
        self._open.append((path.resolve(), name))
        bases = [self._base(reference, path) for reference in _references(extends)]
        self._open.pop()
        own = _mapping([(key, child) for name, key, child in lines.items(node) if name != EXTENDS], node)
        return reduce(_merged, [*bases, own])

    def _base(self, reference: yaml.ScalarNode, path: Path) -> yaml.MappingNode:
        where = lines.at(reference.start_mark)
        file, hash_sign, name = reference.value.rpartition("#")
        other = path.parent / file if hash_sign else path
        if not hash_sign and name.endswith((".yaml", ".yml")):
            raise LlameroError(
                f"which mixture of {name}?", where=where, fix=f"write `extends: {name}#name`, with the mixture's name"
            )
        known = [known for known, _, _ in lines.items(lines.get(self._file(other, where), "data", "mixtures"))]
        if name not in known:
            of = f" in {file}" if hash_sign else ""
            raise LlameroError(
                f"there is no mixture `{name}`{of} to extend",
                where=where,
                fix=did_you_mean(name, known) if known else "name a recipe file that has mixtures",
            )
        if (other.resolve(), name) in self._open:
            way = [name for _, name in self._open[self._open.index((other.resolve(), name)) :]]
            raise LlameroError(
                f"these mixtures extend each other: {' → '.join([*way, name])}",
                where=where,
                fix="take one `extends` away and name the sources there",
            )
        base = self.mixture(other, name)
        if not isinstance(base, yaml.MappingNode):
            raise LlameroError(f"mixture `{name}` holds nothing to extend", where=lines.at(base.start_mark))
        return base

    def _file(self, path: Path, where: str) -> yaml.MappingNode:
        key = path.resolve()
        if key not in self._files:
            if not path.is_file():
                raise LlameroError(
                    f"there is no recipe {path} to extend", where=where, fix="paths are relative to the recipe's file"
                )
            self._files[key] = lines.read(path)
        return self._files[key]

    def _rebased(self, mixture: yaml.Node, path: Path) -> yaml.Node:
        """Return a mixture of another directory's file whose paths lead to the same files from here."""

        def rebase(node: yaml.Node) -> yaml.Node:
            if not isinstance(node, yaml.ScalarNode) or node.tag != _STRING or Path(node.value).is_absolute():
                return node
            moved = os.path.relpath(path.resolve().parent / node.value, self._home)
            return yaml.ScalarNode(_STRING, Path(moved).as_posix(), node.start_mark, node.end_mark)

        sources = lines.get(mixture, "sources")
        if isinstance(sources, yaml.SequenceNode):
            moved = [_each(source, ("path", "refusals"), rebase) for source in sources.value]
            mixture = _with(mixture, "sources", _sequence(moved, sources))
        against = lines.get(mixture, "decontaminate", "against")
        if against is not None:
            tests = _each(against, [name for name, _, _ in lines.items(against)], rebase)
            mixture = _with(mixture, "decontaminate", _with(lines.get(mixture, "decontaminate"), "against", tests))
        return mixture


def _references(extends: yaml.Node) -> list[yaml.ScalarNode]:
    if extends.tag == _NULL:
        return []
    references: list[yaml.ScalarNode] = []
    for node in extends.value if isinstance(extends, yaml.SequenceNode) else [extends]:
        if not isinstance(node, yaml.ScalarNode) or node.tag != _STRING:
            raise LlameroError(
                "`extends` names a mixture, or several in a list",
                where=lines.at(node.start_mark),
                fix="write `extends: name`, or `extends: other.yaml#name`",
            )
        references.append(node)
    return references


def _merged(base: yaml.MappingNode, own: yaml.MappingNode) -> yaml.MappingNode:
    """Return a mixture with the keys of both; where both have one, `own` decides, and null takes it away."""
    pairs = _pairs(base)
    for name, (key, child) in _pairs(own).items():
        inherited = lines.get(base, name)
        if child.tag == _NULL:
            pairs.pop(name, None)
        elif name == "sources" and isinstance(inherited, yaml.SequenceNode) and isinstance(child, yaml.SequenceNode):
            pairs[name] = key, _merged_sources(inherited, child)
        else:
            pairs[name] = key, child
    return _mapping(list(pairs.values()), own)


def _merged_sources(base: yaml.SequenceNode, own: yaml.SequenceNode) -> yaml.SequenceNode:
    """Return the base's sources, those that `own` names changed by it, and then the new ones."""
    sources: list[yaml.Node] = list(base.value)
    inherited = [_name(source) for source in sources]
    changed: set[str] = set()
    for source in own.value:
        name = _name(source)
        # named twice by `own` is a mistake, which the schema refuses
        if name is not None and name in inherited and name not in changed:
            changed.add(name)
            place = inherited.index(name)
            sources[place] = _merged(sources[place], source)  # pyright: ignore[reportArgumentType]
        else:
            sources.append(source)
    return _sequence(sources, own)


def _name(source: yaml.Node) -> str | None:
    """Return how a source is known in reports, as the schema has it."""
    name, toy_world = lines.get(source, "source"), lines.get(source, "toy_world")
    if isinstance(toy_world, yaml.ScalarNode):
        return f"toy_world {toy_world.value}"
    return name.value if isinstance(name, yaml.ScalarNode) else None


def _pairs(node: yaml.Node | None) -> Pairs:
    return {name: (key, child) for name, key, child in lines.items(node)}


def _with(node: yaml.Node | None, name: str, child: yaml.Node) -> yaml.MappingNode:
    """Return a mapping with something else under a key that it has."""
    assert node is not None
    return _mapping([(key, child if own == name else old) for own, key, old in lines.items(node)], node)


def _each(node: yaml.Node, names: Sequence[str], change: Callable[[yaml.Node], yaml.Node]) -> yaml.Node:
    """Return a mapping with the values of some keys changed."""
    for name in names:
        child = lines.get(node, name)
        if child is not None:
            node = _with(node, name, change(child))
    return node


def _mapping(pairs: list[tuple[yaml.Node, yaml.Node]], like: yaml.Node) -> yaml.MappingNode:
    return yaml.MappingNode("tag:yaml.org,2002:map", pairs, like.start_mark, like.end_mark)


def _sequence(nodes: list[yaml.Node], like: yaml.Node) -> yaml.SequenceNode:
    return yaml.SequenceNode("tag:yaml.org,2002:seq", nodes, like.start_mark, like.end_mark)

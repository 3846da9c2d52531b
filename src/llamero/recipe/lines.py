"""YAML that remembers where every key stood, so that an error can name its line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Source:
    """A parsed YAML file.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_text(encoding="utf-8")
            self._node = yaml.compose(text, Loader=yaml.SafeLoader)
            self.value: Any = yaml.safe_load(text)
        except FileNotFoundError as error:
            raise LlameroError(
                "no such recipe", where=path, fix="`llamero run recipes/quickstart.yaml` is one"
            ) from error
        except IsADirectoryError as error:
            raise LlameroError("a recipe is a file, this is a directory", where=path) from error
        except UnicodeDecodeError as error:
            raise LlameroError(f"not UTF-8 text: {error.reason}", where=path) from error
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise LlameroError(f"not valid YAML: {error.problem}", where=f"{path}:{line}") from error
        except yaml.YAMLError as error:
            raise LlameroError(f"not valid YAML: {error}", where=path) from error
        if not isinstance(self.value, dict):
            raise LlameroError("a recipe is a mapping of keys", where=path)
        self._refuse_twice(self._node)

    def line(self, place: Sequence[str | int]) -> int:
        """Return the line of a key, or of the innermost thing around it that the file has."""
        node, line = self._node, 1
        for part in place:
            found = _child(node, part)
            if found is None:
                continue  # names that the schema adds (tags of a union) are not in the file
            node, line = found
        return line

    def _refuse_twice(self, node: Any) -> None:
        if isinstance(node, yaml.SequenceNode):
            for child in node.value:
                self._refuse_twice(child)
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, child in node.value:
                if key.value in seen:
                    raise LlameroError(
                        f"key `{key.value}` stands here twice", where=f"{self.path}:{key.start_mark.line + 1}"
                    )
                seen.add(key.value)
                self._refuse_twice(child)


def _child(node: Any, part: str | int) -> tuple[Any, int] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(part):
                return value, key.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part].start_mark.line + 1
    return None

"""What the small files beside a tokenizer say about it: names of special tokens, conventions, Jinja."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from pathlib import Path

Json = dict[str, Any]


class TokenizerConfig:
    """tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat_template.jinja of a directory.

    Args:
        directory: Any of the files may be missing.
    """

    def __init__(self, directory: Path) -> None:
        self.file = directory / "tokenizer_config.json"
        self._config = read_json(self.file)
        self._special = read_json(directory / "special_tokens_map.json")
        self._later = read_json(directory / "added_tokens.json")
        jinja = directory / "chat_template.jinja"
        self._jinja = jinja.read_bytes().decode() if jinja.is_file() else None

    def token(self, part: str) -> str | None:
        """The token that plays a part, such as `bos_token`."""
        for source in (self._config, self._special):
            named = source.get(part)
            if named is not None:
                return named["content"] if isinstance(named, dict) else named
        return None

    @property
    def add_bos(self) -> bool | None:
        """What is written of the convention; None if nothing is."""
        return self._config.get("add_bos_token")

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja; of several, the one named `default`."""
        if self._jinja is not None:
            return self._jinja
        written = self._config.get("chat_template")
        if isinstance(written, list):
            return {entry["name"]: entry["template"] for entry in written}.get("default")
        return written

    @property
    def added(self) -> dict[int, str]:
        """Tokens by id, as these files list them beside the vocabulary."""
        listed: dict[str, Json] = self._config.get("added_tokens_decoder", {})
        tokens = {int(id): token["content"] for id, token in listed.items()}
        return dict(sorted((tokens | {id: token for token, id in self._later.items()}).items()))


def read_json(path: Path) -> Json:
    """The object in a file, or an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise LlameroError(f"not JSON ({error})", where=path, fix="fetch the file again") from error

"""How a script here hears what to do and answers: it runs in a peer's environment, so it imports nothing of ours."""

import json
import sys
import time
from pathlib import Path
from typing import Any


def job() -> dict[str, Any]:
    """Return what the script was told."""
    return json.loads(Path(sys.argv[1]).read_text())


def answer(**values: Any) -> None:
    """Say what came out."""
    Path(sys.argv[2]).write_text(json.dumps({"import_seconds": _IMPORTED, **values}))


_IMPORTED = 0.0


def imported() -> None:
    """Note that everything is imported: CPU-seconds until here are no work."""
    global _IMPORTED
    _IMPORTED = time.process_time()

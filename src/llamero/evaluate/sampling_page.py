"""One page that shows sampling reports side by side; it needs no other file and no network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamero.core import files
from llamero.core.errors import LlameroError
from llamero.corpus import sampling_reports

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamero.corpus.sampling_reports import Report

TEMPLATE = Path(__file__).with_name("sampling_page.html")
_BLOCKS = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def page(reports: Sequence[Report]) -> str:
    """Return the page of some reports, one column each; prompts that are the same text share a row.

    Whatever a model said reaches the page as JSON, in which no tag can begin, and is shown as text. The page allows its
    own script and style by their digests and nothing else, so that no output can load or run anything.

    Raises:
        LlameroError: There is no report.
    """
    if not reports:
        raise LlameroError("there is no report to show", fix="give --report FILE, once for each")
    text = TEMPLATE.read_text(encoding="utf-8")
    digests = {kind: base64.b64encode(hashlib.sha256(block.encode()).digest()) for kind, block in _BLOCKS.findall(text)}
    policy = "default-src 'none'; " + "; ".join(f"{kind}-src 'sha256-{d.decode()}'" for kind, d in digests.items())
    data = json.dumps([_shown(report) for report in reports], ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    return text.replace("{{policy}}", policy, 1).replace("{{data}}", data, 1)


def _shown(report: Report) -> dict[str, Any]:
    """Return what the page knows of a report."""
    return {
        "model": report.model_name,
        "date": report.date,
        "args": dict(report.args),
        "prompts": [
            {
                "prompt": asked.prompt,
                "results": [
                    {"name": each.sampling_config, "params": dict(each.sampling_params), "outputs": list(each.outputs)}
                    for each in asked.results
                ],
            }
            for asked in report.prompts
        ],
    }


def write(reports: Sequence[Path], to: Path) -> int:
    """Write the page of some report files, and return how many prompts it shows.

    Raises:
        LlameroError: A file is missing or is no sampling report.
    """
    read = [sampling_reports.read_report(path) for path in reports]
    text = page(read)
    if not to.resolve().parent.is_dir():
        raise LlameroError("there is no such directory to write to", where=to.parent)
    with files.disk_errors_named(to):
        files.write_atomically(to, text)
    return len({asked.prompt for report in read for asked in report.prompts})

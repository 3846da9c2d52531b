"""The page of sampling reports holds all of them, and nothing a model says can become a tag."""

import json
import re

import pytest

from llamero.cli import app
from llamero.core.errors import LlameroError
from llamero.corpus import sampling_reports
from llamero.corpus.sampling_reports import Asked, Outputs, Report
from llamero.evaluate import sampling_page

EVIL = "</script><script>document.title = 'taken'</script><!-- <img src=x onerror=alert(1)> & \u2028 {{policy}}"


def report(model, *prompts):
    ways = (Outputs("draw", {"max_new_tokens": 3}, (EVIL, "é")), Outputs("greedy", {"max_new_tokens": 3}, ()))
    asked = tuple(Asked(prompt, ways) for prompt in prompts)
    return Report(model, "2023-07-18T21:50:59.646355", {"mode": "legacy"}, asked)


def data_of(page):
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert len(found) == 1
    return found[0]


def test_the_page_holds_what_the_reports_say():
    page = sampling_page.page([report("a", "p", "q"), report(EVIL, "q")])
    read = json.loads(data_of(page))
    assert [each["model"] for each in read] == ["a", EVIL]
    assert [asked["prompt"] for asked in read[0]["prompts"]] == ["p", "q"]
    assert read[0]["prompts"][0]["results"][0]["outputs"] == [EVIL, "é"]


def test_no_output_can_begin_a_tag_or_run():
    page = sampling_page.page([report("a", EVIL)])
    assert not set(data_of(page)) & set("<>&\u2028")
    template = sampling_page.TEMPLATE.read_text()
    assert page.count("<script") == template.count("<script") == 2
    assert "innerHTML" not in template
    assert "insertAdjacentHTML" not in template
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert len(policy) == 1
    assert policy[0].startswith("default-src 'none'; ")
    assert "unsafe" not in policy[0]
    assert not re.findall(r"https?://", template)


def test_the_command_writes_a_page_of_several_reports(tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}.json").write_bytes(sampling_reports.written(report(name, "p", name)))
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    app(["evaluate", "--report", *files, "--html", str(tmp_path / "page.html")], result_action="return_value")
    assert "2 reports, 3 prompts" in capsys.readouterr().out
    assert [each["model"] for each in json.loads(data_of((tmp_path / "page.html").read_text()))] == ["a", "b"]


def test_what_cannot_be_shown_is_refused(tmp_path):
    with pytest.raises(LlameroError, match="no report to show"):
        sampling_page.page([])
    with pytest.raises(LlameroError, match="no such file"):
        sampling_page.write([tmp_path / "absent"], tmp_path / "page.html")
    (tmp_path / "a.json").write_bytes(sampling_reports.written(report("a", "p")))
    with pytest.raises(LlameroError, match="no such directory"):
        sampling_page.write([tmp_path / "a.json"], tmp_path / "absent" / "page.html")

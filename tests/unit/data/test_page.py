import re
from html.parser import HTMLParser

import numpy as np
import pytest

from llamero.corpus.dataset import Dataset
from llamero.corpus.megatron import Writer
from llamero.data import inspect, page, stats
from llamero.data.stats import SourceStats
from llamero.text.render import render

EVIL = '</div><script>alert("x")</script> & <img src=http://a.b/c onerror=alert(1)>'


class Texts(HTMLParser):
    """Collects the names of all tags, and the text that stands in `.said` of samples."""

    def __init__(self):
        super().__init__()
        self.tags, self.said, self._inside = [], "", False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._inside = self._inside or (tag == "div" and dict(attrs).get("class") == "said")

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "div"

    def handle_data(self, data):
        self.said += data if self._inside else ""


def make(directory, tokenizer, answers, *, names=("alpaca", "evol")):
    """Write a dataset with the same answers from each source, and return it with its summary."""
    parts = [SourceStats(name, "alpaca", samples=len(answers), rows=len(answers) + 2) for name in names]
    with Writer(directory / "train-text", np.uint16) as text, Writer(directory / "train-role", np.uint16) as role:
        for number, part in enumerate(parts):
            part.leave_out("duplicate", 2)
            for answer in answers:
                chat = [{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": answer}]
                said = render(chat, "chatml", tokenizer)
                text.add(said.ids)
                role.add(said.roles)
                part.add(len(said.ids), sum(said.learned), turns=1, language="en")
    train = {"sources": [part.to_json() for part in parts], "total": stats.total(parts).to_json()}
    return Dataset(directory), {"mixture": f"m {EVIL}", "train": train}


def read(path):
    parser = Texts()
    parser.feed((path / page.PAGE).read_text(encoding="utf-8"))
    return parser


@pytest.fixture
def out(tmp_path):
    (tmp_path / "page").mkdir()
    return tmp_path / "page"


def test_nothing_that_a_sample_or_a_name_says_becomes_markup(tmp_path, out, tokenizer):
    dataset, summary = make(tmp_path, tokenizer, [EVIL], names=(EVIL, "b"))
    page.write(out, summary, dataset, tokenizer, seed=0)
    found = read(out)
    assert "script" not in found.tags
    assert "img" not in found.tags
    assert EVIL in found.said


def test_the_page_needs_no_other_file(tmp_path, out, tokenizer):
    dataset, summary = make(tmp_path, tokenizer, ["the cat"])
    page.write(out, summary | {"mixture": "m"}, dataset, tokenizer, seed=0)
    text = (out / page.PAGE).read_text()
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import", text)
    assert "<title>m: what is in it</title>" in text


def test_samples_are_shown_token_by_token_and_marked(tmp_path, out, tokenizer):
    dataset, summary = make(tmp_path, tokenizer, ["sat on\n€"], names=("alpaca",))
    page.write(out, summary, dataset, tokenizer, seed=0)
    text = (out / page.PAGE).read_text()
    assert '<span class="s l">&lt;|im_end|&gt;</span>' in text
    assert '<span class="s t">&lt;|im_start|&gt;</span>' in text
    assert '<span class="l">€</span>' in text
    said = render(
        [{"role": "user", "content": "0"}, {"role": "assistant", "content": "sat on\n€"}], "chatml", tokenizer
    )
    assert read(out).said == inspect.visible(tokenizer.decode(said.ids, skip_special=False))


def test_five_samples_of_each_source_are_shown_and_the_seed_chooses(tmp_path, out, tokenizer):
    dataset, summary = make(tmp_path, tokenizer, [f"the cat {number}" for number in range(30)])
    shown = []
    for seed in (1, 1, 2):
        page.write(out, summary, dataset, tokenizer, seed=seed)
        shown.append((out / page.PAGE).read_text())
    assert shown[0].count("<article>") == 2 * page.SAMPLES
    assert shown[0] == shown[1]
    assert shown[0] != shown[2]


def test_the_cut_of_a_long_sample_is_counted(tmp_path, out, tokenizer):
    dataset, summary = make(tmp_path, tokenizer, ["the cat " * 900], names=("alpaca",))
    tokens = len(dataset.tokens("train")[0])
    page.write(out, summary, dataset, tokenizer, seed=0)
    assert f"… {tokens - inspect.HEAD - inspect.TAIL:,} tokens left out …" in (out / page.PAGE).read_text()


def test_numbers_and_what_was_left_out_are_in_it(tmp_path, out, tokenizer):
    dataset, summary = make(tmp_path, tokenizer, ["the cat", "the dog"])
    page.write(out, summary, dataset, tokenizer, seed=0)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", (out / page.PAGE).read_text()))
    assert "alpaca before selection duplicate 2" in text
    assert "en 4 100.0%" in text
    assert "alpaca alpaca 4 2 2 0" in text  # rows, selected, taken, copies


@pytest.mark.parametrize("names", [("a",), ("指示 $x$", "b")])
def test_lengths_are_drawn(tmp_path, out, tokenizer, names):
    dataset, summary = make(tmp_path, tokenizer, ["the cat", "the " * 50], names=names)
    page.write(out, summary, dataset, tokenizer, seed=0)
    assert (out / page.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert (out / page.PAGE).read_text().count("<svg") == len(names)


def test_a_dataset_without_a_document_has_a_page(tmp_path, out, tokenizer):
    dataset, summary = make(tmp_path, tokenizer, [])
    page.write(out, summary, dataset, tokenizer, seed=0)
    assert "duplicate" in (out / page.PAGE).read_text()
    assert (out / page.PICTURE).exists()


@pytest.mark.parametrize(("tokens", "said"), [(1, "1"), (512, "512"), (4096, "4k"), (1 << 20, "1M")])
def test_powers_of_two_are_said_shortly(tokens, said):
    assert page.short(tokens) == said


def test_what_was_left_out_is_counted_without_a_share():
    part = SourceStats("trees", "oasst", rows=1)
    part.leave_out("duplicate", 3)
    assert page.Split("train", [part], part).losses == [("trees", "before selection", "duplicate", 3)]

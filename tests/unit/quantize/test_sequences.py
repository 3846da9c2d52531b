import json
import sys
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamero.core.errors import LlameroError
from llamero.corpus.megatron import Writer
from llamero.quantize.config import Calibration, CalibrationSource
from llamero.quantize.sequences import _shares, draw
from llamero.text.render import render
from llamero.text.tokenizer import train_bpe

TEXT = "the cat sat on the mat and the dog ran after the cat "
CHATS = [{"instruction": f"Count to {n}.", "input": "", "output": "one " * n} for n in range(1, 30)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter([TEXT * 9]), vocab_size=280)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "wiki.test.txt").write_text(TEXT * 40)
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in CHATS))
    return tmp_path


def config(*sources, tokens=64, sequence=16):
    return Calibration.model_validate({"sources": sources, "tokens": tokens, "sequence": sequence})


def flat(sequences):
    return torch.cat(list(sequences)).tolist()


def test_text_is_cut_into_sequences_without_a_gap(root, tokenizer):
    drawn = draw(config({"path": "wiki.test.txt"}), tokenizer, root=root)
    assert [len(ids) for ids in drawn.sequences] == [16] * 4
    assert flat(drawn.sequences) == tokenizer.encode(TEXT * 40)[:64]
    (report,) = drawn.sources
    assert (report.source, report.split, report.layout) == ("wiki.test.txt", "test", "text")
    assert (report.samples, report.sequences, report.tokens) == (1, 4, 64)
    assert report.unused == len(tokenizer.encode(TEXT * 40)) - 64
    assert report.file == sha256((root / "wiki.test.txt").read_bytes()).hexdigest()
    assert report.digest == sha256(np.asarray(flat(drawn.sequences), dtype="<i8").tobytes()).hexdigest()


def test_conversations_are_rendered_with_the_template(root, tokenizer):
    drawn = draw(config({"path": "chats.jsonl"}), tokenizer, root=root, template="orca-hashes")
    said: list[int] = []
    samples = 0
    while len(said) < 64:
        messages = [("user", CHATS[samples]["instruction"]), ("assistant", CHATS[samples]["output"])]
        said += render([{"role": role, "content": text} for role, text in messages], "orca-hashes", tokenizer).ids
        samples += 1
    assert flat(drawn.sequences) == said[:64]
    assert drawn.sources[0].samples == samples
    assert drawn.sources[0].layout == "alpaca"


def test_sources_share_the_tokens_and_each_is_counted(root, tokenizer):
    (root / "mix").mkdir()
    with Writer(root / "mix" / "some-train-text", np.uint16) as writer:  # a prefix, as mixtures may have
        for _ in range(3):
            writer.add(np.arange(40, dtype=np.uint16))
    sources = [
        {"source": "wikitext-2-v1", "path": "wiki.test.txt", "share": 2},
        {"path": "chats.jsonl", "split": "train"},
        {"mixture": "chat"},
    ]
    drawn = draw(
        config(*sources, tokens=8 * 16 + 7), tokenizer, root=root, template="plain", mixtures={"chat": root / "mix"}
    )
    assert [part.sequences for part in drawn.sources] == [4, 2, 2]
    assert len(drawn.sequences) == 8
    assert flat(drawn.sequences[-2:]) == list(range(32))
    said = drawn.to_json()
    assert said["source"] == "wikitext-2-v1 (test) + chats.jsonl (train) + chat (train)"
    assert (said["sequence"], said["tokens"]) == (16, 128)
    assert [part["tokens"] for part in said["sources"]] == [64, 32, 32]
    assert str(root) not in json.dumps(said)


def test_what_a_layout_keeps_out_and_what_is_empty_is_counted(root, tokenizer):
    rows = [{"text": ""}, {"text": TEXT}, {"text": TEXT * 9}]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (report,) = draw(config({"path": "rows.jsonl"}), tokenizer, root=root).sources
    assert (report.samples, report.empty) == (3, 1)
    limited = config({"path": "rows.jsonl", "limit": 2}, tokens=64)
    with pytest.raises(LlameroError, match=r"rows.jsonl \(whole\) has \d+ tokens, 64 are asked for"):
        draw(limited, tokenizer, root=root)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"path": "none.txt"}, "no such data file"),
        ({"path": "wiki.test.txt", "layout": "alpaca"}, "instruction"),
        ({"path": "chats.jsonl", "layout": "alpca"}, "unknown layout `alpca`"),
        ({"path": "broken.jsonl"}, "not JSON"),
        ({"path": "odd.jsonl"}, "fit no known layout"),
    ],
)
def test_what_cannot_be_read_is_refused(root, tokenizer, source, says):
    (root / "broken.jsonl").write_text("{")
    (root / "odd.jsonl").write_text('{"a": 1}')
    with pytest.raises(LlameroError, match=says):
        draw(config(source), tokenizer, root=root)


def test_more_sources_than_sequences_are_refused(root, tokenizer):
    sources = config({"path": "wiki.test.txt"}, {"path": "chats.jsonl"}, tokens=16)
    with pytest.raises(LlameroError, match="1 sequences are too few for 2 sources"):
        draw(sources, tokenizer, root=root)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.integers(0, 200))
def test_shares_are_whole_and_near(shares, extra):
    whole = 100 * len(shares) + extra
    counts = _shares(shares, whole)
    assert sum(counts) == whole
    for share, count in zip(shares, counts, strict=True):
        assert abs(count - share / sum(shares) * whole) < 1


def test_a_published_data_set_is_read_from_the_hub(monkeypatch, tokenizer):
    asked = []

    def load_dataset(path, *, split, streaming, name=None):
        asked.append((path, split, name))
        yield from ({"text": text} for text in ("", f" {TEXT}\n", "", f" {TEXT * 5}\n"))

    library = ModuleType("datasets")
    vars(library)["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)
    drawn = draw(config({"source": "wikitext-2-v1", "split": "test"}), tokenizer, root=Path())
    assert set(asked) == {("Salesforce/wikitext", "test", "wikitext-2-v1")}
    assert drawn.to_json()["source"] == "wikitext-2-v1 (test)"
    assert (drawn.sources[0].samples, drawn.sources[0].empty, drawn.sources[0].file) == (4, 2, None)
    assert flat(drawn.sequences) == (tokenizer.encode(f" {TEXT}\n") + tokenizer.encode(f" {TEXT * 5}\n"))[:64]


def test_without_a_source_it_is_the_own_mixture_and_wikitext():
    plain = Calibration()
    assert [(part.name, part.part) for part in plain.parts()] == [("wikitext-2-raw-v1", "train")]
    assert [part.name for part in plain.parts("chat")] == ["chat", "wikitext-2-raw-v1"]
    assert [part.name for part in Calibration(mixture="talk").parts("chat")] == ["talk"]
    assert plain.decides("chat") != plain.decides()


def test_where_files_lie_decides_nothing():
    here, there = (
        Calibration.model_validate({"sources": [{"source": "a", "path": p}]}) for p in ("x/a.txt", "y/a.txt")
    )
    assert here.decides() == there.decides()
    assert here.decides() != Calibration.model_validate({"sources": [{"source": "b", "path": "x/a.txt"}]}).decides()


@pytest.mark.parametrize(
    ("source", "split"),
    [
        ({"path": "wikitext2/test.txt"}, "test"),
        ({"path": "wiki.valid.raw.txt"}, "validation"),
        ({"path": "contest.txt"}, "whole"),
        ({"path": "a.txt", "split": "dev"}, "dev"),
        ({"hub": "owner/name"}, "train"),
        ({"source": "oasst1"}, "train+validation"),
    ],
)
def test_the_split_is_always_named(source, split):
    assert CalibrationSource.model_validate(source).part == split

"""What is decided about samples before they are tokenized: shares, near-duplicates, overlaps, lengths."""

import json
import random

import numpy as np
import pytest

from llamero.corpus import megatron
from llamero.corpus.dataset import Dataset
from llamero.corpus.samples import Chat
from llamero.data import duplicates, inspect, select, write
from llamero.data.config import LengthenConfig, MixtureConfig
from llamero.data.lengthen import ChatCounts
from llamero.data.read import Parsed
from llamero.data.run import tokenize_mixture
from llamero.data.tokenize import Chunk, Encoder, Parsing, lengthened
from llamero.text.messages import SCAFFOLD, Message, Role
from llamero.text.render import render

WORDS = ["the", "cat", "sat", "on", "mat", "and", "dog", "log", "times", "said", "user", "to", *map(str, range(10))]


def sentence(draw, words):
    return " ".join(draw.choices(WORDS, k=words))


@pytest.fixture
def make(tmp_path, tokenizer_files):
    """Tokenize sources of rows with other keys of the mixture; return the summary and the dataset."""

    def run(rows, *, out="out", **keys):
        sources = []
        for name, lines in rows.items():
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
            sources.append({"source": name, "path": f"{name}.jsonl", **keys.get(name, {})})
        said = {key: value for key, value in keys.items() if key not in rows}
        mixture = MixtureConfig.model_validate({"sources": sources, **said})
        (tmp_path / out).mkdir(exist_ok=True)
        summary = tokenize_mixture(
            "chat",
            mixture,
            tokenizer=tokenizer_files,
            template="chatml",
            root=tmp_path,
            seed=5,
            out=tmp_path / out,
            team=1,
        )
        return summary, Dataset(tmp_path / out)

    return run


def rows_of(count, *, seed=0, words=40):
    draw = random.Random(seed)
    return [{"instruction": f"the cat {n}", "output": sentence(draw, words)} for n in range(count)]


def texts(dataset, tokenizer, split="train"):
    return [tokenizer.decode(ids.tolist()) for ids in dataset.tokens(split)]


def test_near_duplicates_are_left_out_within_and_across_sources(make, tokenizer):
    first, second = rows_of(30), rows_of(20, seed=1)
    changed = [{**row, "output": row["output"] + " the end"} for row in first[:5]]
    summary, dataset = make({"a": [*first, first[3]], "b": [*second, *changed]}, duplicates={"threshold": 0.8})
    assert len(dataset.tokens("train")) == 50
    a, b = (part["left_out"] for part in summary["train"]["sources"])
    assert (a, b) == ({"near-duplicate": 1}, {"near-duplicate": 5})
    found = summary["duplicates"]
    assert (found["within_sources"], found["across_sources"], found["dropped"]) == (1, 5, True)
    assert {example["same_as"] for example in found["examples"]} >= {"a, row 4", "a, row 1"}
    assert not any("the end" in text for text in texts(dataset, tokenizer))


def test_near_duplicates_may_only_be_reported(make):
    rows = rows_of(10)
    summary, dataset = make({"a": [*rows, rows[0]]}, duplicates={"threshold": 0.8, "action": "report"})
    assert len(dataset.tokens("train")) == 11
    assert summary["duplicates"]["within_sources"] == 1


def test_a_survey_that_waits_has_all_its_signatures(make, monkeypatch):
    """A run that is killed right after a survey is stored must find the signatures that it promises."""
    store, seen = select._store, []

    def watched(path, survey):
        seen.append((path.with_suffix(select.SIGNATURES).stat().st_size, survey.characters.size))
        store(path, survey)

    monkeypatch.setattr(select, "_store", watched)
    make({"a": rows_of(30), "b": rows_of(3, seed=1)}, duplicates={"threshold": 0.8})
    assert seen == [(4 * duplicates.PLACES * count, count) for count in (30, 3)]


QUESTION = "which of these animals sat on the old wooden mat beside the river while nobody was looking at it"


@pytest.mark.parametrize("action", ["drop", "report"])
def test_overlaps_with_a_test_set_are_left_out_or_reported(make, tmp_path, tokenizer, action):
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"question": QUESTION}))
    rows = rows_of(20)
    rows[7] = {"instruction": f"Please answer: {QUESTION.upper()}?", "output": "the cat"}
    summary, dataset = make({"a": rows}, decontaminate={"against": {"quiz": "quiz.jsonl"}, "action": action})
    found = summary["decontamination"]
    assert found["tests"]["quiz"]["samples"] == 1
    assert found["tests"]["quiz"]["examples"][0]["sample"].endswith("a.jsonl:8")
    assert "quiz (1)" in found["statement"]
    assert ("removed" if action == "drop" else "kept") in found["statement"]
    assert len(dataset.tokens("train")) == (19 if action == "drop" else 20)
    left_out = {"overlaps with a test set": 1} if action == "drop" else {}
    assert summary["train"]["total"]["left_out"] == left_out


def test_a_size_is_exact_and_more_than_there_is_takes_all(make):
    for size, taken in ((7, 7), (30, 30), (99, 30)):
        summary, dataset = make({"a": rows_of(30)}, a={"size": size}, out=f"by {size}")
        assert len(dataset.tokens("train")) == taken
        assert summary["train"]["sources"][0]["fraction"] == taken / 30


def test_validation_goes_by_rows_so_that_a_tree_is_on_one_side(make, tokenizer):
    def tree(number):
        replies = [
            {"message_id": f"{number}-{k}", "text": f"said {number} {k}", "role": "assistant", "rank": k, "replies": []}
            for k in range(3)
        ]
        root = {"message_id": str(number), "text": f"the cat {number}", "role": "prompter", "lang": "en"}
        prompt = {**root, "review_result": True, "deleted": False, "synthetic": False, "replies": replies}
        return {"message_tree_id": str(number), "tree_state": "ready_for_export", "prompt": prompt}

    _, dataset = make({"a": [tree(n) for n in range(40)]}, a={"layout": "oasst", "val_split": 0.25, "top_k": 2})
    numbers = {
        split: [text.split("the cat ")[1].split()[0] for text in texts(dataset, tokenizer, split)]
        for split in ("train", "val")
    }
    assert (len(numbers["train"]), len(numbers["val"])) == (60, 20)
    assert not set(numbers["train"]) & set(numbers["val"])


def documents(count, *, seed=0):
    draw = random.Random(seed)
    for n in range(count):
        name = ("web", "books")[n % 4 == 0]
        yield {"text": sentence(draw, draw.choice((20, 60, 400))), "meta": {"redpajama_set_name": name}}


def test_long_documents_have_the_length_and_their_spans_are_true(make, tokenizer, tmp_path):
    rows = list(documents(200))
    how = {"length": 512, "long_from": 300, "short_share": 0.3}
    summary, dataset = make({"a": rows}, lengthen=how, a={"val_split": 0.1})
    tokens, roles = dataset.tokens("train"), dataset.roles("train")
    assert len(tokens) > 5
    assert {len(ids) for ids in tokens} == {512}
    assert roles is not None
    spans = [json.loads(line) for line in (tmp_path / "out/spans.jsonl").read_text().splitlines()]
    assert [said["document"] for said in spans] == list(range(len(tokens)))
    head = [tokenizer.bos_id] if tokenizer.add_bos else []
    whole = [[*head, *tokenizer.encode(row["text"]), tokenizer.eos_id] for row in rows]
    for ids, said in zip(tokens, spans, strict=True):
        for start, stop, label, offset in said["spans"]:
            original = whole[int(label.rpartition(":")[2]) - 1]
            assert ids[start:stop].tolist() == original[offset : offset + stop - start]
    assert summary["lengthen"]["domains"].keys() == {"web", "books"}
    written = sum(map(len, tokens)) + summary["lengthen"]["tokens_left_over"]
    assert written - summary["lengthen"]["tokens_left_over"] == summary["train"]["total"]["tokens"]
    assert len(dataset.tokens("val")) == 20  # as they were


def test_the_statistics_of_a_lengthened_set_are_those_of_its_files(make):
    rows = {"a": list(documents(300)), "b": rows_of(40)}
    summary, dataset = make(rows, lengthen={"length": 512, "long_from": 300, "short_share": 0.3})
    lengths = list(map(len, dataset.tokens("train")))
    total = summary["train"]["total"]
    assert (total["tokens"], total["accepted"]) == (sum(lengths), len(lengths))
    assert (total["min_tokens"], total["max_tokens"]) == (min(lengths), max(lengths))
    assert sum(total["lengths"].values()) == len(lengths)
    assert [(part["name"], part["rows"]) for part in summary["train"]["sources"]][:2] == [("a", 300), ("b", 40)]
    assert inspect.draw(dataset, "train", summary, seed=1, count=3).keys() == {write.LONG}


def test_characters_per_token_are_those_of_the_tokenizer_and_decide_the_length_of_chats(tokenizer_files, tokenizer):
    mixture = MixtureConfig.model_validate({"sources": [{"toy_world": "conversations", "count": 1}]})
    encoder = Encoder(mixture, Parsing([], []), tokenizer=tokenizer_files, template="chatml", seed=0)
    chats = [
        Chat((Message("user", row["instruction"]), Message("assistant", row["output"])))
        for row in rows_of(200, words=60)
    ]
    units = tuple(Parsed(f"row {n}", (chat,)) for n, chat in enumerate(chats))
    known = [Chunk(0, 0, units, np.zeros(200, np.uint8))]
    how = LengthenConfig(length=1500)

    def parse(unit):
        return unit

    found = lengthened(0, known, parse, how, seed=0, counts=ChatCounts(), measure=encoder.characters_per_token)
    parsed = [unit for chunk in found for unit in chunk.units if isinstance(unit, Parsed)]
    long = [item.messages for unit in parsed for item in unit.found if isinstance(item, Chat)]
    sizes = [len(render(each, "chatml", tokenizer).ids) for each in long]
    assert len(sizes) > 5
    assert np.mean([size <= how.length for size in sizes]) >= 0.95
    assert np.median(sizes) > 0.6 * how.length


def test_spans_of_a_long_chat_are_tokens_of_its_dialogues(make, tokenizer, tmp_path):
    _, dataset = make({"a": rows_of(30)}, lengthen={"length": 900, "recall_every": 100})
    for said in map(json.loads, (tmp_path / "out/spans.jsonl").read_text().splitlines()):
        ids = dataset.tokens("train")[said["document"]]
        assert (said["spans"][0][0], said["spans"][-1][1]) == (0, len(ids))
        for start, stop, label, _ in said["spans"]:
            number = int(label.rpartition(":")[2]) - 1
            text = tokenizer.decode(ids[start:stop].tolist(), skip_special=False)
            assert text.count("the cat") >= 1
            assert f"the cat {number}" in text
            assert len(label) < 200


def test_long_chats_are_made_of_dialogues_and_ask_about_earlier_ones(make, tokenizer):
    how = {"length": 600, "recall_every": 2}
    summary, dataset = make({"a": rows_of(60)}, lengthen=how, a={"val_split": 0.1})
    chats = summary["lengthen"]["chats"]
    assert chats["dialogues"] == 54
    assert chats["chats"] == len(dataset.tokens("train")) < 20
    assert chats["recalls"] > 0
    assert len(dataset.tokens("val")) == 6
    roles = dataset.roles("train")
    assert roles is not None
    turns = np.flatnonzero(np.diff((np.asarray(roles[0]) % SCAFFOLD == Role.ASSISTANT).astype(int)) == 1).size
    assert turns >= 4


@pytest.mark.parametrize("at", [3, 5])
def test_a_lengthened_set_goes_on_where_it_was_cut_off(make, monkeypatch, tmp_path, at):
    rows = {"a": list(documents(1500)), "b": rows_of(600)}
    how = {"length": 512, "long_from": 300, "short_share": 0.5}
    make(rows, lengthen=how, out="whole")
    monkeypatch.setattr(write, "SECONDS", 0.0)
    add = write.DatasetWriter.add

    def cut_off(writer, encoded):
        if writer.chunks == at:
            raise KeyboardInterrupt
        return add(writer, encoded)

    with monkeypatch.context() as cut:
        cut.setattr(write.DatasetWriter, "add", cut_off)
        with pytest.raises(KeyboardInterrupt):
            make(rows, lengthen=how, out="cut")
    make(rows, lengthen=how, out="cut")
    names = [path.name for path in (tmp_path / "whole").iterdir()]
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == sorted(names)
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert len(megatron.Reader(tmp_path / "whole/train-text")) > 10

"""Toy files hold what the reader of their layout finds in them."""

import json
from typing import Any

import pytest

from llamero.corpus import layouts
from llamero.corpus.samples import Chat, Document
from llamero.corpus.toy_files import SYSTEM, ToyFile
from llamero.data.config import MixtureConfig
from llamero.data.read import Reading, refuse_unreadable

ROWS = 40


def written(layout, tmp_path, **keys):
    file = ToyFile(f"toy/{layout}.jsonl", layout, ROWS, seed=3, **keys)
    file.write(tmp_path)
    return file


def read(layout, tmp_path, **keys) -> list[Any]:
    said = {"sources": [{"source": "a", "path": f"toy/{layout}.jsonl", "layout": layout, **keys}]}
    mixture = MixtureConfig.model_validate(said)
    refuse_unreadable(mixture, tmp_path)
    return [sample for _, sample in Reading(mixture.sources[0], tmp_path).samples()]


@pytest.mark.parametrize("layout", sorted(layouts.LAYOUTS))
def test_every_row_of_every_layout_is_read(layout, tmp_path):
    written(layout, tmp_path)
    found = read(layout, tmp_path)
    trees = layout.startswith("oasst")
    assert len(found) == (2 * ROWS if trees else ROWS)
    assert {type(sample) for sample in found} == {Document if layout == "text" else Chat}
    assert {sample.language for sample in found} == {"en"}


@pytest.mark.parametrize("layout", ["messages", "sharegpt", "orca-chat", "orca", "dolphin"])
def test_every_second_row_has_a_system_message(layout, tmp_path):
    written(layout, tmp_path)
    said = [sample.messages[0] for sample in read(layout, tmp_path)]
    assert [message.role for message in said] == ["user", "system"] * (ROWS // 2)
    assert {message.text for message in said if message.role == "system"} == {SYSTEM}


@pytest.mark.parametrize("layout", ["dialogue", "sharegpt", "sharegpt-clean", "messages", "orca-chat", "oasst"])
def test_conversations_of_one_seed_are_the_same_in_every_layout(layout, tmp_path):
    written(layout, tmp_path)
    written("oasst-flat", tmp_path)
    keys = {"top_k": 1} if layout == "oasst" else {}
    chats = [[m.text for m in chat.messages if m.role != "system"] for chat in read(layout, tmp_path, **keys)]
    assert chats == [[m.text for m in chat.messages] for chat in read("oasst-flat", tmp_path, top_k=1)]
    assert {len(chat) for chat in chats} == {4}


def test_a_context_is_parted_from_its_question(tmp_path):
    written("dolly", tmp_path)
    written("alpaca", tmp_path)
    roles = {tuple(message.role for message in chat.messages) for chat in read("dolly", tmp_path)}
    assert roles == {("user", "assistant"), ("context", "user", "assistant")}
    assert any(row["input"] for row in map(json.loads, (tmp_path / "toy/alpaca.jsonl").read_text().splitlines()))


def test_languages_take_turns(tmp_path):
    written("oasst", tmp_path, languages=("de", "en", "fr"))
    assert len(read("oasst", tmp_path, lang="de", top_k=1)) == 14  # 0, 3, 6 … of 40
    assert {chat.language for chat in read("oasst", tmp_path, lang="en,fr")} == {"en", "fr"}


def test_a_file_that_stands_there_is_not_touched(tmp_path):
    file = written("pair", tmp_path)
    path = tmp_path / file.path
    before = path.stat().st_mtime_ns
    file.write(tmp_path)
    assert path.stat().st_mtime_ns == before
    path.write_text("{}\n")
    file.write(tmp_path)
    assert len(path.read_text().splitlines()) == ROWS

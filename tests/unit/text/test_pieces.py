"""The oracle tokenizes every stretch of ordinary text whole and asks the backend for all spans."""

import json
import os
import pickle
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamero.core.errors import LlameroError
from llamero.text.messages import SCAFFOLD, Message, Role, Speaker
from llamero.text.pieces import Piece, Rendered, tokenize, tokenize_batch
from llamero.text.render import render, render_batch, resolve
from llamero.text.templates import TEMPLATES
from llamero.text.tokenizer import load_tokenizer


def by_spans(pieces, tokenizer) -> Rendered:
    ids, roles, learned = [], [], []
    within = False
    for (special, _), run in groupby(pieces, key=lambda piece: (piece.special, piece.role == Role.ASSISTANT)):
        together = list(run)
        if special:
            ids += [tokenizer.id(piece.text) for piece in together]
            roles += [piece.role for piece in together]
            learned += [piece.learned for piece in together]
            within = False
            continue
        continues = within or (bool(ids) and tokenizer.dummy_space == "first")
        text = "".join(piece.text for piece in together)
        if not text:
            continue
        encoded = tokenizer.encode_with_spans(text, continues=continues)
        owners = [piece for piece in together for _ in piece.text]
        ids += encoded.ids
        for start, stop in encoded.spans:
            owner = owners[start]
            if owner.role >= SCAFFOLD:
                owner = next((other for other in owners[start:stop] if other.role < SCAFFOLD), owner)
            roles.append(owner.role)
            learned.append(owner.learned)
        within = True
    return Rendered("".join(piece.text for piece in pieces), tuple(ids), tuple(roles), tuple(learned))


ATOMS = [*" \n\t\r▁aé1.!'\u0301🦙北", "  ", "\n\n", "word", " words", "it's", "</s>", "### User:\n", "<s>"]
ORDINARY = st.builds(
    Piece,
    st.lists(st.sampled_from(ATOMS), max_size=4).map("".join),
    st.sampled_from([*map(int, Role), *(role + SCAFFOLD for role in Role)]),
    st.booleans(),
    st.just(False),
)
SPECIAL = st.builds(
    Piece, st.sampled_from(["<s>", "</s>"]), st.sampled_from([1, 2, 17, 18]), st.booleans(), st.just(True)
)


@given(pieces=st.lists(ORDINARY | ORDINARY | ORDINARY | SPECIAL, max_size=8))
def test_pieces_get_the_tokens_of_whole_stretches(tokenizer, pieces):
    pieces = [piece._replace(text=tokenizer.bos or tokenizer.eos) if piece.special else piece for piece in pieces]
    assert tokenize(pieces, tokenizer) == by_spans(pieces, tokenizer)


@given(pieces=st.lists(ORDINARY, max_size=8))
def test_so_they_do_where_nothing_is_proved_of_words(pieces):
    tokenizer = stories()
    assert tokenizer.words is None
    assert tokenize(pieces, tokenizer) == by_spans(pieces, tokenizer)


@cache
def stories():
    return load_tokenizer(shared() / "data/weights/tinystories-656k-hf")


@cache
def shared() -> Path:
    folder = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[3].parent / "shared"))
    if not folder.exists():
        pytest.skip("needs the shared data folder")
    return folder


@cache
def chats() -> list[list[Message]]:
    instruct = shared() / "data/instruct"
    rows = json.loads((instruct / "lima/lima.json").read_text())[::40]
    rows += json.loads((instruct / "alpaca/alpaca_en_demo.json").read_text())[::40]
    found = [[Message("user", row["instruction"]), Message("assistant", row["output"])] for row in rows]
    names: dict[str, Speaker] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
    for row in json.loads((instruct / "sharegpt/sharegpt_sample.json").read_text()):
        found.append([Message(names[turn["from"]], turn["value"]) for turn in row["conversations"]])
    return [
        [Message("system", " Be  brief.\n"), Message("context", "\tSeen\n"), *chat] if number % 3 == 0 else chat
        for number, chat in enumerate(found)
    ]


@pytest.mark.parametrize("template", TEMPLATES)
def test_real_chats_get_the_tokens_of_whole_stretches(tokenizer, template):
    resolved = resolve(template, tokenizer)
    rendered = render_batch(chats(), template, tokenizer)
    for chat, found in zip(chats(), rendered, strict=True):
        whole = by_spans(resolved.pieces(chat, tokenizer, add_generation_prompt=False), tokenizer)
        assert not isinstance(found, LlameroError)
        assert found.text == whole.text
        assert tuple(found.ids.tolist()) == whole.ids
        assert tuple(found.roles.tolist()) == whole.roles
        assert tuple(found.learned.tolist()) == whole.learned


def test_a_batch_holds_each_conversation_or_why_there_is_none(tiny):
    good = [Message("user", "Hi"), Message("assistant", "Yo")]
    batch = [good, [Message("assistant", "Yo")], [], [Message("user", "a"), Message("assistant", " ")], good[:1]]
    first, early, empty, silent, last = render_batch(batch, "chatml", tiny)
    for error, problem in ((early, "speaks after nobody"), (empty, "no messages"), (silent, "says nothing")):
        assert isinstance(error, LlameroError)
        assert problem in error.problem
    for found, chat in ((first, good), (last, good[:1])):
        assert not isinstance(found, LlameroError)
        whole = render(chat, "chatml", tiny)
        assert (found.text, tuple(found.ids.tolist())) == (whole.text, whole.ids)
        assert (found.ids.dtype, found.roles.dtype, found.learned.dtype) == (np.int32, np.uint8, np.bool_)
    assert render_batch([], "chatml", tiny) == []
    with pytest.raises(LlameroError, match="does not have"):
        render_batch([], "chatml", stories())


def test_a_special_token_that_is_none_is_a_mistake(tiny):
    with pytest.raises(ValueError, match="'<nope>' is no token"):
        tokenize_batch([[Piece("<nope>", 1, False, True)]], tiny)


def test_what_is_remembered_does_not_travel(tiny):
    fresh = len(pickle.dumps(tiny.with_tokens([])))
    known = tiny.with_tokens([])
    render([Message("user", " ".join(map(str, range(1000))))], "chatml", known)
    assert len(pickle.dumps(known)) < fresh + 1000

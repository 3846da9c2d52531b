import pickle

import pytest

from llamero.core.errors import LlameroError
from llamero.corpus.known import KNOWN, lookup
from llamero.corpus.layouts import LAYOUTS
from llamero.corpus.refusals import SHIPPED, Refusals
from llamero.corpus.samples import Chat, Document
from llamero.text.messages import Message, Speaker

PUBLISHED = ["megacode2", "orca-chat", "dolly15k_multilingual", "oa_leet10k", "oasst_export"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sources_of_the_published_mixtures_are_known(name):
    assert lookup(name) is not None


@pytest.mark.parametrize("name", ["orca_chat", "orca-chat", "Orca-Chat"])
def test_hyphens_and_underscores_in_names_are_the_same(name):
    assert lookup(name) == KNOWN["orca_chat"]


def test_an_unknown_name_is_no_error():
    assert lookup("my data") is None


def test_every_known_name_can_be_looked_up_and_its_layout_exists():
    for name, known in KNOWN.items():
        assert lookup(name) is known, name
        assert known.layout in LAYOUTS, name
        assert known.hub.count("/") == (0 if name == "oasst_export" else 1), name


def said(text, role: Speaker = "assistant"):
    return Chat((Message("user", "Hi"), Message(role, text)))


SHIPPED_LIST = Refusals.load()


@pytest.mark.parametrize(
    "text",
    [
        "As an AI language model, I cannot do that.",
        "Well, AS A LARGE LANGUAGE MODEL I would not.",
        "I was trained by OpenAI.",
        "I'm sorry, I cannot generate that.",
        "I am an AI and have no body.",
        "That was after my knowledge cutoff.",
    ],
)
def test_who_speaks_as_a_refusing_assistant_is_found(text):
    assert SHIPPED_LIST.found(said(text))
    assert SHIPPED_LIST.found(said(text, "user"))
    assert SHIPPED_LIST.found(Document(text))


@pytest.mark.parametrize(
    "text", ["As an aid to memory, I am an airline.", "I cannot see it.", "I'm sorry, I could not."]
)
def test_who_speaks_like_anybody_is_not(text):
    assert SHIPPED_LIST.found(said(text)) is None


@pytest.mark.parametrize("role", ["system", "context"])
def test_what_nobody_says_is_not_looked_at(role):
    assert SHIPPED_LIST.found(said("Answer as an AI language model.", role)) is None


def test_no_shipped_phrase_is_found_by_another():
    phrases = SHIPPED_LIST.phrases
    assert [(a, b) for a in phrases for b in phrases if a != b and a in b] == []
    assert len(phrases) == len(set(phrases)) == 21


def test_phrases_of_ones_own_are_read(tmp_path):
    path = tmp_path / "phrases.txt"
    path.write_text('# what we do not want\n\nFoo Bar \n" baz"\n')
    refusals = Refusals.load(path)
    assert refusals.phrases == ("foo bar", " baz")
    assert refusals.found(said("a foo BAR")) == "foo bar"
    assert refusals.found(said("a  BAZ")) == " baz"
    assert refusals.found(said("baz")) is None
    assert pickle.loads(pickle.dumps(refusals)) == refusals


@pytest.mark.parametrize("data", [b"", b"# nothing\n\n", b'""\n'])
def test_a_list_without_phrases_is_refused(tmp_path, data):
    (tmp_path / "phrases.txt").write_bytes(data)
    with pytest.raises(LlameroError, match=r"phrases\.txt: no refusal phrase(?s:.*)one phrase a line"):
        Refusals.load(tmp_path / "phrases.txt")


def test_a_list_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(LlameroError, match=r"none\.txt: the refusal phrases cannot be read"):
        Refusals.load(tmp_path / "none.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(LlameroError, match=r"bad\.txt: the refusal phrases cannot be read"):
        Refusals.load(tmp_path / "bad.txt")


def test_the_shipped_list_lies_beside_the_code():
    assert SHIPPED.is_file()

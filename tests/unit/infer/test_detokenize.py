"""Text that grows: its parts joined are the decoder's text, characters are whole, stop strings never show."""

import os
from pathlib import Path

import pytest
import torch

from llamero.infer.detokenize import Text

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[4] / "shared"))
STORY = "Once upon a time, naïve 日本語 👩‍👩‍👧 — “ok”  two  spaces\n\n\ttab ﷽ end"


class ByteTokenizer:
    """A token is a byte; 0 is special."""

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids, *, skip_special=True):
        return bytes(id for id in ids if id).decode(errors="replace")


class PieceTokenizer:
    """SentencePiece's habit: words begin with a space, and a text loses the space it begins with."""

    words = ("<s>", "▁Hello", "▁world", "s", "▁", ".")

    def decode(self, ids, *, skip_special=True):
        return "".join(self.words[id] for id in ids if id).replace("▁", " ").removeprefix(" ")


def parts(tokenizer, prompt, ids, stops=()):
    text = Text(tokenizer, prompt, stops)
    said = []
    for id in ids:
        said.append(text.add(id))
        if text.stopped:
            return said
    return [*said, text.end()]


def test_characters_come_whole():
    tokenizer = ByteTokenizer()
    said = parts(tokenizer, [], tokenizer.encode(STORY))
    assert "".join(said) == STORY
    assert not any("\ufffd" in part for part in said)


def test_a_character_that_is_cut_off_is_shown_as_the_decoder_shows_it():
    tokenizer = ByteTokenizer()
    assert "".join(parts(tokenizer, [], tokenizer.encode("né")[:-1])) == "n\ufffd"


@pytest.mark.parametrize(
    ("prompt", "ids", "text"),
    [
        ([], [1, 2, 3], "Hello worlds"),
        ([0], [1, 2], "Hello world"),
        ([0, 1], [2, 3, 5], " worlds."),
        ([0, 1], [3, 2], "s world"),
        ([0, 1], [4, 4, 2], "   world"),
    ],
)
def test_a_space_between_prompt_and_answer_is_kept(prompt, ids, text):
    assert "".join(parts(PieceTokenizer(), prompt, ids)) == text


@pytest.mark.parametrize("stops", [("END",), ("NEVER", "END"), ("ENDING", "EN"), ("END OF", "END")])
def test_a_stop_string_never_shows(stops):
    tokenizer = ByteTokenizer()
    said = parts(tokenizer, [], tokenizer.encode("one EEN two END OF text"), stops)
    expected = "one E" if "EN" in stops else "one EEN two "
    assert "".join(said) == expected


def test_text_that_only_looks_like_a_stop_string_is_shown():
    tokenizer = ByteTokenizer()
    said = parts(tokenizer, [], tokenizer.encode("one EN"), ("END",))
    assert said == ["o", "n", "e", " ", "", "", "EN"]


def test_a_stop_string_in_the_prompt_stops_nothing():
    tokenizer = ByteTokenizer()
    assert "".join(parts(tokenizer, tokenizer.encode("END E"), tokenizer.encode("ND"), ("END",))) == "ND"


def test_special_tokens_are_silent():
    tokenizer = ByteTokenizer()
    assert "".join(parts(tokenizer, [], [0, 65, 0, 0, 66, 0])) == "AB"


@pytest.mark.parametrize("name", ["weights/tinystories-656k-hf", "weights/ref-7m-hf", "tokenizers/llama2"])
def test_real_tokenizers_stream_what_they_decode(name):
    directory = SHARED / "data" / name
    if not directory.exists():
        pytest.skip(f"{directory} is not there")
    from llamero.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode(STORY * 2)
    for cut in (0, 1, len(tokenizer.encode(STORY[:20]))):
        assert tokenizer.decode(ids[:cut]) + "".join(parts(tokenizer, ids[:cut], ids[cut:])) == tokenizer.decode(ids)
    noise = torch.randint(300, len(tokenizer), (200,), generator=torch.Generator().manual_seed(0)).tolist()
    if "llama2" in name:  # no byte tokens among the noise: what is broken cannot be taken back
        assert "".join(parts(tokenizer, [], noise)) == tokenizer.decode(noise)

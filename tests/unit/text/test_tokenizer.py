import json
import pickle

import pytest

from llamero.core.errors import LlameroError
from llamero.text.tokenizer import Tokenizer, load_tokenizer, train_bpe

TEXTS = ["the cat sat on the mat 12 times, said the user to the assistant\n"] * 3
ODD = ["", " ", "  two  spaces ", "\n\n\tx\n", "ÄÖÜ ß naïve 北京 🦙🏽", "1234567", "</s> <s> <unk> <0x0A>", "don't"]


@pytest.mark.parametrize("text", ODD)
def test_decode_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_is_encoded_as_its_texts_are(tokenizer):
    for how in ({}, {"special": True}, {"continues": True}):
        assert tokenizer.encode_batch(ODD, **how) == [tokenizer.encode(text, **how) for text in ODD]


def test_markers_in_a_text_are_text_unless_asked_for(tokenizer):
    eos = tokenizer.eos
    assert tokenizer.eos_id not in tokenizer.encode(f"a{eos}b")
    assert tokenizer.decode(tokenizer.encode(f"a{eos}b")) == f"a{eos}b"
    assert tokenizer.encode(eos, special=True) == [tokenizer.eos_id]


def test_a_text_that_continues_gets_no_dummy_space(tokenizer):
    whole = tokenizer.encode("one two three")
    assert tokenizer.encode("one") + tokenizer.encode(" two three", continues=True) == whole
    assert tokenizer.decode(tokenizer.encode("one") + tokenizer.encode("1", continues=True)) == "one1"


def test_encode_adds_no_beginning_and_no_end(tokenizer):
    ids = tokenizer.encode("hello", special=True)
    assert tokenizer.bos_id not in ids
    assert tokenizer.eos_id not in ids


def test_spans_cover_the_text(tokenizer):
    text = "a longer text, ünïcödé 🦙\n\n with  space"
    encoded = tokenizer.encode_with_spans(text, continues=True)
    assert encoded.ids == tokenizer.encode(text, continues=True)
    assert encoded.spans[0][0] == 0
    assert encoded.spans[-1][1] == len(text)


def test_extra_tokens_take_the_next_ids_in_order(tiny):
    size = len(tiny)
    more = tiny.with_tokens(["<CLS>", "<|im_start|>", "<SEP>"])
    assert len(tiny) == size
    assert tiny.id("<CLS>") is None
    assert [more.id("<CLS>"), more.id("<SEP>"), len(more)] == [size, size + 1, size + 2]
    assert more.id("<|im_start|>") == tiny.id("<|im_start|>")
    assert more.token(size) == "<CLS>"
    assert more.encode("<CLS>", special=True) == [size]
    assert size not in more.encode("<CLS>")


def test_an_id_beyond_the_vocabulary_is_a_mistake(tiny):
    with pytest.raises(ValueError, match="no token has id 9999"):
        tiny.token(9999)


def test_the_digest_is_of_what_decides_ids(tiny):
    same = Tokenizer(tiny.with_tokens([]).backend, bos=tiny.bos, eos=tiny.eos, unk=tiny.unk, add_bos=True)
    assert same.digest == tiny.digest
    assert tiny.with_tokens(["<CLS>"]).digest != tiny.digest
    assert Tokenizer(same.backend, bos=tiny.bos, eos=None, add_bos=True).digest != tiny.digest


@pytest.mark.parametrize("tokenizer", ["tiny", "llama-2", "ref-7m"], indirect=True)
def test_what_is_saved_loads_as_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path, chat_template="{{ messages }}\n", model_max_length=4096)
    loaded = load_tokenizer(tmp_path)
    assert loaded.digest == tokenizer.digest
    assert (loaded.bos, loaded.eos, loaded.unk, loaded.pad, loaded.add_bos) == (
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.unk,
        tokenizer.pad,
        tokenizer.add_bos,
    )
    assert loaded.chat_template == "{{ messages }}\n"
    assert [loaded.encode(text) for text in ODD] == [tokenizer.encode(text) for text in ODD]


def test_a_file_is_as_good_as_its_directory(tiny, tmp_path):
    tiny.save(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").digest == tiny.digest


def test_a_tokenizer_travels_to_other_processes(tiny):
    tiny.encode("warm")
    there = pickle.loads(pickle.dumps(tiny))
    assert there.encode("the cat</s>") == tiny.encode("the cat</s>")


def test_training_twice_gives_the_same(tiny):
    again = [train_bpe(iter(TEXTS), vocab_size=290) for _ in range(2)]
    assert again[0].digest == again[1].digest
    assert [again[0].id(token) for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert (len(again[0]), again[0].bos, again[0].eos) == (290, "<s>", "</s>")


def test_digits_are_split_or_not():
    texts = ["1234 1234 1234"] * 5
    split = train_bpe(iter(texts), vocab_size=259)
    joined = train_bpe(iter(texts), vocab_size=263, split_digits=False)
    assert [len(split.encode("1234")), len(joined.encode("1234"))] == [4, 1]


def test_a_vocabulary_that_cannot_be_had_is_said():
    with pytest.raises(LlameroError, match="give 259 tokens, not the 1000") as caught:
        train_bpe(iter(["1 1 1"]), vocab_size=1000)
    assert caught.value.fix == "ask for 259, or give more text"
    with pytest.raises(LlameroError, match="give 259 tokens, not the 100") as caught:
        train_bpe(iter(["1 1 1"]), vocab_size=100)
    assert caught.value.fix == "ask for at least 259"


def test_missing_files_are_named(tmp_path):
    with pytest.raises(LlameroError, match=r"no tokenizer\.json and no tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(LlameroError, match="no such file"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "neither a SentencePiece"),
        ("tokenizer.model", b"\x0a\xff\xff", "neither a SentencePiece"),
        ("tokenizer.model", b"IQ== 0\nIg==\n", "not a line of tiktoken ranks"),
        ("tokenizer.model", b"IQ== 0\nIg== 7\n", "the ranks are not 0 to 1"),
        ("tokenizer.json", b"{", "not JSON"),
        ("tokenizer.json", b"{}", "holds no `model`"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LlameroError, match=problem) as caught:
        load_tokenizer(tmp_path)
    assert name in str(caught.value)


def _field(number: int, value: bytes | int) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2, len(value)]) + value


def test_a_unigram_model_is_refused_by_name(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(_field(1, _field(1, b"<unk>")) + _field(2, _field(3, 1)))
    with pytest.raises(LlameroError, match="of type unigram"):
        load_tokenizer(tmp_path)


def test_what_the_conversion_does_not_copy_is_refused(tmp_path):
    piece, trainer = _field(1, _field(1, b"x") + _field(3, 4)), _field(2, _field(3, 2))
    normalizer = _field(3, _field(2, b"nfkc") + _field(3, 0))
    (tmp_path / "tokenizer.model").write_bytes(piece + trainer + normalizer)
    with pytest.raises(LlameroError, match=r"character map.*no dummy prefix.*extra spaces.*user-defined"):
        load_tokenizer(tmp_path)


def test_a_named_token_that_is_not_there_is_refused(tiny, tmp_path):
    tiny.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "pad_token": "<nopad>"}))
    with pytest.raises(LlameroError, match="names '<nopad>'"):
        load_tokenizer(tmp_path)
    config.write_text(json.dumps({"add_bos_token": True}))
    (tmp_path / "special_tokens_map.json").unlink()
    with pytest.raises(LlameroError, match="names none"):
        load_tokenizer(tmp_path)


def test_without_a_written_convention_the_post_processor_tells(tiny, tmp_path):
    tiny.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    assert load_tokenizer(tmp_path).add_bos
    Tokenizer(tiny.with_tokens([]).backend, bos="<s>", eos="</s>").save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    assert not load_tokenizer(tmp_path).add_bos


def test_of_several_chat_templates_the_default_is_taken(tiny, tmp_path):
    tiny.save(tmp_path)
    several = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert load_tokenizer(tmp_path).chat_template == "b"

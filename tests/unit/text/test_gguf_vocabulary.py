import json
import os
from pathlib import Path

import pytest
import regex
import sentencepiece

from llamero.core.errors import LlameroError
from llamero.core.gguf import read_header
from llamero.text.gguf_vocabulary import PRE, from_metadata
from llamero.text.tokenizer import Tokenizer, load_tokenizer, train_bpe

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[3].parent / "shared"))
TEXTS = ["the cat sat on the mat 12 times, said the user to the assistant\n"] * 3
ODD = [
    "", " ", "  two  spaces ", "\n\n\tx\n", "ÄÖÜ ß naïve 北京 🦙🏽", "1234567", "</s> <s> <unk> <0x0A>", "don't DON'T",
    "a$+b <=> c^2|~", "x = 3.14;\r\n\r\n  y", "١٢٣٤ ½ ⅷ", "CamelCaseWord HTTPServer", "…!? 100,000.50%",
    "a\u00a0b\u3000c",
]  # fmt: skip

shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data folder")


def made(metadata):
    return Tokenizer(**from_metadata(metadata, where="model.gguf")._asdict())


def bpe_metadata(tokenizer, pre):
    """What a GGUF file would say of a byte-level BPE."""
    spec = json.loads(tokenizer.backend.to_str())
    added = {token["id"]: token["content"] for token in spec["added_tokens"]}
    texts = {**{id: text for text, id in spec["model"]["vocab"].items()}, **added}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [texts[id] for id in range(len(tokenizer))],
        "tokenizer.ggml.token_type": [3 if id in added else 1 for id in range(len(tokenizer))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
    }


def spm_metadata(**more):
    """A SentencePiece vocabulary: three letters and what they merge to."""
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    words = [("▁", 1), ("a", 1), ("b", 1), ("ab", 1), ("▁ab", 1), ("<tool>", 4), ("[PAD]", 5)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text for text, _ in pieces + words],
        "tokenizer.ggml.token_type": [type for _, type in pieces + words],
        "tokenizer.ggml.scores": [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0, -1000.0, -1000.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0xFFFFFFFF,
        **more,
    }


def recorded(name):
    folder = SHARED / "data/tokenizers/llamacpp_vectors"
    texts = (folder / f"{name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [[int(id) for id in line.split()] for line in (folder / f"{name}.out").read_text().split("\n")]
    assert len(texts) == 47
    return texts, ids[:47]


@shared
def test_the_ids_that_llamacpp_recorded_for_a_sentencepiece_vocabulary():
    path = SHARED / "data/tokenizers/llamacpp_vectors/ggml-vocab-llama-spm.gguf"
    tokenizer, (texts, ids) = load_tokenizer(path), recorded(path.name)
    assert [tokenizer.encode(text) for text in texts] == ids
    assert [tokenizer.decode(line) for line in ids] == texts
    assert (tokenizer.bos, tokenizer.eos, tokenizer.unk, tokenizer.pad, tokenizer.add_bos) == (
        "<s>", "</s>", "<unk>", None, True,
    )  # fmt: skip


@shared
@pytest.mark.slow
def test_the_ids_that_llamacpp_recorded_for_llama_3():
    original = load_tokenizer(SHARED / "data/tokenizers/llama3")
    tokenizer, (texts, ids) = made(bpe_metadata(original, "llama-bpe")), recorded("ggml-vocab-llama-bpe.gguf")
    assert [tokenizer.encode(text) for text in texts] == ids
    assert [tokenizer.decode(line) for line in ids] == texts
    assert tokenizer.digest == original.digest
    assert tokenizer.special_tokens == original.special_tokens


@shared
@pytest.mark.slow
def test_a_model_of_others_has_the_tokenizer_that_it_was_made_with():
    original = load_tokenizer(SHARED / "data/tokenizers/llama2")
    assert load_tokenizer(SHARED / "data/weights/random-fixtures/llama-2-tiny-random.gguf").digest == original.digest


@shared
def test_stories_get_the_ids_of_their_sentencepiece_model():
    folder = SHARED / "data/weights/stories260k"
    tokenizer = load_tokenizer(folder / "stories260Ktok512.gguf")
    oracle = sentencepiece.SentencePieceProcessor(str(folder / "tok512.model"))
    texts = ["Once upon a time, there was a little girl.", "Zoë said: 12 cats!", "x", "the dog\nran"]
    assert [tokenizer.encode(text) for text in texts] == [oracle.encode(text) for text in texts]
    assert tokenizer.pad is None


def test_a_tokenizer_of_ours_comes_back():
    tokenizer = train_bpe(iter(TEXTS), vocab_size=290).with_tokens(["<|im_start|>", "<|im_end|>"])
    metadata = bpe_metadata(tokenizer, "smollm") | {"tokenizer.ggml.add_bos_token": True}
    again = made(metadata | {"tokenizer.ggml.unknown_token_id": 0, "tokenizer.chat_template": "{{ messages }}"})
    assert again.digest == tokenizer.digest
    assert (again.unk, again.chat_template) == ("<unk>", "{{ messages }}")
    assert [again.encode(text, special=True) for text in ODD] == [tokenizer.encode(text, special=True) for text in ODD]


_LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
EXPRESSIONS = {
    "llama-bpe": [_LLAMA3],
    "smaug-bpe": [_LLAMA3],
    "qwen2": [_LLAMA3.replace("{1,3}", "")],
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "tekken": [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}
"""What llama.cpp splits by, one expression after the other (llama-vocab.cpp), for one name of each kind."""


def parts(text, expressions):
    """The matches of each expression and what is between them, of the parts that the one before left."""
    found = [text]
    for expression in expressions:
        found = [part for piece in found for part in regex.split(f"({expression})", piece) if part]
    return found


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_texts_are_split_as_llamacpp_does(name):
    for text in [*ODD, *TEXTS]:
        found = [text[start:stop] for _, (start, stop) in PRE[name].split.pre_tokenize_str(text)]
        assert found == parts(text, EXPRESSIONS[name])


def test_every_name_is_one_of_those_kinds():
    kinds = {str(PRE[name].split) + str(PRE[name].ignore_merges) for name in EXPRESSIONS}
    assert {str(pre.split) + str(pre.ignore_merges) for pre in PRE.values()} == kinds


def test_user_defined_tokens_are_found_in_any_text_and_control_tokens_only_where_they_are_meant():
    tokenizer = made(spm_metadata())
    ids = {text: tokenizer.id(text) for text in ("▁ab", "ab", "<tool>", "</s>")}
    assert tokenizer.encode("ab<tool>") == [ids["▁ab"], ids["<tool>"]]
    assert ids["</s>"] not in tokenizer.encode("ab</s>")
    assert tokenizer.encode("ab</s>", special=True) == [ids["▁ab"], ids["</s>"]]
    assert tokenizer.special_tokens == ("<unk>", "<s>", "</s>")
    assert tokenizer.pad is None
    assert tokenizer.decode(tokenizer.encode("ab ab é")) == "ab ab é"  # by bytes


def test_a_vocabulary_without_a_space_in_front():
    tokenizer = made(spm_metadata(**{"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}))
    assert tokenizer.encode("ab ab") == [tokenizer.id("ab"), tokenizer.id("▁ab")]
    assert tokenizer.decode(tokenizer.encode("ab ab")) == "ab ab"
    assert not tokenizer.add_bos


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tokenizer.ggml.model": None}, "carries no tokenizer"),
        ({"tokenizer.ggml.model": "t5"}, "of the kind `t5`"),
        ({"tokenizer.ggml.scores": [0.0]}, r"scores` has 1 entries for 266 tokens"),
        ({"tokenizer.ggml.scores": None}, r"scores` is missing"),
        ({"tokenizer.ggml.token_type": [1]}, r"token_type` has 1 entries"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "'a' has the ids 0 and 1"),
        ({"tokenizer.ggml.tokens": []}, "is empty"),
        ({"tokenizer.ggml.tokens": ["a", "\udcff"]}, "token 1 is no UTF-8 text"),
        ({"tokenizer.ggml.remove_extra_whitespaces": True}, "removal of extra spaces"),
        ({"tokenizer.ggml.unknown_token_id": 999}, "what is unknown"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(change, problem):
    metadata = {key: value for key, value in (spm_metadata() | change).items() if value is not None}
    with pytest.raises(LlameroError, match=problem) as caught:
        made(metadata)
    assert "model.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "problem", "fix"),
    [
        ({"tokenizer.ggml.pre": "llama-bp"}, "splits texts by `llama-bp`", "did you mean `llama-bpe`"),
        ({"tokenizer.ggml.pre": None}, "does not say how", "gguf-new-metadata --pre-tokenizer"),
        ({"tokenizer.ggml.merges": None}, "merges` is missing", ""),
        ({"tokenizer.ggml.merges": ["t hh"]}, "'t hh' is not of tokens", ""),
        ({"tokenizer.ggml.merges": ["t h e"]}, "'t h e' is not of tokens", ""),
    ],
)
def test_merges_and_ways_of_splitting_that_are_unknown_are_refused(tiny, change, problem, fix):
    metadata = bpe_metadata(tiny, "gpt-2") | change
    with pytest.raises(LlameroError, match=problem) as caught:
        made({key: value for key, value in metadata.items() if value is not None})
    assert fix in (caught.value.fix or "")


def test_a_file_without_a_tokenizer(tmp_path):
    header = b"GGUF" + (3).to_bytes(4, "little") + bytes(16)
    (tmp_path / "model.gguf").write_bytes(header)
    assert read_header(tmp_path / "model.gguf").metadata == {}
    with pytest.raises(LlameroError, match="carries no tokenizer"):
        load_tokenizer(tmp_path)

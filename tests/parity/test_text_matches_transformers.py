"""What `transformers` makes of the tokenizers and templates that we save."""

import json
import os
from functools import cache
from pathlib import Path

import jinja2
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from llamero.core.errors import LlameroError
from llamero.text.messages import Message
from llamero.text.render import chat_template, render
from llamero.text.system_messages import LLAMA2
from llamero.text.templates import TEMPLATES
from llamero.text.tokenizer import load_tokenizer, train_bpe

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
REAL = {
    "llama-2": SHARED / "data/tokenizers/llama2",
    "llama-3": SHARED / "data/tokenizers/llama3",
    "ref-7m": SHARED / "data/weights/ref-7m-hf",
}
MARKUP = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|end_of_text|>",
)
ODD = [
    "",
    " ",
    "  two  spaces ",
    "\n\n\tx\r\n\n",
    "ÄÖÜ ß naïve 北京 🦙🏽",
    "1234567.",
    "</s> <|im_end|><|eot_id|> [INST]",
    "{{ user }} {% raw %} 'quoted' \\n",
    "don't",
]


@cache
def real(name):
    """A published tokenizer with all markup of all templates."""
    return load_tokenizer(REAL[name]).with_tokens(MARKUP)


@pytest.fixture(scope="module", params=["trained", *REAL])
def pair(request, tmp_path_factory):
    """A tokenizer, and what transformers loads from where it was saved as part of a Llama model."""
    if request.param == "trained":
        ours = train_bpe(iter(["the user and the assistant talk"] * 3), vocab_size=270).with_tokens(MARKUP)
    elif SHARED.exists():
        ours = real(request.param)
    else:
        pytest.skip("needs the shared data folder")
    directory = tmp_path_factory.mktemp(request.param)
    ours.save(directory, model_max_length=2048)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return ours, transformers.AutoTokenizer.from_pretrained(directory)


def test_what_we_save_encodes_as_we_do(pair):
    ours, theirs = pair
    begin = [ours.bos_id] if ours.add_bos else []
    for text in ODD:
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text, special=True)
        assert theirs(text).input_ids == begin + ours.encode(text, special=True)
        assert theirs.decode(ours.encode(text)) == text
    assert set(theirs("x")) == {"input_ids", "attention_mask"}
    assert (theirs.bos_token, theirs.eos_token) == (ours.bos, ours.eos)
    assert (len(theirs), theirs.model_max_length) == (len(ours), 2048)


def conversations(text):
    """Conversations with and without a system message and contexts, one or two rounds."""
    system = st.none() | text.map(lambda said: Message("system", said))
    context = st.none() | text.map(lambda said: Message("context", said))
    user = text.map(lambda said: Message("user", said))
    answer = text.filter(lambda said: said.strip()).map(lambda said: Message("assistant", said))
    turns = st.tuples(system, context, user, answer, context, user, answer)
    return st.tuples(turns, st.sampled_from((3, 4, 6, 7))).map(
        lambda drawn: [message for message in drawn[0][: drawn[1]] if message is not None]
    )


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40)
@given(chat=conversations(st.sampled_from([*ODD, "Hi", "Be brief."]) | st.text(max_size=12)))
def test_our_jinja_writes_our_text(pair, name, chat):
    ours, theirs = pair
    theirs.chat_template = chat_template(name, ours)
    prompt = chat[-1].role == "user"
    written = theirs.apply_chat_template(
        [{"role": message.role, "content": message.text} for message in chat],
        tokenize=False,
        add_generation_prompt=prompt,
    )
    assert written == render(chat, name, ours, add_generation_prompt=prompt).text


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_has_the_ids_that_any_server_gives_it(pair, name):
    ours, theirs = pair
    theirs.chat_template = chat_template(name, ours)
    for said in ("Hello.", "It's  late\n\n", " 北京? ", "x:\n"):
        chat = [{"role": "system", "content": said}, {"role": "user", "content": said}]
        rendered = render(chat, name, ours, add_generation_prompt=True)
        served = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        assert served["input_ids"] == list(rendered.ids)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("roles", ["", "s", "a", "uu", "uaa", "us", "ccu", "x", "ua!"])
def test_our_jinja_refuses_what_we_refuse(pair, name, roles):
    ours, theirs = pair
    theirs.chat_template = chat_template(name, ours)
    names = {"s": "system", "u": "user", "a": "assistant", "c": "context", "x": "tool"}
    prompt = roles.endswith("!")
    chat = [{"role": names[letter], "content": "x"} for letter in roles.removesuffix("!")]
    with pytest.raises(LlameroError):
        render(chat, name, ours, add_generation_prompt=prompt)
    if chat:  # transformers cannot render an empty conversation with any template
        with pytest.raises(jinja2.TemplateError):
            theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)


def meta_llama_2(dialog, encode):
    """Meta's reference (meta-llama/llama, llama/generation.py), for dialogues that end with an answer."""
    if dialog[0]["role"] == "system":
        merged = "<<SYS>>\n" + dialog[0]["content"] + "\n<</SYS>>\n\n" + dialog[1]["content"]
        dialog = [{"role": "user", "content": merged}, *dialog[2:]]
    return [
        id
        for prompt, answer in zip(dialog[::2], dialog[1::2], strict=True)
        for id in encode(f"[INST] {prompt['content'].strip()} [/INST] {answer['content'].strip()} ")
    ]


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data folder")
def test_llama_2_is_tokenized_as_meta_did():
    ours = real("llama-2")
    chat = [
        {"role": "system", "content": LLAMA2},
        {"role": "user", "content": " Hi there! "},
        {"role": "assistant", "content": "Hello, how are you?"},
        {"role": "user", "content": "Fine."},
        {"role": "assistant", "content": "Good. "},
    ]
    reference = meta_llama_2(chat, lambda text: [1, *ours.encode(text), 2])
    assert list(render(chat, "llama-2", ours).ids) == reference


def meta_llama_3(dialog, tokenizer):
    """Meta's reference (meta-llama/llama3, llama/tokenizer.py, ChatFormat.encode_dialog_prompt)."""

    def header(role):
        begin, end = tokenizer.id("<|start_header_id|>"), tokenizer.id("<|end_header_id|>")
        return [begin, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]

    ids = [tokenizer.bos_id]
    for message in dialog:
        ids += header(message["role"]) + tokenizer.encode(message["content"].strip())
        ids.append(tokenizer.id("<|eot_id|>"))
    return ids + header("assistant")


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data folder")
def test_llama_3_is_tokenized_as_meta_did():
    ours = real("llama-3")
    chat = [
        {"role": "system", "content": "Be <|eot_id|> brief.\n"},
        {"role": "user", "content": " Hi there! "},
        {"role": "assistant", "content": "Hello, how are you?\n"},
        {"role": "user", "content": "!Fine"},
    ]
    rendered = render(chat, "llama-3", ours, add_generation_prompt=True)
    assert list(rendered.ids) == meta_llama_3(chat, ours)

import pytest

from llamero.core.errors import LlameroError
from llamero.text.messages import SCAFFOLD, Message, Role
from llamero.text.render import chat_template, generation_config, render
from llamero.text.system_messages import ALPACA, VICUNA
from llamero.text.templates import TEMPLATES
from llamero.text.tokenizer import Tokenizer, train_bpe
from llamero.text.unwrap import alpaca_unwrap

CHAT = [
    Message("system", "Be brief."),
    Message("user", "Hi!\n"),
    Message("assistant", "  Yo.\n\nWhat is up?"),
    Message("context", "The mat is red."),
    Message("user", "Say <|im_end|> and </s> and [INST]."),
    Message("assistant", "No 🦙."),
]
TEXTS = {
    "orca-hashes": "<s>### System:\nBe.\n\n### User:\nHi\n\n### Assistant:\nYo</s>"
    "\n\n### User:\nred\n\nwhy\n\n### Assistant:\nno</s>",
    "alpaca": "<s>Be.\n\n### Instruction:\nHi\n\n### Response:\nYo</s>"
    "\n\n### Instruction:\nwhy\n\n### Input:\nred\n\n### Response:\nno</s>",
    "chatml": "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    "<|im_start|>context\nred<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n",
    "llama-2": "<s>[INST] <<SYS>>\nBe.\n<</SYS>>\n\nHi [/INST] Yo </s><s>[INST] red\n\nwhy [/INST] no </s>",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nred\n\nwhy<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nno<|eot_id|>",
    "vicuna": "<s>Be. USER: Hi ASSISTANT: Yo</s>USER: red\n\nwhy ASSISTANT: no</s>",
    "plain": "<s>Be.\nHi\nYo</s>\nred\nwhy\nno</s>",
}
LEARNED = {
    "orca-hashes": ["Yo</s>", "no</s>"],
    "alpaca": ["Yo</s>", "no</s>"],
    "chatml": ["Yo<|im_end|>", "no<|im_end|>"],
    "llama-2": [" Yo </s>", " no </s>"],
    "llama-3": ["Yo<|eot_id|>", "no<|eot_id|>"],
    "vicuna": [" Yo</s>", " no</s>"],
    "plain": ["\nYo</s>", "\nno</s>"],
}


def learned_runs(rendered, tokenizer):
    """The learned tokens, spelled out, in runs."""
    runs, before = [], False
    for id, learn in zip(rendered.ids, rendered.learned, strict=True):
        if learn:
            runs = runs if before else [*runs, []]
            runs[-1].append(id)
        before = learn
    return [tokenizer.decode(run, skip_special=False) for run in runs]


def test_every_template_is_tried():
    assert set(TEXTS) == set(LEARNED) == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_the_published_one(tiny, name):
    chat = ["Be.", "Hi", "Yo", "red", "why", "no"]
    said = [Message(message.role, text) for message, text in zip(CHAT, chat, strict=True)]
    rendered = render(said, name, tiny)
    assert rendered.text == TEXTS[name]
    assert tiny.decode(rendered.ids, skip_special=False) == rendered.text
    assert learned_runs(rendered, tiny) == LEARNED[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_and_its_answer_are_the_conversation(tokenizer, name):
    for stop in (3, 6):
        whole = render(CHAT[:stop], name, tokenizer)
        prompt = render(CHAT[: stop - 1], name, tokenizer, add_generation_prompt=True)
        assert whole.text.startswith(prompt.text)
        assert whole.ids[: len(prompt.ids)] == prompt.ids
        assert whole.roles[: len(prompt.ids)] == prompt.roles
        learned = whole.learned[len(prompt.ids) :]
        answer = [id for id, learn in zip(whole.ids[len(prompt.ids) :], learned, strict=True) if learn]
        assert learned[: len(answer)] == (True,) * len(answer)
        *said, end = answer
        text = whole.text[len(prompt.text) : whole.text.rindex(tokenizer.token(end))]
        assert said == tokenizer.encode(text, continues=bool(prompt.ids))


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_assistant_is_learned(tokenizer, name):
    rendered = render(CHAT, name, tokenizer)
    assert len(rendered.ids) == len(rendered.roles) == len(rendered.learned)
    assert {role for role, learn in zip(rendered.roles, rendered.learned, strict=True) if learn} == {Role.ASSISTANT}
    assert Role.ASSISTANT not in {
        role for role, learn in zip(rendered.roles, rendered.learned, strict=True) if not learn
    }
    assert {role % SCAFFOLD for role in rendered.roles} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", TEMPLATES)
def test_nobody_speaks_a_special_token(tokenizer, name):
    rendered = render(CHAT, name, tokenizer)
    special = {tokenizer.id(token) for token in tokenizer.special_tokens}
    turns = sum(message.role == "assistant" for message in CHAT)
    assert sum(id in special and role == Role.USER for id, role in zip(rendered.ids, rendered.roles, strict=True)) == 0
    assert sum(id in special and learn for id, learn in zip(rendered.ids, rendered.learned, strict=True)) == turns


def test_an_answer_can_be_kept_out_of_the_loss(tiny):
    chat = [Message("user", "a"), Message("assistant", "b", learned=False), Message("user", "c")]
    chat.append(Message("assistant", "d"))
    rendered = render(chat, "chatml", tiny)
    assert learned_runs(rendered, tiny) == ["d<|im_end|>"]
    again = [Message(message.role, message.text) for message in chat]
    assert render(again, "chatml", tiny).ids == rendered.ids


def test_a_dummy_space_begins_only_what_follows_a_special_token(tokenizer):
    if tokenizer.dummy_space == "none":
        pytest.skip("this tokenizer puts no dummy spaces")
    rendered = render([Message("user", "x"), Message("assistant", "x")], "chatml", tokenizer)
    tokens = [tokenizer.token(id) for id in rendered.ids]
    user = ["<|im_start|>", "▁user", "<0x0A>", "x", "<|im_end|>", "▁", "<0x0A>"]
    assert tokens == [*user, *("▁assistant" if token == "▁user" else token for token in user)]


def test_bos_follows_the_convention_of_the_tokenizer(tiny):
    without = Tokenizer(tiny.with_tokens([]).backend, bos=tiny.bos, eos=tiny.eos, add_bos=False)
    chat = [Message("user", "Hi")]
    for name in ("orca-hashes", "alpaca", "vicuna", "plain"):
        assert render(chat, name, tiny).text == "<s>" + render(chat, name, without).text
    for name in ("chatml", "llama-2", "llama-3"):
        assert render(chat, name, tiny).text == render(chat, name, without).text


def test_alpaca_and_vicuna_bring_a_preamble_where_there_is_no_system_message(tiny):
    assert render([{"role": "user", "content": "Hi"}], "alpaca", tiny).text == (
        f"<s>{ALPACA}\n\n### Instruction:\nHi\n\n"
    )
    assert render([{"role": "user", "content": "Hi"}], "vicuna", tiny, add_generation_prompt=True).text == (
        f"<s>{VICUNA} USER: Hi ASSISTANT:"
    )


def test_an_empty_system_message_is_one(tiny):
    chat = [Message("system", ""), Message("user", "Hi")]
    assert render(chat, "orca-hashes", tiny).text == "<s>### System:\n\n\n### User:\nHi\n\n"


@pytest.mark.parametrize(
    ("roles", "problem", "where"),
    [
        ("", "no messages", "messages"),
        ("s", "ends with a system message", "message 0"),
        ("c", "ends with a context message", "message 0"),
        ("a", "assistant speaks after nobody", "message 0"),
        ("uu", "user speaks after user", "message 1"),
        ("uaa", "assistant speaks after assistant", "message 2"),
        ("suas", "not the first", "message 3"),
        ("ccu", "context speaks after context", "message 1"),
        ("uca", "context speaks after user", "message 1"),
    ],
)
def test_who_speaks_out_of_turn_is_named(tiny, roles, problem, where):
    names = {"s": "system", "u": "user", "a": "assistant", "c": "context"}
    chat = [{"role": names[letter], "content": "x"} for letter in roles]
    with pytest.raises(LlameroError, match=problem) as caught:
        render(chat, "chatml", tiny)
    assert caught.value.where == where


def test_other_bad_conversations_are_refused_with_their_message(tiny):
    ask = {"role": "user", "content": "x"}
    bad = [
        ([ask, {"role": "assistant", "content": " \n"}], "says nothing", "message 1", "drop"),
        ([ask, {"role": "asistant", "content": "x"}], "unknown role", "message 1", "did you mean `assistant`?"),
        ([{"from": "human", "value": "x"}], "must have `role` and `content`", "message 0", "write"),
    ]
    for chat, problem, where, fix in bad:
        with pytest.raises(LlameroError, match=problem) as caught:
            render(chat, "chatml", tiny)
        assert caught.value.where == where
        assert fix in str(caught.value.fix)
    with pytest.raises(LlameroError, match="nothing to answer"):
        render([ask, {"role": "assistant", "content": "y"}], "chatml", tiny, add_generation_prompt=True)


def test_an_unknown_template_is_answered_with_the_nearest(tiny):
    with pytest.raises(LlameroError, match="unknown template 'chatmll'") as caught:
        render([Message("user", "x")], "chatmll", tiny)
    assert caught.value.fix == "did you mean `chatml`?"


def test_tokens_that_a_template_needs_are_named():
    bare = train_bpe(iter(["a b c"]), vocab_size=257, special=())
    with pytest.raises(LlameroError, match=r"<\|im_start\|>, <\|im_end\|>") as caught:
        render([Message("user", "x")], "chatml", bare)
    assert "data.extra_tokens" in str(caught.value.fix)
    with pytest.raises(LlameroError, match="the tokenizer's eos token"):
        chat_template("orca-hashes", bare)
    with pytest.raises(LlameroError, match="the tokenizer's bos token"):
        generation_config("llama-2", bare)


def test_generation_stops_where_answers_end(tiny):
    assert generation_config("orca-hashes", tiny) == {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2}
    ends = [tiny.id("<|eot_id|>"), tiny.id("<|end_of_text|>")]
    assert generation_config("llama-3", tiny)["eos_token_id"] == ends
    assert generation_config("chatml", tiny)["eos_token_id"] == tiny.id("<|im_end|>")
    padded = Tokenizer(tiny.with_tokens(["<PAD>"]).backend, bos="<s>", eos="</s>", pad="<PAD>")
    assert generation_config("plain", padded)["pad_token_id"] == padded.pad_id


def test_alpaca_rows_come_out_of_their_wrapper(tiny):
    for chat, row in (
        ([Message("user", "Add.\n\nNow.")], ("Add.\n\nNow.", "")),
        ([Message("context", "1\n2"), Message("user", "Add.")], ("Add.", "1\n2")),
    ):
        text = render(chat, "alpaca", tiny, add_generation_prompt=True).text.removeprefix("<s>")
        assert alpaca_unwrap(text) == row
        assert alpaca_unwrap(text.removesuffix("\n")) == row
        assert alpaca_unwrap(text + "x") is None
    assert alpaca_unwrap("Add.") is None

from datetime import date

import pytest

from llamero.core.errors import LlameroError
from llamero.text.auto import auto_template
from llamero.text.messages import SCAFFOLD, Message, Role
from llamero.text.render import chat_template, generation_config, render
from llamero.text.templates import TEMPLATES
from llamero.text.tokenizer import Tokenizer

CHAT = [
    Message("system", " Be brief."),
    Message("user", "Hi </s> <|im_end|> {{ user }}"),
    Message("assistant", "Yo."),
    Message("context", "user"),
    Message("user", " assistant "),
    Message("assistant", "system"),
]
SIMPLE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def with_jinja(tokenizer: Tokenizer, jinja: str | None) -> Tokenizer:
    return Tokenizer(
        tokenizer.with_tokens([]).backend,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        add_bos=tokenizer.add_bos,
        chat_template=jinja,
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_auto_finds_in_our_jinja_what_we_put_there(tokenizer, name, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", chat_template(name, tokenizer))
    for stop, prompt in ((6, False), (5, True), (3, False), (2, True)):
        ours = render(CHAT[:stop], name, tokenizer, add_generation_prompt=prompt)
        auto = render(CHAT[:stop], "auto", tokenizer, add_generation_prompt=prompt)
        assert (auto.text, auto.ids, auto.learned) == (ours.text, ours.ids, ours.learned)
        said = [role for role in ours.roles if role < SCAFFOLD]
        assert [role for role in auto.roles if role < SCAFFOLD] == said


def test_auto_stops_where_the_model_does(tiny):
    own = with_jinja(tiny, SIMPLE + PROMPT)
    assert generation_config("auto", own)["eos_token_id"] == [own.id("<|im_end|>"), own.eos_id]
    assert chat_template("auto", own) == SIMPLE + PROMPT


def test_the_turn_that_a_template_rewrites_is_named(tiny):
    forgetful = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if m.role != 'assistant' or loop.last else '(said)' }}<|im_end|>\n{% endfor %}"
    )
    own = with_jinja(tiny, forgetful + PROMPT)
    assert render(CHAT[:3], "auto", own).learned.count(True) > 0
    with pytest.raises(LlameroError, match="does not write this assistant message") as caught:
        render(CHAT, "auto", own)
    assert caught.value.where == "message 2"


def test_markup_that_changes_later_is_refused(tiny):
    changing = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ '' if loop.last else '!' }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    with pytest.raises(LlameroError, match="differently once the conversation goes on") as caught:
        render(CHAT, "auto", with_jinja(tiny, changing + PROMPT))
    assert caught.value.where == "message 2"


def test_dates_need_a_day(tiny):
    own = with_jinja(tiny, "{{ strftime_now('%d %b %Y') }}\n" + SIMPLE + PROMPT)
    with pytest.raises(LlameroError, match="today's date"):
        render(CHAT[:3], "auto", own)
    dated = auto_template(own, today=date(2024, 7, 26))
    assert render(CHAT[:3], dated, own).text.startswith("26 Jul 2024\n<|im_start|>")


@pytest.mark.parametrize(
    ("jinja", "problem"),
    [
        (None, "this model has none"),
        ("{% for m in messages %}", "is no Jinja"),
        ("{{ raise_exception('no system') }}", "refuses this conversation: no system"),
        (SIMPLE.replace("m.content", "m.content.upper()"), "does not write this system message"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no special token after an answer"),
        (SIMPLE + "{{ 'long' if messages[0].content | length > 5 }}", "ends differently"),
        (SIMPLE.replace("m.role", "m.nothing.at_all"), "refuses this conversation"),
    ],
)
def test_templates_without_a_right_mask_are_refused(tiny, jinja, problem):
    with pytest.raises(LlameroError, match=problem):
        render(CHAT[:3], "auto", with_jinja(tiny, jinja))


def test_a_template_gets_what_transformers_gives_it(tiny):
    jinja = (
        "{%- set here = namespace(n=0) -%}{{ bos_token }}{{ {'a': 'é<'} | tojson }}"
        "{% for m in messages %}{% if m.role == 'context' %}{% continue %}{% endif %}"
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n\n"
        "{% else %}{{ m.content | trim }}<|im_end|>\n\n{% endif %}{% endfor %}" + PROMPT
    )
    rendered = render(CHAT[:3], "auto", with_jinja(tiny, jinja))
    assert rendered.text.startswith('<s>{"a": "é<"}<|im_start|>system\nBe brief.<|im_end|>\n')
    learned = [id for id, learn in zip(rendered.ids, rendered.learned, strict=True) if learn]
    assert tiny.decode(learned, skip_special=False) == "Yo.<|im_end|>"


def test_tokens_that_swallow_space_are_refused(tiny):
    own = with_jinja(tiny, SIMPLE + PROMPT)
    spec = own.backend.to_str().replace(
        '"content":"<|im_end|>","single_word":false,"lstrip":false,"rstrip":false',
        '"content":"<|im_end|>","single_word":false,"lstrip":false,"rstrip":true',
    )
    greedy = Tokenizer(type(own.backend).from_str(spec), bos="<s>", eos="</s>", chat_template=SIMPLE)
    assert greedy.greedy_tokens == ("<|im_end|>",)
    with pytest.raises(LlameroError, match="swallow the space"):
        render(CHAT[:3], "auto", greedy)


def test_an_unlearned_answer_stays_unlearned(tiny):
    chat = [Message("user", "a"), Message("assistant", "b", learned=False)]
    rendered = render(chat, "auto", with_jinja(tiny, SIMPLE + PROMPT))
    assert not any(rendered.learned)
    assert Role.ASSISTANT in rendered.roles

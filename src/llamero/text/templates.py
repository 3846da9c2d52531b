"""The chat templates there are, as data: what is written before, between and after what people say.

A pattern is text with slots. `{system}`, `{context}`, `{user}` and `{assistant}` are what somebody says, exactly;
`{user|trim}` is that without space around it, `{user|rtrim}` without space after it. `{bos}` and `{eos}` are the
tokenizer's; `{add_bos}` is `{bos}` where the tokenizer's own convention puts one. A template's `special` tokens are
written as themselves. Nothing that somebody says ever becomes a special token.
"""

from __future__ import annotations

from llamero.core.errors import LlameroError, did_you_mean
from llamero.text import system_messages
from llamero.text.template import Opening, Template

ORCA_HASHES = Template(
    name="orca-hashes",
    first=Opening(
        user=("{add_bos}### User:\n{user}\n\n",),
        context=("{add_bos}### User:\n{context}\n\n{user}\n\n",),
        system=("{add_bos}### System:\n{system}\n\n", "### User:\n{user}\n\n"),
        system_context=("{add_bos}### System:\n{system}\n\n", "### User:\n{context}\n\n{user}\n\n"),
    ),
    later_user=("\n\n### User:\n{user}\n\n",),
    later_context=("\n\n### User:\n{context}\n\n{user}\n\n",),
    prompt="### Assistant:\n",
    answer="{assistant}{eos}",
    stop=("### User:", "### System:"),
)
"""Upstage's LLaMa-65b-instruct and SOLAR-0-70b; a context stands before the question, in the user's turn."""

ALPACA = Template(
    name="alpaca",
    first=Opening(
        user=("{add_bos}" + system_messages.ALPACA + "\n\n", "### Instruction:\n{user}\n\n"),
        context=(
            "{add_bos}" + system_messages.ALPACA_WITH_INPUT + "\n\n",
            "### Instruction:\n{user}\n\n### Input:\n{context}\n\n",
        ),
        system=("{add_bos}{system}\n\n", "### Instruction:\n{user}\n\n"),
        system_context=("{add_bos}{system}\n\n", "### Instruction:\n{user}\n\n### Input:\n{context}\n\n"),
    ),
    later_user=("\n\n### Instruction:\n{user}\n\n",),
    later_context=("\n\n### Instruction:\n{user}\n\n### Input:\n{context}\n\n",),
    prompt="### Response:\n",
    answer="{assistant}{eos}",
    stop=("### Instruction:",),
)
"""Stanford Alpaca, with a context as its input; a system message takes the place of the preamble."""

CHATML = Template(
    name="chatml",
    first=Opening(
        user=("<|im_start|>user\n{user}<|im_end|>\n",),
        context=("<|im_start|>context\n{context}<|im_end|>\n", "<|im_start|>user\n{user}<|im_end|>\n"),
        system=("<|im_start|>system\n{system}<|im_end|>\n", "<|im_start|>user\n{user}<|im_end|>\n"),
        system_context=(
            "<|im_start|>system\n{system}<|im_end|>\n",
            "<|im_start|>context\n{context}<|im_end|>\n",
            "<|im_start|>user\n{user}<|im_end|>\n",
        ),
    ),
    later_user=("<|im_start|>user\n{user}<|im_end|>\n",),
    later_context=("<|im_start|>context\n{context}<|im_end|>\n", "<|im_start|>user\n{user}<|im_end|>\n"),
    prompt="<|im_start|>assistant\n",
    answer="{assistant}<|im_end|>",
    after="\n",
    special=("<|im_start|>", "<|im_end|>"),
    ends=("<|im_end|>",),
)
"""OpenAI's markup as OpenAssistant trained it: no beginning of text, and a context is a turn of its own."""

LLAMA_2 = Template(
    name="llama-2",
    first=Opening(
        user=("{bos}[INST] {user|trim} [/INST]",),
        context=("{bos}[INST] {context|trim}\n\n{user|trim} [/INST]",),
        system=("{bos}[INST] <<SYS>>\n{system}\n<</SYS>>\n\n", "{user|rtrim} [/INST]"),
        system_context=("{bos}[INST] <<SYS>>\n{system}\n<</SYS>>\n\n", "{context|trim}\n\n{user|trim} [/INST]"),
    ),
    later_user=("{bos}[INST] {user|trim} [/INST]",),
    later_context=("{bos}[INST] {context|trim}\n\n{user|trim} [/INST]",),
    prompt="",
    answer=" {assistant|trim} {eos}",
)
"""Llama 2 Chat (meta-llama/llama, llama/generation.py); a context stands before the question."""

LLAMA_3 = Template(
    name="llama-3",
    first=Opening(
        user=("{bos}<|start_header_id|>user<|end_header_id|>\n\n{user|trim}<|eot_id|>",),
        context=("{bos}<|start_header_id|>user<|end_header_id|>\n\n{context|trim}\n\n{user|trim}<|eot_id|>",),
        system=(
            "{bos}<|start_header_id|>system<|end_header_id|>\n\n{system|trim}<|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\n{user|trim}<|eot_id|>",
        ),
        system_context=(
            "{bos}<|start_header_id|>system<|end_header_id|>\n\n{system|trim}<|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\n{context|trim}\n\n{user|trim}<|eot_id|>",
        ),
    ),
    later_user=("<|start_header_id|>user<|end_header_id|>\n\n{user|trim}<|eot_id|>",),
    later_context=("<|start_header_id|>user<|end_header_id|>\n\n{context|trim}\n\n{user|trim}<|eot_id|>",),
    prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
    answer="{assistant|trim}<|eot_id|>",
    special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
    ends=("<|eot_id|>", "<|end_of_text|>"),
)
"""Llama 3 Instruct (meta-llama/llama3, llama/tokenizer.py: ChatFormat); a context stands before the question."""

VICUNA = Template(
    name="vicuna",
    first=Opening(
        user=("{add_bos}" + system_messages.VICUNA + " ", "USER: {user} "),
        context=("{add_bos}" + system_messages.VICUNA + " ", "USER: {context}\n\n{user} "),
        system=("{add_bos}{system} ", "USER: {user} "),
        system_context=("{add_bos}{system} ", "USER: {context}\n\n{user} "),
    ),
    later_user=("USER: {user} ",),
    later_context=("USER: {context}\n\n{user} ",),
    prompt="ASSISTANT:",
    answer=" {assistant}{eos}",
    stop=("USER:",),
)
"""Vicuna 1.1 (lm-sys/FastChat, fastchat/conversation.py); a context stands before the question."""

PLAIN = Template(
    name="plain",
    first=Opening(
        user=("{add_bos}{user}",),
        context=("{add_bos}{context}\n", "{user}"),
        system=("{add_bos}{system}\n", "{user}"),
        system_context=("{add_bos}{system}\n", "{context}\n", "{user}"),
    ),
    later_user=("\n{user}",),
    later_context=("\n{context}\n", "{user}"),
    prompt="",
    answer="\n{assistant}{eos}",
)
"""No markup: a base model goes on where the text stops. Turns are lines; an answer begins with its own newline."""

TEMPLATES: dict[str, Template] = {
    template.name: template for template in (ORCA_HASHES, ALPACA, CHATML, LLAMA_2, LLAMA_3, VICUNA, PLAIN)
}
"""Every template there is. To add one: a constant above, its name here."""


def template_named(name: str) -> Template:
    """The template of a name; `auto` is no such name, because it is a model's own (`llamero.text.auto`)."""
    if name not in TEMPLATES:
        raise LlameroError(f"unknown template {name!r}", where="template", fix=did_you_mean(name, [*TEMPLATES, "auto"]))
    return TEMPLATES[name]

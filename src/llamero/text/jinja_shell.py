"""The Jinja around a template's patterns: who may speak when, and which pattern is whose.

Everything is written by expressions, and every tag eats the space around it, so that not a byte of the layout below
reaches a prompt under any setting of a Jinja environment. It uses what the smaller Jinjas of other servers have too.
"""

from __future__ import annotations

from string import Template as Text
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

SHELL = Text("""\
{%- set here = namespace(system=none, context=none, first=true, previous='nobody') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' and here.previous == 'nobody' -%}
    {%- set here.system = message['content'] -%}
  {%- elif message['role'] == 'context' and here.previous in ['nobody', 'system', 'assistant'] -%}
    {%- set here.context = message['content'] -%}
  {%- elif message['role'] == 'user' and here.previous != 'user' -%}
    {%- set user = message['content'] -%}
    {%- set system = here.system -%}
    {%- set context = here.context -%}
    {%- if here.first and system is not none and context is not none -%}
      $first_system_context
    {%- elif here.first and system is not none -%}
      $first_system
    {%- elif here.first and context is not none -%}
      $first_context
    {%- elif here.first -%}
      $first_user
    {%- elif context is not none -%}
      $later_context
    {%- else -%}
      $later_user
    {%- endif -%}
    {%- set here.first = false -%}
    {%- set here.context = none -%}
  {%- elif message['role'] == 'assistant' and here.previous == 'user' -%}
    {%- set assistant = message['content'] -%}
    $answer
  {%- else -%}
    {{- raise_exception('after ' + here.previous + ', ' + message['role'] + ' may not speak: '
      + 'a system message is the first, user and assistant take turns, a context stands before a user') -}}
  {%- endif -%}
  {%- set here.previous = message['role'] -%}
{%- endfor -%}
{%- if here.previous in ['nobody', 'system', 'context'] -%}
  {{- raise_exception('a user message must follow ' + here.previous) -}}
{%- elif add_generation_prompt and here.previous == 'assistant' -%}
  {{- raise_exception('there is nothing to answer: the assistant spoke last') -}}
{%- elif add_generation_prompt -%}
  $prompt
{%- endif -%}
""")


def concatenation(expressions: Iterable[str]) -> str:
    """Return the tag that writes some Jinja expressions one after the other."""
    joined = " + ".join(expressions)
    return f"{{{{- {joined} -}}}}" if joined else ""

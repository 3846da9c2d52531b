"""From the text of a request to the ids that a model sees, by the rules of whoever is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from llamero.text.tokenizer import Tokenizer

Ids = list[int]


def pair(tokenizer: Tokenizer, context: str, continuation: str, *, bos: bool = False) -> tuple[Ids, Ids]:
    """Return the ids of a context and of what may follow it: spaces at the border go to the right.

    Both are cut from the ids of the whole, so a continuation has the tokens that it has in running text.

    Args:
        tokenizer: Of the model.
        context: May be empty; then the beginning-of-text token stands for it with `bos`, else the end-of-text token.
        continuation: What may follow.
        bos: Whether a text begins with the beginning-of-text token (lm-eval; the harness of 2023 never did that).

    Raises:
        LlameroError: The context is empty and the tokenizer has no token to stand for it.
    """
    if not context:
        ids = text(tokenizer, continuation, bos=False)
        prefix = prefix_id(tokenizer, bos=bos)
        return ([prefix], ids) if not bos or ids[:1] != [prefix] else (ids[:1], ids[1:])
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    whole, head = text(tokenizer, bare + continuation, bos=bos), text(tokenizer, bare, bos=bos)
    if not head:  # nothing but spaces, and no beginning-of-text token
        return [prefix_id(tokenizer, bos=bos)], whole
    return whole[: len(head)], whole[len(head) :]


def text(tokenizer: Tokenizer, said: str, *, bos: bool) -> Ids:
    """Return the ids of a text; special tokens that are spelled out in it become their ids, as in both harnesses.

    Args:
        tokenizer: Of the model.
        said: The text.
        bos: Put the beginning-of-text token in front, unless the text begins with it.
    """
    special = any(token in said for token in tokenizer.special_tokens)
    ids = tokenizer.encode(said, special=special)
    if not bos or tokenizer.bos is None or tokenizer.bos_id is None or said.startswith(tokenizer.bos):
        return ids
    return [tokenizer.bos_id, *ids]


def prefix_id(tokenizer: Tokenizer, *, bos: bool) -> int:
    """Return the token that stands for an empty context."""
    found = tokenizer.bos_id if bos and tokenizer.bos_id is not None else tokenizer.eos_id
    if found is None:
        raise LlameroError(
            "the tokenizer names neither a beginning-of-text nor an end-of-text token to begin with",
            fix="name one in tokenizer_config.json",
        )
    return found

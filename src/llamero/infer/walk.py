"""What a model makes of a text, without the whole model in memory: all of the text goes through layer after layer."""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llamero.core import progress
from llamero.infer import score
from llamero.infer.context import rotation_of
from llamero.infer.score import BATCH_TOKENS, Tally, Window
from llamero.infer.texts import Text
from llamero.model.attention import Documents
from llamero.model.layered import Layered

Seen = list[Float[Tensor, "asked dim"]]
"""Hidden states of a text before the last normalization, where a scored token is predicted: those of a pass each."""


@torch.inference_mode()
def walk(model: Layered, texts: Sequence[Text], *, name: str, batch_tokens: int = BATCH_TOKENS) -> list[Seen]:
    """Return what a model makes of some texts, computed in the forward passes that `score.perplexity` would do.

    Every layer is read once. In memory are one layer and, in main memory, a hidden state of every token of every
    window; what is returned has one for every scored token.

    Args:
        model: The model.
        texts: The texts.
        name: What progress calls the model.
        batch_tokens: Tokens of a forward pass; at least one window goes into each.
    """
    batches = [(text, batch) for text in texts for batch in score.passes(text.windows, batch_tokens)]
    layouts = [tuple(len(window) for window in batch) for _, batch in batches]
    with model.embedding() as lookup:
        for text in texts:
            score.check_windows(lookup, text.ids, text.windows)
        rotations = {lengths: rotation_of(lookup, [0] * len(lengths), lengths, lengths) for lengths in set(layouts)}
        states = [lookup.model.embed_tokens(_ids(text, batch, model.device)) for text, batch in batches]
        states = [state.to("cpu", model.dtype) for state in states]
    for number in progress.track(range(model.config.num_layers), f"measure {name}", unit="layers"):
        with model.layer(number) as block:
            for place, lengths in enumerate(layouts):
                x = states[place].to(model.device)
                states[place] = block(x, rotations[lengths], Documents(lengths)).cpu()
    seen: dict[int, Seen] = {id(text): [] for text in texts}
    for place, (text, batch) in enumerate(batches):
        nodes, _ = score.predictions(text.ids, batch)
        seen[id(text)].append(states[place][nodes])
    return [seen[id(text)] for text in texts]


def _ids(text: Text, batch: Sequence[Window], device: torch.device) -> Int[Tensor, " tokens"]:
    flat = list(chain.from_iterable(text.ids[w.start : w.stop] for w in batch))
    return torch.tensor(flat, device=device)


@torch.inference_mode()
def compare(
    model: Layered,
    seen: Sequence[Seen],
    texts: Sequence[Text],
    *,
    reference: Layered,
    seen_by_reference: Sequence[Seen],
    batch_tokens: int = BATCH_TOKENS,
) -> list[Tally]:
    """Return how a model does on each text, beside a reference; both heads are in memory, in their dtype.

    Args:
        model: The model.
        seen: What it made of the texts.
        texts: The texts.
        reference: The model to stay close to; it may be the same.
        seen_by_reference: What that one made of the texts.
        batch_tokens: As it was for `walk`.
    """
    vocabulary = score.same_vocabulary(reference.config, model.config)
    totals = []
    with ExitStack() as stack:
        norm, head = stack.enter_context(model.end())
        itself = reference is model
        norm_of_reference, head_of_reference = (norm, head) if itself else stack.enter_context(reference.end())
        for text, ours, theirs in zip(texts, seen, seen_by_reference, strict=True):
            total = Tally()
            for batch, a, b in zip(score.passes(text.windows, batch_tokens), ours, theirs, strict=True):
                _, targets = score.predictions(text.ids, batch)
                states = norm(a.to(model.device))
                of_reference = states if itself else norm_of_reference(b.to(reference.device))
                beside = (head_of_reference, of_reference)
                total += score.tally(head, states, targets, reference=beside, vocabulary=vocabulary)
            totals.append(total)
    return totals

"""Packing changes where a document lies, and nothing else: no document sees another."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llamero.engine.batches import Batches
from llamero.model.llama import Llama


def losses(model: Llama, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Return the loss of every token but the first of each document, in one pass."""
    hidden = model.packed_hidden(ids, lengths)
    ends = torch.cumsum(torch.tensor(lengths), 0) - 1
    inner = torch.ones(len(ids), dtype=torch.bool)
    inner[ends] = False
    return F.cross_entropy(model.lm_head(hidden)[inner], ids[torch.nonzero(inner).squeeze(1) + 1], reduction="none")


@torch.no_grad()
@pytest.mark.parametrize("sequence", [32, 64, 200])
def test_the_loss_of_every_token_is_that_of_its_document_alone(make_model, make_stage, make_data, sequence):
    model, data = make_model().double(), make_data(40, longest=33)
    batches = Batches(data.tokens, data.roles, make_stage(sequence=sequence, objective="lm"), seed=0, where="here")
    assert len(batches) < 40
    seen: list[int] = []
    for row in range(len(batches)):
        batch = batches.assemble([row])
        packed = losses(model, batch.ids, batch.lengths)
        alone = [
            F.cross_entropy(model(part[None])[0, :-1], part[1:], reduction="none")
            for part in batch.ids.split(batch.lengths)
        ]
        torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-12, atol=1e-12)
        seen += batch.documents
    assert sorted(seen) == list(range(40))


@torch.no_grad()
def test_what_one_document_says_changes_nothing_in_the_others(make_model, make_stage, make_data):
    model, data = make_model().double(), make_data(20, longest=20)
    batch = Batches(data.tokens, data.roles, make_stage(sequence=64, objective="lm"), seed=0, where="here").assemble(
        [0]
    )
    assert len(batch.lengths) >= 3
    before = model.packed_hidden(batch.ids, batch.lengths).split(batch.lengths)
    changed = list(batch.ids.split(batch.lengths))
    changed[1] = (changed[1] + 1) % model.config.vocab_size
    after = model.packed_hidden(torch.cat(changed), batch.lengths).split(batch.lengths)
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(one, other) == (number != 1)

"""From the description of a stage to the noise of one micro-batch."""

import torch

from llamero.engine.batches import Batch
from llamero.engine.stage import StageConfig
from llamero.model.dropout import Noise, Rates, token_keys


def rates(stage: StageConfig) -> Rates:
    """Return how much noise a stage has."""
    dropout = stage.dropout
    embedding = 0.0 if dropout.lima else dropout.hidden
    return Rates(
        hidden=dropout.hidden,
        lima=dropout.lima,
        attention=dropout.attention,
        embedding=embedding if dropout.embedding is None else dropout.embedding,
        neftune=stage.neftune,
        adapter=0.0 if stage.adapter is None else stage.adapter.dropout,
    )


def noise_of(
    batch: Batch, stage: StageConfig, *, layers: int, seed: int, step: int, device: torch.device
) -> Noise | None:
    """Return the noise of a micro-batch of a step, or nothing where the stage has none.

    Args:
        batch: Its samples.
        stage: How much.
        layers: Layers of the whole model.
        seed: Of the run.
        step: Of the stage, 0-based.
        device: Where the model is.
    """
    wanted = rates(stage)
    if not any(wanted):
        return None
    keys = token_keys(batch.documents, batch.lengths, seed=seed, step=step, starts=batch.starts)
    sizes = torch.tensor(batch.lengths)
    return Noise(keys.to(device), sizes.repeat_interleave(sizes).to(device), wanted, layers)

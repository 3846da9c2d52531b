"""Learning rate by step."""

import math
from collections.abc import Callable

from llamero.engine.stage import StageConfig

SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
"""How much of `lr − min_lr` is left when a share of the steps after warm-up is done.

A shape falls from 1 to what it ends at and sees only the share that is done.
To add one: a line here, and its name in `StageConfig.schedule`.
"""


def learning_rate(stage: StageConfig, step: int, *, steps: int) -> float:
    """Return the learning rate of a step.

    Args:
        stage: Where the shape is described.
        step: 0-based.
        steps: Steps of the whole stage; the last one runs at `min_lr`.
    """
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(1, steps - 1 - stage.warmup)
    return stage.min_lr + (stage.lr - stage.min_lr) * SHAPES[stage.schedule](min(1.0, done))

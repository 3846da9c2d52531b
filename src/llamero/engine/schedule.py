"""Learning rate by step."""

import math
from collections.abc import Callable

from llamero.engine.stage import StageConfig

SHAPES: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda done, _: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done, _: 1 - done,
    "constant": lambda _, __: 1.0,
    "wsd": lambda _, fallen: 1 - fallen,
    "wsd_sqrt": lambda _, fallen: 1 - math.sqrt(fallen),
}
"""How much of `lr − min_lr` is left when a share of the steps after warm-up is done, and a share of those in which a
schedule falls that stays level first (warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395; with 1 − √x: Hägele et
al. 2024, arXiv:2405.18392).

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
    falling = stage.decay_steps(steps)
    fallen = (step + 1 - (steps - falling)) / falling
    left = SHAPES[stage.schedule](min(1.0, done), min(1.0, max(0.0, fallen)))
    return stage.min_lr + (stage.lr - stage.min_lr) * left

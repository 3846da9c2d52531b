"""AdamW with the usual exclusions (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

import torch
from torch import nn

from llamero.engine.stage import StageConfig


def adamw(model: nn.Module, stage: StageConfig) -> torch.optim.AdamW:
    """Return the optimizer of a stage; matrices decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, eps=stage.eps, fused=True)

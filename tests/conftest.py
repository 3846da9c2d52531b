"""One thread a test process: pytest-xdist uses the cores, and tiny tensors gain nothing from more."""

import torch

torch.set_num_threads(1)

"""One thread a test process: pytest-xdist uses the cores, and tiny tensors gain nothing from more.

Machines are shared: no property is failed for having taken its time.
Shapes in the signatures of mathematics are checked while tests run (jaxtyping with beartype).
"""

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

torch.set_num_threads(1)
settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("shared machine")
install_import_hook(
    [
        "llamero.kernels",
        "llamero.model.attention",
        "llamero.model.rope",
        "llamero.model.llama",
        "llamero.model.linear",
        "llamero.model.kquant_linear",
        "llamero.model.nf4",
        "llamero.model.grid",
        "llamero.model.rtn",
        "llamero.model.adapters",
        "llamero.infer.score",
        "llamero.quantize.gptq",
    ],
    "beartype.beartype",
)


@pytest.fixture
def unchecked_shapes():
    """Shapes are not checked: under sequence parallelism a layer has two numbers of tokens, which share a name."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)

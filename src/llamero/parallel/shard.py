"""Spreading a model over a mesh, from outside: tensor parallelism, recomputation, compilation, FSDP2, in this order.

Tensor and sequence parallelism: Shoeybi et al. 2019 (arXiv:1909.08053), Korthikanti et al. 2022 (arXiv:2205.05198);
FSDP: Zhao et al. 2023 (arXiv:2304.11277). The tensor axis cuts a matrix along one dimension and FSDP along the other,
so that every shard of a checkpoint is a plain rectangle.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from llamero.kernels.attention import DEAR
from llamero.parallel.adapted import COLUMNS, ROWS, freeze_codes, tensor_style
from llamero.parallel.config import ParallelConfig
from llamero.parallel.part import Part
from llamero.parallel.world import World


def shard(part: Part, world: World, *, precision: torch.dtype | None = None) -> None:
    """Spread a part over its processes, in place; every process must hold the same whole weights.

    Args:
        part: What is spread.
        world: The processes.
        precision: Of products; weights that are fetched from other processes come in it, so that half as much is
            sent and nothing is rounded twice. `None` is that of the weights.
    """
    parallel = world.parallel
    if world.mesh is not None and parallel.tensor > 1:
        _over_tensor(part, world.mesh["tensor"], sequence=parallel.sequence_parallel, sharded=parallel.sharded)
    for number, block in list(part.layers.items()):
        if parallel.recompute != "none":
            part.layers[number] = block = _recomputed(block, selective=parallel.recompute == "selective")
        if parallel.compile:
            # `forward` and not the module: the hooks of FSDP stay outside
            block.forward = torch.compile(block.forward, dynamic=True)
    if world.mesh is not None and parallel.data > 1:
        _over_data(part, world.mesh, parallel, precision)


def _over_tensor(part: Part, mesh: DeviceMesh, *, sequence: bool, sharded: int) -> None:
    tokens = Shard(0) if sequence else Replicate()
    part.tensor, part.spread = mesh, tokens
    plan: dict[str, ParallelStyle] = {}
    for number in part.layers:
        block = f"layers.{number}."
        for name in (*COLUMNS, *ROWS):
            layer = part.get_submodule(block + name)
            plan[block + name] = tensor_style(layer, outputs=name in COLUMNS, tokens=tokens, sharded=sharded)
        for name in ("input_layernorm", "post_attention_layernorm"):
            plan[block + name] = _Norm(tokens, Replicate())
    if part.first or part.tied:
        plan["embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens)
    if part.last:
        plan["norm"] = _Norm(tokens, tokens)
    parallelize_module(part, mesh, plan, src_data_rank=None)
    if part.last:
        head = part.lm_head
        head.weight = (
            part.embed_tokens.weight
            if part.tied
            else nn.Parameter(
                distribute_tensor(head.weight.detach(), mesh, [Shard(0)], src_data_rank=None),
                requires_grad=head.weight.requires_grad,
            )
        )


class _Norm(ParallelStyle):
    """A normalization of tokens that lie in some way over the processes, and come out in another."""

    def __init__(self, tokens: Shard | Replicate, out: Shard | Replicate) -> None:
        super().__init__()
        self._tokens, self._out = tokens, out

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> Tensor:
            return DTensor.from_local(inputs[0], mesh, [self._tokens], run_check=False)

        def leave(module: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
            return output.redistribute(placements=[self._out])

        def same(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
            for key, value in list(module.named_parameters(recurse=False)):
                whole = distribute_tensor(value.detach(), mesh, [Replicate()], src_data_rank=None)
                module.register_parameter(key, nn.Parameter(whole, requires_grad=value.requires_grad))

        return distribute_module(module, device_mesh, same, enter, leave)  # type: ignore[arg-type]


_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    *DEAR,
}


def _recomputed(block: nn.Module, *, selective: bool) -> nn.Module:
    if not selective:
        return checkpoint_wrapper(block, preserve_rng_state=False)
    contexts = partial(create_selective_checkpoint_contexts, _keep_products)
    return checkpoint_wrapper(block, context_fn=contexts, preserve_rng_state=False)


def _keep_products(context: Any, operation: Any, *args: Any, **keys: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _over_data(part: Part, mesh: DeviceMesh, parallel: ParallelConfig, precision: torch.dtype | None) -> None:
    axes = mesh["replicate", "shard"] if parallel.replicate > 1 else mesh["shard"]
    on_cpu = CPUOffloadPolicy(pin_memory=axes.device_type == "cuda")
    keys: dict[str, Any] = {
        "mesh": axes,
        # inputs stay what they are: the residual stream is float32, autocast rounds what enters a product
        "mp_policy": MixedPrecisionPolicy(precision, getattr(torch, parallel.reduce_dtype), cast_forward_inputs=False),
        "offload_policy": on_cpu if parallel.offload else OffloadPolicy(),
        "shard_placement_fn": _across,
    }
    freeze_codes(part)
    blocks = [
        fully_shard(block, reshard_after_forward=parallel.zero_stage == 3, **keys) for block in part.layers.values()
    ]
    whole = fully_shard(part, **keys)
    for this, following in pairwise([whole, *blocks]):  # the next layer is asked for before this one computes
        this.set_modules_to_forward_prefetch([following])
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the weight of the whole batch already
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum that also divides


def _across(parameter: nn.Parameter) -> Shard:
    """Return the dimension that FSDP cuts: the one that the tensor axis leaves whole."""
    if isinstance(parameter, DTensor) and parameter.dim() == 2 and parameter.placements[0] == Shard(0):
        return Shard(1)
    return Shard(0)

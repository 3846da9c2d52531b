"""Adapters and packed layers over a mesh, and the plain model that they stand for, one tensor at a time.

Over the tensor axis: where a layer's outputs are spread, the first factor of its update is whole and the second spread
over the outputs; where its inputs are, the first is spread over the inputs and the second whole, and what the base and
the update sum up travels in one reduction. Codes are cut at whole words or blocks. FSDP spreads them as bits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from llamero.checkpoint.hf import Spec
from llamero.core.errors import LlameroError
from llamero.model.adapters import LoraLinear, updated
from llamero.model.linear import PackedLinear
from llamero.model.llama import Llama
from llamero.model.weights import Adapted, Weights, everything
from llamero.parallel.config import ParallelConfig
from llamero.parallel.part import Part, canonical

COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
"""Layers of a block whose outputs are spread over the tensor axis."""
ROWS = ("self_attn.o_proj", "mlp.down_proj")
"""Those whose inputs are."""


def tensor_style(layer: nn.Module, *, outputs: bool, tokens: Placement, sharded: int) -> ParallelStyle:
    """Return how a linear layer of any kind is spread over the tensor axis.

    Args:
        layer: Plain, packed, or with an update.
        outputs: Whether its outputs are spread, or its inputs.
        tokens: How tokens lie outside of a block.
        sharded: Processes over which FSDP spreads what the tensor axis leaves.
    """
    if not isinstance(layer, LoraLinear | PackedLinear):
        return ColwiseParallel() if outputs else RowwiseParallel(output_layouts=tokens)
    return _Shares(outputs=outputs, tokens=tokens, sharded=sharded)


class _Shares(ParallelStyle):
    """A packed layer, or one with an update, of which every process has a share and computes with plain tensors."""

    def __init__(self, *, outputs: bool, tokens: Placement, sharded: int) -> None:
        super().__init__()
        self._outputs, self._tokens, self._sharded = outputs, tokens, sharded

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
            return inputs[0].to_local(grad_placements=[Partial()])

        def leave(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            summand = DTensor.from_local(output, device_mesh, [Partial()], run_check=False)
            return summand.redistribute(placements=[self._tokens]).to_local()

        self._cut(module, device_mesh)
        if self._outputs:
            module.register_forward_pre_hook(enter)
        else:
            module.register_forward_hook(leave)
        return module

    def _cut(self, module: nn.Module, mesh: DeviceMesh) -> None:
        if isinstance(module, PackedLinear):
            module.keep(mesh.get_local_rank(), mesh.size(), outputs=self._outputs)
            return
        assert isinstance(module, LoraLinear)
        base, whole, own = module.base, Replicate(), Shard(0 if self._outputs else 1)
        if isinstance(base, PackedLinear):
            self._cut(base, mesh)
        else:
            module.base = Share(base, mesh, own, partial=False)  # type: ignore[assignment]
        if self._outputs:
            rank = module.lora_B.in_features
            # FSDP cuts along the other dimension, here the rank, and only evenly
            b = own if rank % self._sharded == 0 else whole
            module.lora_A = Share(module.lora_A, mesh, whole, partial=True)  # type: ignore[assignment]
            module.lora_B = Share(module.lora_B, mesh, b, partial=b == whole, outputs=True)  # type: ignore[assignment]
        else:
            module.first_input = module.lora_A.in_features // mesh.size() * mesh.get_local_rank()
            module.lora_A = Share(module.lora_A, mesh, own, partial=False)  # type: ignore[assignment]
            module.lora_B = Share(module.lora_B, mesh, whole, partial=True)  # type: ignore[assignment]


class Share(nn.Module):
    """A process's share of a linear layer; plain tensors go in and come out, and nothing is summed up in between.

    Args:
        layer: The whole of it.
        mesh: The tensor axis.
        place: How the weight lies on it.
        partial: Whether a process has a summand of the weight's gradient, rather than the gradient of its share.
        outputs: Whether a process uses its outputs alone even where the weight lies whole.
    """

    def __init__(
        self, layer: nn.Linear, mesh: DeviceMesh, place: Placement, *, partial: bool, outputs: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = _spread(layer.weight, mesh, place)
        bias = dict(layer.named_parameters()).get("bias")
        across = place == Shard(0)
        self.bias = None if bias is None else _spread(bias, mesh, Shard(0) if across else Replicate())
        self._grads: list[Placement] = [Partial() if partial else place]
        self._adds_bias = across or mesh.get_local_rank() == 0  # once, where processes compute summands
        self._cut = (mesh.size(), mesh.get_local_rank()) if outputs and not across else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply this process's share."""
        weight = _local(self.weight, self._grads)
        if self._cut is not None:
            count, number = self._cut
            weight = weight.chunk(count)[number]
        bias = None if self.bias is None or not self._adds_bias else _local(self.bias)
        return F.linear(x, weight, bias)


def _local(weight: Tensor, grads: list[Placement] | None = None) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local(grad_placements=grads)


def _spread(parameter: Tensor, mesh: DeviceMesh, place: Placement) -> nn.Parameter:
    value = distribute_tensor(parameter.detach(), mesh, [place], src_data_rank=None)
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def refuse_cuts(parallel: ParallelConfig, model: Llama) -> None:
    """Refuse a tensor axis that would cut through a word or a block of codes, and name the sizes that do not.

    Args:
        parallel: The layout.
        model: May be without storage.
    """
    size, config = parallel.tensor, model.config
    if size == 1:
        return
    found = {name.removesuffix(".base"): layer for name, layer in model.model.layers[0].named_modules()}
    packed = {name: layer for name, layer in found.items() if isinstance(layer, PackedLinear)}
    for name, layer in packed.items():
        outputs = name in COLUMNS
        if layer.cuts(size, outputs=outputs):
            continue
        fit = [
            other
            for other in range(1, config.num_kv_heads + 1)
            if not any(heads % other for heads in (config.num_heads, config.num_kv_heads))
            and all(layer.cuts(other, outputs=name in COLUMNS) for name, layer in packed.items())
        ]
        channels = f"{layer.out_features} outputs" if outputs else f"{layer.in_features} inputs"
        raise LlameroError(
            f"`tensor: {size}` cuts the {channels} of `{name}` within a word or a block of its codes",
            where="parallel",
            fix=f"`tensor:` one of {', '.join(map(str, fit))}, or another form of the base",
        )


def freeze_codes(part: nn.Module) -> None:
    """Let the codes of packed layers be parameters, so that FSDP spreads them."""
    for module in part.modules():
        if isinstance(module, PackedLinear):
            module.freeze()


def packed_layers(part: Part) -> dict[str, PackedLinear]:
    """Return the packed layers of a part, by name."""
    return {canonical(name): layer for name, layer in part.named_modules() if isinstance(layer, PackedLinear)}


def fill_codes(name: str, layer: PackedLinear, weights: Weights) -> None:
    """Give a packed layer this process's share of its codes, and of its bias; one whole layer is held beside it.

    Args:
        name: Of the layer.
        layer: With storage.
        weights: Of a model with an adapter (`Adapted`).
    """
    if not isinstance(weights, Adapted):
        raise ValueError(f"`{name}` is packed, and nobody says where its codes come from")
    for leaf, value in layer.kept(weights.codes(name, layer)).items():
        slot = getattr(layer, leaf)
        _put(slot, value.contiguous().view(torch.uint8) if isinstance(slot, nn.Parameter) else value)
    if layer.bias is not None:
        _put(layer.bias, layer.kept_bias(weights.part(f"{name}.bias", everything(layer.whole[:1]))))


def _put(slot: Tensor, value: Tensor) -> None:
    if isinstance(slot, DTensor):
        value = distribute_tensor(value, slot.device_mesh, slot.placements, src_data_rank=None).to_local()
        slot = slot.to_local()
    slot.copy_(value)


# -- the plain model


def plain_specs(model: Llama) -> dict[str, Spec]:
    """Return every tensor of the plain model that a model with an adapter, or with codes, stands for."""
    specs: dict[str, Spec] = {}
    seen: set[Tensor] = set()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        base = module.base if isinstance(module, LoraLinear) else module
        if isinstance(module, LoraLinear | PackedLinear):
            inside = (f"{name}.",)
        if isinstance(base, PackedLinear):
            specs[f"{name}.weight"] = Spec((base.out_features, base.in_features), torch.float32)
        for leaf, parameter in base.named_parameters(recurse=False):
            if parameter not in seen:
                specs[f"{name}.{leaf}"] = Spec(tuple(parameter.shape), parameter.dtype)
            seen.add(parameter)
    return specs


def adapted_layers(part: Part) -> dict[str, nn.Module]:
    """Return the layers of a part that are packed or have an update, by name."""
    kinds = LoraLinear | PackedLinear
    found = {canonical(name): layer for name, layer in part.named_modules() if isinstance(layer, kinds)}
    return {name: layer for name, layer in found.items() if not name.endswith(".base")}


class Plain:
    """What a layer that is packed or has an update stands for, gathered from the processes that have parts of it.

    Args:
        layer: The layer.
        name: Its name, which says whether the tensor axis spreads its outputs or its inputs.
        mesh: The tensor axis, if there is one.
    """

    def __init__(self, layer: nn.Module, name: str, mesh: DeviceMesh | None) -> None:
        self._layer, self._mesh = layer, mesh
        self._base = layer.base if isinstance(layer, LoraLinear) else layer
        self._outputs = name.endswith(COLUMNS)

    @torch.no_grad()
    def tensor(self, leaf: str, *, wanted: bool) -> Tensor | None:
        """Return its whole `weight` or `bias`, where it is wanted; every process that has a part of it must ask.

        A weight is in float32 or wider, with the update added, and is rounded by nobody.
        """
        if leaf == "bias":
            return self._bias()
        base, layer = self._base, self._layer
        weight = self._decoded(base) if isinstance(base, PackedLinear) else whole(base.get_parameter("weight"))
        if not isinstance(layer, LoraLinear):
            return weight
        a, b = whole(layer.lora_A.weight), whole(layer.lora_B.weight)
        return updated(weight, a, b, layer.scale) if wanted else None

    def _bias(self) -> Tensor:
        bias = whole(self._base.get_parameter("bias"))
        if self._mesh is None or not isinstance(self._base, PackedLinear):
            return bias
        place = Shard(0) if self._outputs else Partial()  # all but one have zeros
        return DTensor.from_local(bias, self._mesh, [place], run_check=False).full_tensor()

    def _decoded(self, base: PackedLinear) -> Tensor:
        """Return the weight of a packed layer; where it is cut each process decodes its share."""
        codes = {name: base.as_stored(name, whole(getattr(base, name))) for name in base.names}
        share = base.decode(codes, torch.float32).contiguous()
        if self._mesh is None:
            return share
        return DTensor.from_local(share, self._mesh, [Shard(0 if self._outputs else 1)], run_check=False).full_tensor()


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that lies on several processes, or of one that does not."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

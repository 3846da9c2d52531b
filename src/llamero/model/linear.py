"""Linear layers: plain, and with weights that rest as low-bit codes; and the encoders that need no data."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llamero.checkpoint import awq, bitsandbytes, compressed_tensors, gptq, packed
from llamero.checkpoint.codes import GroupCodes
from llamero.core.errors import LlameroError
from llamero.kernels import low_bit, w4a16
from llamero.model import int8, nf4, rtn


def linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    """Return a plain linear layer without drawing random weights: they are loaded, or drawn by `initialize`."""
    # left to itself `skip_init` takes storage on the CPU, even where the meta device was asked for
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, device=torch.get_default_device())
    assert isinstance(layer, nn.Linear)
    return layer


class PackedLinear(nn.Module):
    """A linear layer that rests as codes and is dequantized whenever it is used, for its gradient once more.

    The codes are frozen; a gradient flows through them to the input (QLoRA) and to the bias.
    """

    bias: nn.Parameter | None
    names: tuple[str, ...]
    """Of the tensors that stand for the weight."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs)) if bias else None)
        self.whole = outputs, inputs
        """Its shape before anything of it was given away."""
        self.slow_because = ""
        """Why there is no faster way; nothing where none was looked for."""
        self._views: dict[str, torch.dtype] = {}
        self._kept: tuple[int, int, bool] | None = None

    def dequantize(self, dtype: torch.dtype) -> Float[Tensor, "out d"]:
        """Return the weight, computed in float32 (or wider, if that is asked for) and rounded once."""
        return self.decode(self.codes(), dtype)

    def decode(self, codes: Mapping[str, Tensor], dtype: torch.dtype) -> Float[Tensor, "out d"]:
        """Return the weight that some codes of a layer like this one stand for."""
        raise NotImplementedError

    def codes(self) -> dict[str, Tensor]:
        """Return the tensors that stand for the weight, by name."""
        return {name: self.as_stored(name, getattr(self, name)) for name in self.names}

    def as_stored(self, name: str, value: Tensor) -> Tensor:
        """Return a tensor of the codes in the dtype that it has in files (see `freeze`)."""
        return value.view(self._views[name]) if name in self._views else value

    def freeze(self) -> None:
        """Let the codes be parameters, so that what spreads parameters spreads them.

        They rest as bytes, because no change of precision may touch the numbers among them. Single numbers stay
        buffers.
        """
        for name, value in self.codes().items():
            if value.dim() and name in dict(self.named_buffers(recurse=False)):
                self._views[name] = value.dtype
                delattr(self, name)
                self.register_parameter(name, nn.Parameter(value.contiguous().view(torch.uint8), requires_grad=False))

    def cuts(self, of: int, *, outputs: bool) -> bool:
        """Return whether the codes can be cut into so many equal shares of outputs, or of inputs."""
        raise NotImplementedError

    def keep(self, share: int, of: int, *, outputs: bool) -> None:
        """Keep one of some equal shares of the outputs, or of the inputs, of a layer that `cuts` so.

        Of shares of inputs each computes a summand, and the first has the bias.
        """
        for name, value in self._cut(self.codes(), share, of, outputs=outputs).items():
            self.register_buffer(name, value.clone())
        self._kept = share, of, outputs
        if outputs:
            self.out_features //= of
        else:
            self.in_features //= of
        if self.bias is not None:
            self.bias = nn.Parameter(self.kept_bias(self.bias.detach()), requires_grad=self.bias.requires_grad)

    def kept(self, codes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return of the codes of the whole layer what this one has kept."""
        return dict(codes) if self._kept is None else self._cut(codes, *self._kept[:2], outputs=self._kept[2])

    def kept_bias(self, bias: Float[Tensor, " outputs"]) -> Float[Tensor, " kept"]:
        """Return of the bias of the whole layer what this one has kept."""
        if self._kept is None:
            return bias
        share, of, outputs = self._kept
        if outputs:
            return bias.view(of, -1)[share].clone()
        return torch.zeros_like(bias) if share else bias

    def _cut(self, codes: Mapping[str, Tensor], share: int, of: int, *, outputs: bool) -> dict[str, Tensor]:
        """Return a share of the codes of the whole layer."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """Return the plain layer that this one stands for."""
        layer = linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight = nn.Parameter(self.dequantize(dtype).contiguous())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().to(dtype))
        return layer

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... out"]:
        """Apply the layer in the dtype of its input, or in that of autocast."""
        x = x.to(_compute_dtype(x))
        return _PackedProduct.apply(x, None if self.bias is None else self.bias.to(x.dtype), self)

    def product(self, x: Float[Tensor, "... d"], bias: Float[Tensor, " out"] | None) -> Float[Tensor, "... out"]:
        """Return `x @ weight.T + bias` in the dtype of `x`; the plain way, and the oracle of the others."""
        return F.linear(x, self.dequantize(x.dtype), bias)

    def way(self) -> str:
        """Return how it computes, for a report."""
        return "dequantized for every product" + (f" ({self.slow_because})" if self.slow_because else "")


class _PackedProduct(torch.autograd.Function):
    """`x @ weight.T + bias` that keeps the codes; autograd would keep the weight itself until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        to_input, to_bias, _ = ctx.needs_input_grad
        return (
            grad @ ctx.layer.dequantize(grad.dtype) if to_input else None,
            grad.flatten(0, -2).sum(0) if to_bias else None,
            None,
        )


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class GroupLinear(PackedLinear):
    """A linear layer that rests as codes on grids, as GPTQ, AWQ and compressed-tensors store them.

    Buffers have the names and shapes of the files. Scales stay in the dtype of the file: another one would change the
    weights.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        layout: How the codes are stored.
        bias: Whether there is one.
    """

    def __init__(self, inputs: int, outputs: int, *, layout: packed.OnGrids, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.layout = layout
        specs = layout.specs(inputs, outputs)
        for name, spec in specs.items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype))
        self.names = tuple(name for name in specs if name != "weight_shape")

    def grids(self) -> GroupCodes:
        """Return its weight on grids."""
        return self.layout.decode(self.codes())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the codes of all of the layer."""
        outputs, inputs = self.whole
        specs = self.layout.specs(inputs, outputs)
        return {name: specs[name].shape for name in self.names}

    def decode(self, codes: Mapping[str, Tensor], dtype: torch.dtype) -> Float[Tensor, "out d"]:
        """Return the weight, computed in float32 (float64 if that is asked for) and rounded once."""
        return self.layout.decode(codes).dequantize(torch.promote_types(dtype, torch.float32)).to(dtype)

    def cuts(self, of: int, *, outputs: bool) -> bool:
        """Return whether the codes can be cut into so many equal shares of outputs, or of inputs."""
        width = self.out_features if outputs else self.in_features
        return width % (of * self.layout.step(width, outputs=outputs)) == 0

    def _cut(self, codes: Mapping[str, Tensor], share: int, of: int, *, outputs: bool) -> dict[str, Tensor]:
        return self.layout.cut(codes, share, of, outputs=outputs)

    def problem(self, codes: Mapping[str, Tensor] | None = None) -> str:
        """Return what is wrong with the loaded codes, or with others of a layer like this one, or nothing."""
        return self.layout.damage(codes or self.codes())


class Nf4Linear(PackedLinear):
    """A linear layer that rests as NF4 codes, as bitsandbytes lays them out; on CUDA its kernels are used if installed.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        double: Whether the scales are quantized too.
        bias: Whether there is one.
    """

    def __init__(self, inputs: int, outputs: int, *, double: bool, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias)
        for name, tensor in nf4.empty(inputs, outputs, double=double).items():
            self.register_buffer(name, tensor)
        self.names = tuple(dict(self.named_buffers()))
        self._place = nf4.WHOLE

    def decode(self, codes: Mapping[str, Tensor], dtype: torch.dtype) -> Float[Tensor, "out d"]:
        """Return the weight, computed in float32 and rounded once."""
        return nf4.decode(codes, (self.out_features, self.in_features), dtype, self._place)

    def product(self, x: Float[Tensor, "... d"], bias: Float[Tensor, " out"] | None) -> Float[Tensor, "... out"]:
        """Return `x @ weight.T + bias` in the dtype of `x`."""
        codes = self.codes()
        if codes["packed"].device.type != "cpu" or self.in_features % nf4.BLOCK or torch.compiler.is_compiling():
            return super().product(x, bias)
        y = nf4.product(x.reshape(-1, self.in_features), codes, self.out_features, self._place)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if bias is None else y.add_(bias)

    def way(self) -> str:
        """Return how it computes, for a report."""
        inside = self.codes()["packed"].device.type == "cpu" and not self.in_features % nf4.BLOCK
        return "nf4, decoded in the cache" if inside else super().way()

    def cuts(self, of: int, *, outputs: bool) -> bool:
        """Return whether the codes can be cut into so many equal shares of outputs, or of inputs: at whole blocks."""
        return nf4.cuts((self.out_features, self.in_features), of, outputs=outputs)

    def _cut(self, codes: Mapping[str, Tensor], share: int, of: int, *, outputs: bool) -> dict[str, Tensor]:
        parts, self._place = nf4.cut(codes, self.whole, share, of, outputs=outputs)
        return parts


class Int8Linear(PackedLinear):
    """A linear layer that rests as int8, each output scaled by itself, as bitsandbytes stores LLM.int8.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        bias: Whether there is one.
    """

    names = ("values", "scale")
    scale: Tensor

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.register_buffer("values", torch.empty(outputs, inputs, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(outputs))

    def decode(self, codes: Mapping[str, Tensor], dtype: torch.dtype) -> Float[Tensor, "out d"]:
        """Return the weight, computed in float32 and rounded once."""
        return int8.Codes(codes["values"], codes["scale"]).dequantize().to(dtype)

    def cuts(self, of: int, *, outputs: bool) -> bool:
        """Return whether the codes can be cut into so many equal shares of outputs, or of inputs."""
        return (self.out_features if outputs else self.in_features) % of == 0

    def _cut(self, codes: Mapping[str, Tensor], share: int, of: int, *, outputs: bool) -> dict[str, Tensor]:
        values, scale = codes["values"], codes["scale"]
        if outputs:
            return {"values": values.chunk(of)[share], "scale": scale.chunk(of)[share]}
        return {"values": values.chunk(of, 1)[share], "scale": scale}

    def grids(self) -> GroupCodes:
        """Return its weight on grids, a row each; equal but for the last bit."""
        codes, group = self.codes(), torch.zeros(self.in_features, dtype=torch.int32, device=self.scale.device)
        middle = torch.full((self.out_features, 1), 128, dtype=torch.uint8, device=self.scale.device)
        values = (codes["values"].to(torch.int16) + 128).to(torch.uint8)
        return GroupCodes(values, codes["scale"][:, None] * int8.STEP, middle, group, bits=8)


class ReadyLinear(PackedLinear):
    """A packed linear layer whose codes rest as a fast product wants them, and no longer as in files.

    For use, not for being spread over processes. Its weights are those of the layer that it was made of, to the last
    bit; what a product makes of them is said in `kernels/low_bit.py`.

    Args:
        layer: The layer it stands for.
        form: Its codes.
    """

    names = ()

    def __init__(self, layer: PackedLinear, form: low_bit.Form) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.bias = layer.bias
        self.form = form

    def dequantize(self, dtype: torch.dtype) -> Float[Tensor, "out d"]:
        """Return the weight, computed in float32 (or wider, if that is asked for) and rounded once."""
        return self.form.weight(dtype)

    def product(self, x: Float[Tensor, "... d"], bias: Float[Tensor, " out"] | None) -> Float[Tensor, "... out"]:
        """Return `x @ weight.T + bias` in the dtype of `x`."""
        if x.dtype not in low_bit.SUMS:
            return super().product(x, bias)
        y = self.form(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if bias is None else y.add_(bias)

    def way(self) -> str:
        """Return how it computes, for a report."""
        return self.form.title


LAYERS: dict[type[packed.OnGrids], type[GroupLinear]] = {
    gptq.Format: GroupLinear,
    awq.Format: GroupLinear,
    compressed_tensors.Format: GroupLinear,
}
"""The layer of every packed format. To add one: a class above, a line here, its parser in checkpoint/packed.py."""


def room(layout: packed.Format, inputs: int, outputs: int, *, bias: bool) -> PackedLinear:
    """Return a layer with nothing in it for the codes of a layout."""
    if not isinstance(layout, bitsandbytes.Format):
        return LAYERS[type(layout)](inputs, outputs, layout=layout, bias=bias)
    if layout.kind == "int8":
        return Int8Linear(inputs, outputs, bias=bias)
    return Nf4Linear(inputs, outputs, double=layout.double, bias=bias)


def shell(layer: nn.Linear, form: str) -> PackedLinear:
    """Return what `encode` would, on the meta device and with nothing in it.

    Raises:
        LlameroError: The form does not exist, or does not divide the layer.
    """
    inputs, outputs, bias = layer.in_features, layer.out_features, dict(layer.named_parameters()).get("bias")
    double = refuse_form(inputs, outputs, form)
    with torch.device("meta"):
        if isinstance(double, bool):
            packed: PackedLinear = Nf4Linear(inputs, outputs, double=double, bias=bias is not None)
        else:
            packed = GroupLinear(inputs, outputs, layout=double, bias=bias is not None)
    return packed.train(layer.training)


_RTN = re.compile(r"rtn-(?P<bits>[2348])bit-(?P<group>-1|[1-9]\d*)g")


@torch.no_grad()
def encode(layer: nn.Linear, form: str) -> PackedLinear:
    """Return a plain layer in a packed form, without looking at data.

    Args:
        layer: What is to be packed.
        form: `nf4`, `nf4-double`, or `rtn-<bits>bit-<group>g` (-1 is a whole row).

    Raises:
        LlameroError: The form does not exist, or does not divide the layer.
    """
    coded, bias = shell(layer, form), dict(layer.named_parameters()).get("bias")
    if isinstance(coded, GroupLinear):
        layout = coded.layout
        weight = rtn.quantize(layer.weight.float(), bits=layout.bits, group_size=layout.group_size)
        codes = layout.encode(weight)
    else:
        codes = nf4.encode(layer.weight, double=form == "nf4-double")
    for name, tensor in codes.items():
        coded.register_buffer(name, tensor)
    coded.bias = bias
    return coded.train(layer.training)


def refuse_form(inputs: int, outputs: int, form: str) -> bool | gptq.Format:
    """Return the layout of a packed form of a layer, or for nf4 whether its scales are quantized too.

    Raises:
        LlameroError: The form does not exist, or does not divide the layer.
    """
    shape = f"{inputs} inputs and {outputs} outputs"
    if form in ("nf4", "nf4-double"):
        if inputs * outputs % nf4.BLOCK:
            raise _does_not_fit(shape, form, f"its number of weights is no multiple of {nf4.BLOCK}")
        return form == "nf4-double"
    found = _RTN.fullmatch(form)
    if found is None:
        raise LlameroError(f"unknown packed form `{form}`", fix="nf4, nf4-double, or rtn-4bit-128g and its kin")
    bits, group = int(found["bits"]), int(found["group"])
    if inputs % gptq.MULTIPLE or outputs % gptq.MULTIPLE or (group > 0 and inputs % group):
        raise _does_not_fit(shape, form, f"both must be multiples of {gptq.MULTIPLE}, and its inputs of the group")
    return gptq.Format(bits, group, zero_offset=1)


def _does_not_fit(shape: str, form: str, why: str) -> LlameroError:
    return LlameroError(f"a layer with {shape} cannot be packed as `{form}`: {why}", fix="choose another form")


def pack(blocks: nn.Module, form: str) -> None:
    """Encode every plain linear layer within some modules, such as a model's decoder layers, one after the other."""
    for name, layer in list(blocks.named_modules()):
        if isinstance(layer, nn.Linear):
            blocks.set_submodule(name, encode(layer, form))


def shells(model: nn.Module, form: str) -> list[str]:
    """Replace every plain linear layer of a model's decoder layers by what `pack` would, empty; return their names."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("model.layers.")}
    for name, layer in found.items():
        model.set_submodule(name, shell(layer, form))
    return list(found)


@torch.no_grad()
def make_ready(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the packed layers of a model compute the fastest way there is, where it is not the plain one.

    Args:
        model: With its codes loaded, on the device where it will stay.
        dtype: Of the activations.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, GroupLinear | Int8Linear):
            coded = layer.grids()
            form = (w4a16 if coded.codes.is_cuda else low_bit).prepare(coded, dtype)
            if isinstance(form, low_bit.Form):
                model.set_submodule(name, ReadyLinear(layer, form).train(layer.training))
            else:
                layer.slow_because = form


def ways(model: nn.Module) -> dict[str, int]:
    """Return how the packed layers of a model compute, and how many each way; empty for a plain model."""
    return dict(Counter(layer.way() for layer in model.modules() if isinstance(layer, PackedLinear)))

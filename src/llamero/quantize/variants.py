"""Names of quantized variants: `gptq-4bit-128g-actorder_True` and its kin, as published branches have them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from llamero.checkpoint import loaders
from llamero.core.errors import LlameroError, did_you_mean
from llamero.quantize.gguf_mix import MIXES

if TYPE_CHECKING:
    from llamero.checkpoint.codes import Actorder
    from llamero.checkpoint.packed import Format

Method = Literal["gptq", "rtn", "awq", "gguf", "gguf-rtn", "bitsandbytes"]

Layout = Literal["gptq", "gptq_v2", "awq", "compressed-tensors", "gguf", "bitsandbytes"]
"""How the files are laid out."""

BITS: dict[Layout, tuple[int, ...]] = {
    "gptq": (2, 3, 4, 8),
    "gptq_v2": (2, 3, 4, 8),
    "awq": (4,),
    "compressed-tensors": (2, 3, 4, 5, 6, 7, 8),
    "gguf": (2, 3, 4, 5, 6, 8, 16),
    "bitsandbytes": (4, 8),
}
"""Widths of a code that readers of each layout know."""

_NAME = re.compile(
    r"(?P<method>gptq|rtn|awq)-(?P<bits>\d+)bit-(?P<group>-1|\d+)g(-actorder_(?P<order>True|False|static))?"
    r"(?P<asym>-asym)?(-(?P<layout>v2|ct))?"
)
_ORDERS: dict[str | None, Actorder] = {"True": "desc", "static": "static", "False": "none", None: "none"}
_LAYOUTS: dict[str, Layout] = {"v2": "gptq_v2", "ct": "compressed-tensors"}

PUBLISHED = (
    "gptq-4bit--1g-actorder_True",
    "gptq-4bit-32g-actorder_True",
    "gptq-4bit-64g-actorder_True",
    "gptq-4bit-128g-actorder_True",
    "gptq-3bit--1g-actorder_True",
    "gptq-3bit-128g-actorder_True",
    "awq-4bit-128g",
    "awq-4bit-32g",
    "gguf-Q2_K",
    "gguf-Q3_K_M",
    "gguf-Q4_K_M",
    "gguf-Q5_K_M",
    "gguf-Q6_K",
    "gguf-Q8_0",
)
"""The variants that quantizers publish, the one of the main branch first; the default set is these and their siblings
(`default_set`)."""

MULTIPLES: dict[Layout, int] = {"gptq": 32, "gptq_v2": 32, "awq": 32, "compressed-tensors": 32}
"""Readers of a layout need input and output channels to be multiples of this."""

GROUPS = (16, 32, 64, 128, 256, 512, 1024)
"""Sizes of groups that are proposed where another does not divide a layer."""

EXAMPLES = (
    "gptq-4bit-128g-actorder_True",
    "gptq-4bit-128g-actorder_static",
    "gptq-4bit-128g-actorder_False",
    "gptq-4bit-32g-actorder_True",
    "gptq-4bit--1g-actorder_True",
    "gptq-3bit-128g-actorder_True",
    "gptq-8bit-128g-actorder_True",
    "gptq-3bit-128g-actorder_static-ct",
    "gptq-4bit-128g-actorder_static-asym-ct",
    "gptq-4bit-128g-actorder_True-v2",
    "awq-4bit-128g",
    "rtn-4bit-128g",
    "gguf-Q4_K_M",
    "int8",
    "nf4",
)


@dataclass(frozen=True)
class Variant:
    """One way of quantizing a model."""

    name: str
    method: Method
    bits: int
    group_size: int
    """Input channels that share one grid; -1 is all of a row."""
    actorder: Actorder = "none"
    sym: bool = True
    """Zero in the middle of every grid."""
    layout: Layout = "gptq"
    mix: str = ""
    """Of a GGUF file: which tensor has which type, a name of `gguf_mix.MIXES`."""

    @property
    def format(self) -> Format:
        """Return how its layers are stored; in a GGUF file each in a way of its own."""
        from llamero.checkpoint import awq, bitsandbytes, compressed_tensors, gptq

        if self.layout == "gguf":
            raise ValueError(f"{self.name}: the layers of a GGUF file are of different types")
        if self.layout == "bitsandbytes":
            return bitsandbytes.Format("int8" if self.bits == 8 else "nf4")
        if self.layout == "awq":
            return awq.Format(self.group_size)
        if self.layout == "compressed-tensors":
            return compressed_tensors.Format(self.bits, self.group_size, self.sym)
        return gptq.Format(self.bits, self.group_size, zero_offset=1 if self.layout == "gptq" else 0)


BITSANDBYTES = {
    "int8": Variant("int8", "bitsandbytes", 8, -1, layout="bitsandbytes"),
    "nf4": Variant("nf4", "bitsandbytes", 4, 64, layout="bitsandbytes"),
}
"""The kinds of bitsandbytes, which have no further numbers."""


def parse(name: str, *, sym: bool = True) -> Variant:
    """Return the variant of a name.

    Args:
        name: `<method>-<bits>bit-<group>g`, for `gptq` followed by `-actorder_<True|static|False>`, then `-asym` for
            asymmetric grids, then `-v2` or `-ct` for another layout than the method's own; or `gguf-<mix>`,
            `gguf-rtn-<mix>`, `int8`, `nf4`.
        sym: Whether grids are symmetric where the name does not say it; those of AWQ never are.
    """
    if name.startswith("gguf-"):
        return _gguf(name)
    if name in BITSANDBYTES:
        return BITSANDBYTES[name]
    found = _NAME.fullmatch(name)
    if found is None or (found["method"] == "gptq") != (found["order"] is not None):
        like = [example for example in EXAMPLES if example.startswith(name)]
        fix = f"one of: {', '.join(like)}" if like else did_you_mean(name, _near(name))
        raise LlameroError(f"unknown variant `{name}`", fix=fix)
    (method,) = (each for each in get_args(Method) if each == found["method"])
    own: Layout = "awq" if method == "awq" else "gptq"
    made = Variant(
        name,
        method,
        int(found["bits"]),
        int(found["group"]),
        _ORDERS[found["order"]],
        sym and not found["asym"] and method != "awq",
        _LAYOUTS[found["layout"]] if found["layout"] else own,
    )
    _refuse_impossible(made)
    return made


def _gguf(name: str) -> Variant:
    method: Method = "gguf-rtn" if name.startswith("gguf-rtn-") else "gguf"
    mix = name.removeprefix(f"{method}-")
    if mix not in MIXES:
        raise LlameroError(f"unknown variant `{name}`", fix=did_you_mean(name, [f"{method}-{mix}" for mix in MIXES]))
    return Variant(name, method, MIXES[mix].bits, -1, layout="gguf", mix=mix)


def _near(name: str) -> list[str]:
    """Return names that somebody may have meant: the examples, or those with the same numbers."""
    head = re.match(r"(gptq|rtn|awq)-\d+bit-(-1|\d+)g", name)
    if head is None:
        return list(EXAMPLES)
    orders = ("True", "static", "False") if head[1] == "gptq" else ()
    heads = [f"{head[0]}-actorder_{order}" for order in orders] or [head[0]]
    return [each + end for each in heads for end in ("", "-asym", "-v2", "-ct", "-asym-ct")]


def default_set(*, sym: bool = True) -> tuple[str, ...]:
    """Return what is made where nobody says what: the published variants, and beside each that vLLM refuses one that
    it takes.

    Args:
        sym: Whether grids are symmetric where a name does not say it.
    """
    names: list[str] = []
    for name in PUBLISHED:
        sibling = sibling_for_vllm(parse(name, sym=sym))
        names += [name] if sibling is None else [name, sibling.name]
    return tuple(dict.fromkeys(names))


def sibling_for_vllm(variant: Variant) -> Variant | None:
    """Return the same bits and groups in a form that vLLM takes; `None` if it takes the variant, or no form of it.

    Groups are made to lie side by side, and if that is not enough the layout is that of compressed-tensors.
    """
    if _taken_by_vllm(variant):
        return None
    static: Actorder = "none" if variant.actorder == "none" else "static"
    for layout in ("gptq", "compressed-tensors"):
        other = replace(variant, actorder=static, layout=layout)
        other = replace(other, name=_name(other, asym="-asym" in variant.name))
        if _taken_by_vllm(other):
            return other
    return None


def _taken_by_vllm(variant: Variant) -> bool:
    return loaders.verdicts(variant)[loaders.VLLM].loads


def _name(variant: Variant, *, asym: bool) -> str:
    """Return the name of a GPTQ variant, or of one that is rounded, in a layout."""
    order = next(word for word, order in _ORDERS.items() if word and order == variant.actorder)
    name = f"{variant.method}-{variant.bits}bit-{variant.group_size}g"
    name += f"-actorder_{order}" if variant.method == "gptq" else ""
    layout = next((word for word, layout in _LAYOUTS.items() if layout == variant.layout), None)
    return name + ("-asym" if asym else "") + (f"-{layout}" if layout else "")


def misfit(variant: Variant, widths: Iterable[tuple[int, int]]) -> str:
    """Return why layers of these widths cannot be stored as a variant says, or nothing.

    Args:
        variant: The variant.
        widths: Input and output channels of each kind of layer.
    """
    multiple = MULTIPLES.get(variant.layout, 1)
    for inputs, outputs in widths:
        odd = [width for width in (inputs, outputs) if width % multiple]
        if odd:
            return f"{odd[0]} channels; its readers need a multiple of {multiple}"
        if variant.group_size != -1 and inputs % variant.group_size:
            return f"groups of {variant.group_size} do not divide {inputs} input channels"
    return ""


def fitting(found: Sequence[Variant], widths: Iterable[tuple[int, int]]) -> tuple[tuple[Variant, ...], dict[str, str]]:
    """Return the variants that can be made of layers of these widths, and why the others cannot, by name."""
    known = sorted(set(widths))
    why = {variant.name: misfit(variant, known) for variant in found}
    return tuple(variant for variant in found if not why[variant.name]), {n: said for n, said in why.items() if said}


def refuse_misfits(found: Sequence[Variant], widths: Iterable[tuple[int, int]], *, where: str) -> None:
    """Refuse variants that cannot be made, all of them in one error.

    Args:
        found: The variants.
        widths: Input and output channels of each kind of layer.
        where: What the error names.
    """
    known = sorted(set(widths))
    kept, left = fitting(found, known)
    if left:
        works = [size for size in GROUPS if not any(inputs % size for inputs, _ in known)]
        names = [variant.name for variant in kept]
        rest = [f"leave them out: {', '.join(names)} can be made"] if names else []
        sizes = [f"group sizes that divide every layer: {', '.join(map(str, [*works, -1]))}"]
        raise LlameroError(
            "; ".join(f"variant `{name}`: {why}" for name, why in left.items()),
            where=where,
            fix="; ".join(rest + (sizes if any("groups" in why for why in left.values()) else [])) or None,
        )


def _refuse_impossible(variant: Variant) -> None:
    about, widths = f"variant `{variant.name}`: ", BITS[variant.layout]
    if variant.bits not in widths:
        said = ", ".join(map(str, widths[:-1])) + (" or " if widths[:-1] else "") + str(widths[-1])
        problem = f"{about}{variant.bits} bits"
        raise LlameroError(problem, fix=f"{variant.layout} files hold {said} bits; `-ct` at the end holds 2 to 8")
    if variant.group_size == 0:
        raise LlameroError(f"{about}groups of 0", fix="a number of input channels, or -1 for the whole row")
    if variant.actorder == "desc" and variant.layout == "compressed-tensors":
        raise LlameroError(f"{about}readers want groups side by side", fix="use `actorder_static`")
    if variant.method == "awq" and variant.layout == "gptq_v2":
        raise LlameroError(f"{about}AWQ is stored as such, or as compressed-tensors", fix="leave out `-v2`, or `-ct`")

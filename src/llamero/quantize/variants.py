"""Names of quantized variants: `gptq-4bit-128g-actorder_True` and its kin, as published branches have them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from llamero.core.errors import LlameroError, did_you_mean

if TYPE_CHECKING:
    from llamero.checkpoint.codes import Actorder
    from llamero.checkpoint.packed import Format

Method = Literal["gptq", "rtn", "awq"]

Layout = Literal["gptq", "gptq_v2", "awq", "compressed-tensors"]
"""How the files are laid out."""

BITS: dict[Layout, tuple[int, ...]] = {
    "gptq": (2, 3, 4, 8),
    "gptq_v2": (2, 3, 4, 8),
    "awq": (4,),
    "compressed-tensors": (2, 3, 4, 5, 6, 7, 8),
}
"""Widths of a code that readers of each layout know."""

_NAME = re.compile(
    r"(?P<method>gptq|rtn|awq)-(?P<bits>\d+)bit-(?P<group>-1|\d+)g(-actorder_(?P<order>True|False|static))?"
    r"(?P<asym>-asym)?(-(?P<layout>v2|ct))?"
)
_ORDERS: dict[str | None, Actorder] = {"True": "desc", "static": "static", "False": "none", None: "none"}
_LAYOUTS: dict[str, Layout] = {"v2": "gptq_v2", "ct": "compressed-tensors"}

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

    @property
    def format(self) -> Format:
        """Return how its layers are stored."""
        from llamero.checkpoint import awq, compressed_tensors, gptq

        if self.layout == "awq":
            return awq.Format(self.group_size)
        if self.layout == "compressed-tensors":
            return compressed_tensors.Format(self.bits, self.group_size, self.sym)
        return gptq.Format(self.bits, self.group_size, zero_offset=1 if self.layout == "gptq" else 0)

    def groups(self, inputs: int) -> int:
        """Return how many groups a row of `inputs` channels has."""
        return 1 if self.group_size == -1 else inputs // self.group_size


def parse(name: str, *, sym: bool = True) -> Variant:
    """Return the variant of a name.

    Args:
        name: `<method>-<bits>bit-<group>g`, for `gptq` followed by `-actorder_<True|static|False>`, then `-asym` for
            asymmetric grids, then `-v2` or `-ct` for another layout than the method's own.
        sym: Whether grids are symmetric where the name does not say it; those of AWQ never are.
    """
    found = _NAME.fullmatch(name)
    if found is None or (found["method"] == "gptq") != (found["order"] is not None):
        like = [example for example in EXAMPLES if example.startswith(name)]
        fix = f"one of: {', '.join(like)}" if like else did_you_mean(name, EXAMPLES)
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

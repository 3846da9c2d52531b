"""Names of quantized variants: `gptq-4bit-128g-actorder_True` and its kin, as published branches have them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from llamero.core.errors import LlameroError, did_you_mean

Method = Literal["gptq", "rtn"]

Actorder = Literal["none", "static", "desc"]
"""Order in which GPTQ solves input channels. `none`: as they lie; `static`: the most active first, groups stay side
by side; `desc`: the most active first, groups are formed in that order and readers need `g_idx` (`desc_act`)."""

BITS = (2, 3, 4, 8)

_NAME = re.compile(r"gptq-(?P<bits>\d+)bit-(?P<group>-1|\d+)g-actorder_(?P<order>True|False|static)")
_RTN_NAME = re.compile(r"rtn-(?P<bits>\d+)bit-(?P<group>-1|\d+)g")
_ORDERS: dict[str, Actorder] = {"True": "desc", "static": "static", "False": "none"}

EXAMPLES = (
    "gptq-4bit-128g-actorder_True",
    "gptq-4bit-128g-actorder_static",
    "gptq-4bit-128g-actorder_False",
    "gptq-4bit-32g-actorder_True",
    "gptq-4bit--1g-actorder_True",
    "gptq-3bit-128g-actorder_True",
    "gptq-8bit-128g-actorder_True",
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

    def groups(self, inputs: int) -> int:
        """Return how many groups a row of `inputs` channels has."""
        return 1 if self.group_size == -1 else inputs // self.group_size


def parse(name: str, *, sym: bool = True) -> Variant:
    """Return the variant of a name.

    Args:
        name: `gptq-<bits>bit-<group>g-actorder_<True|static|False>` or `rtn-<bits>bit-<group>g`.
        sym: Whether grids are symmetric; names do not say it.
    """
    method: Method = "gptq"
    found = _NAME.fullmatch(name)
    order: Actorder = "none"
    if found is not None:
        order = _ORDERS[found["order"]]
    else:
        method, found = "rtn", _RTN_NAME.fullmatch(name)
    if found is None:
        like = [example for example in EXAMPLES if example.startswith(name)]
        fix = f"one of: {', '.join(like)}" if like else did_you_mean(name, EXAMPLES)
        raise LlameroError(f"unknown variant `{name}`", fix=fix)
    bits, group_size = int(found["bits"]), int(found["group"])
    if bits not in BITS:
        raise LlameroError(f"variant `{name}`: {bits} bits", fix="GPTQ files hold 2, 3, 4 or 8 bits")
    if group_size == 0:
        raise LlameroError(f"variant `{name}`: groups of 0", fix="a number of input channels, or -1 for the whole row")
    return Variant(name, method, bits, group_size, order, sym)

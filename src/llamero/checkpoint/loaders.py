"""Which programs load which quantized files, and why others refuse them.

Each rule says what a named version does, so that a table of files can say where each of them loads. Sources: the
loaders' own code (vLLM: quantization/auto_gptq.py, compressed_tensors_wNa16.py and marlin_utils.py; text-generation-
inference: layers/gptq and layers/compressed_tensors; GPTQModel; ExLlamaV2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class Quantized(Protocol):
    """What decides who loads a quantized file."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def layout(self) -> str:
        """How the files are laid out: `gptq`, `gptq_v2`, `awq`, `compressed-tensors` and so on."""
        ...

    @property
    def bits(self) -> int:
        """Width of a code."""
        ...

    @property
    def group_size(self) -> int:
        """Input channels of a group; -1 is all of them."""
        ...

    @property
    def sym(self) -> bool:
        """Whether all zero points are in the middle."""
        ...

    @property
    def actorder(self) -> str:
        """Order in which channels were solved; `desc` formed groups in it."""
        ...


@dataclass(frozen=True)
class Verdict:
    """Whether a program loads a file."""

    loads: bool
    why: str = ""
    """What it needs beside itself, or what it refuses."""


Rule = Callable[[Quantized], Verdict]

_YES = Verdict(True)


def _always(why: str = "") -> Rule:
    return lambda _: Verdict(True, why)


def _no(why: str) -> Verdict:
    return Verdict(False, why)


_MARLIN_GROUPS = (-1, 32, 64, 128)


def _odd_group(file: Quantized) -> str:
    """Return what is wrong with the group for Marlin, the kernel of vLLM and others, or nothing."""
    if file.group_size in _MARLIN_GROUPS:
        return ""
    return f"groups of {file.group_size} (its kernels have {', '.join(map(str, _MARLIN_GROUPS))})"


def _vllm_gptq(file: Quantized) -> Verdict:
    if file.bits not in (4, 8):
        return _no(f"{file.bits} bits (of GPTQ files it takes 4 and 8)")
    if not file.sym:
        return _no("asymmetric GPTQ files")
    if file.actorder == "desc" and file.group_size != -1:
        return _no("desc_act with groups")
    return Verdict(not _odd_group(file), _odd_group(file))


def _vllm_awq(file: Quantized) -> Verdict:
    return Verdict(not _odd_group(file), _odd_group(file))


def _vllm_compressed(file: Quantized) -> Verdict:
    if not file.sym and file.bits not in (4, 8):
        return _no(f"asymmetric codes of {file.bits} bits (it takes 4 and 8)")
    if problem := _odd_group(file):
        return _no(problem)
    return Verdict(True, "" if file.bits == 4 else "on a GPU")


def _gptqmodel(file: Quantized) -> Verdict:
    """Transformers hands both to GPTQModel, whose kernel for CPUs has no groups of whole rows."""
    beside = "gptqmodel" if file.layout == "awq" else "gptqmodel and optimum"
    on_gpu = file.bits == 4 and file.group_size == -1
    return Verdict(True, f"with {beside}, on a GPU" if on_gpu else f"with {beside}")


def _exllama(file: Quantized) -> Verdict:
    return _YES if file.bits == 4 else _no(f"{file.bits} bits (of GPTQ files it takes 4)")


def _tgi_gptq(file: Quantized) -> Verdict:
    if file.layout == "gptq_v2":
        return _no("zero points of layout v2")
    return _YES if file.bits in (2, 4, 8) else _no(f"{file.bits} bits (of GPTQ files it takes 2, 4 and 8)")


def _tgi_compressed(file: Quantized) -> Verdict:
    if file.bits not in (4, 8) or not file.sym:
        return _no("compressed-tensors other than symmetric codes of 4 and 8 bits")
    return Verdict(not _odd_group(file), _odd_group(file))


@dataclass(frozen=True)
class Loader:
    """A program that loads quantized files."""

    name: str
    version: str
    """Of which the rules hold; "" is the one at hand."""
    rules: Mapping[str, Rule]
    """By layout; a layout that is missing is not read."""

    def verdict(self, file: Quantized) -> Verdict:
        """Return whether it loads a file."""
        rule = self.rules.get(file.layout)
        return rule(file) if rule else _no(f"{file.layout} files")


OWN = "llamero"
VLLM = "vLLM"

LOADERS = (
    Loader(
        OWN,
        "",
        {name: _always() for name in ("gptq", "gptq_v2", "awq", "compressed-tensors", "gguf", "bitsandbytes")},
    ),
    Loader(
        VLLM,
        "0.32",
        {
            "gptq": _vllm_gptq,
            "gptq_v2": _vllm_gptq,  # of symmetric codes the zero points are not looked at
            "awq": _vllm_awq,
            "compressed-tensors": _vllm_compressed,
            "gguf": _always("with vllm-gguf-plugin"),
            "bitsandbytes": _always("with vllm-bnb-plugin"),
        },
    ),
    Loader(
        "Transformers",
        "5.23",
        {
            "gptq": _gptqmodel,
            "gptq_v2": _gptqmodel,
            "awq": _gptqmodel,
            "compressed-tensors": _always("with compressed-tensors 0.15 or later"),
            "gguf": _always("with gguf; it decodes the weights as it loads"),
            "bitsandbytes": _always("with bitsandbytes"),
        },
    ),
    Loader("ExLlamaV2", "0.3", {"gptq": _exllama, "gptq_v2": _exllama}),
    Loader(
        "TGI", "3.3", {"gptq": _tgi_gptq, "gptq_v2": _tgi_gptq, "awq": _always(), "compressed-tensors": _tgi_compressed}
    ),
    Loader("llama.cpp", "", {"gguf": _always()}),
)
"""Every program that is looked at. To add one: a line here, rows in the test."""


def verdicts(file: Quantized) -> dict[str, Verdict]:
    """Return what each program says to a file."""
    return {loader.name: loader.verdict(file) for loader in LOADERS}


def looked_at() -> str:
    """Return the names and versions of all programs but this one."""
    return ", ".join(f"{each.name} {each.version}".strip() for each in LOADERS if each.name != OWN)


def remarks(files: Sequence[Quantized]) -> list[tuple[str, list[str]]]:
    """Return what programs need for files or refuse in them, and the names of these files.

    That a program does not read a layout at all is not among it.
    """
    found: dict[str, list[str]] = {}
    for loader in LOADERS:
        for file in files:
            verdict = loader.verdict(file)
            if verdict.why and file.layout in loader.rules:
                said = f"{loader.name} {'' if verdict.loads else 'refuses '}{verdict.why}"
                found.setdefault(said, []).append(file.name)
    return list(found.items())


def accepting(file: Quantized) -> list[str]:
    """Return the programs that load a file."""
    return [name for name, verdict in verdicts(file).items() if verdict.loads]

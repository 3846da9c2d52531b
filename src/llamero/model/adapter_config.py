"""What a recipe says of an adapter (LoRA: Hu et al. 2021, arXiv:2106.09685; QLoRA: arXiv:2305.14314)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llamero.core.config import Strict

PACKED = r"^(nf4|nf4-double|rtn-[2348]bit-(-1|[1-9]\d*)g)$"
"""Names of the packed forms that a base can be encoded in without looking at data."""


class AdapterConfig(Strict):
    """A low-rank update that is trained in place of the weights; PEFT's names stand in brackets."""

    lora: int = Field(gt=0)
    """Rank of the update (`r`)."""
    alpha: float | None = Field(default=None, gt=0)
    """The update is scaled by alpha / rank (`lora_alpha`); twice the rank by default, so by 2."""
    rslora: bool = False
    """Scale by alpha / √rank instead (`use_rslora`; arXiv:2312.03732)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the update's input channels that is dropped while training (`lora_dropout`)."""
    targets: Literal["all-linear"] | tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Linear layers that get an update, by the end of their name (`target_modules`); `all-linear` is every one of
    the decoder layers."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules that are trained whole, by the end of their name. By default none; `embed_tokens` and `lm_head`
    where the vocabulary grew, because new tokens are nowhere else."""
    init: Literal["default", "gaussian"] = "default"
    """How the first factor begins (`init_lora_weights`): uniform as a linear layer's weight, or normal with standard
    deviation 1 / rank. The second begins at zero."""
    base: str | None = Field(default=None, pattern=PACKED)
    """Form in which the frozen base rests: `nf4`, `nf4-double` (its scales are quantized too, as in QLoRA),
    `rtn-4bit-128g` and its kin. By default as it is: a GPTQ directory stays packed."""

    @property
    def stated_alpha(self) -> float:
        """Return alpha, stated or not."""
        return 2.0 * self.lora if self.alpha is None else self.alpha

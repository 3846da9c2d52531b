"""What a recipe says of its publication: what cannot be measured, and so must be told."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from llamero.core.config import Strict

HubName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")]
"""`owner/name` of the hub."""


class Sampling(Strict):
    """How answers are drawn unless the user says otherwise; written to generation_config.json."""

    temperature: float | None = Field(default=None, gt=0)
    """Divides the logits; below 1 answers become safer, above 1 wilder."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Only the likeliest tokens that together have this probability are drawn."""
    top_k: int | None = Field(default=None, gt=0)
    """Only this many of the likeliest tokens are drawn."""
    repetition_penalty: float | None = Field(default=None, gt=0)
    """Above 1, tokens that were there before become less likely."""

    def to_generation_config(self) -> dict[str, float | int | bool]:
        """Return the keys of generation_config.json; nothing if nothing is set."""
        told = self.model_dump(exclude_none=True)
        return {"do_sample": True, **told} if told else {}


class PublishConfig(Strict):
    """A release: what its cards say beside what was measured."""

    license: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    """Licence as the hub spells it: `llama2`, `apache-2.0`, `cc-by-nc-4.0` …"""
    languages: list[Annotated[str, StringConstraints(pattern=r"^([a-z]{2,3}|code|multilingual)$")]] = []
    """ISO 639 codes of the languages it is made for."""
    repository: HubName | None = None
    """`owner/name` that the model will have on the hub; quantized files go to `owner/name-GPTQ`."""
    base_model: HubName | None = None
    """Hub name of the base, where the recipe's `base` is a directory that was downloaded from there."""
    creator: str | None = None
    """Who makes the release."""
    description: str | None = None
    """Markdown that opens the card."""
    datasets: list[HubName] = []
    """Hub names of the data sets that it was trained on."""
    tags: list[str] = []
    """More tags for the hub."""
    sampling: Sampling = Sampling()
    """How answers are drawn unless the user says otherwise."""

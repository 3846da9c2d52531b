"""The model that is measured, and what every measurement of it says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamero.core.results import Result
from llamero.evaluate import per_sample
from llamero.infer.chat import ends_of
from llamero.infer.engine import OwnEngine
from llamero.model.llama import Llama
from llamero.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """The model that is measured."""

    name: str
    engine: OwnEngine
    tokenizer: Tokenizer
    template: str
    root: Path
    """Directory that a task's paths start from."""
    reference: Path | None
    """The unquantized model, where this is a variant of one."""
    mixtures: Mapping[str, Path]
    """Tokenized mixtures of the recipe."""
    directory: Path
    """Where the model was read from."""
    work: Path | None = None
    """Directory for files of the measurement: a run that was cut off finds there what it had, and goes on."""

    @property
    def ends(self) -> frozenset[int]:
        """Return the tokens that end a text."""
        return ends_of(self.directory, self.tokenizer)

    @property
    def model(self) -> Llama:
        """Return the model itself, for what no other engine can be asked."""
        return self.engine.model

    @property
    def samples(self) -> Path | None:
        """Return where every sample is written down; what is there already is not asked again."""
        return None if self.work is None else self.work / per_sample.FILE

    def measured(self) -> dict[str, Any]:
        """Return what moves scores and is of this model or of whatever runs it."""
        tokenizer = self.tokenizer
        return {"engine": self.engine.describe(), "tokenizer": tokenizer.digest, "tokenizer_bos": tokenizer.add_bos}

    def result(
        self, task: str, metrics: dict[str, float], protocol: str, *, notes: Sequence[str] = (), **inputs: Any
    ) -> Result:
        """Return a measurement of this model."""
        common = {"dtype": self.engine.describe()["dtype"], "tokenizer": self.tokenizer.digest}
        return Result(task, self.name, metrics, protocol, {**common, **inputs}, tuple(notes))


def standard_error(metric: str, value: float | None) -> dict[str, float]:
    """Return the standard error of a metric under its own key; nothing where there is none."""
    return {} if value is None else {f"{metric}_stderr": value}

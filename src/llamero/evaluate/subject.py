"""The model that is measured, and what every measurement of it says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamero.core.errors import LlameroError
from llamero.core.results import Result
from llamero.evaluate import per_sample
from llamero.infer.chat import ends_of
from llamero.infer.engine import Engine, OwnEngine
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama
from llamero.model.load import load_config
from llamero.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """The model that is measured."""

    name: str
    engine: Engine
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
        if not isinstance(self.engine, OwnEngine):
            raise LlameroError(f"`{self.name}` is run by another engine, which cannot be asked this")
        return self.engine.model

    @property
    def config(self) -> LlamaConfig:
        """Return the shape of the model, whoever runs it."""
        return self.engine.model.config if isinstance(self.engine, OwnEngine) else load_config(self.directory)

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

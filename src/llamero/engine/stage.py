"""The description of one training stage, as it stands in a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from llamero.core.config import Strict
from llamero.model.adapter_config import AdapterConfig

if TYPE_CHECKING:
    from pathlib import Path

Overlong = Literal["error", "drop", "truncate", "split"]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Learn(Strict):
    """How much a token counts in the loss, by who says it; 0 leaves it out."""

    assistant: float = Field(default=1.0, ge=0)
    """What assistants say, the end of their turn included."""
    text: float = Field(default=1.0, ge=0)
    """Plain documents, in a mixture that has some beside chats."""
    user: float = Field(default=0.0, ge=0)
    """What users say."""
    system: float = Field(default=0.0, ge=0)
    """System messages."""
    context: float = Field(default=0.0, ge=0)
    """Context given beside a question."""


class DropoutConfig(Strict):
    """Dropout of a stage; what is dropped depends on nothing but the recipe's seed and what it falls on."""

    hidden: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the outputs of attention and MLP, before each is added to the residual stream."""
    lima: bool = False
    """Let `hidden` rise linearly with depth: 0 in the first layer, `hidden` in the last (LIMA)."""
    embedding: float | None = Field(default=None, ge=0, lt=1)
    """Dropout of the embeddings; `hidden` by default, 0 with `lima`."""
    attention: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of attention probabilities. They have to be held in memory for it, heads · n² of them for a sample of
    n tokens, instead of never existing: slow and large for long samples."""

    @model_validator(mode="after")
    def _lima_is_of_something(self) -> Self:
        if self.lima and not self.hidden:
            raise ValueError("`lima` shapes `hidden`, which is 0")
        if self.lima and self.embedding:
            raise ValueError(f"with `lima` embeddings are not dropped, but `embedding` is {self.embedding}")
        return self


class ProbeConfig(Strict):
    """Small questions between training steps, to watch a run by; they change nothing of what is trained."""

    every: int = Field(gt=0)
    """Steps between probes; the last step has one too."""
    task: Literal["arc_challenge", "toy_world"] | None = None
    """Whose multiple-choice questions are asked, without examples."""
    data: str | None = None
    """Directory with the benchmark files, relative to the recipe (layout in docs/evaluate.md); `toy_world` has none."""
    questions: int = Field(default=64, gt=0)
    """How many, the first ones."""
    prompts: tuple[str, ...] = ()
    """What the model is asked to go on from; the answers stand in probes.jsonl."""
    max_new_tokens: int = Field(default=64, gt=0)
    """Longest answer to a prompt."""

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if self.task is None and not self.prompts:
            raise ValueError("give `task` or `prompts`")
        if (self.task == "arc_challenge") != (self.data is not None):
            raise ValueError("`data` is where the files of `arc_challenge` are: give both or neither")
        return self


class StageConfig(Strict):
    """One stage of training; a release has as many as it needs, each starting where the last ended."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the stage and of its model."""
    mixture: str
    """Mixture of the recipe's `data.mixtures` to learn from."""
    objective: Literal["sft", "lm"] = "sft"
    """`sft` learns what `learn` says (by default what assistants say); `lm` learns every token."""
    learn: Learn = Learn()
    """Weights of the loss by speaker, for `sft`."""
    init_from: str | None = None
    """Stage to start from; the one before by default, the base for the first."""
    adapter: AdapterConfig | None = None
    """Train a low-rank update (LoRA, QLoRA) and not the weights. The stage's model is the merged one, the adapter
    stands beside it in `adapter/`."""

    sequence: int = Field(default=4096, ge=8)
    """Tokens of a packed row."""
    overlong: Overlong | None = None
    """What happens to a sample longer than `sequence`: `error` (the default for sft), `drop`, `truncate`,
    or `split` (the default for lm: every token of a text stays a target; chats are cut before a user's turn, and a
    turn that is longer by itself loses its end). All of it is counted."""
    batch: int = Field(default=64, gt=0)
    """Packed rows of a step, over all devices and accumulation steps."""
    batch_tokens: int | None = Field(default=None, gt=0)
    """Tokens of a step instead of `batch`: as many rows of `sequence` as fit into them."""
    batch_samples: int | None = Field(default=None, gt=0)
    """Samples of a step instead of `batch`, packed into as many rows as they need (the pieces of a split sample count
    as samples). Steps then differ in tokens; `epochs` count samples, as trainers that pad each to a row do."""

    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; or give `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the mixture; or give `steps`."""

    lr: float = Field(default=1e-5, gt=0)
    """Highest learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end."""
    warmup: int = Field(default=0, ge=0)
    """Steps of linear rise from 0."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "wsd_sqrt"] = "cosine"
    """How the learning rate falls from `lr` to `min_lr`: `wsd` stays at `lr` and falls at the end only, linearly,
    `wsd_sqrt` as 1 − √x."""
    decay: float | None = Field(default=None, gt=0)
    """Steps at the end in which `wsd` and `wsd_sqrt` fall, or, below 1, their share of the stage; 0.2 by default."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; norms and biases are left out."""
    weight_decay_embeddings: bool = True
    """Whether the embedding decays (a tied head is the embedding)."""
    optimizer: Literal["fresh", "keep"] = "fresh"
    """`keep` goes on with the moments of the stage it starts from, which has to say `export_optimizer: true`; none of
    the two has an `adapter`."""
    clip: float = Field(default=1.0, ge=0)
    """Largest gradient norm; 0 does not clip."""
    dropout: DropoutConfig = DropoutConfig()
    """What is dropped while training; nothing by default."""
    neftune: float = Field(default=0.0, ge=0)
    """α of NEFTune: uniform noise of at most α / √(tokens of the sample · width) on embeddings; 0 adds none."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log of the softmax's denominator in the loss, which keeps logits small (1e-4 in PaLM);
    the training loss then contains it, the validation loss does not."""

    eval_every: int = Field(default=0, ge=0)
    """Steps between validations on the mixture's validation split; 0 validates at the end only."""
    probe: ProbeConfig | None = None
    """Questions that are asked while the stage trains."""
    save_every: int = Field(default=200, gt=0)
    """Steps between checkpoints to resume from."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints that are kept while the stage is trained, the last ones; afterwards none is."""
    keep_best: bool = False
    """Also save at each validation (`eval_every`) that is the best so far, and keep the best beside the last ones."""
    export_best: bool = False
    """The stage's model is the checkpoint with the lowest validation loss rather than the last; needs `eval_every`."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the products; `auto` is float32 on CPU and bfloat16 on CUDA. Weights are float32."""
    export: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the exported weights."""
    export_optimizer: bool = False
    """Leave the optimizer's moments beside the model (8 bytes a parameter), for a stage that says `optimizer: keep`."""

    @model_validator(mode="after")
    def _rows_of_a_step(self) -> Self:
        rows = self.batch
        if self.batch_tokens is not None:
            rows = self.batch_tokens // self.sequence
            if not rows:
                raise ValueError(f"`batch_tokens` {self.batch_tokens} is less than one row of {self.sequence}")
        if self.batch_samples is not None:
            if self.batch_tokens is not None:
                raise ValueError("`batch_tokens` and `batch_samples` both say what a step takes: give one of them")
            rows = self.batch_samples  # at most: no sample takes more than a row
        if "batch" in self.model_fields_set and self.batch != rows:
            said = "batch_tokens" if self.batch_samples is None else "batch_samples"
            raise ValueError(f"`batch` says {self.batch} rows, `{said}` {rows}: give one of them")
        object.__setattr__(self, "batch", rows)  # pydantic's own way past `frozen`
        return self

    @model_validator(mode="after")
    def _decay_fits(self) -> Self:
        if self.decay is None:
            return self
        if not self.schedule.startswith("wsd"):
            raise ValueError(f"`decay` is for `schedule: wsd`, this one is `{self.schedule}`")
        if self.decay >= 1 and self.decay != int(self.decay):
            raise ValueError(f"`decay` {self.decay:g} is neither a whole number of steps nor a share below 1")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give `steps` or `epochs`, one of them")
        if self.min_lr > self.lr:
            raise ValueError(f"`min_lr` {self.min_lr} is above `lr` {self.lr}")
        if self.steps is not None and (problem := self.too_long(self.steps)):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        wanting = [name for name in ("keep_best", "export_best") if getattr(self, name)]
        if wanting and not self.eval_every:
            raise ValueError(f"`{wanting[0]}` needs `eval_every`: the validations among which the best is chosen")
        return self

    @property
    def keeps_best(self) -> bool:
        """Return whether the checkpoint with the lowest validation loss is kept."""
        return self.keep_best or self.export_best

    def decay_steps(self, steps: int) -> int:
        """Return in how many of its steps the learning rate falls at the end, for schedules that stay level first."""
        decay = 0.2 if self.decay is None else self.decay
        return max(1, round(decay * steps)) if decay < 1 else int(decay)

    def too_long(self, steps: int) -> str:
        """Return what does not fit into a number of steps, or nothing."""
        if self.warmup > steps:
            return f"`warmup: {self.warmup}` is longer than the stage, which has {steps} steps"
        if self.schedule.startswith("wsd") and self.warmup + self.decay_steps(steps) > steps:
            falls = self.decay_steps(steps)
            return f"`warmup: {self.warmup}` and {falls} steps of `decay` are longer than the stage, which has {steps}"
        return ""

    @property
    def policy(self) -> Overlong:
        """Return what happens to over-long samples."""
        return self.overlong or ("split" if self.objective == "lm" else "error")

    def rooted(self, directory: Path) -> Self:
        """Return it with paths that start from a directory."""
        if self.probe is None or self.probe.data is None:
            return self
        probe = self.probe.model_copy(update={"data": str(directory / self.probe.data)})
        return self.model_copy(update={"probe": probe})

    def decides(self) -> dict[str, object]:
        """Return what decides the trained weights: everything but how often we look and save, and what is kept.

        How often we look decides them where the best of what was seen is exported.
        """
        looking = set() if self.export_best else {"eval_every", "export_best"}
        return self.model_dump(mode="json", exclude={"name", "save_every", "keep", "keep_best", "probe"} | looking)

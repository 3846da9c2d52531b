"""How the work is spread over devices; never decides the result, so it stays outside every digest."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llamero.core.config import Strict

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]


class ParallelConfig(Strict):
    """The axes of the device mesh, and what saves memory; started by `torchrun` where there is more than one device.

    gpus = replicate · shard · tensor · pipeline.
    """

    gpus: int = Field(default=1, ge=1)
    """Devices (processes) in all."""
    replicate: int = Field(default=1, ge=1)
    """Whole copies of what the `shard` axis spreads (HSDP; plain data parallelism where `shard` is 1)."""
    shard: int | None = Field(default=None, ge=1)
    """Devices over which weights, gradients and optimizer are spread (FSDP2, like ZeRO 3), each with rows of its own;
    by default all that the other axes leave."""
    tensor: int = Field(default=1, ge=1)
    """Devices that share every matrix (tensor parallelism); keep it inside a node."""
    pipeline: int = Field(default=1, ge=1)
    """Devices that each have some of the layers."""
    ring: int = Field(default=1, ge=1)
    """Devices that share a sequence by ring attention; more than 1 comes with long context."""
    ulysses: int = Field(default=1, ge=1)
    """Devices that share a sequence by exchanging heads; more than 1 comes with long context."""

    sequence_parallel: bool = True
    """Under `tensor`, also spread the tokens of norms and residuals."""
    schedule: Schedule = "1f1b"
    """Order of forward and backward passes under `pipeline`."""
    stages_per_rank: int = Field(default=2, ge=2)
    """Pieces of the model that each pipeline rank has under `interleaved` and `zero-bubble`."""
    micro_batch: int = Field(default=0, ge=0)
    """Packed rows that go through the model at a time on a device; 0 takes its whole share of the batch (one row
    under `pipeline`). Changes memory, not the result."""

    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again rather than keeps: nothing; all but matrix products and attention; or
    whole layers."""
    zero: Literal[1, 2, 3] | None = None
    """What of a model `shard` spreads while a step goes through it in several micro-batches. 3 (the default): weights
    are fetched for every pass of a layer, gradients summed after every micro-batch; least memory. 2: weights are
    fetched once a step. 1 (the default under `pipeline`): gradients, too, stay whole until the last micro-batch and are
    summed once a step; least communication. Between steps all of it is spread. Under `pipeline` gradients always
    wait for the last micro-batch, so that 2 is not there."""
    offload: bool = False
    """Weights, gradients and optimizer rest in CPU memory (needs `shard` or `replicate` above 1)."""
    compile: bool = False
    """Compile each layer as a whole, once for all lengths of documents: attention is one operator in it, and only
    `dropout.attention`, which needs a loop over documents, breaks it in two. Changes speed, not the result; the first
    step takes a minute or more."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients are summed over devices."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` takes CUDA where there is one; with several processes each takes the one of its local rank."""
    save_in_background: bool = True
    """Train on while a checkpoint is written. It is copied to CPU memory first: 12 bytes a trained parameter, spread
    over the processes, that are held from the first save on. Without it training waits, and nothing is copied."""
    timeout: int = Field(default=600, ge=1)
    """Seconds after which a process that is not heard of ends the run, by name."""
    workers: int | None = Field(default=None, ge=1)
    """Processes that read and tokenize data; one per core where it is not stated."""

    @model_validator(mode="after")
    def _axes_fill_the_devices(self) -> Self:
        for name in ("ring", "ulysses"):
            if getattr(self, name) > 1:
                raise ValueError(f"`{name}` above 1 comes with long context")
        fixed = self.replicate * self.tensor * self.pipeline
        product = f"replicate {self.replicate} × tensor {self.tensor} × pipeline {self.pipeline}"
        if self.gpus % fixed:
            raise ValueError(f"{product} does not divide `gpus: {self.gpus}`; a multiple of {fixed} would do")
        if fixed * self.sharded != self.gpus:
            fit = self.gpus // fixed
            raise ValueError(f"{product} × shard {self.sharded} is not `gpus: {self.gpus}`; `shard: {fit}` would do")
        if self.zero == 2 and self.pipeline > 1:
            raise ValueError("`zero: 2` sums gradients after every micro-batch, a pipeline after the last: say 1 or 3")
        if self.offload and self.data == 1:
            raise ValueError("`offload` works on what `shard` or `replicate` spreads, and both are 1")
        return self

    @property
    def sharded(self) -> int:
        """Return the size of the shard axis."""
        return self.shard or max(1, self.gpus // (self.replicate * self.tensor * self.pipeline))

    @property
    def zero_stage(self) -> int:
        """Return how much of a model is spread during a step: 3 all of it, 2 not its weights, 1 nor its gradients."""
        return self.zero or (1 if self.pipeline > 1 else 3)

    @property
    def data(self) -> int:
        """Return how many devices have rows of their own."""
        return self.replicate * self.sharded

    @property
    def pieces(self) -> int:
        """Return how many pieces the layers are cut into."""
        several = self.pipeline > 1 and self.schedule in ("interleaved", "zero-bubble")
        return self.pipeline * (self.stages_per_rank if several else 1)

    def share(self, batch: int) -> tuple[int, int]:
        """Return how many micro-batches a device takes of a step of `batch` rows, and the rows of each."""
        rows = -(-batch // self.data)
        size = min(rows, self.micro_batch or (1 if self.pipeline > 1 else rows))
        count = -(-rows // size)
        if self.pieces > self.pipeline:  # these schedules go round in groups
            count = -(-count // self.pipeline) * self.pipeline
        return count, size

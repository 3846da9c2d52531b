"""What a layout makes of a model: whether it can have it at all, and which layers go where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from llamero.core.errors import LlameroError

if TYPE_CHECKING:
    from llamero.parallel.config import ParallelConfig


class Shape(Protocol):
    """What must be known of a model; its `LlamaConfig` has all of it."""

    @property
    def hidden_size(self) -> int: ...  # noqa: D102
    @property
    def intermediate_size(self) -> int: ...  # noqa: D102
    @property
    def num_layers(self) -> int: ...  # noqa: D102
    @property
    def num_heads(self) -> int: ...  # noqa: D102
    @property
    def num_kv_heads(self) -> int: ...  # noqa: D102
    @property
    def vocab_size(self) -> int: ...  # noqa: D102


def refuse_impossible(parallel: ParallelConfig, config: Shape, *, batch: int) -> None:
    """Refuse a layout that does not fit a model or its batch, and name the sizes that would.

    Args:
        parallel: The layout.
        config: The model.
        batch: Rows of a step.
    """
    for what, number in (
        ("attention heads", config.num_heads),
        ("key/value heads", config.num_kv_heads),
        ("MLP channels", config.intermediate_size),
    ):
        if number % parallel.tensor:
            raise _refused("tensor", parallel.tensor, f"does not divide the {number} {what}", _divisors(config))
    if parallel.tensor > config.vocab_size:
        raise _refused("tensor", parallel.tensor, f"is more than the {config.vocab_size} tokens", _divisors(config))
    if parallel.tensor > 1 and config.hidden_size % parallel.sharded:
        fit = [size for size in range(1, 1025) if config.hidden_size % size == 0]
        raise _refused("shard", parallel.sharded, f"does not divide the width of {config.hidden_size}", fit)
    if batch < parallel.data:
        raise LlameroError(
            f"a batch of {batch} rows leaves {parallel.data - batch} of the {parallel.data} devices of `shard` and "
            "`replicate` without one",
            where="parallel",
            fix=f"a `batch` of at least {parallel.data} rows, or fewer devices there",
        )
    _refuse_pipeline(parallel, config, batch)


def _refuse_pipeline(parallel: ParallelConfig, config: Shape, batch: int) -> None:
    if parallel.pipeline == 1:
        return
    if parallel.pieces > config.num_layers:
        per_rank = parallel.pieces // parallel.pipeline
        fit = range(1, config.num_layers // per_rank + 1)
        problem = f"makes {parallel.pieces} pieces of {config.num_layers} layers (schedule {parallel.schedule})"
        raise _refused("pipeline", parallel.pipeline, problem, list(fit))
    count, size = parallel.share(batch)
    if count < parallel.pieces:
        raise LlameroError(
            f"a batch of {batch} rows is {count} micro-batches of {size} on a device, and the pipeline has "
            f"{parallel.pieces} pieces to keep busy",
            where="parallel.pipeline",
            fix=f"`batch` of at least {parallel.pieces * parallel.data} with `micro_batch: 1`, or a shorter pipeline",
        )


def _divisors(config: Shape) -> list[int]:
    numbers = (config.num_heads, config.num_kv_heads, config.intermediate_size)
    return [size for size in range(1, config.num_kv_heads + 1) if not any(number % size for number in numbers)]


def _refused(axis: str, size: int, problem: str, fit: list[int]) -> LlameroError:
    said = ", ".join(map(str, fit)) or "no other size"
    return LlameroError(f"`{axis}: {size}` {problem}", where="parallel", fix=f"`{axis}:` one of {said}")


def layers_of(piece: int, *, pieces: int, layers: int) -> range:
    """Return the layers of one piece; where they do not come out even the last pieces, which also have the head, or
    the first, which has the embedding, have fewer.
    """
    few, more = divmod(layers, pieces)
    first = (pieces - more) // 2  # the larger pieces lie in the middle
    sizes = [few + (first <= number < first + more) for number in range(pieces)]
    start = sum(sizes[:piece])
    return range(start, start + sizes[piece])

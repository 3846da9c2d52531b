"""One walk through a model, layer by layer, that records what flows into its linear layers.

One decoder layer is in memory at a time. Sequences go through it in groups whose make-up depends on nothing but the
sequences; groups run side by side, each in a thread that computes alone, and what they find is summed exactly
(`statistics`). So the same model, text and dtype give the same bytes, whatever the number of threads, and of processes:
these have groups of their own, and add up what they find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import local

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llamero.checkpoint import hf
from llamero.core import progress
from llamero.core.errors import LlameroError
from llamero.model.attention import Documents
from llamero.model.config import LlamaConfig
from llamero.model.device import one_thread
from llamero.model.layered import Layered
from llamero.model.llama import Block, RMSNorm
from llamero.model.load import empty_model, load_block
from llamero.parallel.config import ParallelConfig
from llamero.parallel.world import World
from llamero.quantize.agreed import AgreedSums, added_up
from llamero.quantize.statistics import INPUTS, Channels, Statistics, largest
from llamero.quantize.waiting import KeptWaiting, Waiting

GROUP_TOKENS = 2048
"""Sequences go through a layer together until they have this many tokens."""

PASS_BYTES = 12 << 30
"""Bytes that text takes on its way through a layer, with the layer and the sums; threads are fewer where it is more."""

UNQUANTIZED = ""
"""The stream of activations that no quantized weight has touched."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer that has been run, and what flowed into its linear layers."""

    number: int
    block: Block
    """The layer as it is stored."""
    statistics: dict[str, Statistics]
    """By the keys of `INPUTS`."""
    stream: str = UNQUANTIZED
    """Which activations these are."""
    weights: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """To be filled in for any stream but the unquantized one: what makes the parameters with which it flows on, by
    their names in the layer; those that are not here stay as they are."""


@dataclass(frozen=True)
class Group:
    """Sequences that go through a layer together."""

    start: int
    """Number of the first."""
    layout: Documents
    rotation: Float[Tensor, "tokens half 2"]

    def sequence(self, token: int) -> int:
        """Return the number of the sequence that a token is in."""
        ends = torch.tensor(self.layout.lengths).cumsum(0)
        return self.start + int((ends <= token).sum())


class Walk:
    """A way through a model: iterate over its layers, once, and `heads` are known at the end.

    Args:
        directory: Model directory.
        config: Its shape.
        tokens: Sequences; they do not see each other.
        dtype: To compute in: float32 or bfloat16.
        world: The processes that share the work; all of them walk. Without it this one is alone, on the CPU.
        streams: Names of the activations to follow. Each layer is seen once for each of them; all but `UNQUANTIZED`
            flow on through the `weights` that whoever iterates puts into a layer.
        waiting: Makes what holds the activations of a stream, of its name, the tokens of each group, their width and
            dtype; perhaps those of an earlier walk, which is then gone on with. Without it they are in memory.
    """

    def __init__(
        self,
        directory: Path,
        config: LlamaConfig,
        tokens: Sequence[Int[Tensor, " time"]],
        *,
        dtype: torch.dtype = torch.float32,
        world: World | None = None,
        streams: Sequence[str] = (UNQUANTIZED,),
        waiting: Callable[[str, list[int], int, torch.dtype], Waiting | KeptWaiting] = Waiting,
    ) -> None:
        check_tokens(tokens, config)
        self.heads: dict[str, Channels] = {}
        """What flowed into the head, by the names of the streams."""
        self.world = alone() if world is None else world
        self._config, self._tokens = config, tokens
        self.device = device = self.world.device
        self._model = Layered(directory, dtype=dtype, device=device)  # anything missing is said before the work begins
        self._tensors = hf.open_tensors(directory)
        self._groups = _groups(config, tokens, self.device)
        self._mine = range(self.world.rank, len(self._groups), self.world.size)
        lengths = [sum(group.layout.lengths) for group in self._groups]
        self._streams = {name: waiting(name, lengths, config.hidden_size, dtype) for name in streams}

    @property
    def first(self) -> int:
        """Return the first layer that is to be run."""
        return min(waiting.layer or 0 for waiting in self._streams.values())

    def restart(self) -> None:
        """Forget an earlier walk."""
        for waiting in self._streams.values():
            waiting.layer = None

    def __iter__(self) -> Iterator[Layer]:
        """Yield decoder layer after decoder layer with its statistics, for each stream in turn."""
        self._embed()
        layers = range(self.first, self._config.num_layers)
        for number in progress.track(layers, "calibrate and solve", unit="layers"):
            for name, waiting in self._streams.items():
                if waiting.layer != number:
                    continue  # it went on before the walk was cut off
                statistics = self._observe(number, waiting, flows_on=name == UNQUANTIZED)
                block = load_block(self._config, self._tensors, number, dtype=None, device=self.device)
                layer = Layer(number, block, statistics, name)
                del statistics, block
                yield layer
                weights = layer.weights
                del layer  # before the next one is read, not after
                if name != UNQUANTIZED:
                    self._flow_on(number, waiting, weights)
                self._turn(waiting)
        for name, waiting in self._streams.items():
            self.heads[name] = self._end(waiting)

    def _embed(self) -> None:
        begun = [waiting for waiting in self._streams.values() if waiting.layer is None]
        with self.world.together(), self._model.embedding() as lookup, torch.no_grad():
            for waiting in begun:
                for number in self._mine:
                    group = self._groups[number]
                    stop = group.start + len(group.layout.lengths)
                    ids = torch.cat([ids.long() for ids in self._tokens[group.start : stop]])
                    waiting[number] = lookup.model.embed_tokens(ids.to(self.device)).to("cpu", self._model.dtype)
        for waiting in begun:
            self._turn(waiting)

    def _turn(self, waiting: Waiting | KeptWaiting) -> None:
        """Go on to the next layer; what comes before this one may be written over only when that is noted."""
        with self.world.together():
            waiting.sync()
        with self.world.together():
            waiting.turn()

    def _observe(self, number: int, waiting: Waiting | KeptWaiting, *, flows_on: bool) -> dict[str, Statistics]:
        """Send everything through a layer and return what flowed into its linear layers.

        Args:
            number: Of the layer.
            waiting: The activations before it.
            flows_on: Whether they become those after it.
        """
        recorders = {name: self._recorder(f"model.layers.{number}.{name}") for name in INPUTS}
        sums = [recorder.sums for recorder in recorders.values()]
        with added_up(self.world, sums), self._model.layer(number) as block, ExitStack() as hooks:
            for name, recorder in recorders.items():
                hook = block.get_submodule(name).register_forward_pre_hook(recorder.hook)
                hooks.callback(hook.remove)
            self._run(block, waiting, flows_on=flows_on)
        return {name: recorder.sums.sums.statistics(recorder.where) for name, recorder in recorders.items()}

    def _recorder(self, where: str, *, products: bool = True) -> _Recorder:
        return _Recorder(where, AgreedSums(where, len(self._groups), self.world, products=products))

    def _flow_on(self, number: int, waiting: Waiting | KeptWaiting, weights: dict[str, Callable[[], Tensor]]) -> None:
        if not weights:
            raise ValueError(f"layer {number} was given no weights to flow on through")
        with self._model.layer(number) as block:
            for name, make in weights.items():
                block.get_parameter(name).data.copy_(make())
            weights.clear()
            with self.world.together():
                self._run(block, waiting, flows_on=True)

    def _run(self, block: Block, waiting: Waiting | KeptWaiting, *, flows_on: bool) -> None:
        @torch.no_grad()
        def one(number: int) -> None:
            group = _current.group = self._groups[number]
            x = block(waiting[number].to(self.device), group.rotation, group.layout)
            if flows_on:
                waiting[number] = x

        self._for_all(one)

    def _end(self, waiting: Waiting | KeptWaiting) -> Channels:
        """Return what flows into the head."""
        norm = RMSNorm(self._config.hidden_size, self._config.rms_norm_eps)
        norm.weight.data = self._tensors["model.norm.weight"].to(self.device, self._model.dtype)
        recorder = self._recorder("lm_head", products=False)

        @torch.no_grad()
        def one(number: int) -> None:
            _current.group = self._groups[number]
            recorder.record(norm(waiting[number].to(self.device)))

        with added_up(self.world, [recorder.sums]):
            self._for_all(one)
        return recorder.sums.sums.channels(recorder.where)

    def _for_all(self, one: Callable[[int], None]) -> None:
        """Call a function for every group of this process, for the first of them before the others."""
        if not self._mine:
            return
        threads = 1
        if self.device.type == "cpu":
            room = PASS_BYTES - resting(self._config, self._model.dtype.itemsize)
            a_group = max(sum(group.layout.lengths) for group in self._groups)
            a_group = passing(self._config, a_group, self._model.dtype.itemsize)
            threads = min(torch.get_num_threads(), max(1, room // a_group))
        with one_thread():
            one(self._mine[0])
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                done = [pool.submit(one, number) for number in self._mine[1:]]
                try:
                    for each in done:
                        each.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise


_current = local()
"""The group that a thread is at."""


class _Recorder:
    """Takes in what flows into one linear layer."""

    def __init__(self, where: str, sums: AgreedSums) -> None:
        self.where, self.sums = where, sums

    def hook(self, _: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        """Take in what flows into a layer."""
        self.record(args[0])

    def record(self, x: Float[Tensor, "tokens d"]) -> None:
        """Take in the inputs of a group, or name the layer and the sequence whose inputs are not numbers."""
        if not bool(largest(x).isfinite().all()):
            token = int((~x.isfinite().all(1)).nonzero()[0])
            raise LlameroError(
                f"its inputs on the calibration text are not all finite, first in sequence "
                f"{_current.group.sequence(token)}",
                where=self.where,
                fix="see whether the model itself works; its weights may be broken",
            )
        self.sums.add(x)


def alone() -> World:
    """Return a process that is alone and computes on the CPU."""
    return World(ParallelConfig(device="cpu"))


def _groups(config: LlamaConfig, tokens: Sequence[Int[Tensor, " time"]], device: torch.device) -> list[Group]:
    """Return neighbouring sequences that have `GROUP_TOKENS` together; only the last group may have fewer."""
    model, rotations = empty_model(config), {}
    groups: list[Group] = []
    lengths: list[int] = []
    start = 0
    for number, ids in enumerate(tokens):
        lengths.append(len(ids))
        if sum(lengths) >= GROUP_TOKENS or number == len(tokens) - 1:
            layout = Documents(tuple(lengths))
            if layout.lengths not in rotations:
                rotations[layout.lengths] = model.document_rotation(layout, device)
            groups.append(Group(start, layout, rotations[layout.lengths]))
            start, lengths = number + 1, []
    return groups


def passing(config: LlamaConfig, tokens: int, itemsize: int) -> int:
    """Return about how many bytes a group takes while it goes through a layer.

    Args:
        config: Shape of the model.
        tokens: Of the group.
        itemsize: Bytes of a number in the forward pass.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    return tokens * ((3 * hidden + 3 * inner) * itemsize + 3 * 4 * inner)


def resting(config: LlamaConfig, itemsize: int) -> int:
    """Return how many bytes a layer and the sums of its statistics take, with what is expected of them in bfloat16."""
    sums = sum(moments(config))
    return weights(config) * itemsize + sums + (sums // 4 if itemsize == 2 else 0)


def weights(config: LlamaConfig) -> int:
    """Return the number of weights of a layer's linear layers."""
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    return 2 * hidden * heads + 2 * hidden * config.num_kv_heads * config.head_dim + 3 * hidden * inner


def moments(config: LlamaConfig) -> list[int]:
    """Return the bytes of each second moment of a layer, or of its sums: half of it in float64."""
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    return [4 * width**2 for width in (hidden, heads, hidden, inner)]


def check_tokens(tokens: Sequence[Int[Tensor, " time"]], config: LlamaConfig) -> None:
    """Refuse sequences that the model cannot read."""
    if not tokens or any(len(ids) == 0 for ids in tokens):
        raise LlameroError("no calibration tokens, or a sequence without any", fix="give text to calibrate on")
    longest = max(len(ids) for ids in tokens)
    if longest > config.max_position_embeddings:
        raise LlameroError(
            f"calibration sequences of {longest} tokens, the model reads {config.max_position_embeddings}",
            fix=f"set `calibration.sequence` to at most {config.max_position_embeddings}",
        )
    low, high = min(int(ids.min()) for ids in tokens), max(int(ids.max()) for ids in tokens)
    if low < 0 or high >= config.vocab_size:
        raise LlameroError(
            f"calibration tokens {low} to {high}, the model's vocabulary has {config.vocab_size}",
            fix="tokenize with the tokenizer of this model",
        )

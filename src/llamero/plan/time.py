"""Seconds of a training step under a layout on a cluster, from what is computed, moved in memory and sent.

Matrix products and attention are counted in operations, all else in bytes; each is divided by what devices reach
(`Efficiency`). What is sent while something else is computed costs only what sticks out. The parts of one layer are put
together over layers, micro-batches and the order of the pipeline's own schedule (`order`).

Counts: Narayanan et al. 2021 (arXiv:2104.04473, appendix) and Korthikanti et al. 2022 (arXiv:2205.05198, section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from llamero.core.errors import LlameroError
from llamero.parallel.layout import layers_of
from llamero.plan.cluster import Cluster, Group
from llamero.plan.order import Durations, seconds

if TYPE_CHECKING:
    from llamero.core.hardware import Accelerator, Arithmetic
    from llamero.model.config import LlamaConfig
    from llamero.parallel.config import ParallelConfig, Schedule


_WIDTH = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 2}
"""Bytes of an activation; with fp8 only what goes into a product has one byte."""


@dataclass(frozen=True)
class Efficiency:
    """What devices reach, as a share of what they could.

    Those above the line are published of kernels by themselves. Those below are fitted to training runs of 8B models
    (`published.fit`), and say what a whole step makes of them.
    """

    product: float = 0.8
    """Of the peak, in large products of matrices in 16 or 32 bits: 80 to 90 % on H100 (Shah et al. 2024,
    arXiv:2407.08608). What a product reads and writes comes on top, so that small ones reach less."""
    attention: float = 0.6
    """Of the peak, in FlashAttention-2's forward pass up to A100: 50 to 73 % (Dao 2023, arXiv:2307.08691)."""
    attention_hopper: float = 0.35
    """The same from H100 on, whose own instructions it does not use (Shah et al. 2024, arXiv:2407.08608)."""
    attention_backward: float = 0.86
    """Of that, in its backward pass: up to 63 % where forward reaches 73 (Dao 2023)."""
    memory: float = 0.85
    """Of the memory's bandwidth, in long copies and sums."""
    contention: float = 0.15
    """What an exchange costs that is hidden behind computing, as a share of its time: NCCL's kernels take about 20 of
    an H100's 132 multiprocessors."""

    # ----

    sustained: float = 0.756
    """What a step sustains of what its kernels reach alone: clocks, gaps between kernels, waiting for the slowest."""
    product_8: float = 0.882
    """Of the peak, in large products in 8 bits."""
    eager: float = 2.98
    """How much more often everything but products and attention passes through memory where it is not compiled."""
    link: float = 0.909
    """Of the bandwidth inside a node that collectives reach."""
    network: float = 0.347
    """Of the network's, with all that goes slower over many nodes."""
    hidden: float = 0.41
    """Share of tensor parallelism's exchanges that asynchronous tensor parallelism hides behind products."""


LATENCY = 2e-5
"""Seconds until a collective starts."""
HOST_GB_S = 25.0
"""Between a device and the memory of its host (PCIe 4.0 × 16, in one direction)."""
_HOPPER_TFLOPS = 700
"""Peak in bf16 above which a device is one of those that FlashAttention-2 was not written for."""


@dataclass(frozen=True)
class Layout:
    """How a step is spread: what `parallel:` says, and what only other trainers have."""

    replicate: int = 1
    shard: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1
    pipeline: int = 1
    schedule: Schedule = "1f1b"
    pieces: int = 1
    """Pieces that the layers are cut into."""
    micros: int = 1
    """Micro-batches of a step on each device."""
    rows: int = 1
    """Rows of a micro-batch."""
    sequence_parallel: bool = True
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    offload: bool = False
    gather_bytes: int = 2
    """Of a parameter, when FSDP gathers it."""
    reduce_bytes: int = 4
    """Of a gradient, when FSDP sums it."""
    residual_bytes: int = 4
    """Of a number of the residual stream, in which norms and what comes out of them are."""
    zero: int = 3
    """3: FSDP gathers weights for every pass and sums gradients after every micro-batch; 2: gathers once a step; 1:
    sums once as well."""
    hides_tensor: bool = False
    """Asynchronous tensor parallelism."""

    @property
    def gpus(self) -> int:
        """Return how many devices it takes."""
        return self.replicate * self.fsdp * self.tensor * self.pipeline

    @property
    def fsdp(self) -> int:
        """Return over how many devices FSDP spreads weights."""
        return self.shard * self.ring * self.ulysses

    @classmethod
    def of(cls, parallel: ParallelConfig, batch: int) -> Layout:
        """Return the layout of a recipe's `parallel:` for a step of `batch` rows."""
        micros, rows = parallel.share(batch)
        return cls(
            replicate=parallel.replicate,
            shard=parallel.sharded,
            ring=parallel.ring,
            ulysses=parallel.ulysses,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            schedule=parallel.schedule,
            pieces=parallel.pieces,
            micros=micros,
            rows=rows,
            sequence_parallel=parallel.sequence_parallel,
            recompute=parallel.recompute,
            compile=parallel.compile,
            offload=parallel.offload,
            reduce_bytes=4 if parallel.reduce_dtype == "float32" else 2,
            zero=parallel.zero_stage,
        )


@dataclass(frozen=True)
class Work:
    """What a step computes.

    Args:
        config: The model.
        sequence: Tokens of a row.
        attended: Tokens that a token sees on average; half a row by default, one document to a row.
        learned: Share of tokens whose next one is learned; only these go through the head.
        precision: Of products.
        frozen: Whether the weights are, and only an adapter is trained.
    """

    config: LlamaConfig
    sequence: int
    attended: float | None = None
    learned: float = 1.0
    precision: Arithmetic = "bf16"
    frozen: bool = False

    @property
    def keys(self) -> float:
        """Return how many tokens a token sees on average."""
        return (self.sequence + 1) / 2 if self.attended is None else self.attended

    def flops(self, tokens: float) -> float:
        """Return the operations that some tokens need, forward and backward, without what is computed again.

        6 for each weight in a product (Kaplan et al. 2020, arXiv:2001.08361), the head's for tokens that are learned;
        12 · layers · width for each token that is seen, of which causal attention sees half (Chowdhery et al. 2022,
        arXiv:2204.02311, appendix B, counts all).
        """
        config = self.config
        products = config.num_layers * layer_weights(config) + self.learned * config.vocab_size * config.hidden_size
        seen = config.num_layers * config.num_heads * config.head_dim * self.keys
        return tokens * ((4 if self.frozen else 6) * products + 12 * seen)


@dataclass(frozen=True)
class Parts:
    """Seconds of a step by what they are spent on."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    """Norms, activations, rotations, sums: all that reads and writes more than it computes."""
    head: float = 0.0
    """Embedding, head and loss."""
    recomputed: float = 0.0
    """What the backward pass computes again."""
    tensor: float = 0.0
    """Exchanges of tensor parallelism."""
    context: float = 0.0
    """Exchanges of ring and Ulysses, and putting blocks of a ring together."""
    data: float = 0.0
    """Gathering weights and summing gradients, as far as nothing hides it."""
    bubble: float = 0.0
    """Waiting in the pipeline."""
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """Return the sum."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Parts) -> Parts:
        """Return the sum, part by part."""
        return Parts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, times: float) -> Parts:
        """Return a multiple."""
        return Parts(*(getattr(self, field.name) * times for field in fields(self)))


def layer_weights(config: LlamaConfig) -> int:
    """Return how many weights the products of a layer have."""
    inner, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return config.hidden_size * (2 * inner + 2 * kv + 3 * config.intermediate_size)


def step_time(work: Work, layout: Layout, cluster: Cluster, reached: Efficiency | None = None) -> Parts:
    """Return the seconds of a step.

    Args:
        work: What is computed.
        layout: How it is spread.
        cluster: On what.
        reached: What devices reach; as fitted by default.

    Raises:
        LlameroError: If the layout takes other than the cluster's devices, or they cannot compute in this precision.
    """
    if layout.gpus != cluster.gpus:
        raise LlameroError(f"the layout is for {layout.gpus} devices, the cluster has {cluster.gpus}")
    return _Step(work, layout, cluster, Efficiency() if reached is None else reached).parts()


class _Step:
    def __init__(self, work: Work, layout: Layout, cluster: Cluster, reached: Efficiency) -> None:
        self.work, self.layout, self.cluster, self.reached = work, layout, cluster, reached
        self.config = work.config
        self.width = _WIDTH[work.precision]
        self.tokens = layout.rows * work.sequence / (layout.ring * layout.ulysses)
        """Of a micro-batch, on the devices that share matrices."""
        on_one = layout.tensor if layout.sequence_parallel else 1
        self.own = self.tokens / on_one
        """Of those the tokens whose residuals and norms one device has."""
        self.passes = cluster.accelerator.bandwidth_gb_s * 1e9 * reached.memory * reached.sustained
        """Bytes a second to and from memory."""
        self.traffic = 1.0 if layout.compile else reached.eager
        t = layout.tensor
        self.over_tensor = Group(t, 1)
        self.over_ulysses, self.over_ring = Group(layout.ulysses, t), Group(layout.ring, t * layout.ulysses)
        self.over_fsdp = Group(layout.fsdp, t)
        self.over_copies = Group(layout.replicate, t * layout.fsdp)

    # -- what a device computes and moves

    def _peak(self, precision: str) -> float:
        return peak(self.cluster.accelerator, precision) * self.reached.sustained

    def _product(self, tokens: float, inputs: float, outputs: float, *, precision: str | None = None) -> float:
        """Return the seconds of a product of (tokens, inputs) with (inputs, outputs)."""
        precision = precision or self.work.precision
        share = self.reached.product_8 if precision == "fp8" else self.reached.product
        operand = 1 if precision == "fp8" else self.width
        moved = operand * (tokens * inputs + inputs * outputs) + self.width * tokens * outputs
        return 2 * tokens * inputs * outputs / (self._peak(precision) * share) + moved / self.passes

    def _products(self) -> float:
        """Return the seconds of a layer's products, forward."""
        c, t, n = self.config, self.layout.tensor, self.tokens
        inner, kv = c.num_heads * c.head_dim / t, c.num_kv_heads * c.head_dim / t
        into = self._product(n, c.hidden_size, inner) + 2 * self._product(n, c.hidden_size, kv)
        mlp = 2 * self._product(n, c.hidden_size, c.intermediate_size / t)
        out = self._product(n, inner, c.hidden_size) + self._product(n, c.intermediate_size / t, c.hidden_size)
        return into + mlp + out

    def _attention(self, *, backward: bool = False) -> float:
        """Return the seconds of a layer's attention; backward takes 5 products for 2."""
        c, device = self.config, self.cluster.accelerator
        flops = 4 * self.tokens * self.work.keys * c.num_heads * c.head_dim / self.layout.tensor
        precision = "fp32" if self.work.precision == "fp32" else "fp16" if "bf16" not in device.tflops else "bf16"
        r = self.reached
        share = r.attention_hopper if device.tflops.get("bf16", 0) > _HOPPER_TFLOPS else r.attention
        if backward:
            flops, share = 2.5 * flops, share * r.attention_backward
        return flops / (self._peak(precision) * share)

    def _memory(self, *, backward: bool = False) -> float:
        """Return the seconds of what reads and writes more than it computes, in a layer.

        Compiled: each of two norms with the sum before it reads two and writes two residuals, rotation reads and writes
        queries and keys, SwiGLU reads two and writes one; backward each of them reads also what went in.
        """
        c, t = self.config, self.layout.tensor
        heads = (c.num_heads + c.num_kv_heads) * c.head_dim / t
        mlp = c.intermediate_size / t
        residual, inner = (10, 2 * heads + 5 * mlp) if backward else (8, 2 * heads + 3 * mlp)
        moved = self.layout.residual_bytes * self.own * residual * c.hidden_size + self.width * self.tokens * inner
        return (moved * self.traffic + self._casts(backward=backward)) / self.passes

    def _casts(self, *, backward: bool) -> float:
        """Return the bytes of making 8-bit operands: reading once for the scale, once more to write one byte."""
        if self.work.precision != "fp8":
            return 0.0
        c, t = self.config, self.layout.tensor
        inner, kv, mlp = c.num_heads * c.head_dim / t, c.num_kv_heads * c.head_dim / t, c.intermediate_size / t
        if backward:  # gradients of outputs
            return 5 * (self.tokens * (inner + 2 * kv + 2 * mlp) + self.own * 2 * c.hidden_size)
        return 5 * (self.own * 5 * c.hidden_size + self.tokens * (inner + mlp))

    # -- what it exchanges

    def _rate(self, group: Group) -> float:
        return group.rate(self.cluster, link=self.reached.link, network=self.reached.network)

    def _collective(self, bytes: float, group: Group) -> float:
        """Return the seconds in which each device of a group gets, or sums, `bytes` that lie spread over them."""
        if group.size == 1:
            return 0.0
        return bytes * (group.size - 1) / group.size / self._rate(group) + LATENCY

    def _tensor(self, gathers: int, scatters: int, *, backward: bool = False) -> float:
        """Return the seconds of exchanging residuals: gathered before products, summed and scattered after."""
        whole = self.tokens * self.config.hidden_size
        normed = 1 if self.work.precision == "fp8" else self.layout.residual_bytes
        gathered, scattered = (self.width, self.layout.residual_bytes) if backward else (normed, self.width)
        one = gathers * self._collective(gathered * whole, self.over_tensor)
        one += scatters * self._collective(scattered * whole, self.over_tensor)
        return one * (1 - self.reached.hidden) if self.layout.hides_tensor else one

    def _context(self, *, backward: bool = False) -> float:
        """Return the seconds that sharing a sequence costs beside attention itself."""
        c, t, ring, ulysses = self.config, self.layout.tensor, self.layout.ring, self.layout.ulysses
        heads, kv = c.num_heads * c.head_dim / t, c.num_kv_heads * c.head_dim / t
        exchanged = 2 * self._collective(self.width * self.tokens * (heads + kv), self.over_ulysses)
        if ring == 1:
            return exchanged
        tokens, heads, kv = self.tokens * ulysses, heads / ulysses, kv / ulysses
        block = 2 * self.width * tokens * kv + (8 * tokens * kv if backward else 0)  # and gradients in fp32
        sent = block / self._rate(self.over_ring) + LATENCY
        # a block's result joins what is there, in fp32: read both, write one; on average three quarters of the rows
        joined = 0.75 * tokens * (12 * heads + (24 * kv if backward else 0)) / self.passes
        return exchanged + (ring - 1) * (self._beside(sent, self._attention(backward=backward) / ring) + joined)

    def _beside(self, sent: float, computed: float) -> float:
        """Return what an exchange costs while something is computed: what sticks out, and some of what does not."""
        return max(0.0, sent - computed) + self.reached.contention * min(sent, computed)

    # -- put together

    def _forward(self) -> Parts:
        """Return a layer's forward pass."""
        return Parts(
            products=self._products(),
            attention=self._attention(),
            memory=self._memory(),
            tensor=self._tensor(2, 2),
            context=self._context(),
        )

    def _backward(self) -> Parts:
        """Return a layer's backward pass but for gradients of weights, with what is recomputed for it."""
        again = 0.0
        if self.layout.recompute == "full":
            again = self._products() + self._attention() + self._memory() + self._context() + self._tensor(2, 1)
        elif self.layout.recompute == "selective":
            again = self._memory() + self._tensor(2, 1)
        return Parts(
            products=self._products(),
            attention=self._attention(backward=True),
            memory=self._memory(backward=True),
            recomputed=again,
            tensor=self._tensor(2, 2, backward=True),
            context=self._context(backward=True),
        )

    def _head(self) -> float:
        """Return a forward or backward pass's share of head and loss: three products, and reading logits over again."""
        c, t = self.config, self.layout.tensor
        n, rows = self.tokens * self.work.learned, c.vocab_size / t
        precision = "bf16" if self.work.precision == "fp8" else None
        logits = 24 * n * rows / self.passes
        gathered = 2 * self._collective(self.width * self.tokens * c.hidden_size, self.over_tensor)
        return (3 * self._product(n, c.hidden_size, rows, precision=precision) + logits + gathered) / 2

    def _embedding(self) -> float:
        return 4 * self.layout.residual_bytes * self.own * self.config.hidden_size / self.passes

    def _gathered(self, weights: float) -> float:
        return self._collective(weights / self.layout.tensor * self.layout.gather_bytes, self.over_fsdp)

    def _summed(self, weights: float) -> float:
        """Return the seconds of summing gradients over shards."""
        if self.work.frozen:
            return 0.0
        return self._collective(weights / self.layout.tensor * self.layout.reduce_bytes, self.over_fsdp)

    def _copies(self, weights: float) -> float:
        """Return the seconds of summing the shards of gradients over copies of the model."""
        if self.work.frozen:
            return 0.0
        layout = self.layout
        return 2 * self._collective(weights * layout.reduce_bytes / layout.tensor / layout.fsdp, self.over_copies)

    def _piece(self, number: int) -> tuple[Parts, Parts, Parts, Parts]:
        """Return a micro-batch's forward pass through a piece, its backward pass, gradients of weights; and what comes
        once a step.
        """
        pieces, layers, zero = self.layout.pieces, self.config.num_layers, self.layout.zero
        here = len(layers_of(number, pieces=pieces, layers=layers))
        forward, backward = self._forward(), self._backward()
        of_weights = Parts() if self.work.frozen else Parts(products=self._products())
        weights, behind = layer_weights(self.config), backward.total + of_weights.total
        gather = self._beside(self._gathered(weights), forward.total)
        gather_again = self._beside(self._gathered(weights), behind)
        add, copies = self._beside(self._summed(weights), behind), self._beside(self._copies(weights), behind)
        ends = (number == 0) + (number == pieces - 1)
        rows = self.config.vocab_size * self.config.hidden_size
        first, last = ends * self._gathered(rows), ends * self._summed(rows)  # nothing to hide them behind
        once = Parts(data=here * copies + ends * self._copies(rows) + (zero == 1) * (here * add + last))
        once += Parts(data=(zero < 3) * (here * gather + first))
        forward += Parts(data=(zero == 3) * gather + self._host(weights))
        backward += Parts(data=(zero == 3) * gather_again + (zero > 1) * add + self._host(weights))
        head = Parts(head=(number == 0) * self._embedding() + (number == pieces - 1) * self._head())
        return (
            forward * here + head + Parts(data=(zero == 3) * first + self._host(ends * rows)),
            backward * here + head + Parts(data=(zero > 1) * last + self._host(ends * rows)),
            of_weights * here,
            once,
        )

    def _host(self, weights: float) -> float:
        """Return the seconds of fetching a device's shard of weights from its host, or of bringing gradients there."""
        bytes = 4 * weights / self.layout.tensor / self.layout.fsdp
        return bytes / (HOST_GB_S * 1e9) if self.layout.offload else 0.0

    def _tied(self) -> float:
        """Return the seconds of summing the gradients of a tied table over both ends of a pipeline."""
        c, layout = self.config, self.layout
        if layout.pipeline == 1 or self.work.frozen or not c.tie_word_embeddings:
            return 0.0
        share = 4 * c.vocab_size * c.hidden_size / (layout.tensor * layout.fsdp)
        ends = Group(2, (layout.pipeline - 1) * layout.gpus // layout.pipeline)
        return 2 * self._collective(share, ends)

    def _optimizer(self) -> float:
        """Return the seconds of clipping and AdamW: 28 bytes a parameter read and written, gradients once more."""
        if self.work.frozen:
            return 0.0
        c, layout = self.config, self.layout
        weights = c.num_layers * layer_weights(c) / layout.pipeline
        ends = c.vocab_size * c.hidden_size * (1 if layout.pipeline > 1 else 2)
        moved = 36 * (weights + ends) / (layout.tensor * layout.fsdp)
        return moved / (HOST_GB_S * 1e9 if layout.offload else self.passes)

    def parts(self) -> Parts:
        """Return the seconds of the step, those of the busiest place of the pipeline."""
        layout = self.layout
        pieces = [self._piece(number) for number in range(layout.pieces)]
        last = Parts(optimizer=self._optimizer(), data=self._tied())
        if layout.pieces == 1:
            *passes, once = pieces[0]
            return sum(passes, start=Parts()) * layout.micros + once + last
        times = [Durations(*(part.total for part in passes)) for *passes, _ in pieces]
        over_pipeline = Group(layout.pipeline, layout.gpus // layout.pipeline)
        hop = layout.residual_bytes * self.own * self.config.hidden_size / self._rate(over_pipeline) + LATENCY
        whole, busy = seconds(layout.schedule, layout.pipeline, layout.micros, times, hop=hop)
        most = max(range(layout.pipeline), key=lambda rank: busy[rank])
        mine = [pieces[number] for number in range(most, layout.pieces, layout.pipeline)]
        passes = sum((part for *parts, _ in mine for part in parts), start=Parts()) * layout.micros
        return sum((once for *_, once in mine), start=passes) + Parts(bubble=whole - busy[most]) + last


def peak(accelerator: Accelerator, precision: str) -> float:
    """Return the operations a second that a device has in a precision.

    Raises:
        LlameroError: If it has none.
    """
    for kind, tflops in accelerator.tflops.items():
        if kind == precision:
            return tflops * 1e12
    has = ", ".join(accelerator.tflops)
    raise LlameroError(f"{accelerator.name} does not compute in {precision}", fix=f"it computes in {has}")

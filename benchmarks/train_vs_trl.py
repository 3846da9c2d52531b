"""How many tokens per CPU-second does training take in, against TRL's SFTTrainer with packing?

Both sides start from the same weights and see the same rows in the same order, so that every step must give
the same loss (the script fails if one differs by more than 1 %): synthetic documents of log-normal length,
about 55 % of their tokens supervised, packed once by best fit, longest first, which is TRL's `bfd` too. Same AdamW,
constant learning rate, clipping at 1, float32, one thread; a Llama of 6 layers, vocabulary 16,384.

TRL runs in its fastest setting that is right on a CPU: `packing_strategy="bfd"` (which turns on `padding_free`,
so that documents are told apart by position ids and sdpa gets a block-diagonal mask), `bf16=False`,
`gradient_checkpointing=False`, and one row at a time with gradient accumulation: a larger
`per_device_train_batch_size` joins its rows into one, whose mask is dense over all of them. `--defaults` adds its
own defaults (bfloat16 autocast, gradient checkpointing, padding), which are slower by far.

Measured: CPU time (user + system) of whole steps, each side in processes of its own, taking turns, of which the
fastest counts; tokens are those of the documents, never padding. The first step, imports, packing and loading
are left out.
Not measured: memory, several threads, GPUs.

    python benchmarks/train_vs_trl.py [--hidden 192 512] [--steps 3] [--repeat 2] [--defaults]
    python benchmarks/train_vs_trl.py --profile  # where llamero's time goes

On a GPU (`--device cuda --shape 1b`, or `8b-lora`) wall time counts instead, between moments at which the device has
nothing left to do; both sides keep float32 weights (`8b-lora`: a frozen bfloat16 base) and compute in bfloat16. TRL
has FlashAttention 2 where the flash-attn package is installed, else sdpa; the result says which. Beside it stand the
peak of memory that torch has handed out, and MFU: arithmetic that the model needs (matrix products forward and
backward, the head only where a token is learned, attention below the diagonal of each document; nothing computed
twice) over the dense bfloat16 peak of the device's data sheet.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import append, single_thread_environment
from torch.optim.optimizer import register_optimizer_step_post_hook

from llamero.core.hardware import of_device
from llamero.engine.batches import Batches
from llamero.engine.loop import train
from llamero.engine.stage import StageConfig
from llamero.model.adapter_config import AdapterConfig
from llamero.model.adapters import attach
from llamero.model.config import LlamaConfig
from llamero.model.llama import Llama, initialize
from llamero.model.load import load_model, save_model
from llamero.model.rope import Default
from llamero.parallel.config import ParallelConfig
from llamero.text.messages import SCAFFOLD, Role

VOCABULARY = 16384

Document = tuple[np.ndarray, np.ndarray]
"""Tokens, and the role of each."""


@dataclass(frozen=True)
class Shape:
    """A model, and how it is trained."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = VOCABULARY
    tied: bool = False
    lora: int = 0
    """Rank of the update; 0 trains the weights."""
    compile: bool = False
    recompute: bool = False
    """Whether both sides compute activations again in the backward pass."""

    def flops(self, documents: list[int], learned: int) -> float:
        """Return what a step over documents of these lengths needs, forward and backward."""
        inner, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = 2 * self.hidden * (inner + kv) + 3 * self.hidden * self.mlp
        products = self.layers * layer * sum(documents) + self.hidden * self.vocabulary * learned
        scores = self.layers * inner * sum(length**2 for length in documents)  # two products, half of each
        # forward, gradient of the input, and, where the weights are trained, theirs
        return 2 * products * (2 if self.lora else 3) + 2 * scores * 3


def narrow(hidden: int) -> Shape:
    """Return the shape that is measured on a CPU."""
    return Shape(hidden, hidden * 11 // 4, 6, hidden // 64, hidden // 64, 64)


SHAPES = {
    "tiny": Shape(64, 128, 2, 2, 1, 32, vocabulary=512),
    "tiny-lora": Shape(64, 128, 2, 2, 1, 32, vocabulary=512, lora=4),
    "1b": Shape(2048, 8192, 16, 32, 8, 64, vocabulary=128256, tied=True, compile=True),
    "8b-lora": Shape(4096, 14336, 32, 32, 8, 128, vocabulary=128256, lora=16, compile=True, recompute=True),
}
"""Models by name: those of Llama 3.2 1B and Llama 3 8B, and two for a test."""


@dataclass(frozen=True)
class Steps:
    """What one process measured, one number for each step that counts."""

    seconds: list[float]
    """CPU time, user and system; on CUDA wall time."""
    losses: list[float]
    tokens: list[int]
    """Of whole documents."""
    flops: list[float]
    """That the model needs."""
    memory: int = 0
    """Most bytes that were handed out on the device."""
    about: str = ""
    """How it was done, where it depends on what is installed."""

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens) / sum(self.seconds)


@dataclass(frozen=True)
class Work:
    """What all sides do."""

    sequence: int
    batch: int
    """Rows of a step."""
    steps: int
    """Steps that count, after one that does not."""
    seed: int
    shape: Shape
    device: str = "cpu"

    @property
    def stage(self) -> StageConfig:
        """The same as a stage of a recipe: one step to warm up, and one more whose begin ends the last that counts."""
        return StageConfig(
            name="benchmark",
            mixture="synthetic",
            sequence=self.sequence,
            batch=self.batch,
            steps=self.steps + 2,
            lr=1e-3,
            schedule="constant",
            clip=1.0,
            save_every=10**6,
            precision="auto",
            adapter=AdapterConfig(lora=self.shape.lora) if self.shape.lora else None,
        )

    @property
    def documents(self) -> int:
        """More than the steps take: a document has 250 tokens on average."""
        return self.stage.steps * self.batch * self.sequence // 200

    def batches(self) -> Batches:
        """Return the rows of all steps."""
        tokens, roles = self.drawn()
        return Batches(tokens, roles, self.stage, seed=self.seed, where="synthetic documents")

    def drawn(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return all documents."""
        return documents(self.documents, self.sequence, seed=self.seed, vocabulary=self.shape.vocabulary)

    def now(self) -> float:
        """Return seconds: of the processor, or, when the device has nothing left to do, of the wall."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def rows(self) -> list[list[Document]]:
        """Return the documents of every row, in the order in which the steps take them."""
        batches = self.batches()
        tokens, roles = self.drawn()
        rows = [batches.assemble([row]).documents for step in range(batches.steps) for row in batches.rows_of(step)]
        return [[(tokens[number], roles[number]) for number in numbers] for numbers in rows]


def documents(count: int, longest: int, *, seed: int, vocabulary: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return tokens and roles of chats: log-normal lengths, Zipf's words, one to three rounds."""
    random = np.random.default_rng(seed)
    rank = np.arange(1, vocabulary + 1)
    chance = 1 / rank / (1 / rank).sum()
    tokens, roles = [], []
    for length in np.clip(random.lognormal(np.log(180), 0.9, count), 16, longest).astype(int):
        tokens.append(random.choice(vocabulary, size=length, p=chance))
        said = np.empty(length, dtype=np.uint8)
        for turn in np.array_split(said, random.integers(1, 4)):
            answer = int(len(turn) * (1 - random.beta(4, 5)))
            turn[: len(turn) - answer] = Role.USER
            turn[len(turn) - answer :] = Role.ASSISTANT
            turn[:3] = Role.USER + SCAFFOLD
        roles.append(said)
    return tokens, roles


def fresh_model(work: Work, directory: Path) -> None:
    """Write the model that both sides start from."""
    shape = work.shape
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rope=Default(10000.0, shape.head_dim),
        max_position_embeddings=work.sequence,
        tie_word_embeddings=shape.tied,
        carried={"bos_token_id": 1, "eos_token_id": 2},
    )
    directory.mkdir()
    model = Llama(config)
    initialize(model, seed=work.seed)
    save_model(model, directory, dtype=torch.float32 if work.device == "cpu" else torch.bfloat16)


def llamero(directory: Path, work: Work) -> Steps:
    """Train with llamero."""
    shape, clock = work.shape, []
    parallel = ParallelConfig(
        device=work.device,
        compile=shape.compile and work.device == "cuda",
        micro_batch=0 if work.device == "cpu" else 1,
        recompute="selective" if shape.recompute else "none",
    )
    stage = work.stage
    with tempfile.TemporaryDirectory(dir=directory) as out:
        half = shape.lora and work.device == "cuda"
        model = load_model(directory / "model", dtype=torch.bfloat16 if half else torch.float32)
        if stage.adapter is not None:
            attach(model, stage.adapter, seed=work.seed)
        hook = register_optimizer_step_post_hook(lambda *_: clock.append(work.now()))
        train(model, work.batches(), stage, Path(out), parallel=parallel)
        hook.remove()
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    about = "compiled" if parallel.compile else ""
    rows = [as_trl(row) for row in work.rows()]
    # the end of the step before is the begin of a step: the first has none, so that one falls out at the front
    return measured([clock[0], *clock], [line["loss"] for line in lines], rows, work.batch, work=work, about=about)


def trl(directory: Path, work: Work) -> Steps:
    """Train with TRL on the same rows, in its best setting."""
    rows = [as_trl(row) for row in work.rows()]
    packing = {"packing": True, "packing_strategy": "bfd"}
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": work.batch}
    bf16, again = work.device == "cuda", work.shape.recompute
    return _sft(directory, work, rows, {**packing, **batch, "bf16": bf16, "gradient_checkpointing": again})


def trl_defaults(directory: Path, work: Work) -> Steps:
    """Train with TRL's own settings on the same documents, each a row that is padded to the longest of its step."""
    documents = [as_trl([document]) for row in work.rows() for document in row]
    return _sft(directory, work, documents, {"per_device_train_batch_size": len(documents) // work.stage.steps})


SIDES = {"llamero": llamero, "trl": trl, "trl_defaults": trl_defaults}


def as_trl(row: list[Document]) -> dict[str, list[int]]:
    """Return a row as TRL's own packing would write it."""
    tokens = np.concatenate([tokens for tokens, _ in row])
    roles = np.concatenate([roles for _, roles in row])
    labels = np.where(roles == Role.ASSISTANT, tokens, -100)
    return {"input_ids": tokens.tolist(), "labels": labels.tolist(), "seq_lengths": [len(tokens) for tokens, _ in row]}


def _sft(directory: Path, work: Work, rows: list[dict[str, list[int]]], settings: dict[str, Any]) -> Steps:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clock: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.append(work.now())

    stage = work.stage
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    config = SFTConfig(
        output_dir=str(directory / "trl"),
        max_length=work.sequence,
        max_steps=stage.steps,
        learning_rate=stage.lr,
        lr_scheduler_type="constant",
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        adam_epsilon=stage.eps,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.clip,
        dataset_kwargs={"skip_prepare_dataset": True},  # tokenized and packed already
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=work.device == "cpu",
        **settings,
    )
    shape = work.shape
    flash = work.device == "cuda" and find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    half = shape.lora and work.device == "cuda"
    adapter: dict[str, Any] = {}
    if shape.lora:
        if find_spec("peft") is None:
            raise SystemExit("TRL trains adapters with PEFT: pip install peft, or measure --alone")
        from peft import LoraConfig

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        alpha = AdapterConfig(lora=shape.lora).stated_alpha
        adapter["peft_config"] = LoraConfig(r=shape.lora, lora_alpha=alpha, target_modules=targets)
    trainer = SFTTrainer(
        model=LlamaForCausalLM.from_pretrained(
            directory / "model",
            attn_implementation=attention,
            dtype=torch.bfloat16 if half else torch.float32,
        ),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>"),
        callbacks=[Clock()],
        **adapter,
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return measured(clock, losses, rows, batch, work=work, about=attention)


def measured(
    clock: list[float], losses: list[float], rows: list[dict[str, list[int]]], batch: int, *, work: Work, about: str
) -> Steps:
    """Return what counts: all steps but the first, and the last, which only ends the one before.

    Args:
        clock: Seconds at the begin of every step.
        losses: Of every step.
        rows: Of all steps.
        batch: Rows of a step.
        work: What was done.
        about: How.
    """
    steps = [rows[step * batch : (step + 1) * batch] for step in range(len(losses))]
    tokens = [sum(len(row["input_ids"]) for row in step) for step in steps]
    lengths = [[length for row in step for length in row["seq_lengths"]] for step in steps]
    learned = [sum(label >= 0 for row in step for label in row["labels"]) for step in steps]
    flops = [work.shape.flops(*each) for each in zip(lengths, learned, strict=True)]
    memory = torch.cuda.max_memory_allocated() if work.device == "cuda" else 0
    return Steps(np.diff(clock)[1:].tolist()[: work.steps], losses[1:-1], tokens[1:-1], flops[1:-1], memory, about)


def alone(side: str, directory: Path, work: Work) -> Steps:
    """Return what one side measured in a process of its own."""
    out = directory / f"{side}.json"
    command = [
        sys.executable,
        __file__,
        "--side",
        side,
        "--directory",
        str(directory),
        "--work",
        json.dumps(asdict(work)),
    ]
    done = subprocess.run(command, env=single_thread_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return Steps(**json.loads(out.read_text()))


def compare(name: str, work: Work, sides: list[str], *, repeat: int) -> None:
    """Measure one shape, print its row and keep its results."""
    runs: dict[str, list[Steps]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        fresh_model(work, directory / "model")
        for _ in range(repeat):
            for side in sides:
                runs[side].append(alone(side, directory, work))
    speed = {side: max(run.tokens_per_second for run in of) for side, of in runs.items()}
    loss = {side: statistics.fmean(of[0].losses) for side, of in runs.items()}
    apart, ratio, theirs = 0.0, "–", "–"
    if "trl" in runs:
        apart = max(abs(a / b - 1) for a, b in zip(runs["llamero"][0].losses, runs["trl"][0].losses, strict=True))
        ratio, theirs = f"**{speed['llamero'] / speed['trl']:.2f}×**", f"{loss['trl']:.4f}"
    shown = {side: f"{value:,.0f}" for side, value in speed.items()}
    print(
        f"| {name} | {work.sequence} | {shown['llamero']} | {shown.get('trl', '–')} | {ratio} "
        f"| {shown.get('trl_defaults', '–')} | {loss['llamero']:.4f} | {theirs} | {apart:.4%} |",
        flush=True,
    )
    for side in sides:
        append(
            "train_vs_trl",
            value=round(speed[side], 1),
            unit="tokens per CPU-second" if work.device == "cpu" else "tokens per second",
            libraries=("trl", "transformers") if "trl" in runs else (),
            threads=1,
            side=side,
            **_seen(name, runs[side], work),
            ratio=round(speed["llamero"] / speed[side], 3),
            loss=round(loss[side], 5),
            repetitions=[round(run.tokens_per_second, 1) for run in runs[side]],
            **{key: value for key, value in asdict(work).items() if key not in ("shape", "device")},
        )
    if apart > 0.01:
        raise SystemExit(f"the losses of a step differ by {apart:.2%}: this is no fair comparison")


def _seen(name: str, runs: list[Steps], work: Work) -> dict[str, Any]:
    """Return what else is kept of one side."""
    if work.device == "cpu":
        return {"hidden": work.shape.hidden}
    kind = of_device(torch.cuda.get_device_name())
    found: dict[str, Any] = {"shape": name, "memory_gib": round(max(run.memory for run in runs) / 2**30, 2)}
    found["about"] = runs[0].about
    if kind is not None:
        best = max(sum(run.flops) / sum(run.seconds) for run in runs)
        found["mfu"] = round(best / (kind.tflops["bf16"] * 1e12), 4)
    print(f"  {runs[0].about}: {found}", flush=True)
    return found


def show_profile(work: Work) -> None:
    """Print where llamero's time goes."""
    with tempfile.TemporaryDirectory() as place:
        fresh_model(work, Path(place) / "model")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            llamero(Path(place), work)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=32, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description="Training speed beside TRL's SFTTrainer.")
    parser.add_argument("--hidden", type=int, nargs="+", default=[192, 512], help="widths of the model, in 64s")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", help="models by name, instead of widths")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where; CPU-seconds or wall time")
    parser.add_argument("--sequence", type=int, default=1024, help="tokens of a packed row")
    parser.add_argument("--batch", type=int, default=2, help="rows of a step")
    parser.add_argument("--steps", type=int, default=3, help="steps that count")
    parser.add_argument("--repeat", type=int, default=2, help="processes of each side; the fastest counts")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--defaults", action="store_true", help="also measure TRL's default settings")
    parser.add_argument("--alone", action="store_true", help="leave TRL out")
    parser.add_argument("--profile", action="store_true", help="only show where llamero's time goes")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # these three: a process of its own
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.side:
        work = Work(**{**args.work, "shape": Shape(**args.work["shape"])})
        steps = SIDES[args.side](args.directory, work)
        (args.directory / f"{args.side}.json").write_text(json.dumps(asdict(steps)))
        return
    named = {name: SHAPES[name] for name in args.shape or ()} or {str(hidden): narrow(hidden) for hidden in args.hidden}
    works = {
        name: Work(args.sequence, args.batch, args.steps, args.seed, shape, args.device)
        for name, shape in named.items()
    }
    if args.profile:
        for work in works.values():
            show_profile(work)
        return
    unit = "tokens/CPU-s" if args.device == "cpu" else "tokens/s"
    print(f"| model | sequence | llamero, {unit} | TRL | ratio | TRL's defaults | loss | TRL's | largest gap |")
    print("|---|---|---|---|---|---|---|---|---|")
    sides = ["llamero", *([] if args.alone else ["trl"]), *(["trl_defaults"] if args.defaults else [])]
    for name, work in works.items():
        compare(name, work, sides, repeat=args.repeat)


if __name__ == "__main__":
    main()

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
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import append, single_thread_environment

from llamero.engine.batches import Batches
from llamero.engine.loop import train
from llamero.engine.stage import StageConfig
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
class Steps:
    """What one process measured, one number for each step that counts."""

    seconds: list[float]
    """CPU time, user and system."""
    losses: list[float]
    tokens: list[int]
    """Of whole documents."""

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
        )

    @property
    def documents(self) -> int:
        """More than the steps take: a document has 250 tokens on average."""
        return self.stage.steps * self.batch * self.sequence // 200

    def batches(self) -> "Clocked":
        """Return the rows of all steps."""
        tokens, roles = documents(self.documents, self.sequence, seed=self.seed)
        return Clocked(tokens, roles, self.stage, seed=self.seed, where="synthetic documents")

    def rows(self) -> list[list[Document]]:
        """Return the documents of every row, in the order in which the steps take them."""
        batches = self.batches()
        tokens, roles = documents(self.documents, self.sequence, seed=self.seed)
        rows = [batches.assemble([row]).documents for step in range(batches.steps) for row in batches.rows_of(step)]
        return [[(tokens[number], roles[number]) for number in numbers] for numbers in rows]


class Clocked(Batches):
    """Batches that note the CPU time at the beginning of each step."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.clock: list[float] = []

    def rows_of(self, step: int) -> list[int]:
        self.clock.append(time.process_time())
        return super().rows_of(step)


def documents(count: int, longest: int, *, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return tokens and roles of chats: log-normal lengths, Zipf's words, one to three rounds."""
    random = np.random.default_rng(seed)
    rank = np.arange(1, VOCABULARY + 1)
    chance = 1 / rank / (1 / rank).sum()
    tokens, roles = [], []
    for length in np.clip(random.lognormal(np.log(180), 0.9, count), 16, longest).astype(int):
        tokens.append(random.choice(VOCABULARY, size=length, p=chance))
        said = np.empty(length, dtype=np.uint8)
        for turn in np.array_split(said, random.integers(1, 4)):
            answer = int(len(turn) * (1 - random.beta(4, 5)))
            turn[: len(turn) - answer] = Role.USER
            turn[len(turn) - answer :] = Role.ASSISTANT
            turn[:3] = Role.USER + SCAFFOLD
        roles.append(said)
    return tokens, roles


def fresh_model(hidden: int, work: Work, directory: Path) -> None:
    """Write the model that both sides start from."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_layers=6,
        num_heads=hidden // 64,
        num_kv_heads=hidden // 64,
        head_dim=64,
        rope=Default(10000.0, 64),
        max_position_embeddings=work.sequence,
        tie_word_embeddings=False,
        carried={"bos_token_id": 1, "eos_token_id": 2},
    )
    directory.mkdir()
    model = Llama(config)
    initialize(model, seed=work.seed)
    save_model(model, directory)


def llamero(directory: Path, work: Work) -> Steps:
    """Train with llamero."""
    batches = work.batches()
    with tempfile.TemporaryDirectory(dir=directory) as out:
        model = load_model(directory / "model", dtype=torch.float32)
        train(model, batches, work.stage, Path(out), parallel=ParallelConfig())
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return measured(batches.clock, [line["loss"] for line in lines], [as_trl(row) for row in work.rows()], work.batch)


def trl(directory: Path, work: Work) -> Steps:
    """Train with TRL on the same rows, in its best setting."""
    rows = [as_trl(row) for row in work.rows()]
    packing = {"packing": True, "packing_strategy": "bfd"}
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": work.batch}
    return _sft(directory, work, rows, {**packing, **batch, "bf16": False, "gradient_checkpointing": False})


def trl_defaults(directory: Path, work: Work) -> Steps:
    """Train with TRL on the same documents, each a row that is padded to the longest of its step."""
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
            clock.append(time.process_time())

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
        use_cpu=True,
        **settings,
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM.from_pretrained(directory / "model", attn_implementation="sdpa"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>"),
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return measured(clock, losses, rows, config.per_device_train_batch_size * config.gradient_accumulation_steps)


def measured(clock: list[float], losses: list[float], rows: list[dict[str, list[int]]], batch: int) -> Steps:
    """Return what counts: all steps but the first, and the last, which only ends the one before."""
    lengths = [len(row["input_ids"]) for row in rows]
    tokens = [sum(lengths[step * batch : (step + 1) * batch]) for step in range(len(losses))]
    return Steps(np.diff(clock)[1:].tolist(), losses[1:-1], tokens[1:-1])


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


def compare(hidden: int, work: Work, sides: list[str], *, repeat: int) -> None:
    """Measure one shape, print its row and keep its results."""
    runs: dict[str, list[Steps]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        fresh_model(hidden, work, directory / "model")
        for _ in range(repeat):
            for side in sides:
                runs[side].append(alone(side, directory, work))
    speed = {side: max(run.tokens_per_second for run in of) for side, of in runs.items()}
    loss = {side: statistics.fmean(of[0].losses) for side, of in runs.items()}
    apart = max(abs(a / b - 1) for a, b in zip(runs["llamero"][0].losses, runs["trl"][0].losses, strict=True))
    ratio = speed["llamero"] / speed["trl"]
    defaults = f"{speed['trl_defaults']:,.0f}" if "trl_defaults" in speed else "–"
    print(
        f"| {hidden} | {work.sequence} | {speed['llamero']:,.0f} | {speed['trl']:,.0f} | **{ratio:.2f}×** | {defaults} "
        f"| {loss['llamero']:.4f} | {loss['trl']:.4f} | {apart:.4%} |",
        flush=True,
    )
    for side in sides:
        append(
            "train_vs_trl",
            value=round(speed[side], 1),
            unit="tokens per CPU-second",
            libraries=("trl", "transformers"),
            threads=1,
            side=side,
            hidden=hidden,
            ratio=round(speed["llamero"] / speed[side], 3),
            loss=round(loss[side], 5),
            repetitions=[round(run.tokens_per_second, 1) for run in runs[side]],
            **asdict(work),
        )
    if apart > 0.01:
        raise SystemExit(f"the losses of a step differ by {apart:.2%}: this is no fair comparison")


def show_profile(hidden: int, work: Work) -> None:
    """Print where llamero's time goes."""
    with tempfile.TemporaryDirectory() as place:
        fresh_model(hidden, work, Path(place) / "model")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            llamero(Path(place), work)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=32, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description="Training speed beside TRL's SFTTrainer.")
    parser.add_argument("--hidden", type=int, nargs="+", default=[192, 512], help="widths of the model, in 64s")
    parser.add_argument("--sequence", type=int, default=1024, help="tokens of a packed row")
    parser.add_argument("--batch", type=int, default=2, help="rows of a step")
    parser.add_argument("--steps", type=int, default=3, help="steps that count")
    parser.add_argument("--repeat", type=int, default=2, help="processes of each side; the fastest counts")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--defaults", action="store_true", help="also measure TRL's default settings")
    parser.add_argument("--profile", action="store_true", help="only show where llamero's time goes")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # these three: a process of its own
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.side:
        steps = SIDES[args.side](args.directory, Work(**args.work))
        (args.directory / f"{args.side}.json").write_text(json.dumps(asdict(steps)))
        return
    work = Work(args.sequence, args.batch, args.steps, args.seed)
    if args.profile:
        for hidden in args.hidden:
            show_profile(hidden, work)
        return
    print("| hidden | sequence | llamero, tokens/CPU-s | TRL | ratio | TRL's defaults | loss | TRL's | largest gap |")
    print("|---|---|---|---|---|---|---|---|---|")
    for hidden in args.hidden:
        compare(hidden, work, ["llamero", "trl", *(["trl_defaults"] if args.defaults else [])], repeat=args.repeat)


if __name__ == "__main__":
    main()

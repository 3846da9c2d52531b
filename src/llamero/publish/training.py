"""What cards say of training: stages, data, what was left out, and the ancestry of every model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from llamero.engine.stage import Learn
from llamero.publish.markdown import NOTHING, count, fence, plural, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from llamero.core.artifact import Artifact
    from llamero.engine.stage import StageConfig
    from llamero.model.adapter_config import AdapterConfig
    from llamero.publish.release import ReleaseInputs, TrainedStage

DIGITS = 12
SPLITS = ("train", "val")

STAGE_COLUMNS = (
    "Stage", "Objective", "Mixture", "Steps", "Tokens", "Supervised tokens", "Sequence", "Batch",
    "Learning rate", "Optimizer", "Loss, last step",
)  # fmt: skip

COUNTS = {
    "turns": "Turns of the assistant",
    "repeated": "Copies of samples",
    "unknown_tokens": "Tokens for text that the vocabulary cannot spell",
    "skipped_tokens": "Tokens of skipped samples",
}
"""Counts of a mixture that the published layout has no line for."""


class Mixture(NamedTuple):
    """Data that was trained on."""

    name: str
    statistics: str
    """In the published layout, a code block for each split that has samples, and a table of what that leaves out."""


def stage_table(stages: Sequence[TrainedStage]) -> str:
    """Return what was trained how, a row for each stage."""
    validated = any(stage.artifact.summary["validation_loss"] is not None for stage in stages)
    header = [*STAGE_COLUMNS, *(["Validation loss"] if validated else [])]
    return table(header, [_stage_row(stage, validated=validated) for stage in stages], left=3)


def _stage_row(stage: TrainedStage, *, validated: bool) -> list[str]:
    config, said = stage.config, stage.artifact.summary
    validation = said["validation_loss"]
    row = [stage.name, config.objective, config.mixture, count(said["steps"]), count(said["tokens"])]
    row += [count(said["supervised_tokens"]), count(config.sequence), _batch(config)]
    row += [_schedule(config), _optimizer(config), f"{said['loss']:.4f}"]
    return row + ([NOTHING if validation is None else f"{validation:.4f}"] if validated else [])


def _batch(config: StageConfig) -> str:
    if config.batch_samples is not None:
        return plural(config.batch_samples, "sample")
    return plural(config.batch, "row")


def _schedule(config: StageConfig) -> str:
    lr = f"{config.lr:g}" if config.schedule == "constant" else f"{config.lr:g} → {config.min_lr:g}"
    return f"{lr}, {config.schedule}" + (f", warm-up {plural(config.warmup, 'step')}" if config.warmup else "")


def _optimizer(config: StageConfig) -> str:
    first, second = config.betas
    clip = f", clip {config.clip:g}" if config.clip else ""
    return f"AdamW, β {first:g}/{second:g}, ε {config.eps:g}, weight decay {config.weight_decay:g}{clip}"


def training_notes(stages: Sequence[TrainedStage]) -> list[str]:
    """Return, for each stage, what the table of stages has no column for."""
    return [f"**{stage.name}**: {'; '.join(_details(stage))}." for stage in stages]


def _details(stage: TrainedStage) -> Iterator[str]:
    config, said = stage.config, stage.artifact.summary
    tokens = f"{count(round(said['tokens'] / said['steps']))} tokens a step"
    mean = "" if said["tokens"] % said["steps"] == 0 else " on average"
    yield f"{tokens}{mean}, {said['supervised_tokens'] / said['tokens']:.1%} of them supervised"
    yield from _dropout(config)
    if config.neftune:
        yield f"noise on embeddings (NEFTune), α {config.neftune:g}"
    if config.z_loss:
        yield f"z-loss {config.z_loss:g}"
    if config.objective == "sft" and config.learn != Learn():
        weights = ", ".join(f"{name} {weight:g}" for name, weight in config.learn.model_dump().items() if weight)
        yield f"weights of the loss: {weights}"
    if config.adapter is not None:
        yield _adapter(config.adapter, said)
    if (accuracy := said.get("validation_accuracy")) is not None:
        yield f"{accuracy:.1%} of the supervised validation tokens are the likeliest"


def _dropout(config: StageConfig) -> Iterator[str]:
    dropout = config.dropout
    if dropout.hidden:
        rising = " rising linearly with depth (LIMA)" if dropout.lima else ""
        yield f"dropout {dropout.hidden:g} on the residual branches{rising}"
    embedding = 0.0 if dropout.lima else dropout.hidden if dropout.embedding is None else dropout.embedding
    if embedding:
        yield f"dropout {embedding:g} on embeddings"
    if dropout.attention:
        yield f"dropout {dropout.attention:g} on attention probabilities"


def _adapter(adapter: AdapterConfig, said: Mapping[str, Any]) -> str:
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    what = f"LoRA of rank {adapter.lora}, α {adapter.stated_alpha:g} on {targets}"
    dropped = f", dropout {adapter.dropout:g}" if adapter.dropout else ""
    base = f", on a base in {adapter.base}" if adapter.base else ""
    trained = f"{count(said['trained_parameters'])} of {count(said['parameters'])} parameters trained"
    return f"{what}{dropped}{base} ({trained})"


def packing_notes(stages: Sequence[TrainedStage]) -> list[str]:
    """Return, for each stage, how its samples were packed and what was left out of them."""
    return [_packing(stage.name, stage.config, stage.artifact.summary["packing"]) for stage in stages]


def _packing(name: str, config: StageConfig, packing: Mapping[str, float]) -> str:
    what = f"{plural(int(packing['documents']), 'sample')} in {plural(int(packing['rows']), 'row')}"
    filled = f"{what} of {count(config.sequence)} tokens, {packing['fill']:.1%} of them filled"
    lost = list(_lost(packing))
    return f"**{name}**: {filled}; {', '.join(lost) if lost else 'none was dropped, cut or split'}."


def _lost(packing: Mapping[str, float]) -> Iterator[str]:
    numbers = {key: int(value) for key, value in packing.items() if key != "fill"}
    if numbers["dropped"]:
        yield f"{count(numbers['dropped'])} dropped (too long)"
    if numbers["nothing_to_learn"]:
        yield f"{count(numbers['nothing_to_learn'])} left out (nothing to learn)"
    if numbers["too_short"]:
        yield f"{count(numbers['too_short'])} left out as shorter than two tokens"
    if numbers["truncated"]:
        yield f"{count(numbers['truncated'])} cut, which lost {plural(numbers['truncated_tokens'], 'token')}"
    if numbers["split"]:
        yield f"{count(numbers['split'])} split into several"
    if numbers["pieces_without_target"]:
        yield f"{plural(numbers['pieces_without_target'], 'piece')} with nothing to learn left out"


def mixtures(data: Sequence[Artifact]) -> list[Mixture]:
    """Return the statistics of every mixture, as its making printed them, and what they do not say."""
    return [Mixture(str(each.summary["mixture"]), "\n\n".join(_statistics(each))) for each in data]


def _statistics(data: Artifact) -> Iterator[str]:
    totals = {split: data.summary[split]["total"] for split in SPLITS}
    filled = {split: whole for split, whole in totals.items() if whole["processed"] or whole["left_out"]}
    for split in filled:
        yield fence((data.path / f"{split}_stats.txt").read_text(encoding="utf-8").strip("\n"))
    said = {split: dict(_unsaid(whole)) for split, whole in filled.items()}
    labels = dict.fromkeys(label for each in said.values() for label in each)
    if labels:
        yield table(["", *said], [[label, *(each.get(label, "") for each in said.values())] for label in labels])
    yield from _selection(data.summary)


def _selection(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was searched for before anything was tokenized, and what was found."""
    if "decontamination" in summary:
        yield f"**Test sets**: {summary['decontamination']['statement']}"
    if "duplicates" in summary:
        found = summary["duplicates"]
        alike = found["within_sources"] + found["across_sources"]
        what = "were left out" if found["dropped"] else "were kept"
        where = f"{count(found['within_sources'])} within a source, {count(found['across_sources'])} across sources"
        yield (
            f"**Near-duplicates**: {count(alike)} of {count(found['samples'])} samples read resemble an earlier one to "
            f"{found['threshold']:.0%} ({where}); they {what}."
        )
    if "lengthen" in summary:
        domains = summary["lengthen"]["domains"]
        shares = [[name, f"{said['share']:.1%}", f"{said['kept_share']:.1%}"] for name, said in domains.items()]
        if shares:
            yield table(["Domain", "Share of the corpus", "Share of the long documents"], shares)


def _unsaid(whole: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what the published layout has no line for, as label and text, where there is something to say."""
    if whole["tokens"]:
        learned = whole["supervised_tokens"]
        yield "Supervised tokens", f"{count(learned)} ({learned / whole['tokens']:.1%})"
        yield "Tokens per document, 50/90/99 %", " / ".join(count(whole[key]) for key in ("p50", "p90", "p99"))
    if whole["languages"]:
        yield "Samples by language", ", ".join(f"{name} {count(number)}" for name, number in _most(whole["languages"]))
    for key, label in COUNTS.items():
        if whole[key]:
            yield label, count(whole[key])
    for reason, number in _most(whole["skipped"]):
        yield f"Skipped: {reason}", count(number)
    for reason, number in _most(whole["left_out"]):
        yield f"Left out: {reason}", count(number)


def _most(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def ancestry_table(inputs: ReleaseInputs) -> str:
    """Return the digest of every artifact and of what it was made from."""
    artifacts = [*inputs.data, *inputs.stages, *inputs.variants]
    if not inputs.stages:
        artifacts.insert(0, inputs.model)
    known = {artifact.digest: artifact.stage for artifact in artifacts}
    rows = [[a.stage, f"`{a.digest[:DIGITS]}`", ", ".join(_parents(a.parents, known)) or NOTHING] for a in artifacts]
    return table(["Artifact", "Digest", "Made from"], rows, left=3)


def _parents(parents: Mapping[str, str], known: Mapping[str, str]) -> Iterator[str]:
    for role, digest in parents.items():
        yield f"{role}: {known[digest]}" if digest in known else f"{role}: `{digest[:DIGITS]}`"

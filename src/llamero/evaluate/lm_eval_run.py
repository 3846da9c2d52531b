"""lm-evaluation-harness with this project's model in it: its command line, and its tasks as measurements."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamero.core.errors import LlameroError, did_you_mean
from llamero.evaluate import code_eval
from llamero.evaluate.per_sample import Key, SampleFile, text_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import ModuleType

    from llamero.core.results import Result
    from llamero.evaluate.config import LmEvalTask
    from llamero.evaluate.subject import Subject

NEEDED = "0.4.13"
"""Version that the adapter was written against."""
_SAID = 120
"""Characters of a harness's error that are repeated."""


def harness() -> Callable[[], None]:
    """Return lm-eval's command line, in which `--model llamero` is known."""
    adapter().register()
    return importlib.import_module("lm_eval.__main__").cli_evaluate


def adapter() -> ModuleType:
    """Return the module of the model, which needs lm-eval.

    Raises:
        LlameroError: It is not installed.
    """
    try:
        importlib.import_module("lm_eval.api.model")
    except ImportError as error:
        raise LlameroError(
            f"lm-evaluation-harness is not here ({error})", fix=f"pip install 'llamero[lm-eval]' (lm_eval>={NEEDED})"
        ) from error
    return importlib.import_module("llamero.evaluate.lm_eval_model")


def run(task: LmEvalTask, subject: Subject) -> list[Result]:
    """Measure a model by tasks of lm-eval.

    Args:
        task: Which, and how they are asked.
        subject: Whom.

    Raises:
        LlameroError: lm-eval is not here, knows no such task, or cannot get its data.
    """
    model = adapter().LlameroLM(
        engine=subject.engine,
        pretrained=str(subject.directory),
        add_bos_token=task.bos,
        softmax_dtype=task.softmax_dtype,
    )
    how = {
        "shots": task.shots,
        "chat": _chat(task, subject),
        "system": task.system,
        "multiturn": task.multiturn if task.chat else None,
        "bos": subject.tokenizer.add_bos if task.bos is None else task.bos,
        "softmax_dtype": task.softmax_dtype,
        "lm_eval": importlib.import_module("lm_eval").__version__,
    }
    kept = SampleFile(subject.samples)
    kept.begin(task.label, {"model": subject.name, **how, **subject.measured()})
    found = _evaluated(task, subject, model)
    kept.add(row for name, samples in found.get("samples", {}).items() for row in _rows(name, samples))
    cut = f"{model.truncated} requests were longer than the context and lost their beginning"
    notes = [cut] if model.truncated else []
    measured = {**subject.measured(), "truncated": {"requests": model.truncated}}
    said = {"limit": task.limit, "how": how, "measured": measured}
    return [
        subject.result("lm-eval", metrics, protocol, notes=notes, text=text, **said)
        for text, metrics, protocol in _measurements(found)
    ]


def _chat(task: LmEvalTask, subject: Subject) -> bool | str:
    """Return what lm-eval is told of the chat template: none, the tokenizer's own, or one of ours by name."""
    if not task.chat:
        return False
    return True if subject.template == "auto" else subject.template


def _evaluated(task: LmEvalTask, subject: Subject, model: Any) -> dict[str, Any]:
    """Return what lm-eval makes of the tasks."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    include = None if task.include is None else str(subject.root / task.include)
    manager = TaskManager(include_path=include)
    for name in task.names:
        if name not in manager.task_index and not Path(name).is_file():
            known = manager.task_index
            raise LlameroError(f"lm-eval has no task `{name}`", fix=did_you_mean(name, known))
    try:
        with code_eval.fenced(task.names) as safe:
            found = simple_evaluate(
                model=model,
                tasks=list(task.names),
                num_fewshot=task.shots,
                limit=task.limit,
                task_manager=manager,
                system_instruction=task.system,
                apply_chat_template=_chat(task, subject),
                fewshot_as_multiturn=task.multiturn and task.chat,
                log_samples=True,
                bootstrap_iters=0,
                confirm_run_unsafe_code=safe,
            )
    except (OSError, ImportError, ValueError) as error:  # data that cannot be had, packages of a task, its own checks
        said = str(error).strip().partition("\n")[0][:_SAID] or type(error).__name__
        raise LlameroError(
            f"lm-eval stopped: {said}",
            where=", ".join(task.names),
            fix="see what the task needs (data of the hub, a package); `--debug` shows the whole error",
        ) from error
    if found is None:
        raise LlameroError("lm-eval gave no results", where=", ".join(task.names))
    return dict(found)


def _measurements(found: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float], str]]:
    """Yield (name in reports, metrics, protocol) of each task and group; the first metric of a task is its score."""
    for name, values in found["results"].items():
        metrics: dict[str, float] = {}
        for key, value in values.items():
            metric, _, way = key.partition(",")
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            if metric.endswith("_stderr") or not way:
                continue
            label = metric if way == "none" else f"{metric} {way}"
            metrics[label] = float(value)
            error = values.get(f"{metric}_stderr,{way}")
            if isinstance(error, int | float) and math.isfinite(error):
                metrics[f"{label}_stderr"] = float(error)
        if not metrics:
            continue
        first = next(iter(metrics))
        main = {"score": metrics[first]}
        main |= {"score_stderr": metrics[f"{first}_stderr"]} if f"{first}_stderr" in metrics else {}
        count = found.get("n-samples", {}).get(name, {}).get("effective")
        main |= {"questions": int(count)} if count is not None else {}
        shots = found.get("n-shot", {}).get(name)
        version = found.get("versions", {}).get(name)
        said = [f"lm-eval task {name}", f"version {version}" if version is not None else "", f"score is {first}"]
        said.append(f"{shots}-shot" if shots is not None else "")
        yield f"{name}", {**main, **metrics}, ", ".join(filter(None, said))


def _rows(task: str, samples: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a task's samples: one per request; of several filters the first, which has the answers too."""
    filters = {sample.get("filter") for sample in samples}
    first = samples[0].get("filter") if samples else None
    for sample in samples:
        if len(filters) > 1 and sample.get("filter") != first:
            continue
        scores = {key: float(sample[key]) for key in sample.get("metrics", ()) if _number(sample.get(key))}
        for choice, answers in enumerate(sample["resps"]):
            answer = answers[0]
            row: dict[str, Any] = {
                **Key(task, int(sample["doc_id"]), choice)._asdict(),
                "prompt": text_digest(sample["arguments"][choice]),
                "log_likelihood": None,
                "greedy": None,
                "truncated": None,
                "scores": scores,
            }
            if isinstance(answer, str):
                row["text"] = answer
            else:
                value, row["greedy"] = (answer[0], answer[1]) if isinstance(answer, list | tuple) else (answer, None)
                row["log_likelihood"] = float(value)
            yield row


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

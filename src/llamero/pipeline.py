"""From a recipe to its release: which stages there are, what each depends on, and making those that are missing.

What a stage is named by (its `Identity`) follows from the recipe and from the files it reads, so the whole way is
known before anything runs: `llamero check` prints it, `llamero run` makes what is not there yet.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llamero.core import artifact, files, results, world
from llamero.core.artifact import Artifact, Build, Identity
from llamero.core.download import TOKENIZER_FILES, resolve_model
from llamero.core.errors import LlameroError, did_you_mean
from llamero.core.files import ContentDigests
from llamero.corpus import known
from llamero.data.config import MixtureConfig, VocabularyConfig
from llamero.engine.stage import StageConfig
from llamero.evaluate.config import EvaluateConfig, MtBenchTask
from llamero.quantize.config import AFTERWARDS, CalibrationSource, QuantizeConfig
from llamero.quantize.gate import Measure, Measured, Verdict, judge
from llamero.recipe.fit import refuse_what_does_not_fit, without_misfits
from llamero.recipe.schema import Recipe, ScratchConfig

if TYPE_CHECKING:
    from llamero.infer.texts import Text
    from llamero.publish.release import Gate
    from llamero.quantize.sequences import Drawn
    from llamero.text.tokenizer import Tokenizer

Builds = Mapping[str, Build]


@dataclass(frozen=True)
class Stage:
    """Artifacts that are made together, mostly one."""

    name: str
    identities: Mapping[str, Identity]
    """What it makes, by name."""
    make: Callable[[Builds], None]
    """Makes those that are missing."""
    together: bool = False
    """Whether all processes of a run make it, each a part; else the first does while the others wait."""
    by_any_number: bool = False
    """Whether it does not matter how many they are; training wants those that the recipe says."""
    wanted: Callable[[], bool] = lambda: True
    """Asked when the stages before it are made: whether it is to be made at all."""
    passing: tuple[Path, ...] = ()
    """Directories that are of no use any more when all of it is made."""

    @property
    def identity(self) -> Identity:
        """Return the identity of a stage that makes one artifact."""
        (one,) = self.identities.values()
        return one


@dataclass
class Row:
    """What a run did about a stage."""

    stage: str
    state: Literal["made", "kept"]
    seconds: float
    path: Path


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    rows: Sequence[Row]
    release: Path | None
    """Where the release is, if the recipe publishes."""
    model: Path | None
    """The model: in the release, if there is one."""
    results: Sequence[results.Result]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Default variants that the model cannot become, and why."""
    faults: Mapping[str, Verdict] = field(default_factory=dict)
    """What is wrong with quantized variants, and whether they are published."""


@dataclass
class Plan:
    """The stages of a recipe, in an order in which they can be made.

    Args:
        recipe: What to make.
        root: Directory that the recipe's relative paths start from.
        out: Run directory.
        datasets: Mixtures to make and nothing else; the whole release where it is not given.
    """

    recipe: Recipe
    root: Path
    out: Path
    datasets: Collection[str] | None = None
    stages: list[Stage] = field(default_factory=list)
    models: dict[str, Identity | Path] = field(default_factory=dict)
    """Every model that can be measured: an artifact, or a directory that the user has."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Default variants that the model cannot become, and why."""

    def __post_init__(self) -> None:
        self._digest = ContentDigests(_memory(self.out))
        self._base = self._resolve_base()
        self.recipe, self.left_out = without_misfits(self.recipe, self._base)
        refuse_what_does_not_fit(self.recipe, self._base)
        self.tokenizer = self._plan_tokenizer()
        mixtures = self._mixtures_used() if self.datasets is None else self.datasets
        self.data = {name: self._plan_data(name, self._mixture(name)) for name in mixtures}
        self.measurements: list[Identity] = []
        self.gates: dict[str, Identity] = {}
        self.release: Identity | None = None
        if self.datasets is None:
            self._plan_release_and_what_leads_to_it()

    def _plan_release_and_what_leads_to_it(self) -> None:
        self._plan_training()
        self._plan_variants()
        self.gates = self._plan_measuring()
        self.measurements = [*self.gates.values(), *self._plan_evaluation()]
        self.release = self._plan_release()

    def path(self, model: str) -> Path:
        """Return the directory of a model."""
        found = self.models[model]
        return found if isinstance(found, Path) else found.path(self.out)

    # -- base and vocabulary

    def _resolve_base(self) -> Path | None:
        if isinstance(self.recipe.base, ScratchConfig):
            return None
        local = self.root / self.recipe.base
        return resolve_model(local if local.exists() else self.recipe.base, weights=self.datasets is None)

    @property
    def _base_is_on_the_hub(self) -> bool:
        return self._base is not None and not (self.root / str(self.recipe.base)).is_dir()

    def _base_parent(self) -> dict[str, str]:
        return {} if self._base is None else {"base": self._digest(self._base)}

    def _tokenizer_digest(self, base: Path) -> str:
        """Return what decides a base's tokens: its weights do not, so bases with one tokenizer share their datasets."""
        found = sorted({path for pattern in TOKENIZER_FILES for path in base.glob(pattern) if path.is_file()})
        return files.digest({path.name: self._digest(path) for path in found})

    def _plan_tokenizer(self) -> Identity:
        recipe, base = self.recipe, self._base
        config: dict[str, Any] = {"extra_tokens": recipe.data.extra_tokens, "template": recipe.template}
        parents: dict[str, str] = {}
        start: Path | VocabularyConfig
        if isinstance(recipe.base, ScratchConfig):
            start = recipe.base.vocabulary
            config["vocabulary"] = start.model_dump(mode="json")
            config["text"] = recipe.data.mixtures[start.mixture].decides()
            parents |= self._files(recipe.data.mixtures[start.mixture])
        else:
            assert base is not None
            start = base
            parents = {"base": self._tokenizer_digest(base)}
        identity = Identity("tokenizer", "tokenizer", config, parents)

        def make(builds: Builds) -> None:
            from llamero.data.vocabulary import prepare_tokenizer

            build = builds["tokenizer"]
            build.summary = prepare_tokenizer(
                recipe.data, start, template=recipe.template, root=self.root, out=build.path
            )

        return self._add("tokenizer", identity, make)

    # -- data

    def _mixtures_used(self) -> list[str]:
        used = [stage.mixture for stage in self.recipe.train]
        if self.recipe.quantize:
            used += [part.mixture for part in self._calibration_parts(self.recipe.quantize) if part.mixture is not None]
        measure = self.recipe.measured_on
        used += [] if measure is None else measure.validation
        used += [name for task in self.recipe.evaluate for name in task.mixtures]
        return list(dict.fromkeys(used))

    def _mixture(self, name: str) -> MixtureConfig:
        mixtures = self.recipe.data.mixtures
        if name not in mixtures:
            raise LlameroError(f"there is no mixture `{name}`", fix=did_you_mean(name, mixtures))
        return mixtures[name]

    def _files(self, mixture: MixtureConfig) -> dict[str, str]:
        """Return the digest of every file that a mixture reads; a hub data set is named, not digested."""
        return {f"file of {role}": self._content(path, role) for role, path in mixture.files.items()}

    def _plan_data(self, name: str, mixture: MixtureConfig) -> Identity:
        recipe = self.recipe
        config = {"mixture": mixture.decides(), "template": recipe.template, "seed": recipe.seed}
        parents = {"tokenizer": self.tokenizer.digest, **self._files(mixture)}
        identity = Identity("data", f"data-{name}", config, parents, version=2)

        def make(builds: Builds) -> None:
            from llamero.data.run import tokenize_mixture

            build = builds[identity.stage]
            build.summary = tokenize_mixture(
                name,
                mixture,
                tokenizer=self.tokenizer.path(self.out),
                template=recipe.template,
                root=self.root,
                seed=recipe.seed,
                out=build.path,
                team=recipe.parallel.workers,
            )

        return self._add(identity.stage, identity, make)

    # -- training

    def _plan_training(self) -> None:
        if self._base is not None:
            self.models["base"] = self._base
        previous: Identity | None = None
        trained: dict[str, Identity] = {}
        for stage in self.recipe.train:
            start = trained[stage.init_from] if stage.init_from else previous
            previous = trained[stage.name] = self._plan_stage(stage, start)
            self.models[stage.name] = previous
            self.models.setdefault("base", previous)  # a release from scratch is measured against its first stage
        if previous is not None:
            self.models["final"] = previous
        elif self._base is not None:
            self.models["final"] = self._base

    def _plan_stage(self, stage: StageConfig, start: Identity | None) -> Identity:
        recipe = self.recipe
        config: dict[str, Any] = {"stage": stage.decides(), "seed": recipe.seed}
        parents = {"data": self.data[stage.mixture].digest, "tokenizer": self.tokenizer.digest}
        if start is not None:
            parents["start"] = start.digest
        elif isinstance(recipe.base, ScratchConfig):
            config["shape"] = recipe.base.shape.model_dump(mode="json")
        else:
            parents |= self._base_parent()
            config["new_rows"] = recipe.data.new_rows
        identity = Identity("model", f"train-{stage.name}", config, parents)

        def make(builds: Builds) -> None:
            from llamero.train.run import run

            if start is not None:
                beginning = start.path(self.out)
            else:
                beginning = recipe.base.shape if isinstance(recipe.base, ScratchConfig) else self.path("base")
            build = builds[identity.stage]
            build.summary = run(
                stage.rooted(self.root),
                start=beginning,
                data=self.data[stage.mixture].path(self.out),
                tokenizer=self.tokenizer.path(self.out),
                parallel=recipe.parallel,
                seed=recipe.seed,
                out=build.path,
                new_rows=recipe.data.new_rows,
                hub_name=str(recipe.base) if start is None and self._base_is_on_the_hub else None,
            )

        return self._add(identity.stage, identity, make, together=True)

    # -- quantization

    def _plan_variants(self) -> None:
        config = self.recipe.quantize
        if config is None:
            return
        identities = {name: self._variant(config, name) for name in config.variants}
        self.models |= identities
        name = files.digest({variant: identity.digest for variant, identity in identities.items()})
        progress = self.out / f"quantize-{name[: artifact.DIGITS]}.progress"

        def make(builds: Builds) -> None:
            from llamero.quantize.run import processes, run

            team = processes(timeout=self.recipe.parallel.timeout)
            with team.together():
                drawn = self._calibration(config) if team.speaks else None
            drawn = team.told(drawn)
            assert drawn is not None
            imatrix = config.imatrix and self.root / config.imatrix
            reports = run(
                config.model_copy(update={"variants": tuple(builds), "imatrix": imatrix}),
                model=self.path("final"),
                out=lambda variant: builds[variant.name].path,
                tokens=drawn.sequences,
                world=team,
                keep_in=self.out,
                progress=progress,
            )
            for report in reports:
                builds[report.variant.name].summary = report.to_json() | {"calibration": drawn.to_json()}

        self.stages.append(Stage("quantize", identities, make, together=True, by_any_number=True, passing=(progress,)))

    def _variant(self, config: QuantizeConfig, name: str) -> Identity:
        said = config.model_dump(mode="json", exclude={"variants", "calibration", "imatrix", *AFTERWARDS})
        # conversations of a file are rendered with the template, and no parent says which it is
        said["calibration"] = {**config.calibration.decides(self._own_mixture), "template": self.recipe.template}
        parents = {"model": self._model_digest("final"), **self._calibration_parent(config)}
        if config.imatrix is not None and name.startswith("gguf-"):
            parents["imatrix"] = self._content(str(config.imatrix), "importance matrix")
        return Identity("variant", name, {**said, "variant": name, "seed": self.recipe.seed}, parents)

    @property
    def _own_mixture(self) -> str | None:
        """Return the mixture that the model was last tuned on."""
        return self.recipe.train[-1].mixture if self.recipe.train else None

    def _calibration_parts(self, config: QuantizeConfig) -> tuple[CalibrationSource, ...]:
        return config.calibration.parts(self._own_mixture)

    def _calibration_parent(self, config: QuantizeConfig) -> dict[str, str]:
        """Return the digest of every mixture and file that is calibrated on; a hub data set is named, not digested."""
        found: dict[str, str] = {}
        for number, part in enumerate(self._calibration_parts(config)):
            if part.mixture is not None:
                found[f"calibration {number}"] = self.data[part.mixture].digest
            elif part.path is not None:
                found[f"calibration {number}"] = self._content(str(part.path), "calibration text")
        return found

    def _calibration(self, config: QuantizeConfig) -> Drawn:
        """Return the sequences to calibrate on."""
        from llamero.quantize import sequences
        from llamero.text.tokenizer import load_tokenizer

        return sequences.draw(
            config.calibration,
            load_tokenizer(self.path("final")),
            root=self.root,
            template=self.recipe.template,
            mixtures={name: identity.path(self.out) for name, identity in self.data.items()},
            own=self._own_mixture,
        )

    # -- what the variants lost

    def _plan_measuring(self) -> dict[str, Identity]:
        """Plan the measurement of the final model and of every variant beside it; return them by the model's name."""
        config, measure = self.recipe.quantize, self.recipe.measured_on
        if config is None or measure is None:
            return {}
        parents = {f"text {name}": self._text(said) for name, said in measure.texts.items()}
        self._refuse_calibrated(parents, where="quantize.measure")
        parents |= {f"mixture {mixture}": self.data[mixture].digest for mixture in measure.validation}
        said = {"measure": {**measure.model_dump(mode="json", exclude={"texts"}), "texts": list(measure.texts)}}
        original = self._own_name("final")
        gates = {
            name: Identity(
                "measurement",
                f"measure-{name}",
                {**said, "model": name},
                {**parents, "model": self._model_digest(name), "reference": self._model_digest("final")},
            )
            for name in (original, *config.variants)
        }

        def make(builds: Builds) -> None:
            from llamero.quantize.measure import measure_together, results_of
            from llamero.quantize.run import processes
            from llamero.text.tokenizer import load_tokenizer

            team = processes(timeout=self.recipe.parallel.timeout)
            tokenizer = load_tokenizer(self.path("final"))
            with team.together():
                texts = self._texts(config, measure, tokenizer) if team.speaks else []
            missing = {name: self.path(name) for name in config.variants if f"measure-{name}" in builds}
            beside = (original, self.path("final"))
            for found in measure_together(team.told(texts), original=beside, variants=missing, world=team):
                build = builds.get(f"measure-{found.name}")
                if build is not None and team.speaks:
                    results.write(build.path, results_of(found, tokenizer=tokenizer.digest))
                    files.write_json(build.path / "seconds.json", {"seconds": found.seconds})
                    build.summary = found.to_json()

        made = {identity.stage: identity for identity in gates.values()}
        self.stages.append(Stage("measure", made, make, together=True, by_any_number=True))
        return gates

    def _texts(self, config: QuantizeConfig, measure: Measure, tokenizer: Tokenizer) -> list[Text]:
        """Return the texts that variants are measured on, none of which was calibrated on."""
        from llamero.quantize.measure import refuse_what_was_calibrated_on, texts_to_measure_on

        mixtures = {name: self.data[name].path(self.out) for name in measure.validation}
        found = texts_to_measure_on(measure, tokenizer, model=self.path("final"), root=self.root, mixtures=mixtures)
        refuse_what_was_calibrated_on(found, self._calibration(config).sequences)
        return found

    def _text(self, said: str) -> str:
        """Return the digest of a text to measure on; a published data set is named, not digested."""
        published = known.lookup(said.partition(":")[0]) is not None and not (self.root / said).exists()
        return said if published else self._content(said, "text to measure on")

    def _refuse_calibrated(self, files: Mapping[str, str], *, where: str) -> None:
        """Refuse to measure variants on what is calibrated on, under whatever name: contents are compared."""
        config = self.recipe.quantize
        assert config is not None
        read = set(self._calibration_parent(config).values())
        for part in self._calibration_parts(config):
            read |= set(self._files(self._mixture(part.mixture)).values()) if part.mixture is not None else set()
        for role, digest in files.items():
            if digest in read:
                raise LlameroError(
                    f"`{role.removeprefix('text ')}` is calibrated on: what it says of a variant means nothing",
                    where=where,
                    fix="measure variants on another text, or calibrate on another",
                )

    def verdict(self, variant: str) -> Verdict:
        """Return whether a variant is published, once it is measured."""
        config = self.recipe.quantize
        assert config is not None
        found = None
        if variant in self.gates:
            found = Measured.from_json(artifact.read(self.gates[variant].path(self.out)).summary)
        return judge(found, max_kl=config.max_kl, anyway=config.publish_anyway)

    @property
    def faults(self) -> dict[str, Verdict]:
        """Return the verdicts on variants with which something is wrong, once all are measured."""
        named = self.recipe.quantize.variants if self.recipe.quantize else ()
        verdicts = {name: self.verdict(name) for name in named}
        return {name: verdict for name, verdict in verdicts.items() if verdict.reason is not None}

    # -- evaluation

    def _plan_evaluation(self) -> list[Identity]:
        return [self._plan_measurement(task, name) for task in self.recipe.evaluate for name in self._measured(task)]

    def _measured(self, task: EvaluateConfig) -> list[str]:
        variants = list(self.recipe.quantize.variants) if self.recipe.quantize else []
        names: list[str] = []
        for model in task.models:
            names += variants if model == "variants" else [self._own_name(model)]
        return list(dict.fromkeys(names))

    def _own_name(self, model: str) -> str:
        """Return the stage that `base` or `final` stands for; a base that the user brought stays `base`."""
        if model not in ("base", "final"):
            return model
        same = [stage.name for stage in self.recipe.train if self.models[stage.name] is self.models[model]]
        return same[0] if same else "base"

    def _plan_measurement(self, task: EvaluateConfig, name: str) -> Identity:
        config = {"task": task.decides(), "model": name, "template": self.recipe.template}
        parents = {"model": self._model_digest(name)}
        parents |= {role: self._content(path, f"{role} of {task.tasks}") for role, path in task.files.items()}
        parents |= {f"mixture {mixture}": self.data[mixture].digest for mixture in task.mixtures}
        variant = self.recipe.quantize is not None and name in self.recipe.quantize.variants
        if variant:
            self._refuse_calibrated(parents, where=f"evaluate: {task.tasks}")
            parents["reference"] = self._model_digest("final")
        identity = Identity("evaluation", f"evaluate-{task.label}-{name}", config, parents)

        def make(builds: Builds) -> None:
            from llamero.evaluate.run import run

            build = builds[identity.stage]
            found = run(
                task,
                model=self.path(name),
                name=name,
                template=self.recipe.template,
                root=self.root,
                reference=self.path("final") if variant else None,
                mixtures={name: identity.path(self.out) for name, identity in self.data.items()},
                work=build.path,
            )
            results.write(build.path, found)
            build.summary = {"results": len(found)}

        wanted = (lambda: self.verdict(name).published) if variant else (lambda: True)
        self.stages.append(Stage(identity.stage, {identity.stage: identity}, make, wanted=wanted))
        return identity

    # -- release

    def _plan_release(self) -> Identity | None:
        recipe = self.recipe
        publish = recipe.publish
        if publish is None:
            return None
        config: dict[str, Any] = {"publish": publish.model_dump(mode="json"), "name": recipe.name}
        if recipe.quantize and self.gates:
            config["gate"] = recipe.quantize.model_dump(mode="json", include={"max_kl", "publish_anyway"})
        made = [identity.digest for stage in self.stages for identity in stage.identities.values()]
        parents = {str(number): digest for number, digest in enumerate(made)}
        parents |= {name: self._model_digest(name) for name in self.models}
        identity = Identity("release", "release", config, parents)

        def make(builds: Builds) -> None:
            from llamero.publish.run import ReleaseInputs, run

            build = builds["release"]
            faults = self.faults
            variants = recipe.quantize.variants if recipe.quantize else ()
            published = [name for name in variants if name not in faults or faults[name].published]
            inputs = ReleaseInputs(
                name=recipe.name,
                recipe=recipe.model_dump(mode="json", exclude_defaults=True, exclude={"parallel"}),
                base=recipe.base if isinstance(recipe.base, str) else "trained from scratch",
                template=recipe.template,
                model=self._artifact("final"),
                stages=[self._artifact(stage.name) for stage in recipe.train],
                data=[artifact.read(identity.path(self.out)) for identity in self.data.values()],
                variants=[self._artifact(name) for name in published],
                results=[each for each in self.all_results() if each.model in published or each.model not in variants],
                base_on_hub=self._base_is_on_the_hub,
                gate=self._gate(),
            )
            build.summary = run(publish, inputs, build.path)

        return self._add("release", identity, make)

    def _gate(self) -> Gate | None:
        """Return what the card says of the variants that are far from the original."""
        from llamero.publish.release import Gate, Withheld

        if self.recipe.quantize is None or not self.gates:
            return None
        withheld, anyway = [], {}
        for name, verdict in self.faults.items():
            if verdict.published:
                anyway[name] = str(verdict.reason)
                continue
            found = Measured.from_json(artifact.read(self.gates[name].path(self.out)).summary)
            kl = {reading.text: reading.kl for reading in found.readings if reading.kl is not None}
            size = self._artifact(name).summary["size_bytes"]
            withheld.append(Withheld(name, size, str(verdict.reason), kl))
        return Gate(self.recipe.quantize.max_kl, tuple(withheld), anyway)

    def _artifact(self, name: str) -> Artifact:
        found = self.models[name]
        if isinstance(found, Identity):
            return artifact.read(found.path(self.out))
        return Artifact(found, "model", name, self._digest(found), {}, {}, {})

    def all_results(self) -> list[results.Result]:
        """Return every measurement, in the recipe's order."""
        made = [identity.path(self.out) for identity in self.measurements if artifact.find(self.out, identity)]
        return [result for path in made for result in results.read(path)]

    # -- shared

    def _content(self, path: str, what: str) -> str:
        """Return the digest of a file that the recipe names."""
        place = self.root / path
        if not place.exists():
            raise LlameroError(
                f"{what}: no such file or directory", where=place, fix="paths are relative to the recipe's directory"
            )
        return self._digest(place)

    def _model_digest(self, name: str) -> str:
        found = self.models[name]
        return self._digest(found) if isinstance(found, Path) else found.digest

    def _add(
        self, name: str, identity: Identity, make: Callable[[Builds], None], *, together: bool = False
    ) -> Identity:
        self.stages.append(Stage(name, {name: identity}, make, together))
        return identity


def _memory(out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    return out / ".digests.json"


def run(
    recipe: Recipe,
    *,
    root: Path,
    out: Path,
    datasets: Collection[str] | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Outcome:
    """Make everything that a recipe asks for and that is not there yet.

    Args:
        recipe: What to make.
        root: Directory that its relative paths start from.
        out: Run directory; artifacts stand in it under their digests.
        datasets: Mixtures to make and nothing else.
        on_row: Told of every artifact as it is done.
    """
    if world.rank():
        return _help(Plan(recipe, root, out, datasets), out)
    with artifact.alone_in(out):
        plan = Plan(recipe, root, out, datasets)
        _refuse_other_processes(plan)
        _refuse_absent_judges(plan)
        rows: list[Row] = []
        for stage in plan.stages:
            for row in _make(stage, out):
                rows.append(row)
                on_row(row)
        release = None if plan.release is None else _point(out / "release", plan.release.path(out))
        model = plan.path("final") if "final" in plan.models else None
        if release is not None:
            model = release / recipe.name
        return Outcome(rows, release, model, plan.all_results(), plan.left_out, plan.faults)


def _refuse_other_processes(plan: Plan) -> None:
    """Refuse to train with other than the processes that the recipe asks for; alone one can make all the rest.

    Data is made by the first of however many there are.
    """
    if plan.datasets is not None:
        return
    trains = any(stage.together and not stage.by_any_number and _missing(stage, plan.out) for stage in plan.stages)
    if trains or world.size() > 1:
        world.refuse_other_size(plan.recipe.parallel.gpus)


def _refuse_absent_judges(plan: Plan) -> None:
    """Refuse to train for days towards a judge that will not be paid."""
    identities = [identity for stage in plan.stages for identity in stage.identities.values()]
    missing = [each.stage for each in identities if artifact.find(plan.out, each) is None]
    for task in plan.recipe.evaluate:
        if isinstance(task, MtBenchTask) and any(name.startswith(f"evaluate-{task.label}-") for name in missing):
            task.endpoint()


def _help(plan: Plan, out: Path) -> Outcome:
    """Do the part of a process that is not the first: take part in training and quantizing, wait for all else."""
    _refuse_other_processes(plan)
    rows = []
    for stage in plan.stages:
        missing = _missing(stage, out)
        if missing and stage.together:
            stage.make({name: Build(artifact.partial(out, identity)) for name, identity in missing.items()})
        while _missing(stage, out):
            time.sleep(0.2)
        rows += [Row(name, "kept", 0.0, identity.path(out)) for name, identity in stage.identities.items()]
    return Outcome(rows, None, None, ())


def _missing(stage: Stage, out: Path) -> dict[str, Identity]:
    missing = {name: i for name, i in stage.identities.items() if artifact.find(out, i) is None}
    return missing if missing and stage.wanted() else {}


def _make(stage: Stage, out: Path) -> list[Row]:
    missing = _missing(stage, out)
    began = time.monotonic()
    if missing:
        with ExitStack() as stack:
            stage.make({name: stack.enter_context(artifact.build(out, i)) for name, i in missing.items()})
    if not _missing(stage, out):
        for path in stage.passing:
            shutil.rmtree(path, ignore_errors=True)
    seconds = (time.monotonic() - began) / max(1, len(missing))
    return [
        Row(name, "made" if name in missing else "kept", seconds if name in missing else 0.0, identity.path(out))
        for name, identity in stage.identities.items()
        if artifact.find(out, identity)
    ]


def _point(link: Path, target: Path) -> Path:
    """Let `release` in the run directory lead to the newest one."""
    beside = link.with_name(f".{link.name}.new")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target.name)
    beside.replace(link)
    return link

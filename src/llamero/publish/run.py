"""publish: finished artifacts in, a directory of repositories with their cards out."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from llamero.core import files
from llamero.engine.curves import loss_curve
from llamero.engine.radar import radar
from llamero.publish.card import PICTURE, Cards, read_prompt, read_shape
from llamero.publish.picture import kl_against_size
from llamero.publish.place import CHECKSUMS, place_model, write_checksums
from llamero.publish.release import ReleaseInputs

if TYPE_CHECKING:
    from pathlib import Path

    from llamero.publish.config import PublishConfig

__all__ = ["ReleaseInputs", "run"]

CARD = "README.md"
MT_BENCH_HIGHEST = 10


def run(config: PublishConfig, inputs: ReleaseInputs, out: Path) -> dict[str, Any]:
    """Write a release and return what is in it.

    The model goes to `<name>`, quantized files to `<name>-GPTQ/<variant>`, each of which is a branch on the hub.
    The same inputs give the same bytes.

    Args:
        config: What the recipe says of its publication.
        inputs: Finished artifacts and results.
        out: Release directory; what an earlier run left in it under these names is replaced.
    """
    stages = inputs.trained
    curves = {stage.name: f"loss-{stage.name}.png" for stage in stages}
    path = inputs.model.path
    cards = Cards(config, inputs, read_shape(path), read_prompt(path, inputs.template), curves)
    names = [inputs.name, *([cards.quantized_name] if inputs.variants else [])]
    for name in names:
        if (out / name).exists():
            shutil.rmtree(out / name)

    place_model(path, out / inputs.name, sampling=config.sampling)
    for stage in stages:
        metrics, picture = stage.artifact.path / "metrics.jsonl", out / inputs.name / curves[stage.name]
        loss_curve(metrics, picture, f"{inputs.name}: stage {stage.name}")
    for picture, models in cards.radars.items():
        categories = list(dict.fromkeys(category for scores in models.values() for category in scores))
        title = f"{inputs.name}: MT-Bench by category"
        radar(models, out / inputs.name / picture, title, categories=categories, highest=MT_BENCH_HIGHEST)
    files.write_atomically(out / inputs.name / CARD, cards.model())
    if inputs.variants:
        for artifact, variant in zip(inputs.variants, inputs.quantized, strict=True):
            place_model(artifact.path, out / cards.quantized_name / variant.name, sampling=config.sampling)
        if cards.points:
            limit, picture = inputs.gate.max_kl if inputs.gate else None, out / cards.quantized_name / PICTURE
            kl_against_size(cards.points, picture, f"{cards.quantized_name}: KL against size", max_kl=limit)
        files.write_atomically(out / cards.quantized_name / CARD, cards.quantized())

    found = write_checksums(out, names)
    return {
        "repositories": names,
        "cards": [f"{name}/{CARD}" for name in names],
        "checksums": CHECKSUMS,
        "files": len(found),
        "size_bytes": sum(file.stat().st_size for file in found),
    }

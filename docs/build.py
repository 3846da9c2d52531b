"""Writes docs/recipe.md, the reference of every recipe key, from the schema: `make docs`."""

import sys
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llamero.recipe.load import models_within
from llamero.recipe.schema import Recipe

HEAD = """\
# The recipe, key by key

Made from the schema by `make docs`; a test keeps it true. A recipe is checked whole before anything runs
(`llamero check RECIPE`), unknown keys are refused, and any key can be overridden: `--set train.sft.lr=1e-5`
(a list item goes by its name or its number). Paths are relative to the recipe.
"""


def reference() -> str:
    """Return the page."""
    models = sorted(models_within(Recipe) - {Recipe}, key=lambda model: (model.__module__, model.__name__))
    return HEAD + "".join(_section(model) for model in [Recipe, *models])


def _section(model: type[BaseModel]) -> str:
    rows = "".join(_row(name, field) for name, field in model.model_fields.items())
    about = " ".join((model.__doc__ or "").split())
    return f"\n## {model.__name__}\n\n{about}\n\n| key | default | what |\n|---|---|---|\n{rows}"


def _row(name: str, field: FieldInfo) -> str:
    if field.is_required():
        default = "required"
    else:
        value = field.get_default(call_default_factory=True)
        default = "see below" if isinstance(value, BaseModel) else f"`{value}`"
    kinds = ", ".join(f"[{kind.__name__}](#{kind.__name__.lower()})" for kind in _direct(field.annotation))
    about = " ".join((field.description or "").split())
    return f"| `{name}` | {default} | {about}{' → ' + kinds if kinds else ''} |\n"


def _direct(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for argument in typing.get_args(annotation) for kind in _direct(argument)]


if __name__ == "__main__":
    page = Path(__file__).parent / "recipe.md"
    page.write_text(reference())
    sys.stdout.write(f"{page}\n")

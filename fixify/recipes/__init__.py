"""Recipes: YAML files that a person copies and edits, one a way to retrofit.

    from fixify.recipes import list_recipes, read_recipe

    recipe = read_recipe("retrofit", ["finetune.lr=3e-4"])
    fixify.convert("model.pth", **recipe.convert)

Names are imported when they are first used: listing the recipes, or completing their names, needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "Recipe": "fixify.recipes.reading",
    "RecipeError": "fixify.recipes.parsing",
    "ShippedRecipe": "fixify.recipes.shipped",
    "find_recipe": "fixify.recipes.shipped",
    "list_recipes": "fixify.recipes.shipped",
    "read_recipe": "fixify.recipes.reading",
    "train_recipe": "fixify.recipes.running",
}

__all__ = [*_EXPORTS]  # noqa: PLE0604, RUF100

if TYPE_CHECKING:
    from fixify.recipes.parsing import RecipeError as RecipeError
    from fixify.recipes.reading import Recipe as Recipe
    from fixify.recipes.reading import read_recipe as read_recipe
    from fixify.recipes.running import train_recipe as train_recipe
    from fixify.recipes.shipped import ShippedRecipe as ShippedRecipe
    from fixify.recipes.shipped import find_recipe as find_recipe
    from fixify.recipes.shipped import list_recipes as list_recipes


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fixify.recipes' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

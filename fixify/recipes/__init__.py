"""Recipes: YAML files that a person copies and edits, one per paper experiment and per way to retrofit.

    from fixify.recipes import list_recipes, read_recipe

    recipe = read_recipe("retrofit", ["finetune.lr=3e-4"])
    fixify.finetune("model.fixed.safetensors", "data", options=recipe.finetune)

The names are imported when they are first used: listing the recipes, or completing their names, needs no torch.
"""

from typing import TYPE_CHECKING

from fixify._lazy import lazy

_EXPORTS = {
    "Recipe": "fixify.recipes.reading",
    "RecipeError": "fixify.recipes.parsing",
    "ShippedRecipe": "fixify.recipes.shipped",
    "find_recipe": "fixify.recipes.shipped",
    "list_recipes": "fixify.recipes.shipped",
    "read_recipe": "fixify.recipes.reading",
    "train": "fixify.recipes.running",
}

__all__ = [*_EXPORTS]  # noqa: PLE0604, RUF100
__getattr__, __dir__ = lazy(__name__, _EXPORTS)

if TYPE_CHECKING:
    from fixify.recipes.parsing import RecipeError as RecipeError
    from fixify.recipes.reading import Recipe as Recipe
    from fixify.recipes.reading import read_recipe as read_recipe
    from fixify.recipes.running import train as train
    from fixify.recipes.shipped import ShippedRecipe as ShippedRecipe
    from fixify.recipes.shipped import find_recipe as find_recipe
    from fixify.recipes.shipped import list_recipes as list_recipes

"""`fixify train RECIPE` where the recipe is of a language model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fixify.cli.output import Output

if TYPE_CHECKING:
    from fixify.language.options import LanguageOptions
    from fixify.recipes.reading import Recipe


def refuse_image_options(given: Mapping[str, object]) -> None:
    """Refuse options that are about images.

    Args:
        given: By their name on the command line; None, False or empty where they were not given.

    Raises:
        UsageError: one was given.
    """
    from fixify.errors import UsageError

    wrong = [name for name, value in given.items() if value]
    if wrong:
        raise UsageError(f"{wrong[0]} is for images, and the recipe is of a language model.", hint="Leave it out.")


def train_language(
    output: Output,
    recipe: Recipe,
    folder: Path,
    *,
    machine: Mapping[str, Any],
    compare: bool,
    resume: bool,
    **given: Any,
) -> None:
    """Train as the recipe's `language` section says, with --compare learned words too, and print what came of it.

    Args:
        output: Of the command.
        recipe: With a `language` section.
        folder: Of the run, or of the folders of both.
        machine: Options that suit the machine.
        compare: Whether to train learned words as well.
        resume: Continue what is in the folder.
        given: See `fixify.recipes.running.run_language_recipe`.
    """
    from fixify.cli.language_display import LanguageDisplay
    from fixify.cli.recipe_defaults import run_defaults
    from fixify.errors import UsageError
    from fixify.language.options import LanguageOptions
    from fixify.language.results import read_language_runs
    from fixify.recipes.comparing import FIXED, LEARNED
    from fixify.recipes.running import run_language_recipe
    from fixify.reporting.language_tables import language_table
    from fixify.training import stored_options
    from fixify.training.logging import RUN_FILE

    own = folder / FIXED if compare else folder
    stored = stored_options(own, LanguageOptions) if resume else None
    options: LanguageOptions = run_defaults(output, recipe, "language", stored).replace(**machine)
    runs = {own: options}
    if compare:
        if options.is_learned:
            raise UsageError(
                f"The recipe's words are {options.words}; what they are compared with has to be fixed.",
                hint="Add --set language.words=pmi, or word2vec, orthogonal, hadamard.",
            )
        runs = {folder / LEARNED: options.with_learned_words(), own: options}
    for path, chosen in runs.items():
        if compare:
            output.say(f"{path.name}, {list(runs).index(path) + 1} of {len(runs)} runs", style="bold")
        goes_on = resume and (path / RUN_FILE).exists()
        with LanguageDisplay(output) as tell:
            run_language_recipe(recipe, path, chosen, resume=goes_on, on_event=tell, **given)
    found = read_language_runs(list(runs))
    output.result({"runs": [run.to_dict() for run in found]}, language_table(found))
    output.say(f"checkpoint: {own / 'best.safetensors'}")

"""From a recipe to a run: `fixify train RECIPE`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fixify.errors import OutputExistsError, UsageError
from fixify.language import LanguageOptions, LanguageResult, run_language
from fixify.recipes.reading import Recipe, section_of
from fixify.training import FinetuneOptions, FinetuneResult, Listener, TrainOptions, finetune, train_from_scratch
from fixify.training.api import is_restarted_run
from fixify.training.run_folder import RUN_FILE


def run_section(recipe: Recipe) -> str:
    """The section that `fixify train` follows: "train" if the recipe has it, else "language", else "finetune".

    Raises:
        UsageError: it has none of them, or an override is about another section.
    """
    found = [section for section in ("train", "language", "finetune") if getattr(recipe, section) is not None]
    section = found[0] if found else "train"
    section_of(recipe, section)
    return section


def train_recipe(
    recipe: Recipe,
    out: Path | str,
    options: FinetuneOptions | None = None,
    *,
    data: str | None = None,
    resume: bool = False,
    force: bool = False,
    download: bool = False,
    class_map: Path | str | None = None,
    command: str | None = None,
    on_event: Listener | None = None,
) -> FinetuneResult:
    """Train as a recipe says: from scratch, or, if it has a `finetune` section and names a checkpoint, that.

    Args:
        recipe: See `fixify.recipes.read_recipe`. If a run wrote it, its inputs have to be what they were.
        out: Folder of the run.
        options: Instead of the recipe's, for example `recipe.train.replace(head="learned")`.
        data: Instead of the recipe's data; it may then be any.
        resume: Continue the run in `out`.
        force: Replace the run in `out`.
        download: Whether `torch/...` data may be downloaded.
        class_map: Instead of the recipe's.
        command: What was typed, for the record.
        on_event: Told what happens.

    Raises:
        UsageError: the recipe names no data, or no checkpoint to finetune.
        FixifyError: see `fixify.training.train_from_scratch` and `fixify.training.finetune`.
    """
    section = run_section(recipe)
    if options is None:
        options = section_of(recipe, section)
    name = data if data is not None else recipe.data
    if name is None:
        raise UsageError(f"The recipe {recipe.name} names no data.", hint="Add --data DATA, or a line `data: DATA`.")
    recorded = {key: was for key, was in recipe.recorded.items() if data is None or not key.endswith("_listing")}
    given: dict[str, Any] = {
        "against": recipe.against,
        "distill": recipe.distill,
        "resume": resume,
        "force": force,
        "download": download,
        "class_map": recipe.class_map if class_map is None else class_map,
        "command": command,
        "recorded": recorded,
        "on_event": on_event,
    }
    if isinstance(options, TrainOptions):
        return train_from_scratch(name, out, options, **given)
    if recipe.checkpoint is None:
        raise UsageError(
            f"The recipe {recipe.name} names no checkpoint to finetune.",
            hint=f"Say which: fixify finetune SLIM --data {name} --recipe {recipe.name}",
        )
    return finetune(recipe.checkpoint, name, out, options, **given)


def run_language_recipe(
    recipe: Recipe, out: Path | str, options: LanguageOptions | None = None, *, data: str | None = None, **given: Any
) -> LanguageResult:
    """Train a language model as a recipe says.

    Args:
        recipe: With a `language` section. If a run wrote it, its text has to be what it was.
        out: Folder of the run.
        options: Instead of the recipe's.
        data: Instead of the recipe's; it may then be any.
        given: What else `fixify.language.run_language` takes.

    Raises:
        UsageError: the recipe names no data, or has no such section.
        FixifyError: see `fixify.language.run_language`.
    """
    if options is None:
        options = section_of(recipe, "language")
    name = data if data is not None else recipe.data
    if name is None:
        raise UsageError(f"The recipe {recipe.name} names no data.", hint="Add --data DATA, or a line `data: DATA`.")
    return run_language(name, out, options, recorded=recipe.recorded if data is None else None, **given)


# Learned against fixed, as in the paper: the runs of one recipe that differ in nothing but the head.


FIXED, LEARNED = "fixed", "learned"


def compared(options: TrainOptions, scales: Sequence[float] = ()) -> dict[str, TrainOptions]:
    """The options of each run, by the name of its folder, in the order in which they are trained.

    Args:
        options: Of the run with the fixed head; the others have its seed and budget.
        scales: Values at which alpha is held, one more run each (the paper's figure 3).

    Raises:
        UsageError: the options are those of a learned head, or a scale is not positive or given twice.
    """
    if options.head == "learned":
        raise UsageError(
            "The recipe trains a learned head; what it is compared with has to be a fixed one.",
            hint="Add --set train.head=auto, or hadamard, orthogonal, simplex.",
        )
    found = {FIXED: options, LEARNED: options.replace(head="learned")}
    for scale in scales:
        name = f"scale-{scale:g}"
        if name in found:
            raise UsageError(f"The scale {scale:g} is given twice.")
        found[name] = options.replace(head_scale=scale, head_fixed_scale=True)
    return found


def compare_recipe(
    recipe: Recipe,
    out: Path | str,
    runs: dict[str, TrainOptions],
    *,
    resume: bool = False,
    force: bool = False,
    on_run: Callable[[str], object] | None = None,
    **given: Any,
) -> dict[str, FinetuneResult]:
    """Train one run after the other, each in a folder of its own.

    Args:
        recipe: See `train_recipe`.
        out: The folder of these folders.
        runs: See `compared`.
        resume: Continue: what is done stays, what was stopped goes on exactly, and what had not begun begins.
        force: Replace runs in these folders.
        on_run: Told the name of each run before it begins.
        given: What else `train_recipe` takes.

    Raises:
        OutputExistsError: one of them exists; told before any is trained.
        FixifyError: see `train_recipe`.
    """
    folders = {name: Path(out) / name for name in runs}
    begun = {name for name, folder in folders.items() if (folder / RUN_FILE).exists()}
    others = {name for name in begun if not is_restarted_run(folders[name])}
    if others and not (resume or force):
        raise OutputExistsError(
            f"There is a run in {folders[min(others)]} already.",
            hint="Go on with --resume, choose another folder with -o, or replace it with --force.",
        )
    results = {}
    for name, options in runs.items():
        if on_run is not None:
            on_run(name)
        results[name] = train_recipe(
            recipe, folders[name], options, resume=resume and name in begun, force=force, **given
        )
    return results

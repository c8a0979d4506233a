"""Follow a recipe: one run, or a comparison of learned and fixed classifiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fixify._options import CheckedOptions
from fixify.errors import OutputExistsError, UsageError
from fixify.language.options import LanguageOptions
from fixify.language.run import LanguageResult, run_language
from fixify.recipes.reading import Recipe, read_recipe, section_of
from fixify.recipes.schema import SECTIONS
from fixify.training.api import finetune, is_restarted_run, train_from_scratch
from fixify.training.options import FinetuneOptions, TrainOptions
from fixify.training.run import FinetuneResult
from fixify.training.run_folder import RUN_FILE, stored_options

FIXED, LEARNED = "fixed", "learned"

_Options = TypeVar("_Options", bound=CheckedOptions)


def train(
    recipe: Recipe | str | Path,
    out: Path | str | None = None,
    options: FinetuneOptions | LanguageOptions | None = None,
    *,
    data: str | Path | None = None,
    class_map: Path | str | None = None,
    resume: bool = False,
    force: bool = False,
    download: bool = False,
    command: str | None = None,
    on_event: Callable[[Any], object] | None = None,
    **changes: Any,
) -> FinetuneResult | LanguageResult:
    """Train as a recipe says: a network from scratch, a language model, or a slim checkpoint that it names.

    Args:
        recipe: A recipe, its name or its file. If a run wrote it, the inputs have to be what they were.
        out: Folder of the run; None names it after the recipe.
        options: Instead of the recipe's.
        data: Instead of the recipe's data; may then differ from what a run recorded.
        class_map: Instead of the recipe's file with the label of each class.
        resume: Resume the run in `out`, with the options that it was started with.
        force: Replace the run in `out`.
        download: Whether `torch/...` data may be downloaded.
        command: The command that was typed, for the record.
        on_event: Called with each event.
        changes: Options to change, for example `epochs=3, device="cpu"`.

    Raises:
        UsageError: the recipe names no data, or no checkpoint to finetune; or an option is for images and the recipe
            for a language model.
        FixifyError: see `fixify.finetune`, `fixify.training.train_from_scratch` and `fixify.language.run_language`.
    """
    chosen = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    folder = default_folder(chosen.name) if out is None else Path(out)
    if options is None:
        options = run_options(chosen, folder, resume=resume)[0]
    options = options.replace(**changes)
    name = str(data) if data is not None else chosen.data
    if name is None:
        raise UsageError(f"The recipe {chosen.name} names no data.", hint="Add --data DATA, or a line `data: DATA`.")
    recorded = {key: was for key, was in chosen.recorded.items() if data is None or not key.endswith("_listing")}
    given: dict[str, Any] = {"resume": resume, "force": force, "command": command, "on_event": on_event}
    if isinstance(options, LanguageOptions):
        refuse_image_options({"download": download, "class_map": class_map})
        return run_language(name, folder, options, recorded=chosen.recorded if data is None else None, **given)
    given |= {
        "against": chosen.against,
        "distill": chosen.distill,
        "download": download,
        "class_map": chosen.class_map if class_map is None else class_map,
        "recorded": recorded,
    }
    if isinstance(options, TrainOptions):
        return train_from_scratch(name, folder, options, **given)
    if chosen.checkpoint is None:
        raise UsageError(
            f"The recipe {chosen.name} names no checkpoint to finetune.",
            hint=f"Name one: fixify finetune SLIM --data {name} --recipe {chosen.name}",
        )
    # A recipe names all that a run learns from.
    given["distill"] = chosen.distill or False
    return finetune(chosen.checkpoint, name, folder, options, **given)


def default_folder(recipe: str) -> Path:
    """Name the folder of a run after its recipe.

    >>> [str(default_folder(name)) for name in ("resnet56", "my/resnet56.yaml", "runs/first/recipe.yaml")]
    ['resnet56', 'resnet56', 'first-again']
    """
    path = Path(recipe)
    if path.name == "recipe.yaml":
        return Path(f"{path.resolve().parent.name}-again")
    return Path(path.stem if path.suffix in (".yaml", ".yml") else path.name)


def run_section(recipe: Recipe) -> str:
    """Return the section that `train` follows: "train" if the recipe has it, else "language", else "finetune".

    Raises:
        UsageError: it has none of them, or an override is for another section.
    """
    found = [section for section in ("train", "language", "finetune") if getattr(recipe, section) is not None]
    section = found[0] if found else "train"
    section_of(recipe, section)
    return section


def run_options(recipe: Recipe, folder: Path, *, resume: bool = False) -> tuple[Any, str | None]:
    """Return the options that a run starts with, and a note if it does not follow the recipe.

    See `starting_options`, for the section that `train` follows.
    """
    section = run_section(recipe)
    return starting_options(recipe, section, stored_options(folder, SECTIONS[section]) if resume else None)


def starting_options(recipe: Recipe, section: str, stored: _Options | None) -> tuple[_Options, str | None]:
    """Return the options that a run starts with, before those of the command line.

    Args:
        recipe: The recipe.
        section: "finetune", "train" or "language".
        stored: The options of the run that is resumed. They take precedence over the recipe, which may have been
            edited since, but not over `--set`: then resuming refuses and names the difference.

    Returns:
        The options; and a sentence if the resumed run does not follow the recipe, else None.

    Raises:
        UsageError: the recipe has no such section.
    """
    wanted: _Options = section_of(recipe, section)
    if isinstance(wanted, FinetuneOptions) and wanted.lr is not None and wanted.last_block_epochs is None:
        # A recipe with a rate means what it meant before this default existed; so do those that runs recorded.
        wanted = wanted.replace(last_block_epochs=0)
    if stored is None:
        return wanted, None
    start = stored.replace(**{option: getattr(wanted, option) for _, option in recipe.overridden})
    was, now = start.recipe(), wanted.recipe()
    different = [f"{name} {now[name]} (not {was[name]})" for name in now if now[name] != was[name]]
    if not different:
        return start, None
    return start, f"the run continues with its own options; the recipe {recipe.name} now has {', '.join(different)}."


def refuse_image_options(given: Mapping[str, object]) -> None:
    """Refuse options that concern images, for a language model.

    Args:
        given: Options by name; None, False or empty if they were not given.

    Raises:
        UsageError: one was given.
    """
    if wrong := [name for name, value in given.items() if value]:
        raise UsageError(f"{wrong[0]} is for images, and the recipe is for a language model.", hint="Drop it.")


# Learned against fixed, as in the paper: runs of one recipe that differ in the classifier alone.


@dataclass(frozen=True)
class PlannedComparison:
    """Runs of one recipe with a learned and a fixed classifier, before they are trained.

    Attributes:
        recipe: The recipe.
        folder: The folder of the runs' folders.
        runs: The options of each run, by the name of its folder, in the order of training.
        note: A sentence if resumed runs do not follow the recipe any more, else None.
    """

    recipe: Recipe
    folder: Path
    runs: Mapping[str, TrainOptions | LanguageOptions]
    note: str | None = None

    @property
    def folders(self) -> list[Path]:
        """The runs' folders: the learned one, the fixed one, then those with a held alpha."""
        held = [name for name in self.runs if name not in (LEARNED, FIXED)]
        return [self.folder / name for name in (LEARNED, FIXED, *held)]

    def train(
        self,
        *,
        resume: bool = False,
        force: bool = False,
        on_run: Callable[[str], object] | None = None,
        **given: Any,
    ) -> dict[str, FinetuneResult | LanguageResult]:
        """Train one run after the other, each in a folder of its own.

        Args:
            resume: Runs that are done stay, a stopped one is resumed exactly, and the others are trained.
            force: Replace runs in these folders.
            on_run: Called with the name of each run before it begins.
            given: What else `train` takes.

        Raises:
            OutputExistsError: one of them exists; raised before any is trained.
            FixifyError: see `train`.
        """
        folders = {name: self.folder / name for name in self.runs}
        begun = {name for name, folder in folders.items() if (folder / RUN_FILE).exists()}
        others = [name for name in folders if name in begun and not is_restarted_run(folders[name])]
        if others and not (resume or force):
            raise OutputExistsError(
                f"There is a run in {folders[others[0]]} already.",
                hint="Add --resume to continue it or --force to replace it, or choose another folder with -o.",
            )
        results = {}
        for name, options in self.runs.items():
            if on_run is not None:
                on_run(name)
            again = resume and name in begun
            results[name] = train(self.recipe, folders[name], options, resume=again, force=force, **given)
        return results


def plan_comparison(
    recipe: Recipe, out: Path | str | None = None, scales: Sequence[float] = (), *, resume: bool = False, **changes: Any
) -> PlannedComparison:
    """Plan the runs that compare a fixed classifier with a learned one: same seed, same budget.

    Args:
        recipe: A recipe with a `train` or a `language` section.
        out: The folder of the runs' folders; None names it after the recipe.
        scales: Values at which alpha is held, for one more run each (the paper's figure 3).
        resume: Take the options of the runs that are there.
        changes: Options to change.

    Raises:
        UsageError: the recipe trains no classifier from scratch or only a learned one, or a scale is not positive or
            given twice.
    """
    folder = default_folder(recipe.name) if out is None else Path(out)
    section = run_section(recipe)
    if section == "finetune":
        raise UsageError(
            f"A comparison trains from scratch, and {recipe.name} has no train: or language: section.",
            hint="Drop --compare.",
        )
    # The others have the options of the fixed run, except for the head.
    options, note = run_options(recipe, folder / FIXED, resume=resume)
    options = options.replace(**changes)
    if isinstance(options, LanguageOptions):
        refuse_image_options({"scales": scales})
        return PlannedComparison(recipe, folder, _compared_words(options), note)
    return PlannedComparison(recipe, folder, compared(options, scales), note)


def compared(options: TrainOptions, scales: Sequence[float] = ()) -> dict[str, TrainOptions]:
    """Return the options of each run of a comparison, by the name of its folder; see `plan_comparison`.

    >>> list(compared(TrainOptions.create(model="resnet18"), [0.1, 10]))
    ['fixed', 'learned', 'scale-0.1', 'scale-10']
    """
    if options.head == "learned":
        raise UsageError(
            "The recipe trains a learned head, and a comparison needs a fixed one.",
            hint="Add --set train.head=auto, or hadamard, orthogonal, simplex.",
        )
    # A margin is one of cosines, which a learned classifier does not have.
    found = {FIXED: options, LEARNED: options.replace(head="learned", margin=None)}
    for scale in scales:
        name = f"scale-{scale:g}"
        if name in found:
            raise UsageError(f"The scale {scale:g} is given twice.")
        found[name] = options.replace(head_scale=scale, head_fixed_scale=True)
    return found


def _compared_words(options: LanguageOptions) -> dict[str, LanguageOptions]:
    if options.is_learned:
        raise UsageError(
            f"The recipe's words are {options.words}, and a comparison needs fixed ones.",
            hint="Add --set language.words=pmi, or word2vec, orthogonal, hadamard.",
        )
    return {LEARNED: options.with_learned_words(), FIXED: options}

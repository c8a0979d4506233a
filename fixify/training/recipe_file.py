"""recipe.yaml in the folder of a run: what repeats it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from fixify import __version__
from fixify.errors import TrainingError
from fixify.training import distributed
from fixify.training.options import FinetuneOptions

RECORDED = ("checkpoint_sha256", "train_listing", "val_listing")
"""What a recipe records of its inputs: SHA-256 of the source checkpoint, and of the lists of images."""
IMAGES_A_STEP = "images_a_step"
"""It also records the images that all processes together had in a step: one process alone would train otherwise."""

_INPUTS = {
    "checkpoint_sha256": "The checkpoint is",
    "train_listing": "The training images are",
    "val_listing": "The validation images are",
}
_HEADER = f"""\
# Every option of the run in this folder. Written by fixify {__version__}, torch {torch.__version__},
# timm {timm.__version__}.
# To repeat it, into another folder:
#   fixify train recipe.yaml -o FOLDER
"""


def recipe_text(options: FinetuneOptions, facts: Mapping[str, Any], entries: Mapping[str, Any]) -> str:
    """The recipe of a run.

    Args:
        options: How.
        facts: What it is of.
        entries: Names and files as they were given: data, checkpoint, against, distill. Files become absolute paths:
            this is a file of this machine, unlike a checkpoint.
    """
    what = " on ".join(str(facts[key]) for key in ("checkpoint", "data") if key in facts)
    kind = "A finetuning run of" if options.section == "finetune" else f"{options.model} trained from scratch on"  # type: ignore[attr-defined]
    recipe = {
        "description": f"{kind} {what}.",
        **{key: _found(value) for key, value in entries.items() if value is not None},
        "recorded": {
            **{key: facts[key] for key in RECORDED if key in facts},
            IMAGES_A_STEP: options.batch_size * distributed.count(),
        },
        options.section: options.recipe(),
    }
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    return _HEADER + text


def check_recorded(recorded: Mapping[str, Any], facts: Mapping[str, Any], options: FinetuneOptions) -> None:
    """Refuse to repeat a run on other inputs than it had, or with other batches.

    Raises:
        TrainingError: the checkpoint or the images have changed since the recipe was written, or the processes together
            have another number of images in a step.
    """
    processes, together = distributed.count(), recorded.get(IMAGES_A_STEP)
    if together not in (None, options.batch_size * processes):
        fits = together % processes == 0
        raise TrainingError(
            f"The run that wrote this recipe had {together} images in a step, and this would have "
            f"{options.batch_size * processes} ({processes} x {options.batch_size}), so it would not repeat the run.",
            hint=(f"Add --set {options.section}.batch_size={together // processes}, or start" if fits else "Start")
            + f" as many processes with --nproc-per-node; or drop `recorded.{IMAGES_A_STEP}` from the recipe.",
        )
    for key in RECORDED:
        was = recorded.get(key)
        if was is not None and facts.get(key) != was:
            raise TrainingError(
                f"{_INPUTS[key]} not what this recipe recorded, so it would not repeat the run (SHA-256 {was[:12]}... "
                f"then, {str(facts.get(key))[:12]}... now).",
                hint="Bring back what was there; or drop `recorded` from the recipe to train on what is there now.",
            )


def _found(given: Any) -> str:
    path = Path(str(given)).expanduser()
    return str(path.resolve()) if path.exists() else str(given)

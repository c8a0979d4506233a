"""Recipes that are run, and the recipe of a run that repeats it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import fixify
from fixify.errors import TrainingError, UsageError
from fixify.recipes import RecipeError, read_recipe, train_recipe
from fixify.training import FinetuneOptions, finetune

QUICK = {"epochs": 1, "batch_size": 24, "img_size": 32, "no_aug": True}
MACHINE = {"workers": 0, "device": "cpu"}


def write(path: Path, **values: object) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def same(ours: Path, theirs: Path) -> bool:
    first, second = weights_of(ours), weights_of(theirs)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_recipe_trains_from_scratch_and_what_it_leaves_repeats_it(digits: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    recipe = read_recipe(
        write(tmp_path / "mine.yaml", data=str(data), train={"model": "test_resnet", "head": "orthogonal", **QUICK}),
        ["train.lr=0.03"],
    )
    assert recipe.sections == ("train",) and recipe.train is not None and recipe.train.lr == 0.03
    first = train_recipe(recipe, tmp_path / "first", recipe.train.replace(**MACHINE))
    left = read_recipe(tmp_path / "first" / "recipe.yaml")
    assert left.data == str(data) and set(left.recorded) == {"train_listing", "val_listing", "images_a_step"}
    assert left.train is not None and left.train.recipe() == recipe.train.recipe()
    again = train_recipe(left, tmp_path / "again", left.train.replace(**MACHINE))
    assert same(first.last_path, again.last_path)

    Image.new("L", (32, 32)).save(data / "train" / "0" / "another.png")
    with pytest.raises(TrainingError, match="The training images are not what this recipe recorded"):
        train_recipe(left, tmp_path / "changed")
    moved = tmp_path / "moved"
    data.rename(moved)
    with pytest.raises(fixify.FixifyError, match="There is no folder"):
        train_recipe(left, tmp_path / "changed")
    train_recipe(
        left, tmp_path / "changed", left.train.replace(**MACHINE), data=str(moved)
    )  # said: then it may be other


def test_the_recipe_of_a_finetuning_run_repeats_it(digits: Path, tiny: Path, tmp_path: Path) -> None:
    slim = tmp_path / "net.fixed.safetensors"
    fixify.convert(tiny / "learned.pth", slim, num_classes=10)
    first = finetune(slim, str(digits), tmp_path / "first", FinetuneOptions.create(**QUICK, **MACHINE))
    recipe = read_recipe(tmp_path / "first" / "recipe.yaml")
    assert recipe.checkpoint == str(slim) and set(recipe.recorded) >= {"checkpoint_sha256"}
    assert recipe.finetune is not None
    again = train_recipe(recipe, tmp_path / "again", recipe.finetune.replace(**MACHINE))
    assert same(first.last_path, again.last_path)
    half = recipe.finetune.replace(**MACHINE, batch_size=recipe.finetune.batch_size // 2)
    with pytest.raises(TrainingError, match="images per step") as caught:
        train_recipe(recipe, tmp_path / "half", half)
    assert f"--set finetune.batch_size={recipe.finetune.batch_size}" in str(caught.value.hint)
    fixify.convert(tiny / "learned.pth", slim, num_classes=10, seed=1, head="orthogonal", force=True)
    with pytest.raises(TrainingError, match="The checkpoint is not what this recipe recorded"):
        train_recipe(recipe, tmp_path / "changed", recipe.finetune.replace(**MACHINE))


def test_what_a_recipe_lacks_is_named(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "a.yaml", train={"model": "test_resnet"}))
    with pytest.raises(UsageError, match="names no data") as caught:
        train_recipe(recipe, tmp_path / "out")
    assert "--data" in str(caught.value)
    recipe = read_recipe(write(tmp_path / "b.yaml", data="digits", finetune={}))
    with pytest.raises(UsageError, match="names no checkpoint") as caught:
        train_recipe(recipe, tmp_path / "out")
    assert "fixify finetune SLIM --data digits" in str(caught.value)
    recipe = read_recipe(write(tmp_path / "c.yaml", convert={}))
    with pytest.raises(UsageError, match="has no train: section"):
        train_recipe(recipe, tmp_path / "out")
    with pytest.raises(RecipeError, match=r"line 1: train needs model"):
        read_recipe(write(tmp_path / "d.yaml", train={"epochs": 3}))
    with pytest.raises(RecipeError, match=r"recorded\.listing is not an option"):
        read_recipe(write(tmp_path / "e.yaml", recorded={"listing": "x"}, train={"model": "a"}))

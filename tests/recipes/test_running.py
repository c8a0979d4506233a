"""Recipes that are followed, the recipe of a run that repeats it, and learned against fixed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import fixify
from fixify.errors import OutputExistsError, TrainingError, UsageError
from fixify.recipes import RecipeError, read_recipe
from fixify.recipes.running import compared, default_folder, plan_comparison, starting_options
from fixify.reporting.comparison import write_comparison
from fixify.reporting.run_report import report_runs
from fixify.reporting.runs import read_runs
from fixify.training import EpochEnded, Event, FinetuneOptions, TrainOptions

QUICK = {"epochs": 1, "batch_size": 4, "img_size": 32, "no_aug": True}
MACHINE = {"workers": 0, "device": "cpu"}
NETWORK = {"model": "test_resnet", "in_chans": 1, **QUICK}


def write(path: Path, **values: object) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def same(ours: Path, theirs: Path) -> bool:
    first, second = load_file(ours), load_file(theirs)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_recipe_trains_from_scratch_and_what_it_leaves_repeats_it(tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny / "data", data)
    mine = write(tmp_path / "mine.yaml", data=str(data), train={**NETWORK, "head": "orthogonal"})
    first = fixify.train(read_recipe(mine, ["train.lr=0.03"]), tmp_path / "first", **MACHINE)
    left = read_recipe(tmp_path / "first" / "recipe.yaml")
    assert left.data == str(data) and set(left.recorded) == {"train_listing", "val_listing", "images_a_step"}
    assert left.train is not None and (left.train.lr, left.train.head) == (0.03, "orthogonal")
    again = fixify.train(tmp_path / "first" / "recipe.yaml", tmp_path / "again", **MACHINE)
    assert same(first.last_path, again.last_path)

    Image.new("L", (32, 32)).save(data / "train" / "class0" / "another.png")
    with pytest.raises(TrainingError, match="training images"):
        fixify.train(left, tmp_path / "changed")
    data.rename(tmp_path / "moved")
    with pytest.raises(fixify.FixifyError, match=str(data)):
        fixify.train(left, tmp_path / "changed")
    # Other data that is given explicitly may differ from what was recorded.
    fixify.train(left, tmp_path / "changed", data=tmp_path / "moved", **MACHINE)


def test_the_recipe_of_a_finetuning_run_repeats_it(tiny: Path, tmp_path: Path) -> None:
    slim = tmp_path / "net.fixed.safetensors"
    fixify.convert(tiny / "learned.pth", slim)
    first = fixify.finetune(slim, str(tiny / "data"), tmp_path / "first", FinetuneOptions.create(**QUICK, **MACHINE))
    recipe = read_recipe(tmp_path / "first" / "recipe.yaml")
    assert recipe.checkpoint == str(slim) and set(recipe.recorded) >= {"checkpoint_sha256"}
    assert recipe.finetune is not None
    again = fixify.train(recipe, tmp_path / "again", **MACHINE)
    assert same(first.last_path, again.last_path)
    with pytest.raises(TrainingError, match=r"images (in a|per) step") as caught:
        fixify.train(recipe, tmp_path / "half", batch_size=2, **MACHINE)
    assert "finetune.batch_size=4" in str(caught.value.hint)
    fixify.convert(tiny / "learned.pth", slim, seed=1, head="orthogonal", force=True)
    with pytest.raises(TrainingError, match="checkpoint"):
        fixify.train(recipe, tmp_path / "changed", **MACHINE)


def test_what_a_recipe_lacks_is_named(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "a.yaml", train={"model": "test_resnet"}))
    with pytest.raises(UsageError, match=r"a\.yaml.*data") as caught:
        fixify.train(recipe, tmp_path / "out")
    assert "--data" in str(caught.value)
    recipe = read_recipe(write(tmp_path / "b.yaml", data="digits", finetune={}))
    with pytest.raises(UsageError, match=r"b\.yaml.*checkpoint") as caught:
        fixify.train(recipe, tmp_path / "out")
    assert "fixify finetune SLIM --data digits" in str(caught.value)
    with pytest.raises(UsageError, match=r"c\.yaml.*train:.*convert:"):
        fixify.train(write(tmp_path / "c.yaml", convert={}))
    with pytest.raises(UsageError, match="class_map"):
        fixify.train(write(tmp_path / "w.yaml", data="d", language={"words": "pmi"}), tmp_path / "out", class_map="m")
    with pytest.raises(RecipeError, match=r"line 1: train .*model"):
        read_recipe(write(tmp_path / "d.yaml", train={"epochs": 3}))
    with pytest.raises(RecipeError, match=r"recorded\.listing"):
        read_recipe(write(tmp_path / "e.yaml", recorded={"listing": "x"}, train={"model": "a"}))


def test_the_folder_is_named_after_the_recipe() -> None:
    named = {"resnet56": "resnet56", "my/r.yaml": "r", "runs/first/recipe.yaml": "first-again", "net.v2": "net.v2"}
    assert {name: str(default_folder(name)) for name in named} == named


def test_a_resumed_run_keeps_its_options_but_for_overrides(tmp_path: Path) -> None:
    write(tmp_path / "mine.yaml", finetune={"lr": 0.5})
    stored = FinetuneOptions.create(lr=0.001, epochs=7)
    options, note = starting_options(read_recipe(tmp_path / "mine.yaml"), "finetune", stored)
    assert options == stored
    assert note is not None and "lr 0.5 (not 0.001)" in note and "epochs 5 (not 7)" in note
    options, _ = starting_options(read_recipe(tmp_path / "mine.yaml", ["finetune.lr=0.25"]), "finetune", stored)
    assert options == stored.replace(lr=0.25)
    assert starting_options(read_recipe(None, ["finetune.lr=0.001"]), "finetune", None)[1] is None


def test_a_recipe_with_a_rate_means_what_it_meant_before_the_last_blocks_came_first(tmp_path: Path) -> None:
    for given, expected in (({"lr": 0.5}, 0), ({}, None), ({"lr": 0.5, "last_block_epochs": 3}, 3)):
        recipe = read_recipe(write(tmp_path / "mine.yaml", finetune={"epochs": 3, **given}))
        assert starting_options(recipe, "finetune", None)[0].last_block_epochs == expected


OPTIONS = TrainOptions.create(model="test_resnet", in_chans=1, epochs=1, seed=3)


def test_compared_runs_differ_in_the_head_alone() -> None:
    runs = compared(OPTIONS, (0.1, 10))
    assert list(runs) == ["fixed", "learned", "scale-0.1", "scale-10"]
    assert runs["fixed"] == OPTIONS
    assert runs["learned"] == OPTIONS.replace(head="learned")
    assert runs["scale-0.1"] == OPTIONS.replace(head_scale=0.1, head_fixed_scale=True)
    with pytest.raises(UsageError, match=r"train\.head"):
        compared(OPTIONS.replace(head="learned"))
    with pytest.raises(UsageError, match="scale 1 "):
        compared(OPTIONS, (1, 1.0))
    with pytest.raises(UsageError, match="head_scale"):
        compared(OPTIONS, (-1,))


def test_signs_are_compared_with_a_learned_classifier_without_a_margin() -> None:
    signs = OPTIONS.replace(head="binary", bits_per_class=8, learn_signs=0.1, margin="cosface:0.1")
    runs = compared(signs, (10,))
    assert runs["fixed"] == signs and runs["learned"] == signs.replace(head="learned", margin=None)
    assert runs["scale-10"].head == "binary"


def test_a_learned_run_and_one_that_converts_side_by_side(tiny: Path, tmp_path: Path) -> None:
    signs = {**NETWORK, "head": "binary", "bits_per_class": 16, "margin": "cosface:0.1", "learn_signs": 0.1}
    recipe = read_recipe(write(tmp_path / "mine.yaml", data=str(tiny / "data"), train=signs), ["train.epochs=2"])
    planned = plan_comparison(recipe, tmp_path / "both", **MACHINE)
    planned.train()
    again = fixify.train(tmp_path / "both" / "fixed" / "recipe.yaml", tmp_path / "again", **MACHINE)
    assert same(tmp_path / "both" / "fixed" / "last.fixed.safetensors", again.last_path)
    written = write_comparison(planned.folder, planned.folders)
    assert [row.head for row in written.rows] == ["learned", "binary"]
    (fact,) = [run.facts["classifier"] for run in report_runs(read_runs([tmp_path / "again"])).runs]
    assert "step 1" in fact  # of the two epochs' 4 steps


def test_a_comparison_that_was_stopped_continues(tiny: Path, tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "mine.yaml", data=str(tiny / "data"), train=NETWORK))
    told: list[str] = []
    whole = plan_comparison(recipe, tmp_path / "whole", **MACHINE).train(on_run=told.append)
    assert told == list(whole) == ["fixed", "learned"]
    with pytest.raises(OutputExistsError, match="fixed"):
        plan_comparison(recipe, tmp_path / "whole").train()

    def stop_in_the_second(event: Event) -> None:
        if isinstance(event, EpochEnded) and (tmp_path / "cut" / "learned").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan_comparison(recipe, tmp_path / "cut", **MACHINE).train(on_event=stop_in_the_second)
    done = (tmp_path / "cut" / "fixed" / "last.fixed.safetensors").stat().st_mtime_ns
    resumed = plan_comparison(recipe, tmp_path / "cut", (1,), resume=True, **MACHINE)
    assert [folder.name for folder in resumed.folders] == ["learned", "fixed", "scale-1"]
    results = resumed.train(resume=True)
    assert list(results) == ["fixed", "learned", "scale-1"]  # the last one begins only now
    assert (tmp_path / "cut" / "fixed" / "last.fixed.safetensors").stat().st_mtime_ns == done
    assert all(same(result.last_path, results[name].last_path) for name, result in whole.items())

"""The recipes that come with fixify: found, described, valid, and each can train."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fixify
from fixify.checkpoint import read_info
from fixify.conversion import Conversion
from fixify.errors import FixifyError, UsageError
from fixify.recipes import RecipeError, find_recipe, list_recipes, read_recipe, shipped
from fixify.training import LAST_FILE, FinetuneOptions, run_finetune

NAMES = shipped.recipe_names()
SHORT = {"epochs": 1, "warmup_epochs": 0, "batch_size": 8, "grad_accum": 1, "img_size": 32, "crop_pct": 1.0}


def _convert(name: str, tiny: Path, out: Path) -> Conversion:
    options = read_recipe(name).convert
    assert options is not None
    return fixify.convert(tiny / "learned.pth", out, **options)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_valid_and_says_how_to_run_it(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.sections and recipe.description
    text = find_recipe(name).read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    for command in recipe.sections:
        assert any(re.search(rf"fixify {command} .*(--recipe )?{name}\b", line) for line in header)
    assert text.isascii() and max(map(len, text.splitlines())) <= 120


WANTED = {
    "a figure in percent": r"[\d.]+ %",
    "its range over seeds, or that it is of one": r"[\d.]+ to [\d.]+ over \d+ seeds|one seed",
    "the hardware": r"\bCPU|\bGPU|\b[AH]\d{2,3}\b",
    "the time": r"\bseconds?\b|\bminutes?\b|\bhours?\b|\d+ (s|min|h)\b",
}


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_to_expect_or_that_it_was_not_run(name: str) -> None:
    expect = read_recipe(name).expect
    if not expect.startswith("Not run here"):
        assert [what for what, pattern in WANTED.items() if not re.search(pattern, expect)] == []


@pytest.mark.parametrize("name", NAMES)
def test_each_does_a_real_step(name: str, tiny: Path, tmp_path: Path) -> None:
    slim = _convert(name, tiny, tmp_path / "a.fixed.safetensors").path
    options = read_recipe(name).finetune
    if options is None:
        return
    short = options.replace(**SHORT, workers=0, device="cpu")
    result = run_finetune(slim, str(tiny / "data"), tmp_path / "run", short)
    assert [record.step for record in result.history] == [1]
    before, after = load_file(slim), load_file(tmp_path / "run" / LAST_FILE)
    assert before.keys() == after.keys()
    moved = [key for key in before if before[key].is_floating_point() and not torch.equal(before[key], after[key])]
    assert "classifier.scale" in moved and "conv_stem.weight" in moved

    # The run can be repeated from what it left, to the last bit.
    stored = read_recipe(tmp_path / "run" / "recipe.yaml")
    assert stored.finetune == short.replace(workers=None, device="auto")
    again = stored.finetune.replace(workers=0, device="cpu")
    run_finetune(slim, str(tiny / "data"), tmp_path / "again", again)
    repeated = load_file(tmp_path / "again" / LAST_FILE)
    assert all(torch.equal(repeated[key], after[key]) for key in after)


def test_the_plain_one_spells_the_defaults_out(tiny: Path, tmp_path: Path) -> None:
    assert read_recipe("retrofit").finetune == FinetuneOptions()
    fixify.convert(tiny / "learned.pth", tmp_path / "default.fixed.safetensors")
    _convert("retrofit", tiny, tmp_path / "recipe.fixed.safetensors")
    default, recipe = (tmp_path / f"{name}.fixed.safetensors" for name in ("default", "recipe"))
    assert read_info(default) == read_info(recipe)
    first, second = load_file(default), load_file(recipe)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_papers_has_codes_in_order_and_no_statistics(tiny: Path, tmp_path: Path) -> None:
    done = _convert("retrofit-paper", tiny, tmp_path / "a.fixed.safetensors")
    (record,) = done.info.heads
    assert (record.spec.kind, record.spec.matched, record.spec.standardize) == ("hadamard", False, False)
    assert not {"classifier.center", "classifier.codes"} & load_file(done.path).keys()


def test_the_list() -> None:
    recipes = list_recipes()
    assert [recipe.name for recipe in recipes] == NAMES
    assert {"retrofit", "retrofit-paper"} <= set(NAMES)
    for recipe in recipes:
        read = read_recipe(recipe.name)
        assert recipe.sections == read.sections
        assert recipe.description == " ".join(read.description.split())


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped_file = find_recipe("retrofit")
    Path("retrofit").mkdir()  # what is shipped is meant by its name, whatever lies around here
    assert find_recipe("retrofit") == shipped_file
    Path("retrofit.yaml").touch()
    assert find_recipe("retrofit.yaml") == Path("retrofit.yaml")
    Path("mine").touch()
    assert find_recipe("mine") == Path("mine")
    for name, words in (
        ("retrofitt", "There is no recipe 'retrofitt'. Did you mean 'retrofit'?"),
        ("retrofit-paper.yaml", "There is no recipe 'retrofit-paper.yaml'. Did you mean 'retrofit-paper'?"),
        ("zzz", "There is no recipe 'zzz'."),
        ("runs/a.yaml", "There is no recipe file runs/a.yaml."),
    ):
        with pytest.raises(UsageError) as caught:
            find_recipe(name)
        assert caught.value.message == words
        assert "fixify recipes ls" in str(caught.value)


def test_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "fixify")
    (tmp_path / "recipes").mkdir()  # somebody else's, in site-packages
    with pytest.raises(FixifyError, match="The recipes that come with fixify are missing"):
        shipped.recipes_folder()
    (tmp_path / "pyproject.toml").touch()
    assert shipped.recipes_folder() == tmp_path / "recipes"
    (tmp_path / "fixify" / "_recipes").mkdir(parents=True)
    assert shipped.recipes_folder() == tmp_path / "fixify" / "_recipes"
    (tmp_path / "fixify" / "_recipes" / "broken.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match=r"broken\.yaml has a mistake"):
        list_recipes()

from __future__ import annotations

from pathlib import Path

import pytest

from fixify.conversion_options import ConvertOptions
from fixify.errors import UsageError
from fixify.recipes import RecipeError, read_recipe
from fixify.recipes.reading import section_of
from fixify.training import FinetuneOptions

WRONG = """\
description: wrong
convert:
  head: hadamrd
  match: "no"
finetune:
  lrr: 1e-4
  lr: 1
  lr: 2
  epochs: five
  clip_grad: *x
fintune: {}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("description: |\n  Mine.\nconvert:\n  match: false\nfinetune:\n  lr: 1e-3\n  epochs: 7\n")
    return path


def test_a_recipe_gives_what_it_says_and_defaults(mine: Path) -> None:
    recipe = read_recipe(mine)
    assert recipe.name == str(mine)
    assert (recipe.description, recipe.expect) == ("Mine.", "")
    assert recipe.convert == ConvertOptions(match=False)
    assert recipe.finetune == FinetuneOptions(lr=1e-3, epochs=7)
    assert recipe.sections == ("convert", "finetune")


def test_all_mistakes_at_once_each_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(WRONG)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, ["finetune.opt=sgdd", "lr=3"])
    problems = caught.value.problems
    assert [problem.place.line for problem in problems] == [3, 4, 6, 8, 9, 10, 11, None, None]
    assert [problem.place.override for problem in problems[-2:]] == ["lr=3", "finetune.opt=sgdd"]
    first, *rest = caught.value.message.splitlines()
    assert str(path) in first and "9" in first
    assert rest[0].startswith("  line 3: convert.head ") and "hadamard" in rest[0]
    assert rest[-1].startswith("  --set finetune.opt=sgdd: finetune.opt 'sgdd' ")
    assert caught.value.exit_code == 2


def test_overrides_win_and_their_values_are_yaml(mine: Path) -> None:
    recipe = read_recipe(
        mine,
        [
            "finetune.lr=3e-4",
            "finetune.scale=[0.8, 1]",
            " convert.head = orthogonal",
            "finetune.clip_grad=",
            "convert.match=true",
        ],
    )
    assert recipe.finetune == FinetuneOptions(lr=3e-4, epochs=7, scale=(0.8, 1.0))
    assert recipe.convert == ConvertOptions(match=True, head="orthogonal")
    assert recipe.overridden[:2] == (("finetune", "lr"), ("finetune", "scale"))
    assert read_recipe(mine, ["finetune.epochs=2", "finetune.epochs=3"]).finetune.epochs == 3  # type: ignore[union-attr]


def test_an_override_replaces_a_mistake_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("finetune:\n  scale: [0.8, x]\n  epochs: five\n")
    recipe = read_recipe(path, ["finetune.scale=[0.7, 1]", "finetune.epochs=2"])
    assert recipe.finetune == FinetuneOptions(epochs=2, scale=(0.7, 1.0))


def test_overrides_without_a_recipe() -> None:
    recipe = read_recipe(None, ["finetune.warmup_lr=1e-4"])
    assert (recipe.convert, recipe.finetune) == (None, FinetuneOptions(warmup_lr=1e-4))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lr=3", ["SECTION.OPTION=VALUE", "finetune.lr=3?"]),
        ("finetune.lr", ["SECTION.OPTION=VALUE"]),
        ("finetune=3", ["SECTION.OPTION=VALUE"]),
        ("fintune.lr=3", ["'fintune'", "'finetune'?"]),
        ("description.x=3", ["'description'", "section"]),
        ("finetune.lrr=3", ["finetune.lrr", "'lr'?"]),
        ("finetune.epochs=-1", ["finetune.epochs", "0", "-1"]),
        ("finetune.lr={a: 1}", ["finetune.lr"]),
        ("finetune.lr=*x", ["finetune.lr", "*x"]),
        ("finetune.lr=[1", ["YAML"]),
        ("finetune.scale=[2, 1]", ["finetune.scale", "2 1"]),
        ("finetune.warmup_epochs=9", ["warmup_epochs (9)", "epochs (7)"]),
    ],
)
def test_mistakes_in_overrides_name_the_override(mine: Path, override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(mine, [override])
    (problem,) = caught.value.problems
    assert problem.place.override == override
    assert all(word in problem.message for word in words), problem.message


def test_the_old_name_of_alpha_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("convert: {scale: 2}\n")
    for recipe in (read_recipe(path), read_recipe(None, ["convert.scale=2"]), read_recipe(path, ["convert.alpha=2"])):
        assert recipe.convert == ConvertOptions(alpha=2.0)
    assert read_recipe(path, ["convert.scale=3"]).convert == ConvertOptions(alpha=3.0)
    path.write_text("convert:\n  alpha: 1\n  scale: 2\n")
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert [(problem.place.line, "alpha" in problem.message) for problem in caught.value.problems] == [(3, True)]


def test_an_override_into_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- a\n")
    with pytest.raises(RecipeError, match=r"line 1: the recipe has sections"):
        read_recipe(path, ["finetune.lr=3"])
    path.write_text("finetune: 3\n")
    with pytest.raises(RecipeError, match="line 1: finetune must be a section"):
        read_recipe(path, ["finetune.lr=3"])


def test_a_command_wants_its_own_section(mine: Path, tmp_path: Path) -> None:
    assert section_of(read_recipe(mine), "convert") == ConvertOptions(match=False)
    with pytest.raises(UsageError, match=r"--set finetune\.lr .*`fixify convert`"):
        section_of(read_recipe(mine, ["finetune.lr=1"]), "convert")
    path = tmp_path / "half.yaml"
    path.write_text("finetune:\n")
    with pytest.raises(UsageError, match=r"half\.yaml.* convert:.* finetune:") as caught:
        section_of(read_recipe(path), "convert")
    assert f"fixify finetune --recipe {path}" in str(caught.value.hint)

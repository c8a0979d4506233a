from __future__ import annotations

from pathlib import Path

import pytest

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
    assert recipe.convert == {"match": False}
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
    assert first == f"{path} has 9 mistakes."
    assert rest[0].startswith("  line 3: convert.head must be ")
    assert rest[-1].startswith("  --set finetune.opt=sgdd: finetune.opt 'sgdd' is not an optimiser of timm")
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
    assert recipe.convert == {"match": True, "head": "orthogonal"}
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
    ("override", "problem"),
    [
        ("lr=3", "It is written SECTION.OPTION=VALUE, for example finetune.lr=3e-4; did you mean finetune.lr=3?"),
        ("finetune.lr", "It is written SECTION.OPTION=VALUE, for example finetune.lr=3e-4."),
        ("finetune=3", "It is written SECTION.OPTION=VALUE, for example finetune.lr=3e-4."),
        ("fintune.lr=3", "'fintune' is not a section; did you mean 'finetune'?"),
        ("description.x=3", "'description' is not a section."),
        ("finetune.lrr=3", "finetune.lrr is not an option; did you mean 'lr'?"),
        ("finetune.epochs=-1", "finetune.epochs must be greater than or equal to 0, not -1."),
        ("finetune.lr={a: 1}", "finetune.lr must be one value."),
        ("finetune.lr=*x", "finetune.lr is an alias (*x), which a recipe cannot have: write the value."),
        ("finetune.lr=[1", "This is not YAML: while parsing a flow sequence expected ',' or ']', but got"),
        ("finetune.scale=[2, 1]", "finetune.scale must be two positive numbers, the smaller first, not 2 1."),
        ("finetune.warmup_epochs=9", "finetune: warmup_epochs (9) must be less than epochs (7)."),
    ],
)
def test_mistakes_in_overrides_name_the_override(mine: Path, override: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(mine, [override])
    (said,) = caught.value.problems
    assert str(said).startswith(f"--set {override}: {problem}")


def test_an_override_into_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- a\n")
    with pytest.raises(RecipeError, match=r"line 1: the recipe has sections"):
        read_recipe(path, ["finetune.lr=3"])
    path.write_text("finetune: 3\n")
    with pytest.raises(RecipeError, match="line 1: finetune must be a section"):
        read_recipe(path, ["finetune.lr=3"])


def test_a_command_wants_its_own_section(mine: Path, tmp_path: Path) -> None:
    assert section_of(read_recipe(mine), "convert") == {"match": False}
    with pytest.raises(UsageError, match=r"--set finetune.lr does not concern `fixify convert`"):
        section_of(read_recipe(mine, ["finetune.lr=1"]), "convert")
    path = tmp_path / "half.yaml"
    path.write_text("finetune:\n")
    with pytest.raises(UsageError, match="has no convert: section, only finetune:") as caught:
        section_of(read_recipe(path), "convert")
    assert caught.value.hint == f"Use it with: fixify finetune --recipe {path}"

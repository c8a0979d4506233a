"""`fixify recipes`, and `--recipe` and `--set` of the commands, as a person sees them."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fixify
from fixify.cli.convert import convert
from fixify.recipes import read_recipe
from fixify.recipes.schema import convert_option_names
from fixify.training import FinetuneOptions

MINE = """\
convert:
  match: false
  seed: 3
  head: orthogonal
finetune:
  lr: 1e-3
  epochs: 2
  batch_size: 8
  img_size: 32
  no_aug: true
  workers: 0
  device: cpu
"""

Run = Callable[..., tuple[int, str, str]]


def test_ls_fits_80_columns_and_has_json(run: Run) -> None:
    code, out, err = run("recipes", "ls")
    assert code == 0, err
    assert "retrofit-paper" in out and "convert, finetune" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "next: fixify recipes show NAME" in err
    said = json.loads(run("recipes", "ls", "--json")[1])["recipes"]
    assert said[0].keys() == {"name", "path", "description", "expect", "measured", "sections"}
    assert Path(said[0]["path"]).is_file()


def test_show_and_cp(run: Run, tmp_path: Path) -> None:
    text = run("recipes", "show", "retrofit")[1]
    assert text.startswith("# ") and "fixify convert" in text

    assert run("recipes", "cp", "retrofit")[0] == 0
    mine = tmp_path / "retrofit.yaml"
    assert mine.read_text() == text
    mine.write_text("finetune:\n")
    code, _, err = run("recipes", "cp", "retrofit")
    assert code == 1 and "retrofit.yaml exists already" in err and "--force" in err
    assert mine.read_text() == "finetune:\n"
    assert run("recipes", "cp", "retrofit", "--force")[0] == 0
    assert mine.read_text() == text
    (tmp_path / "sub").mkdir()
    assert run("recipes", "cp", "retrofit", "sub")[0] == 0
    assert run("recipes", "cp", "retrofit", "other")[0] == 0
    assert (tmp_path / "sub" / "retrofit.yaml").read_text() == (tmp_path / "other.yaml").read_text() == text
    code, _, err = run("recipes", "cp", "retrofit", "no/such.yaml")
    assert code == 1 and "The folder no does not exist" in err
    code, _, err = run("recipes", "show", "retrofitt")
    assert code == 2 and "Did you mean 'retrofit'?" in err


def test_validate_tells_all_mistakes_of_all_files(run: Run, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("finetune:\n  lrr: 1\n  epochs: five\n  opt: " + "x" * 70 + "\n")
    code, out, _ = run("recipes", "validate", "retrofit", "wrong.yaml", "none.yaml")
    assert code == 2
    lines = out.splitlines()
    assert lines[:4] == [
        "retrofit: valid, for convert and finetune",
        "wrong.yaml has 3 mistakes.",
        "  line 2: finetune.lrr is not an option; did you mean 'lr'?",
        "  line 3: finetune.epochs must be a whole number, not the text 'five'.",
    ]
    assert lines[4].endswith("is not an optimiser of timm.") and len(lines[4]) > 80  # a mistake is one line
    assert lines[5] == "There is no recipe file none.yaml."
    code, out, _ = run("recipes", "validate", "retrofit", "wrong.yaml", "--json")
    said = json.loads(out)["recipes"]
    assert code == 2
    assert [each["valid"] for each in said] == [True, False]
    assert [problem["line"] for problem in said[1]["problems"]] == [2, 3, 4]
    assert run("recipes", "validate", "retrofit")[0] == 0


def test_a_retrofit_by_recipe(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    given = ("--recipe", "mine.yaml")
    code, out, err = run("convert", tiny / "learned.pth", *given, "--seed", 4, "--set", "convert.bias=false", "--json")
    assert code == 0, err
    spec = json.loads(out)["info"]["heads"][0]["spec"]
    # The recipe's, what --set changes in it, the command line's, and the default.
    assert (spec["kind"], spec["bias"], spec["seed"], spec["standardize"]) == ("orthogonal", False, 4, True)
    assert "next: fixify finetune learned.fixed.safetensors --recipe mine.yaml --data DATA" in err

    command = ("finetune", "learned.fixed.safetensors", *given, "--data", tiny / "data", "-o", "run")
    code, _, err = run(*command, "--set", "finetune.opt=adamw", "--epochs", 1)
    assert code == 0, err
    options = json.loads((tmp_path / "run" / "run.json").read_text())["options"]
    assert (options["lr"], options["opt"], options["epochs"], options["momentum"]) == (1e-3, "adamw", 1, 0.9)

    # What the run stored repeats it without the recipe.
    stored = tmp_path / "run" / "recipe.yaml"
    assert read_recipe(stored).finetune == FinetuneOptions(**options)
    assert stored.read_text().startswith("# ")
    assert run("recipes", "validate", stored)[1] == f"{stored}: valid, for finetune\n"
    again = ("--recipe", "run/recipe.yaml", "--data", tiny / "data", "-o", "again", "--workers", 0, "--device", "cpu")
    code, _, err = run("finetune", "learned.fixed.safetensors", *again)
    assert code == 0, err
    first, second = (load_file(tmp_path / folder / "last.fixed.safetensors") for folder in ("run", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)

    # Resumed: the run's own options, whatever became of the recipe; but not against the command line.
    (tmp_path / "mine.yaml").write_text("finetune:\n  lr: 0.5\n")
    code, _, err = run(*command, "--resume")
    assert code == 0, err
    assert "warning: the run goes on as it was started; mine.yaml says" in err
    assert "lr 0.5 (not 0.001)" in err
    code, _, err = run(*command, "--resume", "--set", "finetune.lr=0.25")
    assert code == 1 and "lr was 0.001 and is 0.25" in err


def test_a_recipe_that_says_what_it_is_about(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, _, err = run("convert", tiny / "learned.pth", "-o", "net.fixed.safetensors")
    assert code == 0, err
    about = {"data": tiny / "data", "checkpoint": "net.fixed.safetensors", "distill": tiny / "learned.pth"}
    options = {"epochs": 1, "batch_size": 4, "workers": 0, "device": "cpu", "img_size": 32, "no_aug": True}
    whole = {**{key: str(value) for key, value in about.items()}, "convert": {}, "finetune": options}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(whole))
    code, _, err = run("convert", tiny / "learned.pth", "-o", "other.fixed.safetensors", "--recipe", "mine.yaml")
    assert code == 0 and "next: fixify finetune other.fixed.safetensors --recipe mine.yaml  " in err, err

    command = ("finetune", "--recipe", "mine.yaml", "--distill-weight", 0.25)
    code, _, err = run(*command)  # of two slim checkpoints here the recipe says which
    assert code == 0, err
    told = yaml.safe_load(Path("net-finetuned/recipe.yaml").read_text())
    assert (told["data"], told["distill"]) == (str(tiny / "data"), str(tiny / "learned.pth"))
    assert Path(told["checkpoint"]).name == "net.fixed.safetensors"
    assert told["finetune"]["distill_weight"] == 0.25
    code, _, err = run(*command, "--data", "nowhere", "-o", "run")  # what is typed wins
    assert code == 1 and "nowhere" in err
    code, _, err = run(*command, "other.fixed.safetensors")
    assert code == 0 and Path("other-finetuned").is_dir(), err

    (tmp_path / "mine.yaml").write_text("finetune: {}\n")
    for arguments, words in (
        (("--recipe", "mine.yaml"), "--data is missing, and the recipe mine.yaml names none."),
        ((), "--data is missing, and there is no recipe."),
    ):
        code, _, err = run("finetune", "net.fixed.safetensors", *arguments)
        assert code == 2 and words in " ".join(err.split()) and "Add --data DATA" in err


def test_mistakes_stop_a_command_before_it_begins(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("convert:\n  hed: auto\nfinetune:\n  epochs: five\n")
    (tmp_path / "half.yaml").write_text("finetune:\n  lr: 1\n")
    source, data = tiny / "learned.pth", ("--data", tiny / "data")
    for arguments, words in (
        (("convert", source, "--recipe", "wrong.yaml"), "wrong.yaml has 2 mistakes.\n  line 2: convert.hed is not an"),
        (("convert", source, "--recipe", "half.yaml"), "half.yaml has no convert: section, only finetune:"),
        (("convert", source, "--set", "convert.seed=x"), "--set convert.seed=x: convert.seed must be a whole number"),
        (("convert", source, "--set", "finetune.lr=1"), "--set finetune.lr does not concern `fixify convert`"),
        (("finetune", *data, source, "--recipe", "nowhere"), "There is no recipe 'nowhere'"),
        (("finetune", *data, source, "--recipe", "half.yaml", "--set", "lr=3"), "did you mean finetune.lr=3?"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), err
        assert words in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.yaml", "wrong.yaml"]


def test_a_wrong_recipe_ends_the_process_with_2(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("convert:\n  hed: auto\n")
    command = [sys.executable, "-m", "fixify", "convert", "any.pth", "--recipe", "wrong.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: wrong.yaml has a mistake.\n  line 2: convert.hed is not an option; did you mean 'head'?\n"
    )


@pytest.mark.parametrize("code", ["print(_complete_recipe('retrofit-p'))", "main()"])
def test_names_come_at_once(tmp_path: Path, code: str) -> None:
    """Completion and the list import nothing heavy."""
    lines = (
        "import sys",
        "from fixify.cli.app import main",
        "from fixify.cli.options import _complete_recipe",
        "sys.argv = ['fixify', 'recipes', 'ls']",
        f"try: {code}",
        "except SystemExit: pass",
        "sys.exit(str({'torch', 'timm', 'numpy', 'scipy'} & set(sys.modules) or ''))",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True)
    assert "retrofit-paper" in done.stdout
    assert "{" not in done.stderr, done.stderr


def test_every_option_of_a_recipe_is_one_of_the_command() -> None:
    """And with the same default: what the help says is what happens."""
    library, command = inspect.signature(fixify.convert).parameters, inspect.signature(convert).parameters
    for name in convert_option_names():
        assert command[name].default == library[name].default, name

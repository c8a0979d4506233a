"""`fixify recipes`, and `--recipe` and `--set` of the commands, as a person sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from fixify.recipes import read_recipe
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
    assert code == 1 and "retrofit.yaml" in err and "--force" in err
    assert mine.read_text() == "finetune:\n"
    assert run("recipes", "cp", "retrofit", "--force")[0] == 0
    assert mine.read_text() == text
    (tmp_path / "sub").mkdir()
    assert run("recipes", "cp", "retrofit", "sub")[0] == 0
    assert run("recipes", "cp", "retrofit", "other")[0] == 0
    assert (tmp_path / "sub" / "retrofit.yaml").read_text() == (tmp_path / "other.yaml").read_text() == text
    code, _, err = run("recipes", "cp", "retrofit", "no/such.yaml")
    assert code == 1 and "mkdir" in err
    code, _, err = run("recipes", "show", "retrofitt")
    assert code == 2 and "'retrofit'?" in err


def test_validate_tells_all_mistakes_of_all_files(run: Run, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("finetune:\n  lrr: 1\n  epochs: five\n  opt: " + "x" * 70 + "\n")
    code, out, _ = run("recipes", "validate", "retrofit", "wrong.yaml", "none.yaml")
    assert code == 2
    lines = out.splitlines()
    assert lines[0].startswith("retrofit: valid") and "wrong.yaml" in lines[1] and "none.yaml" in lines[5]
    for line, words in zip(lines[2:5], ("line 2: finetune.lrr", "line 3: finetune.epochs", "line 4:"), strict=True):
        assert line.strip().startswith(words)
    assert len(lines[4]) > 80  # a mistake is one line
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
    assert "warning: " in err and "mine.yaml" in err and "lr 0.5 (not 0.001)" in err
    code, _, err = run(*command, "--resume", "--set", "finetune.lr=0.25")
    assert code == 1 and "lr" in err and "0.001" in err and "0.25" in err


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
        (("--recipe", "mine.yaml"), "mine.yaml"),
        ((), "--data is missing"),
    ):
        code, _, err = run("finetune", "net.fixed.safetensors", *arguments)
        assert code == 2 and words in " ".join(err.split()) and "Add --data DATA" in err


def test_mistakes_stop_a_command_before_it_begins(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("convert:\n  hed: auto\nfinetune:\n  epochs: five\n")
    (tmp_path / "half.yaml").write_text("finetune:\n  lr: 1\n")
    source, data = tiny / "learned.pth", ("--data", tiny / "data")
    for arguments, words in (
        (("convert", source, "--recipe", "wrong.yaml"), "line 2: convert.hed "),
        (("convert", source, "--recipe", "half.yaml"), "fixify finetune --recipe half.yaml"),
        (("convert", source, "--set", "convert.seed=x"), "--set convert.seed=x: convert.seed "),
        (("convert", source, "--set", "finetune.lr=1"), "--set finetune.lr is not for `fixify convert`"),
        (("finetune", *data, source, "--recipe", "nowhere"), "'nowhere'"),
        (("finetune", *data, source, "--recipe", "half.yaml", "--set", "lr=3"), "did you mean finetune.lr=3?"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), err
        assert words in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.yaml", "wrong.yaml"]

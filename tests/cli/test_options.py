"""Options that are generated from the option classes: types, help, defaults, and what reaches the library."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from fixify import evaluation
from fixify._options import CheckedOptions, flag_of
from fixify.cli.app import COMMANDS
from fixify.cli.options import help_of, parameters, with_options
from fixify.conversion_options import ConvertOptions
from fixify.language.options import LanguageOptions
from fixify.training.options import FinetuneOptions, TrainOptions

Run = Callable[..., tuple[int, str, str]]
CLASSES = (ConvertOptions, FinetuneOptions, TrainOptions, LanguageOptions)


@pytest.mark.parametrize("options", CLASSES, ids=lambda options: options.__name__)
def test_every_field_has_a_help_that_ends_with_its_default(options: type[CheckedOptions]) -> None:
    for name, info in options.model_fields.items():
        text = help_of(info)
        assert info.description and text.endswith("."), name
        if isinstance(info.default, (int, float, str)) and info.default is not False:
            shown = "yes" if info.default is True else str(info.default)
            assert text.endswith(f" Default: {shown}."), name


def test_a_help_in_full() -> None:
    fields = FinetuneOptions.model_fields
    assert help_of(fields["lr"]).endswith("Default: 0.05; 0.0003 for heads with one bit per weight or more.")
    assert help_of(fields["momentum"]) == "Momentum, for optimisers that have one. Default: 0.9."
    assert help_of(fields["seed"]).endswith(" Default: 0.")
    assert help_of(fields["scale"]).endswith(" Default: 0.5 1.")
    assert help_of(fields["clip_mode"]).endswith(" One of norm, value, agc. Default: norm.")
    assert "One of natural, lexical. Default: natural, and" in help_of(fields["class_order"])
    assert "Default" not in help_of(fields["no_aug"]) + help_of(fields["ema_decay"])


@pytest.mark.parametrize(
    ("options", "without"),
    [
        (ConvertOptions, {"gains"}),
        (
            FinetuneOptions,
            {"warmup_lr", "calibration_images", "interpolation", "remode", "mixup_prob", "mixup_switch_prob"},
        ),
    ],
)
def test_which_fields_have_no_flag(options: type[CheckedOptions], without: set[str]) -> None:
    assert set(options.model_fields) - set(parameters(options)) == without


@pytest.mark.parametrize(
    ("name", "kind", "spellings"),
    [
        ("epochs", int, ("--epochs",)),
        ("batch_size", int, ("-b", "--batch-size")),
        ("auto_augment", str, ("--aa", "--auto-augment")),
        ("workers", int, ("-j", "--workers")),
        ("sched", str, ("--sched",)),
        ("no_aug", bool, ("--no-aug",)),
        ("scale", tuple[float, float], ("--scale",)),
        ("decay_milestones", list[float], ("--decay-milestones",)),
    ],
)
def test_types_and_spellings(name: str, kind: Any, spellings: tuple[str, ...]) -> None:
    (parameter,) = parameters(FinetuneOptions)[name]
    assert parameter.annotation.__args__[0] == kind | None and parameter.default is None
    shown = parameter.annotation.__metadata__[0]
    assert (shown.default, *(shown.param_decls or ())) == spellings


def test_hidden_spellings_and_switches() -> None:
    alpha, old = parameters(ConvertOptions)["alpha"]
    assert alpha.annotation.__metadata__[0].default == "--alpha"
    assert old.annotation.__metadata__[0].default == "--scale" and old.annotation.__metadata__[0].hidden
    assert parameters(ConvertOptions)["match"][0].annotation.__metadata__[0].default == "--match/--no-match"
    assert flag_of("warmup_lr", FinetuneOptions.model_fields["warmup_lr"]).names == ()


def test_a_command_gets_what_was_typed_and_nothing_else(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    import fixify.training.api

    seen: list[FinetuneOptions] = []

    def finetune(*given: Any, **_: Any) -> None:
        seen.append(given[3])
        raise KeyboardInterrupt

    monkeypatch.setattr(fixify, "finetune", finetune, raising=False)
    typed = ("--lr", 0.5, "--scale", 0.3, 0.9, "--no-aug", "--decay-milestones", 1, "--decay-milestones", 2, "-j", 0)
    run("finetune", "a.fixed.safetensors", "--data", "d", *typed, "--seed", 0, "--aa", "rand-m9")
    given = {"lr": 0.5, "scale": (0.3, 0.9), "no_aug": True, "decay_milestones": (1, 2), "workers": 0}
    assert seen == [FinetuneOptions.create(**given, auto_augment="rand-m9")]
    code, _, err = run("finetune", "a.fixed.safetensors", "--data", "d", "--epochs", "-1", "--min-lr", 7)
    assert code == 2 and "epochs" in err and "min_lr (7)" in err and len(seen) == 1  # all mistakes at once


@pytest.mark.parametrize("command", ["convert", "finetune", "train", "eval"])
def test_names_of_parameters_are_unique(command: str) -> None:
    function = with_options(COMMANDS[command])
    assert list(inspect.signature(function).parameters) == list(function.__annotations__)


def test_defaults_of_eval_are_those_of_the_library() -> None:
    library, command = (inspect.signature(function).parameters for function in (evaluation.evaluate, COMMANDS["eval"]))
    shared = set(library) & set(command) - {"checkpoint", "data"}
    assert len(shared) > 10
    assert {name: command[name].default for name in shared} == {name: library[name].default for name in shared}

"""`head: binary` in a run from scratch: a learned classifier that the run converts, and everything around it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fixify import load
from fixify.checkpoints.slim import read_info
from fixify.errors import HeadSpecError, UsageError
from fixify.heads import FixedClassifier
from fixify.reporting.runs import read_runs
from fixify.training import (
    ClassifierConverted,
    EpochEnded,
    Event,
    RunStarted,
    Step,
    TrainingInterrupted,
    TrainOptions,
    Validated,
    stored_options,
    train_from_scratch,
)
from fixify.training.head_conversion import conversion_step, head_config
from fixify.training.optimisers import make_optimiser, take_over_state

QUICK = {
    "model": "tiny",
    "head": "binary",
    "bits_per_class": 16,
    "convert_after": 0.3,
    "head_lr_scale": 10,
    "epochs": 5,
    "batch_size": 8,
    "lr": 0.02,
    "no_aug": True,
    "workers": 0,
    "device": "cpu",
    "warmup_epochs": 0,
}
"""44 images: 5 updates per epoch, 25 in all; converted after 8, in the middle of the second epoch."""


def options(**given: Any) -> TrainOptions:
    return TrainOptions.create(**{**QUICK, **given})


@pytest.fixture
def model(new_model: Any) -> nn.Module:
    found: nn.Module = new_model(fixed=False)
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read(path: Path) -> Any:
    return torch.load(io.BytesIO(path.read_bytes()), weights_only=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = read(folder / "last.fixed.safetensors")["weights"]
    return found


def assert_same(ours: Path, theirs: Path) -> None:
    """Check that two runs left the same weights, state and validations."""
    first, second = weights(ours), weights(theirs)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    timed = ("seconds", "images_per_second")
    left, right = ([{k: v for k, v in line.items() if k not in timed} for line in metrics(f)] for f in (ours, theirs))
    assert left == right


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"learn_signs": 0.1, "margin": "cosface:0.1"},
        {"opt": "adamw", "clip_grad": 1.0, "grad_accum": 2},
        {"ema_decay": 0.9, "freeze_bn": True},
        {"amp": "bf16", "learn_signs": 0.1, "channels_last": True},
        {"lr": "auto", "mixup": 0.2, "nan_skip": 2},
        {"head_fixed_scale": True, "head_scale": 7.0, "head_bias": False, "head_standardize": False},
    ],
)
def test_the_run_goes_from_a_learned_to_a_fixed_head(run: Any, model: Any, tmp_path: Path, more: Any) -> None:
    events: list[Event] = []
    saved: list[str] = []

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, (Validated, EpochEnded)):
            saved.append(f"{event.record.classifier} {(tmp_path / 'last.fixed.safetensors').exists()}")

    result = run(tmp_path, options(**more), model, on_event=listen)
    (converted,) = [event for event in events if isinstance(event, ClassifierConverted)]
    per_epoch = 3 if more.get("grad_accum") else 5
    assert converted.step == (4 if more.get("grad_accum") else 8)
    assert (converted.head, converted.bytes_per_class, converted.images) == ("binary", 2, 44)
    assert [event.convert_at for event in events if isinstance(event, RunStarted)] == [converted.step]
    assert saved[:2] == ["learned False", "converted True"] and len(saved) == 6
    lines = metrics(tmp_path)
    assert [line.get("classifier") for line in lines] == ["learned", "converted", None, None, None, None]
    assert [line["step"] for line in lines[:2]] == [per_epoch, converted.step]
    assert lines[0]["scale"] is None and lines[1]["scale"] is not None
    assert result.after.classifier != "learned"
    head = model.fc
    assert isinstance(head, FixedClassifier) and head.latent is None
    assert not head.spec.gains
    assert head.spec.bias is more.get("head_bias", True) and head.spec.standardize == (
        more.get("head_standardize", True) and "center"
    )
    assert head.keeps_statistics is more.get("freeze_bn", False)
    stored = weights(tmp_path)
    assert "fc.codes" in stored and not {"fc.weight", "fc.latent"} & stored.keys()
    assert json.loads((tmp_path / "run.json").read_text())["model"]["head"] == "binary"
    if "head_scale" in more:
        assert float(head.scale) == 7.0


def test_the_learned_head_is_what_a_learned_run_has(run: Any, new_model: Any, tmp_path: Path) -> None:
    """Until the conversion the run is the one with head: learned; its signs are those of the weights there."""
    kept: list[dict[str, torch.Tensor]] = []
    for head in ("learned", "binary"):
        network = new_model(fixed=False)

        def listen(event: Event, network: nn.Module = network) -> None:
            if isinstance(event, Step) and event.step == 8:
                kept.append({name: value.clone() for name, value in network.state_dict().items()})

        run(tmp_path / head, options(head=head), network, on_event=listen)
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert not (tmp_path / "learned" / "last.fixed.safetensors").exists() or "fc.weight" in weights(
        tmp_path / "learned"
    )


def test_the_converted_model_answers_like_the_learned_one(run: Any, model: Any, tmp_path: Path) -> None:
    run(tmp_path, options(bits_per_class=None, epochs=20, convert_after=0.9, val_every=1, lr=0.05), model)
    lines = metrics(tmp_path)
    (place,) = [number for number, line in enumerate(lines) if line.get("classifier") == "converted"]
    before, after = lines[place - 1], lines[place]
    assert before["step"] == after["step"] == 90
    assert before["val_top1"] > 60 and after["val_top1"] >= before["val_top1"] - 10


@pytest.mark.parametrize(
    "convert_after", [0.3, pytest.param(0.4, marks=pytest.mark.slow)]
)  # the second at an epoch's end
@pytest.mark.parametrize(
    ("where", "more"),
    [
        ((0, 3), {"learn_signs": 0.1, "margin": "cosface:0.1"}),
        ((1, 3), {"learn_signs": 0.1}),
        ((1, 4), {"opt": "adamw", "ema_decay": 0.9}),
        ((3, 5), {"learn_signs": 0.1, "opt": "lamb"}),
    ],
)
def test_a_resumed_run_is_the_whole_one(
    run: Any, new_model: Any, crash_at: Any, tmp_path: Path, where: Any, more: Any, convert_after: float
) -> None:
    given = options(**more, convert_after=convert_after)
    run(tmp_path / "whole", given, new_model(fixed=False))
    saving = given.replace(save_minutes=1e-9)
    with pytest.raises(crash_at.error):
        run(tmp_path / "parts", saving, new_model(fixed=False), on_event=crash_at(*where))
    run(tmp_path / "parts", saving, new_model(fixed=False), resume=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("kind", [ClassifierConverted, Validated])
@pytest.mark.parametrize("convert_after", [0.3, 0.4])
def test_a_run_that_stops_at_the_conversion_is_resumed(
    run: Any, new_model: Any, tmp_path: Path, kind: Any, convert_after: float
) -> None:
    """By a crash or a signal: between the conversion and its validation, and right after both."""
    given = options(learn_signs=0.1, convert_after=convert_after)
    run(tmp_path / "whole", given, new_model(fixed=False))
    for error in (KeyboardInterrupt, None):

        def listen(event: Event, error: Any = error) -> None:
            if isinstance(event, kind):
                if error is not None:
                    raise error
                import signal

                signal.raise_signal(signal.SIGTERM)

        folder = tmp_path / str(error)
        with pytest.raises((KeyboardInterrupt, TrainingInterrupted)):
            run(folder, given, new_model(fixed=False), on_event=listen)
        run(folder, given, new_model(fixed=False), resume=True)
        assert_same(tmp_path / "whole", folder)


def test_moments_of_the_other_parameters_stay(new_model: Any) -> None:
    for name in ("momentum", "adamw", "lamb"):
        given, network = options(opt=name, layer_decay=None), new_model(fixed=False)
        optimiser = make_optimiser(network, given)
        for _ in range(2):
            for parameter in network.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimiser.step()
        old, network.fc = network.fc, new_model(signs=16).fc
        new = make_optimiser(network, given)
        take_over_state(new, optimiser)
        assert old.weight not in new.state and network.fc.bias not in new.state
        kept = new.state[network.body[0].weight]
        assert kept and all(not isinstance(value, torch.Tensor) or bool(value.any()) for value in kept.values())
        assert all(group["lr"] == given.lr for group in new.param_groups)
        for group in new.param_groups:
            if "step" in group:
                assert group["step"] == 2


def test_an_average_starts_anew_at_the_converted_model(run: Any, model: Any, tmp_path: Path) -> None:
    """With a decay of nearly 1 the average stays at the converted model, whatever the weights do."""
    run(tmp_path, options(ema_decay=0.999999, lr=0.01), model)
    lines = metrics(tmp_path)
    assert lines[0]["classifier"] == "learned" and lines[1]["scale"] != lines[-1]["scale"]
    averaged = weights(tmp_path)
    assert isinstance(model.fc, FixedClassifier) and torch.equal(averaged["fc.codes"], model.fc.codes)
    assert not torch.equal(averaged["fc.scale"], model.fc.scale)


def test_several_processes_have_the_same_head(processes: Any, run: Any, new_model: Any, tmp_path: Path) -> None:
    plain = {"batch_norm": False, "dropout": 0.0}
    given = {**QUICK, "learn_signs": 0.1, "margin": "cosface:0.1"}
    network = {**plain, "fixed": False}
    named = {name: value for name, value in given.items() if name != "model"}
    runs = {"two": {**named, "batch_size": 4, "model": network, "kind": "train"}}
    told = processes.together(tmp_path, runs)["two"]
    assert [each["result"] for each in told] == ["done", "done"]
    first, second = (each["state"] for each in told)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "ClassifierConverted" in told[0]["events"] and told[1]["events"] == []
    run(tmp_path / "one", options(**given), new_model(**network))
    ours, theirs = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    for left, right in zip(ours, theirs, strict=True):
        assert left["val_loss"] == pytest.approx(right["val_loss"], rel=0.05)
    assert ours[0]["gradient_bytes"] - ours[-1]["gradient_bytes"] == 4 * 32 * 4 - 4 - 4 * 16 * 4


def test_the_accuracy_of_the_learned_head_does_not_stop_the_run(run: Any, model: Any, tmp_path: Path) -> None:
    result = run(tmp_path, options(max_drop=99, original_top1=99, val_every=1), model)
    assert result.reached and result.after.classifier == "converted"
    assert metrics(tmp_path)[-1]["step"] == 8


def test_signs_are_never_those_of_a_projection() -> None:
    """They could not be learned."""
    assert not head_config(options()).project


def test_what_is_not_possible_is_refused_before_training(run: Any, model: Any, tmp_path: Path) -> None:
    with pytest.raises(HeadSpecError):
        run(tmp_path / "bits", options(bits_per_class=33), model)
    with pytest.raises(UsageError, match="bits_per_class"):
        run(tmp_path / "margin", options(bits_per_class=None, margin="cosface:0.1"), model)
    with pytest.raises(UsageError, match="one update"):
        run(tmp_path / "short", options(epochs=1, batch_size=44), model)
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"compile": True}, "compile"),
        ({"shard": True}, "shard"),
        ({"share_classes": True}, "share_classes"),
        ({"loss": "cosine"}, "loss cosine"),
        ({"head": "hadamard"}, "bits_per_class"),
        ({"head": "auto", "bits_per_class": None, "learn_signs": 0.1}, "learn_signs"),
        ({"convert_after": 1.0}, "convert_after"),
    ],
)
def test_what_excludes_it(given: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        options(**given)


def test_when_it_is_converted() -> None:
    assert conversion_step(options(epochs=10, convert_after=0.25), 8) == 20
    assert conversion_step(options(epochs=1, convert_after=0.001), 2) == 1
    assert conversion_step(options(epochs=1, convert_after=0.999), 2) == 1


REAL = {
    "grad_checkpointing": True,
    "model": "test_resnet",
    "in_chans": 1,
    "img_size": 32,
    "mean": (0.3,),
    "std": (0.35,),
    "crop_pct": 1.0,
    "epochs": 4,
    "batch_size": 24,
    "lr": 0.05,
    "bits_per_class": 32,
    "learn_signs": 0.1,
}


def test_from_files_it_leaves_slim_checkpoints_and_a_recipe_that_repeats_it(digits: Path, tmp_path: Path) -> None:
    given = options(**REAL)

    def crash(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.record.epoch == 1:
            raise KeyboardInterrupt

    result = train_from_scratch(str(digits), tmp_path / "whole", given)
    info = read_info(result.best_path)
    assert info.heads[0].spec.kind == "binary" and info.heads[0].spec.bits_per_class == 32
    assert info.labels == [str(digit) for digit in range(10)] and info.savings["removed"] > 0
    assert (info.training or {})["after"]["val_top1"] == result.after.val_top1
    assert isinstance(load(result.best_path).get_classifier(), FixedClassifier)
    assert not (tmp_path / "whole" / "best.safetensors").exists()
    with pytest.raises(KeyboardInterrupt):
        train_from_scratch(str(digits), tmp_path / "parts", given, on_event=crash)
    assert stored_options(tmp_path / "parts", TrainOptions).recipe() == given.recipe()
    train_from_scratch(str(digits), tmp_path / "parts", None, resume=True)
    whole, parts = (load(tmp_path / name / "last.fixed.safetensors").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    (described,) = read_runs([tmp_path / "whole"])
    assert described.head == "binary" and described.best == result.after
    assert described.model.savings is not None

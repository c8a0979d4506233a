"""The start is a candidate for the best checkpoint, so that a run never leaves a worse model as its best."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fixify.data import OpenedData, make_loader
from fixify.data.idx import ArrayImages
from fixify.metrics import Predictions, evaluate
from fixify.training import (
    EpochRecord,
    Evaluated,
    Event,
    FinetuneOptions,
    FinetuneResult,
    ReferenceModel,
    TrainOptions,
    Warned,
)
from fixify.training.events import best_of, gentler
from fixify.training.run_folder import write_sealed

Run = Callable[..., FinetuneResult]
# 5 updates an epoch.
OPTIONS = FinetuneOptions.create(epochs=2, batch_size=8, lr=0.3, no_aug=True, workers=0, device="cpu")


def load(path: Path) -> dict[str, Any]:
    return torch.load(io.BytesIO(path.read_bytes()), weights_only=True)


def trainable(teacher: ReferenceModel) -> nn.Module:
    """A copy of the trained network; tests of teachers freeze the one of the session."""
    return copy.deepcopy(teacher.model).requires_grad_(True)


@pytest.fixture(scope="module")
def misleading(stripes: tuple[OpenedData, OpenedData]) -> OpenedData:
    """Training images with wrong labels, which make any trained model worse."""
    train = stripes[0]
    images: Any = train.images
    return replace(train, images=ArrayImages(images.pixels, (images.labels + 1) % train.num_classes))


@pytest.fixture(scope="module")
def harmed(
    run: Run, teacher: ReferenceModel, misleading: OpenedData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, FinetuneResult, list[Event]]:
    """A run that only makes a trained model worse: its folder, result and events."""
    events: list[Event] = []
    out = tmp_path_factory.mktemp("harmed")
    model = trainable(teacher)
    return out, run(out, OPTIONS, model, train=misleading, on_event=events.append), events


def test_the_best_checkpoint_is_the_start_if_no_validation_is_better(
    harmed: tuple[Path, FinetuneResult, list[Event]], teacher: ReferenceModel
) -> None:
    out, result, _ = harmed
    assert result.best_is_start and result.after is result.start
    assert all(record.val_top1 < result.after.val_top1 for record in result.history) and len(result.history) == 2
    assert result.after.val_top1 == result.before.top1 and (result.after.step, result.after.epochs) == (0, 0)
    best, last, original = load(result.best_path), load(result.last_path)["weights"], teacher.model.state_dict()
    assert all(torch.equal(best["weights"][key], original[key]) for key in original)
    assert not all(torch.equal(last[key], original[key]) for key in original)
    assert best["record"]["epochs_done"] == best["record"]["updates"] == 0
    assert best["record"]["after"]["val_top1"] == result.before.top1
    assert json.loads((out / "run.json").read_text())["start"] == result.after.to_dict()
    assert [json.loads(line)["epoch"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [0, 1]


def test_what_to_try_is_said(harmed: tuple[Path, FinetuneResult, list[Event]]) -> None:
    advice = harmed[1].advice
    assert advice is not None and "--lr 0.03" in advice and "--distill ORIGINAL" in advice
    assert gentler(0.3, taught=False) in advice
    assert "--distill" not in gentler(0.3, taught=True) and "--lr" not in gentler(None, taught=True)


def test_a_first_epoch_far_below_the_start_warns_unless_it_is_the_last_one(
    run: Run,
    harmed: tuple[Path, FinetuneResult, list[Event]],
    teacher: ReferenceModel,
    misleading: OpenedData,
    tmp_path: Path,
) -> None:
    (warned,) = [event.text for event in harmed[2] if isinstance(event, Warned)]
    assert f"{harmed[1].history[0].val_top1:.2f} %" in warned and "--lr 0.03" in warned
    events: list[Event] = []
    one = OPTIONS.replace(epochs=1)
    result = run(tmp_path, one, trainable(teacher), train=misleading, on_event=events.append)
    assert result.best_is_start and not any(isinstance(event, Warned) for event in events)


def test_a_resumed_run_knows_its_start(
    run: Run,
    crash_at: Any,
    harmed: tuple[Path, FinetuneResult, list[Event]],
    teacher: ReferenceModel,
    misleading: OpenedData,
    tmp_path: Path,
) -> None:
    with pytest.raises(crash_at.error):
        run(tmp_path, OPTIONS, trainable(teacher), train=misleading, on_event=crash_at(0, 3))
    assert (tmp_path / "best.fixed.safetensors").exists()  # the start, as soon as it was measured
    result = run(tmp_path, OPTIONS, trainable(teacher), train=misleading, resume=True)
    assert result.best_is_start and result.advice == harmed[1].advice
    ours, theirs = load(result.best_path)["weights"], load(harmed[1].best_path)["weights"]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_of_an_older_version_resumes_without_a_start(
    run: Run, crash_at: Any, teacher: ReferenceModel, misleading: OpenedData, tmp_path: Path
) -> None:
    with pytest.raises(crash_at.error):
        run(tmp_path, OPTIONS, trainable(teacher), train=misleading, on_event=crash_at(1, 2))
    state = load(tmp_path / "state.pt")
    assert state["progress"].pop("start") is not None
    write_sealed(tmp_path, state)
    result = run(tmp_path, OPTIONS, trainable(teacher), train=misleading, resume=True)
    assert result.start is None and result.advice is None and not result.best_is_start
    assert result.after in result.history


def test_a_run_that_gets_better_is_as_before(run: Run, tmp_path: Path) -> None:
    events: list[Event] = []
    result = run(tmp_path, OPTIONS.replace(epochs=8, lr=0.05), on_event=events.append)
    assert result.after in result.history and result.advice is None and result.start is not None
    # Its head had no statistics; the start is what it is with them.
    before, start = [event for event in events if isinstance(event, Evaluated)]
    assert (before.calibrated, start.calibrated) == (False, True)
    assert before.metrics.loss == result.before.loss != start.metrics.loss == result.start.val_loss


SIGNS = OPTIONS.replace(epochs=4, lr=0.05)


@pytest.fixture(scope="module")
def gained(
    run: Run, new_model: Any, stripes: Any, preprocessing: Any, tmp_path_factory: pytest.TempPathFactory
) -> OpenedData:
    """The validation images that a head of one bit per weight gets wrong at its start and right after training."""
    right: list[Any] = []

    def save(model: nn.Module, path: Path, _record: dict[str, Any]) -> None:
        if path.name.startswith("last") or not right:
            right.append(right_answers(model, stripes[1], preprocessing))

    result = run(tmp_path_factory.mktemp("signs"), SIGNS, new_model(signs=32), save=save)
    last = result.history[-1]
    assert result.after in result.history  # it starts at chance, so any training beats it
    assert (last.gained, last.lost) == (int((right[-1] & ~right[0]).sum()), int((right[0] & ~right[-1]).sum()))
    only = (right[-1] & ~right[0]).nonzero()[0]
    assert len(only) >= 5
    return some_of(stripes[1], only)


def right_answers(model: nn.Module, data: OpenedData, preprocessing: Any) -> Any:
    found = Predictions()
    loader = make_loader(data, preprocessing, training=False, batch_size=len(data))
    evaluate(model, loader, device=torch.device("cpu"), predictions=found)
    labels, predicted = found.pairs().numpy()
    return labels == predicted


def some_of(data: OpenedData, which: Any) -> OpenedData:
    images: Any = data.images
    return replace(data, images=ArrayImages(images.pixels[which], images.labels[which]))


def test_a_gain_of_one_image_is_chance_for_a_head_that_starts_near_and_five_are_none(
    run: Run, new_model: Any, gained: OpenedData, tmp_path: Path
) -> None:
    one = some_of(gained, slice(1))
    kept = run(tmp_path / "one", SIGNS, new_model(signs=32), val=one)
    assert kept.best_is_start and kept.after.val_top1 == 0 and kept.history[-1].val_top1 == 100
    assert (kept.history[-1].gained, kept.history[-1].lost) == (1, 0)
    assert kept.advice is not None and "100.00 %" in kept.advice and "--lr" not in kept.advice
    assert load(kept.best_path)["record"]["updates"] == 0
    replaced = run(tmp_path / "five", SIGNS, new_model(signs=32), val=some_of(gained, slice(5)))
    assert replaced.after in replaced.history and replaced.advice is None


def test_max_drop_takes_the_first_validation_that_is_enough(
    run: Run, new_model: Any, gained: OpenedData, tmp_path: Path
) -> None:
    options = SIGNS.replace(max_drop=0.0, original_top1=100.0)
    result = run(tmp_path, options, new_model(signs=32), val=some_of(gained, slice(1)))
    assert result.reached and result.after is result.history[-1] and result.after.gained is None


def test_heads_that_do_not_start_near_are_not_compared_with_their_start(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path, OPTIONS)
    assert [(record.gained, record.lost) for record in result.history] == [(None, None)] * 2
    assert load(tmp_path / "state.pt")["progress"]["start_right"] is None


def test_a_resumed_run_compares_with_its_start_unless_an_older_version_began_it(
    run: Run, crash_at: Any, new_model: Any, gained: OpenedData, tmp_path: Path
) -> None:
    one = some_of(gained, slice(1))
    whole = run(tmp_path / "whole", SIGNS, new_model(signs=32), val=one)
    results = {}
    for name in ("same", "older"):
        with pytest.raises(crash_at.error):
            run(tmp_path / name, SIGNS, new_model(signs=32), val=one, on_event=crash_at(0, 2))
        if name == "older":
            state = load(tmp_path / name / "state.pt")
            assert state["progress"].pop("start_right") is not None
            write_sealed(tmp_path / name, state)
        results[name] = run(tmp_path / name, SIGNS, new_model(signs=32), val=one, resume=True)
    assert results["same"].best_is_start and results["same"].advice == whole.advice
    changes = [[(record.gained, record.lost) for record in each.history] for each in (results["same"], whole)]
    assert changes[0] == changes[1]
    older = results["older"]
    assert older.after in older.history and older.after.val_top1 == 100 and older.after.gained is None


def test_random_weights_are_no_candidate(run: Run, tmp_path: Path) -> None:
    options = TrainOptions.create(
        model="resnet18", epochs=1, batch_size=8, lr=1e-6, no_aug=True, workers=0, device="cpu"
    )
    result = run(tmp_path, options)
    assert result.start is None and result.after is result.history[0]
    assert "start" not in json.loads((tmp_path / "run.json").read_text())


def test_of_equal_validations_the_one_with_the_lower_loss_is_best_then_the_start() -> None:
    def record(step: int, top1: float, loss: float) -> EpochRecord:
        return EpochRecord(0, step, 0.1, None, None, loss, top1, 100.0, 1.0, None, 1.0, 1.0)

    start, same, better, worse = record(0, 90, 1), record(5, 90, 1), record(10, 90, 0.9), record(15, 89, 0.1)
    assert best_of(start, [same, worse]) is start
    assert best_of(start, [same, better, worse]) is better
    assert best_of(None, [worse, same]) is same
    assert best_of(None, []) is None

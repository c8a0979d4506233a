"""Stopping as soon as the accuracy is near enough to the original's, and validating within an epoch."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fixify.data import make_loader
from fixify.errors import TrainingError, UsageError
from fixify.metrics import evaluate
from fixify.training import (
    EpochEnded,
    Evaluating,
    Event,
    FinetuneOptions,
    FinetuneResult,
    OriginalEvaluated,
    ReferenceModel,
    Step,
    TrainingInterrupted,
    Validated,
)

Run = Callable[..., FinetuneResult]
CPU = torch.device("cpu")
# 5 updates an epoch.
OPTIONS = FinetuneOptions.create(epochs=20, batch_size=8, lr=0.1, no_aug=True, workers=0, device="cpu", ema_decay=0.9)
SHORT = OPTIONS.replace(epochs=2)


def load(path: Path) -> dict[str, Any]:
    return torch.load(io.BytesIO(path.read_bytes()), weights_only=True)


def same_weights(ours: Path, theirs: Path) -> bool:
    """Of two runs: the weights, their average, and the optimiser's moments."""
    a, b = load(ours / "state.pt"), load(theirs / "state.pt")
    moments = [[s["momentum_buffer"] for s in x["optimiser"]["state"].values()] for x in (a, b)]
    return (
        all(torch.equal(a[part][key], b[part][key]) for part in ("model", "ema") for key in a[part])
        and all(torch.equal(*pair) for pair in zip(*moments, strict=True))
        and len(moments[0]) > 0
    )


def metrics_without_times(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


@pytest.fixture(scope="module")
def every_two(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """A run of two epochs that validates every two updates."""
    out = tmp_path_factory.mktemp("every-two")
    run(out, SHORT.replace(val_every=2))
    return out


def test_it_stops_at_the_first_validation_that_is_near_enough(run: Run, tmp_path: Path) -> None:
    events: list[Event] = []
    options = OPTIONS.replace(val_every=2, max_drop=5.0, original_top1=95.0)
    result = run(tmp_path, options, on_event=events.append)
    assert result.reached is True and result.original_top1 == 95.0
    *others, last = result.history
    assert others and last.val_top1 >= 90 > max(record.val_top1 for record in others)
    assert result.after is last and last.step < 100
    assert sum(isinstance(event, Step) for event in events) == last.step
    # What it left is what it measured, and says how far it got.
    best, latest, state = (
        load(tmp_path / f"{name}") for name in ("best.fixed.safetensors", "last.fixed.safetensors", "state.pt")
    )
    assert all(torch.equal(best["weights"][key], state["ema"][key]) for key in state["ema"])
    assert best["record"] == latest["record"]
    assert best["record"]["original_top1"] == 95.0 and best["record"]["epochs_done"] == last.step / 5
    assert [line["step"] for line in metrics_without_times(tmp_path)] == [record.step for record in result.history]
    # It is finished: resuming trains no further.
    again = run(
        tmp_path,
        options,
        resume=True,
        on_event=lambda event: pytest.fail(str(event)) if isinstance(event, Step) else None,
    )
    assert again.reached is True and again.history == result.history


def test_a_goal_that_is_never_reached_trains_all_epochs_and_says_so(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path, SHORT.replace(max_drop=0.0, original_top1=100.0))
    assert result.reached is False and result.after.val_top1 < 100
    assert [record.epochs for record in result.history] == [1, 2]
    assert run(tmp_path, SHORT.replace(max_drop=0.0, original_top1=100.0), resume=True).reached is False


def test_without_a_goal_there_is_nothing_to_reach(run: Run, every_two: Path) -> None:
    result = run(every_two, SHORT.replace(val_every=2), resume=True)
    assert result.reached is None and result.original_top1 is None


def test_the_drop_is_met_exactly_in_spite_of_rounding(run: Run, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", SHORT).history[0].val_top1
    # A drop that a bare comparison would refuse, as 97.8 - 97.3 <= 0.5 is false.
    drop = next(tenths / 10 for tenths in range(1, 100) if (plain + tenths / 10) - plain > tenths / 10)
    result = run(tmp_path / "goal", SHORT.replace(max_drop=drop, original_top1=plain + drop))
    assert result.reached is True and result.after.step == 5


def test_a_model_that_is_near_enough_as_it_comes_is_not_trained(
    run: Run, tmp_path: Path, new_model: Any, stripes: Any, preprocessing: Any
) -> None:
    events: list[Event] = []
    result = run(tmp_path, OPTIONS.replace(max_drop=99.0, original_top1=100.0), on_event=events.append)
    (record,) = result.history
    assert result.reached is True and (record.step, record.epochs, record.train_loss) == (0, 0, None)
    assert not any(isinstance(event, Step | EpochEnded) for event in events)
    assert [event.record for event in events if isinstance(event, Validated)] == [record]
    # The head was calibrated, and that is what was measured and saved.
    model = new_model()
    model.load_state_dict(load(result.best_path)["weights"])
    assert int(model.fc.num_batches_tracked) > 0
    loader = make_loader(stripes[1], preprocessing, training=False, batch_size=20)
    assert evaluate(model, loader, device=CPU).loss == pytest.approx(record.val_loss, rel=1e-5)
    assert record.val_loss != pytest.approx(result.before.loss, rel=1e-5)
    assert run(tmp_path, OPTIONS.replace(max_drop=99.0, original_top1=100.0), resume=True).history == result.history


def test_the_original_is_measured_once_with_its_own_preprocessing(
    run: Run, tmp_path: Path, teacher: ReferenceModel, stripes: Any, preprocessing: Any
) -> None:
    learned = teacher.model
    own = {**preprocessing, "input_size": (1, 20, 20)}
    expected = evaluate(learned.eval(), make_loader(stripes[1], own, training=False, batch_size=20), device=CPU)
    events: list[Event] = []
    original = ReferenceModel("learned.pth", "0" * 64, learned, own)
    options = OPTIONS.replace(max_drop=10.0)
    result = run(tmp_path / "run", options, original=original, on_event=events.append)
    (said,) = [event for event in events if isinstance(event, OriginalEvaluated)]
    assert said.metrics.top1 == result.original_top1 == expected.top1 > 80
    assert said.metrics.loss == pytest.approx(expected.loss, rel=1e-5)
    assert result.reached is True
    record = load(result.last_path)["record"]
    assert record["original"] == {"name": "learned.pth", "sha256": "0" * 64}
    assert record["original_top1"] == expected.top1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["original"]["name"] == "learned.pth"
    # Resuming does not measure it again, but it has to be the same one.
    again: list[Event] = []
    result = run(tmp_path / "run", options, original=original, resume=True, on_event=again.append)
    assert result.original_top1 == expected.top1
    assert not any(isinstance(event, OriginalEvaluated) for event in again)
    with pytest.raises(TrainingError, match=r"original was .*learned"):
        run(tmp_path / "run", options, original=ReferenceModel("other.pth", "1" * 64, learned, own), resume=True)


def test_validating_within_epochs_changes_nothing_that_is_trained(run: Run, every_two: Path, tmp_path: Path) -> None:
    run(tmp_path, SHORT)
    assert same_weights(every_two, tmp_path)
    inside, plain = metrics_without_times(every_two), metrics_without_times(tmp_path)
    assert [line for line in inside if line["fraction"] == 1] == plain
    assert [(line["epoch"], line["step"], line["fraction"]) for line in inside] == [
        (0, 2, 0.4),
        (0, 4, 0.8),
        (0, 5, 1.0),
        (1, 6, 0.2),
        (1, 8, 0.6),
        (1, 10, 1.0),
    ]
    assert len((every_two / "summary.csv").read_text().splitlines()) == 3  # timm's, one row an epoch


def test_a_crash_between_validations_and_a_resume_give_the_same_run(
    run: Run, crash_at: Any, every_two: Path, tmp_path: Path
) -> None:
    options = SHORT.replace(val_every=2)
    with pytest.raises(crash_at.error):
        run(tmp_path, options, on_event=crash_at(1, 2))
    steps: list[int] = []
    run(tmp_path, options, resume=True, on_event=lambda e: steps.append(e.step) if isinstance(e, Step) else None)
    assert steps[0] == 7  # from the state after the validation at 6
    assert same_weights(every_two, tmp_path)
    assert metrics_without_times(every_two) == metrics_without_times(tmp_path)


def test_a_signal_during_a_validation_within_an_epoch_repeats_that_validation(
    run: Run, every_two: Path, tmp_path: Path
) -> None:
    seen: list[Event] = []

    def interrupt(event: Event) -> None:
        if isinstance(event, Evaluating) and event.phase == "validation" and not seen:
            seen.append(event)
            os.kill(os.getpid(), signal.SIGINT)

    options = SHORT.replace(val_every=2)
    with pytest.raises(TrainingInterrupted, match="epoch 1 of 2 after 2 of 5 batches"):
        run(tmp_path, options, on_event=interrupt)
    run(tmp_path, options, resume=True)
    assert same_weights(every_two, tmp_path)
    assert metrics_without_times(every_two) == metrics_without_times(tmp_path)


def test_what_does_not_go_together(run: Run, tmp_path: Path, new_model: Any, preprocessing: Any) -> None:
    with pytest.raises(UsageError, match=r"original_top1 .*max_drop"):
        OPTIONS.replace(original_top1=97.8)
    with pytest.raises(UsageError, match=r"--max-drop 0\.5") as caught:
        run(tmp_path / "run", OPTIONS.replace(max_drop=0.5))
    assert "--against ORIGINAL" in str(caught.value)
    original = ReferenceModel("learned.pth", "0" * 64, new_model(fixed=False), preprocessing)
    with pytest.raises(UsageError, match=r"97\.8 .*learned\.pth"):
        run(tmp_path / "run", OPTIONS.replace(max_drop=0.5, original_top1=97.8), original=original)
    assert not (tmp_path / "run").exists()

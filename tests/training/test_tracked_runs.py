"""Real runs, watched by trackers: a recording one, and TensorBoard read back from its event files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fixify.tracking import TensorBoard, TrackedRun, Tracking
from fixify.training import Event, FinetuneOptions, FinetuneResult, Step
from fixify.training.run_folder import is_logged

Run = Callable[..., FinetuneResult]
OPTIONS = FinetuneOptions.create(epochs=6, batch_size=4, lr=0.05, no_aug=True, workers=0, device="cpu")  # 66 steps
LOGGED = [step for step in range(1, 67) if is_logged(step) or step % 50 == 0]


class Recorder:
    def __init__(self) -> None:
        self.runs: list[TrackedRun] = []
        self.values: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def start(self, run: TrackedRun) -> None:
        self.runs.append(run)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.values.append((step, dict(values)))

    def finish(self) -> None:
        self.finished += 1


class Crash(Exception):
    pass


def crash_after(step: int, then: Callable[[Event], object]) -> Callable[[Event], object]:
    def listen(event: Event) -> None:
        then(event)
        if isinstance(event, Step) and event.step == step:
            raise Crash

    return listen


@pytest.fixture(scope="module")
def watched(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FinetuneResult, Recorder]:
    """A run that was watched by a recorder and by TensorBoard."""
    pytest.importorskip("tensorboard")
    out, recorder = tmp_path_factory.mktemp("whole"), Recorder()
    with Tracking([recorder, TensorBoard()]) as tracking:
        result = run(out, OPTIONS, on_event=tracking)
    return out, result, recorder


def test_what_is_logged(watched: tuple[Path, FinetuneResult, Recorder]) -> None:
    out, result, recorder = watched
    (started,) = recorder.runs
    assert (started.name, started.resumed, started.first_step) == (out.name, False, 0)
    resolved = OPTIONS.replace(distill_weight=0.5, freeze_bn=False, last_block_epochs=0)
    assert started.config["options"] == resolved.recipe()
    assert "class_names" not in started.config
    training = [(step, values) for step, values in recorder.values if "train/loss" in values]
    assert [step for step, _ in training] == LOGGED
    # The same windows as in steps.jsonl, up to the first step that only trackers get.
    stored = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    for (step, values), record in zip(training[: LOGGED.index(50)], stored, strict=False):
        assert step == record["step"]
        assert values["train/loss"] == pytest.approx(record["loss"], rel=1e-9)
        assert values["train/scale"] == record["scale"]
    validations = [(step, values["val/top1"]) for step, values in recorder.values if "val/top1" in values]
    assert validations == [(0, result.before.top1), *((r.step, r.val_top1) for r in result.history)]
    assert recorder.finished == 1


def test_a_run_that_fails_is_finished_and_the_next_one_is_another(run: Run, tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(Crash), Tracking([recorder]) as tracking:
        run(tmp_path / "a", OPTIONS.replace(epochs=1), on_event=tracking)
        run(tmp_path / "b", OPTIONS.replace(epochs=1), on_event=crash_after(3, tracking))
    assert [started.name for started in recorder.runs] == ["a", "b"]
    assert recorder.finished == 2


def test_tensorboard_has_every_step_once_after_a_crash(
    run: Run, tmp_path: Path, watched: tuple[Path, FinetuneResult, Recorder]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        return {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if tag != "train/images_per_second"
        }

    out = tmp_path / "crashed"
    with pytest.raises(Crash), Tracking([TensorBoard()]) as tracking:
        run(out, OPTIONS, on_event=crash_after(5, tracking))  # its files have to go
    with pytest.raises(Crash), Tracking([TensorBoard()]) as tracking:
        run(out, OPTIONS, on_event=crash_after(60, tracking), force=True)
    with Tracking([TensorBoard()]) as tracking:
        run(out, OPTIONS, on_event=tracking, resume=True)  # from the validation after 55 updates
    whole, crashed = scalars(watched[0]), scalars(out)
    assert [step for step, _ in whole["train/loss"]] == LOGGED
    assert [step for step, _ in whole["val/top1"]] == list(range(0, 67, 11))
    assert set(whole) == {
        *("train/loss", "train/lr", "train/epoch", "train/scale", "train/top1"),
        *("val/loss", "val/top1", "val/top5", "val/ece"),
    }
    # The first loss after a resume is of the steps since then; all else is as if nothing had happened.
    first = min(step for step in LOGGED if step > 55)
    losses = whole.pop("train/loss"), crashed.pop("train/loss")
    assert [pair for pair in losses[0] if pair[0] != first] == [pair for pair in losses[1] if pair[0] != first]
    assert [step for step, _ in losses[1]] == LOGGED
    assert crashed == whole

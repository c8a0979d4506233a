"""What a run shows: the estimate of the time left, the live view at several widths, and plain lines elsewhere."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fixify.cli.output import Output
from fixify.cli.progress import Pace, TrainingDisplay, as_time
from fixify.metrics import Metrics
from fixify.training import ClassifierConverted, EpochEnded, EpochRecord, Evaluated, Evaluating, RunStarted, Step

STARTED = RunStarted(
    epochs=5,
    first_epoch=0,
    batches=640,
    train="40,960 images of 1,000 classes from train/",
    val="10,000 images of 1,000 classes from val/",
    device="cpu",
    workers=2,
    processes=1,
    parameters=1000,
    trainable=1000,
    frozen=(),
    folder=Path("run"),
    first_step=0,
    resumed=False,
    config={},
)
RECORD = EpochRecord(0, 640, 0.05, 1.25, 70.0, 1.0, 75.0, 93.0, 2.0, 12.5, 1204.0, 34.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step(batch: int, epoch: int = 1, **given: Any) -> Step:
    values = {"loss": 0.7134, "top1": 81.25, "lr": 0.04823, "images_per_second": 1204.4, "scale": 14.312}
    values |= {"recent_loss": 0.7, "recent_images": 64, "step": epoch * 640 + batch, **given}
    return Step(epoch=epoch, batch=batch, batches=640, **values)


def test_the_time_left_counts_batches_and_validations() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.start(epochs=3, batches=10)
    pace.evaluating(50, 100)
    clock.now += 4
    pace.evaluating(100, 100)  # before training: 4 s
    assert pace.left(0, 0) is None
    clock.now += 60  # the first batch waits for workers, and is not counted
    pace.step(0, 1)
    assert pace.left(0, 1) is None
    clock.now += 2
    pace.step(0, 2)
    assert pace.left(0, 2) == (16, 16 + 4 + 2 * (20 + 4))
    for batch in range(3, 11):
        clock.now += 2
        pace.step(0, batch)
    pace.evaluating(50, 100)
    clock.now += 6
    pace.evaluating(100, 100)
    pace.epoch_ended()
    clock.now += 1
    pace.step(1, 1)
    assert pace.left(1, 1) == (18, 18 + 6 + 26)
    # A validation within the epoch stops the clock of training.
    clock.now += 2
    pace.step(1, 2)
    pace.evaluating(50, 100)
    clock.now += 6
    pace.evaluating(100, 100)
    clock.now += 2
    pace.step(1, 3)
    assert pace.left(1, 3) == (14, 14 + 6 + 26)


@pytest.mark.parametrize(("seconds", "text"), [(None, "--:--"), (0.4, "00:00"), (62, "01:02"), (3723, "1:02:03")])
def test_times(seconds: float | None, text: str) -> None:
    assert as_time(seconds) == text


def drawn(width: int, *, color: bool = False) -> str:
    """The live view in mid-run."""
    clock = Clock()
    output = Output()
    output.err = Console(
        file=io.StringIO(), force_terminal=True, width=width, highlight=False, no_color=not color, _environ={}
    )
    display = TrainingDisplay(output, clock=clock)
    display(STARTED)
    display(EpochEnded(RECORD, is_best=True))
    for batch in (1, 212):
        clock.now += 63
        display(step(batch))
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, no_color=not color, color_system="standard", _environ={}
    )
    console.print(display.view.get_renderable())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [120, 80, 40, 24])
def test_the_live_view_fits(width: int) -> None:
    lines = [_without_codes(line) for line in drawn(width).splitlines()]
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    if width >= 40:
        for words in ("epoch 2/5", "212/640", "852/3200", "left"):
            assert words in text
    for words in (
        "loss 0.7134",
        "top-1 81.2 %",
        "alpha 14.31",
        "lr 0.0482",
        "1,204 images/s",
        "best validation 75.00 %",
    ):
        assert words in text, text
    if width == 80:
        assert len(lines) == 4


def _without_codes(line: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", line).rstrip()


def test_no_color_has_no_colour() -> None:
    coloured, plain = drawn(80, color=True), drawn(80)
    assert "\x1b[3" in coloured or "\x1b[9" in coloured
    assert not any(f"\x1b[{number}" in plain for number in (*range(30, 48), *range(90, 98)))


def test_elsewhere_a_line_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with TrainingDisplay(Output(), clock=clock) as display:
        display(STARTED)
        display(Evaluating("before", 100, 100))
        display(Evaluated(Metrics(1.0, 5.0, 7.0, 3.0, 100, 2.0)))
        for batch in range(1, 101):
            clock.now += 1
            display(step(batch))
        display(EpochEnded(RECORD, is_best=True))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("training data: 40,960 images")
    assert lines[2] == "before training: top-1 1.00 %, loss 7.0000"
    during = [line for line in lines if ", batch " in line]
    assert [line.split(":")[0] for line in during] == [f"epoch 2/5, batch {batch}/640" for batch in (30, 60, 90)]
    assert during[0] == (
        "epoch 2/5, batch 30/640: loss 0.7134, top-1 81.2 %, alpha 14.31, lr 0.0482, 1,204 images/s, 42:10 left"
    )
    assert lines[-1] == "epoch 1/5: loss 1.2500, validation top-1 75.00 %, loss 1.0000, 1204 images/s (best)"
    assert not any("━" in line for line in lines)


def test_a_conversion_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    show = TrainingDisplay(Output(as_json=False))
    show(dataclasses.replace(STARTED, convert_at=120))
    show(ClassifierConverted(120, "binary", 9, 512, "loss of 1,000 classes"))
    show(dataclasses.replace(STARTED, convert_at=120, first_step=120, resumed=True))
    lines = capsys.readouterr().err.splitlines()
    assert sum("120 steps" in line for line in lines) == 1
    (place,) = [number for number, line in enumerate(lines) if line.startswith("step 120:")]
    assert "binary head of 9 bytes per class" in lines[place] and "512 training images" in lines[place]
    assert lines[place + 1] == "loss of 1,000 classes"

"""Open trackers by name, and log a run that crashes and is resumed."""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fixify.errors import UsageError
from fixify.tracking import _TRACKERS, TRACKERS, Mark, TensorBoard, TrackedRun, Tracker, open_trackers


def crash_and_resume(new: Callable[[], Tracker], folder: Path) -> None:
    """Log steps 1 to 8, crash with a saved state of step 5, and log steps 6 to 10."""
    tracker = new()
    tracker.start(TrackedRun(folder, {"options": {"lr": 0.1}, "data": "stripes"}, resumed=False, first_step=0))
    for step in range(1, 9):
        tracker.log(step, {"train/loss": 1 / step})
    tracker.log(8, {"val/top1": 80.0})
    tracker.finish()
    tracker = new()
    tracker.start(TrackedRun(folder, {"options": {"lr": 0.1}, "data": "stripes"}, resumed=True, first_step=5))
    for step in range(6, 11):
        tracker.log(step, {"train/loss": 1 / step})
    tracker.log(10, {"val/top1": 90.0})
    tracker.finish()


def test_unknown_names_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError) as caught:
        open_trackers(["tensorbord"])
    assert "'tensorbord'" in caught.value.message and "'tensorboard'" in caught.value.message
    assert all(name in str(caught.value.hint) for name in TRACKERS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    for name in TRACKERS:
        with pytest.raises(UsageError) as caught:
            open_trackers([name])
        assert f"--track {name}" in caught.value.message
        assert caught.value.hint == f"pip install {name}"


def test_a_folder_called_wandb_is_not_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fixify_nowhere").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(_TRACKERS, "fixify_nowhere", TensorBoard)
    with pytest.raises(UsageError) as caught:
        open_trackers(["fixify_nowhere"])
    assert caught.value.hint == "pip install fixify_nowhere"


def test_a_mark_lets_each_step_through_once_and_all_its_parts(tmp_path: Path) -> None:
    path = tmp_path / "mark.json"
    first = Mark(path, resumed=False)
    assert not first.is_known
    assert [first.is_new(step) for step in (0, 1, 2, 2)] == [True] * 4
    second = Mark(path, resumed=True)
    assert second.is_known and second.identity == first.identity
    assert [second.is_new(step) for step in (1, 2, 2, 3, 3)] == [False, False, False, True, True]
    assert Mark(path, resumed=False).identity != first.identity
    path.write_text("{")
    assert not Mark(path, resumed=True).is_known


@pytest.mark.slow
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # trackio reads it when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed")
    from fixify.tracking import PROJECT, Trackio

    crash_and_resume(Trackio, tmp_path)
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    assert capsys.readouterr().out == ""  # stdout is for results
    (found,) = trackio.Api().runs(PROJECT)
    assert found.config["data"] == "stripes"
    logged = SQLiteStorage.get_logs(PROJECT, found.name)
    assert [row["step"] for row in logged if "train/loss" in row] == list(range(1, 11))
    assert [row["val/top1"] for row in logged if "val/top1" in row] == [80.0, 90.0]


def wandb_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    block, header = 32768, 7
    assert content[:4] == b":W&B"
    position, whole = header, b""
    while position + header <= len(content):
        left = block - position % block
        if left < header:
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + header])
        whole += content[position + header : position + header + length]
        position += header + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


@pytest.mark.slow
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb
    from wandb.proto import wandb_internal_pb2

    from fixify.tracking import WeightsAndBiases

    crash_and_resume(WeightsAndBiases, tmp_path)
    wandb.teardown()  # now its service has written everything
    steps: list[int] = []
    identities = set()
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                identities.add(record.run.run_id)
            if record.HasField("history"):
                items: dict[str, Any] = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                steps.append(items["_step"])
    assert steps == list(range(1, 11))
    assert len(identities) == 1

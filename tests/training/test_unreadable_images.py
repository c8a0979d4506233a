from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fixify.data import OpenedData, Subset
from fixify.data.idx import ArrayImages
from fixify.errors import DataError
from fixify.training import FinetuneOptions, Warned

OPTIONS = FinetuneOptions.create(
    epochs=2, batch_size=8, lr=0.02, mixup=0.2, workers=0, device="cpu", max_unreadable=0.5, ema_decay=0.9
)


class Damaged(ArrayImages):
    def __init__(self, images: ArrayImages, damaged: set[int]) -> None:
        super().__init__(images.pixels, images.labels)
        self.damaged = damaged

    def load(self, index: int) -> tuple[Image.Image, int]:
        if index in self.damaged:
            raise DataError(f"Cannot read the image {index}.png: it is not an image.")
        return super().load(index)


def damage(data: OpenedData, damaged: set[int]) -> OpenedData:
    return OpenedData(Damaged(data.images, damaged), data.class_names, "", "", data.name, data.split)  # type: ignore[arg-type]


def state(folder: Path) -> dict[str, Any]:
    return torch.load(io.BytesIO((folder / "state.pt").read_bytes()), weights_only=True)


@pytest.fixture
def damaged(stripes: Any) -> dict[str, OpenedData]:
    return {"train": damage(stripes[0], {0, 3, 7, 8, 20, 30, 40}), "val": damage(stripes[1], {2, 5, 9})}


def test_they_are_named_counted_and_listed(run: Any, tmp_path: Path, damaged: Any) -> None:
    events: list[Any] = []
    result = run(tmp_path, OPTIONS, on_event=events.append, **damaged)
    told = [event.text for event in events if isinstance(event, Warned)]
    assert "Cannot read the image 2.png: it is not an image; it is left out." in told
    assert sum(text.endswith("it is left out.") for text in told) == 3
    (more,) = [text for text in told if text.startswith("More")]
    assert "training" in more and "unreadable.txt" in more
    assert result.before.num_images == 17  # 20, less three
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["val_unreadable"] for line in lines] == [3, 3]
    assert lines[1]["unreadable"] == 7
    listed = (tmp_path / "unreadable.txt").read_text().splitlines()
    assert len(listed) == 10
    assert "val: Cannot read the image 9.png: it is not an image." in listed
    assert "train: Cannot read the image 40.png: it is not an image." in listed


def test_a_resumed_run_is_exact(run: Any, crash_at: Any, tmp_path: Path, damaged: Any) -> None:
    run(tmp_path / "whole", OPTIONS, **damaged)
    with pytest.raises(crash_at.error):
        run(tmp_path / "parts", OPTIONS, on_event=crash_at(1, 2), **damaged)
    run(tmp_path / "parts", OPTIONS, resume=True, **damaged)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    for key in ("model", "ema"):
        assert all(torch.equal(value, parts[key][name]) for name, value in whole[key].items())
    assert whole["progress"]["unreadable"] == parts["progress"]["unreadable"]
    assert len(whole["progress"]["unreadable"]["train"]) == 7
    listings = [(tmp_path / name / "unreadable.txt").read_text() for name in ("whole", "parts")]
    assert listings[0] == listings[1]


def test_too_many_stop_the_run_and_it_may_be_resumed_with_more(run: Any, tmp_path: Path, stripes: Any) -> None:
    few = {"train": damage(stripes[0], {3, 7}), "val": stripes[1]}
    options = OPTIONS.replace(max_unreadable=0.03, calibration_images=2)
    with pytest.raises(DataError, match=r"2 of 44 images.* 0\.03"):
        run(tmp_path, options, **few)
    assert len(run(tmp_path, options.replace(max_unreadable=0.1), resume=True, **few).history) == 2


def test_a_run_whose_images_can_all_be_read_lists_none(run: Any, tmp_path: Path) -> None:
    run(tmp_path, OPTIONS.replace(epochs=1))
    assert not (tmp_path / "unreadable.txt").exists()


def test_the_features_of_the_last_blocks_are_of_those_that_can_be_read(run: Any, tmp_path: Path, damaged: Any) -> None:
    result = run(tmp_path, OPTIONS.replace(epochs=0, last_block_epochs=1, mixup=0.0), **damaged)
    assert result.history[0].val_unreadable == 3


def test_a_teacher_labels_the_validation_images_that_can_be_read(
    run: Any, tmp_path: Path, damaged: Any, teacher: Any, stripes: Any
) -> None:
    def unlabelled(data: OpenedData) -> OpenedData:
        return replace(data, labelled=False)

    options = OPTIONS.replace(epochs=1, mixup=0.0, unlabelled=True)
    events: list[Any] = []
    val = unlabelled(damaged["val"])
    result = run(tmp_path / "damaged", options, train=stripes[0], val=val, teacher=teacher, on_event=events.append)
    assert result.before.num_images == 17 and result.history[0].val_unreadable == 3
    told = [event.text for event in events if isinstance(event, Warned)]
    assert sum("it is left out" in text for text in told) == 3
    whole = unlabelled(replace(stripes[1], images=Subset(stripes[1].images, sorted({*range(20)} - {2, 5, 9}))))
    again = run(tmp_path / "whole", options, train=stripes[0], val=whole, teacher=teacher)
    assert again.before.loss == pytest.approx(result.before.loss, abs=1e-6)
    with pytest.raises(DataError, match=r"2\.png"):
        run(tmp_path / "none", options.replace(max_unreadable=0.0), train=stripes[0], val=val, teacher=teacher)

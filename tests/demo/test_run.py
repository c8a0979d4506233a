"""The demo as a whole, on one typeface for training and one for validation, with few images per class."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tools.demo_checkpoint import held_out_accuracy

import fixify
from fixify.benchmarks.child import child
from fixify.checkpoints.open import open_model
from fixify.demo import glyphs, run
from fixify.demo.run import SHIPPED, DemoResult, StageStarted, run_demo
from fixify.errors import OutputExistsError, ResourceError
from fixify.training import TrainingInterrupted

FEW = {"train": ("DejaVuSerif-Bold",), "val": ("DejaVuSerif-BoldItalic",)}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoResult]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "LETTER_VARIANTS", {"train": 6, "val": 1})
        yield run_demo(tmp_path_factory.mktemp("demo") / "here", epochs=1, faces=FEW)


def test_shipped_checkpoint_reaches_its_stated_accuracy() -> None:
    assert SHIPPED.stat().st_size < 2_000_000
    opened = open_model(SHIPPED)
    assert opened.architecture.ref == "timm/test_efficientnet"
    assert opened.preprocessing["input_size"] == [1, 32, 32]
    stated = torch.load(SHIPPED, weights_only=True)["metric"]
    measured = held_out_accuracy(opened.model)
    assert measured > 98
    assert measured == pytest.approx(stated, abs=0.3)  # FreeType versions differ by a gray level here and there


def test_everything_is_measured_and_written(result: DemoResult) -> None:
    assert result.original_metrics.num_images == 132
    assert result.original_metrics.top1 > 95
    assert result.converted_metrics.top1 < result.original_metrics.top1
    assert result.one_shot_metrics.top1 > result.original_metrics.top1 - 2
    assert result.savings.removed == 132 * 256
    best = max(record.val_top1 for record in result.history)
    assert result.finetuned_metrics.top1 == pytest.approx(best, abs=0.5)  # stored in half
    assert result.control is not None
    assert [record.step for record in result.control_history] == [record.step for record in result.history] == [3]
    assert [step for step, _ in result.scales] == [1, 2, 3]  # 6 x 132 images, 256 per step
    assert result.control.val_top1 > 50 > result.converted_metrics.top1  # the control is the learned classifier
    assert result.many is not None and result.many.num_classes == 500
    assert result.many.original_top1 > 95
    assert result.many.top1 > 50
    assert (result.folder / "glyphs500.pth").read_bytes() == SHIPPED.read_bytes()  # what the README goes on with
    assert (result.folder / "glyphs" / "train").is_dir()
    original, *signs, tuned = result.classifiers
    assert [each.bytes_per_class for each in result.classifiers] == [512, 9, 17, 33, 2]
    assert (original.top1, tuned.top1) == (result.original_metrics.top1, result.finetuned_metrics.top1)
    assert signs[-1].top1 == result.one_shot_metrics.top1 and not any(each.trained for each in (original, *signs))
    with Image.open(result.plot) as image:
        assert image.size[0] > 1000
    stored = json.loads((result.folder / "demo.json").read_text())
    assert stored["finetuned_metrics"]["top1"] == result.finetuned_metrics.top1


def test_the_slim_checkpoint_is_an_ordinary_one(result: DemoResult) -> None:
    model = fixify.load(result.finetuned)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 132)


def test_the_letters_keep_the_weights_of_their_classes(result: DemoResult) -> None:
    images, labels = torch.rand(3, 1, 32, 32), list(glyphs.letter_labels())
    with torch.no_grad():
        every, letters = (open_model(path).model(images) for path in (SHIPPED, result.original))
    assert torch.equal(letters, every[:, labels])


def test_a_process_beside_the_demo_that_fails_says_why(tmp_path: Path) -> None:
    given = {"folder": str(tmp_path), "epochs": 1}
    with child(run.run_control, given, num_threads=1) as result_of, pytest.raises(ResourceError) as caught:
        result_of()
    assert "letters132.pth" in caught.value.message


def test_an_interrupted_demo_says_how_to_go_on(
    result: DemoResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_args: object, **_options: object) -> None:
        raise TrainingInterrupted("Stopped.", number=signal.SIGINT, hint="Resume with --resume.")

    monkeypatch.setattr(run, "finetune", stop)
    monkeypatch.setattr(run, "_evaluate", lambda *_args: result.original_metrics)
    with pytest.raises(TrainingInterrupted) as caught:
        run_demo(tmp_path / "here", faces=FEW, control=False, many=False)
    assert caught.value.exit_code == 130 and "--resume" not in str(caught.value)


def test_results_are_replaced_only_with_force(result: DemoResult, monkeypatch: pytest.MonkeyPatch) -> None:
    results = result.folder / "demo.json"
    before = results.read_bytes()
    with pytest.raises(OutputExistsError) as caught:
        run_demo(result.folder, epochs=1, faces=FEW)
    assert str(result.folder) in caught.value.message and "--force" in str(caught.value.hint)
    assert results.read_bytes() == before

    # Stubs for what the first run has shown: conversion, evaluation and training.
    tuned = SimpleNamespace(best_path=result.finetuned, before=result.converted_metrics, history=result.history[1:])
    converted = SimpleNamespace(path=result.converted, savings=result.savings)
    monkeypatch.setattr(run, "convert", lambda *_args, **_options: converted)
    monkeypatch.setattr(run, "finetune", lambda *_args, **_options: tuned)
    monkeypatch.setattr(run, "_evaluate", lambda *_args: result.original_metrics)
    stages = []
    again = run_demo(
        result.folder,
        epochs=1,
        faces=FEW,
        control=False,
        many=False,
        force=True,
        on_event=lambda event: stages.append(event.stage) if isinstance(event, StageStarted) else None,
    )
    assert again.data.reused
    assert again.control is None and again.many is None
    assert stages == ["draw", "convert", "original", "one-shot", "finetune", "reload"]
    assert json.loads(results.read_text())["control_history"] == []


def test_a_foreign_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(OutputExistsError) as caught:
        run_demo(tmp_path, force=True)
    assert str(tmp_path) in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

"""Training the last blocks on features that are computed once."""

from __future__ import annotations

import io
import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from fixify.data.idx import ArrayImages
from fixify.errors import TrainingError, UsageError
from fixify.heads import FixedClassifier
from fixify.surgery import fix_classifier_
from fixify.training import (
    Event,
    FinetuneOptions,
    FinetuneResult,
    LastBlockEpoch,
    ReferenceModel,
    Step,
    TrainingInterrupted,
    last_block,
)
from fixify.training.last_block import split_model

Run = Callable[..., FinetuneResult]
OPTIONS = FinetuneOptions.create(
    epochs=1, batch_size=8, lr=0.05, workers=0, device="cpu", last_block_epochs=2, ema_decay=0.9, mixup=0.2
)
ALONE = OPTIONS.replace(epochs=0, ema_decay=None)


def state(out: Path) -> dict[str, Any]:
    return torch.load(io.BytesIO((out / "state.pt").read_bytes()), weights_only=True)


def same(ours: Path, theirs: Path) -> bool:
    a, b = state(ours), state(theirs)
    return all(torch.equal(a[part][key], b[part][key]) for part in ("model", "ema") if a[part] for key in a[part])


@pytest.mark.parametrize(
    "name", ["test_efficientnet", "test_resnet", "test_vit", "test_convnext", "tv/mobilenet_v3_small"]
)
def test_the_parts_are_the_model(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tv = name.startswith("tv/")
        model = getattr(torchvision.models, name[3:])(num_classes=12) if tv else timm.create_model(name, num_classes=12)
        images = torch.randn(3, 3, *((64, 64) if tv else model.default_cfg["input_size"][1:]))
    fix_classifier_(model, "hadamard")
    model.eval()
    split = split_model(model, images[:2])
    with torch.no_grad():  # another batch size than the one it was split with
        assert torch.allclose(split.tail(split.front(images)), model(images), atol=1e-4)
    own = {id(parameter) for parameter in model.parameters()}
    tail = {id(parameter) for parameter in split.tail.parameters()}
    assert tail < own  # the very parameters, and not all of them
    assert any(isinstance(module, FixedClassifier) for module in split.tail.modules())
    share = sum(p.numel() for p in split.tail.parameters()) / sum(p.numel() for p in model.parameters())
    assert 0.2 < share < 0.8
    # What acts by its mode still does.
    split.tail.train()
    assert next(m for m in model.modules() if isinstance(m, FixedClassifier)).training


def test_a_model_that_cannot_be_divided_is_refused(run: Run, tmp_path: Path, new_model: Any) -> None:
    class Undecided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = new_model(fixed=False)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.net(images)
            return logits if images.mean() > 0 else -logits

    with pytest.raises(UsageError, match="last blocks") as caught:
        run(tmp_path, OPTIONS, Undecided())
    assert "--last-block-epochs" in str(caught.value)


def test_only_the_last_blocks_change(run: Run, tmp_path: Path, new_model: Any) -> None:
    before, events = new_model().state_dict(), list[Event]()
    result = run(tmp_path, ALONE, on_event=events.append)
    after = state(tmp_path)["model"]
    # The second convolution has over a quarter of the weights; what is in front of it stays, statistics included.
    front = [key for key in after if key.startswith(("body.0.", "body.1."))]
    assert front and all(torch.equal(before[key], after[key]) for key in front)
    assert not torch.equal(before["body.3.weight"], after["body.3.weight"])
    assert not torch.equal(before["body.4.running_mean"], after["body.4.running_mean"])
    assert float(after["fc.scale"]) != float(before["fc.scale"])
    assert [event.epoch for event in events if isinstance(event, LastBlockEpoch)] == [0, 1]
    assert not any(isinstance(event, Step) for event in events)
    (record,) = result.history
    assert (record.step, record.epochs) == (0, 0) and result.best_path.exists() and result.last_path.exists()


def test_it_learns_and_the_whole_network_goes_on_from_there(run: Run, tmp_path: Path, stripes: Any) -> None:
    options = OPTIONS.replace(last_block_epochs=16, lr=0.1, mixup=0)
    result = run(tmp_path, options)
    assert result.before.top1 < 60 < 75 <= result.history[0].val_top1
    assert [record.epochs for record in result.history] == [0, 1]
    first = FinetuneOptions.create(**{**options.recipe(), "device": "cpu", "workers": 0, "last_block_epochs": 0})
    plain = run(tmp_path / "plain", first)
    assert result.history[1].train_loss < plain.history[0].train_loss  # type: ignore[operator]


def test_stopping_within_it_begins_it_anew_and_after_it_goes_on_from_there(
    run: Run, crash_at: Any, tmp_path: Path
) -> None:
    run(tmp_path / "whole", OPTIONS)

    def interrupt(event: Event) -> None:
        if isinstance(event, LastBlockEpoch):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted, match="--resume"):
        run(tmp_path / "stopped", OPTIONS, on_event=interrupt)
    with pytest.raises(crash_at.error):
        run(tmp_path / "stopped", OPTIONS, resume=True, on_event=crash_at(0, 2))
    events: list[Event] = []
    run(tmp_path / "stopped", OPTIONS, resume=True, on_event=events.append)
    assert not any(isinstance(event, LastBlockEpoch) for event in events)
    assert same(tmp_path / "whole", tmp_path / "stopped")


def test_more_features_than_the_memory_holds_are_not_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(last_block, "_MAX_BYTES", 20 * 8 * 7 * 7 * 4)  # 20 images of 8 channels of 7 x 7 float32
    run(tmp_path, ALONE, on_event=lambda e: seen.append(e.images) if isinstance(e, LastBlockEpoch) else None)
    assert seen == [20, 20]


def test_a_teacher_alone_is_enough(run: Run, tmp_path: Path, teacher: ReferenceModel, stripes: Any) -> None:
    train = stripes[0]
    none = replace(train, images=ArrayImages(train.images.pixels, 0 * train.images.labels), labelled=False)
    for name, data in (("labels", train), ("none", none)):
        run(tmp_path / name, ALONE.replace(unlabelled=True), teacher=teacher, train=data)
    assert same(tmp_path / "labels", tmp_path / "none")
    run(tmp_path / "untaught", ALONE)
    assert not same(tmp_path / "labels", tmp_path / "untaught")


def test_the_goal_may_be_reached_before_the_whole_network_is_trained(run: Run, tmp_path: Path) -> None:
    """From below it to above it by the last blocks alone."""
    options = OPTIONS.replace(last_block_epochs=20, lr=0.1, mixup=0, ema_decay=None)
    reachable = run(tmp_path / "free", options.replace(epochs=0)).history[0].val_top1
    result = run(tmp_path / "goal", options.replace(epochs=9, max_drop=0.0, original_top1=reachable))
    assert result.reached is True and len(result.history) == 1 and result.after.step == 0


def test_a_loss_that_is_not_finite_is_told(run: Run, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="loss is nan in epoch 1 of the last blocks") as caught:
        run(tmp_path, ALONE.replace(lr=1e35, warmup_epochs=0))
    assert "--lr" in str(caught.value)


def test_no_epochs_at_all_are_refused() -> None:
    with pytest.raises(UsageError, match="last_block_epochs"):
        OPTIONS.replace(epochs=0, last_block_epochs=0)


def test_copies_are_augmented_and_take_turns(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    real = last_block.compute_features

    def compute(*given: Any, **named: Any) -> Any:
        features = real(*given, **named)
        made.append(features.inputs)
        return features

    monkeypatch.setattr(last_block, "compute_features", compute)
    options = ALONE.replace(last_block_copies=2, last_block_epochs=3, mixup=0.0)
    run(tmp_path / "a", options)
    assert len(made) == 3 and len({features.shape for features in made}) == 1
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(made, 2))
    run(tmp_path / "b", options)
    assert all(torch.equal(a, b) for a, b in zip(made[:3], made[3:], strict=True)) and same(
        tmp_path / "a", tmp_path / "b"
    )
    run(tmp_path / "plain", options.replace(last_block_copies=0))
    assert torch.equal(made[6], made[0]) and not same(tmp_path / "a", tmp_path / "plain")


def test_copies_share_the_memory_of_the_features(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(last_block, "_MAX_BYTES", 20 * 8 * 7 * 7 * 4)
    listen = lambda e: seen.append(e.images) if isinstance(e, LastBlockEpoch) else None  # noqa: E731
    run(tmp_path, ALONE.replace(last_block_copies=1), on_event=listen)
    assert seen == [10, 10]


def test_a_learned_classifier_does_not_count_as_a_last_block() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet", num_classes=1000).eval()  # most of its weights
    split = split_model(model, torch.randn(2, 3, 64, 64))
    own = {id(parameter) for parameter in split.tail.parameters()}
    assert {id(model.classifier.weight), id(model.conv_head.weight)} < own

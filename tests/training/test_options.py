from __future__ import annotations

from typing import Any

import pytest
import torch

from fixify.errors import UsageError
from fixify.training import FinetuneOptions


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, "no option 'epoch'; did you mean 'epochs'"),
        ({"opt": "sgdd"}, "'sgdd' is not an optimiser of timm; .* sgd"),
        ({"scale": (1.0, 0.5)}, "scale: must be two positive numbers, the smaller first, not 1 0.5"),
        ({"mixup": 0.2, "batch_size": 7}, "batch_size must be even with mixup"),
        ({"warmup_epochs": 5, "epochs": 5}, r"warmup_epochs \(5\) must be less than epochs \(5\)"),
        ({"min_lr": 1.0, "lr": 0.1}, r"min_lr \(1\) must not be above lr \(0.1\)"),
        ({"lr": float("nan")}, "lr: "),
        ({"amp": "fp8"}, "amp: .*'none', 'bf16' or 'fp16'"),
        ({"clip_mode": "agc"}, "clip_mode agc .* clip_grad"),
        ({"layer_decay": 1.5}, "layer_decay: "),
        ({"freeze": -1}, "freeze: "),
        ({"seed": -1}, "seed: "),
    ],
)
def test_mistakes_are_sentences(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FinetuneOptions.create(**given)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        FinetuneOptions.create(epochs=-1, lr=-1, opt="nothing-like-it")
    assert len(caught.value.message.splitlines()) == 3


def test_replace_checks_too() -> None:
    options = FinetuneOptions.create(epochs=3)
    assert options.replace(lr=0.5).lr == 0.5
    with pytest.raises(UsageError):
        options.replace(warmup_epochs=4)


def test_a_recipe_repeats_the_options_except_for_the_machine() -> None:
    options = FinetuneOptions.create(scale=(0.3, 1.0), ema_decay=0.99, workers=3, device="cpu")
    recipe = options.recipe()
    assert "workers" not in recipe and "device" not in recipe
    assert FinetuneOptions.create(**recipe) == options.replace(workers=None, device="auto")


def test_augmentation_is_passed_on() -> None:
    augmentation = FinetuneOptions.create(cutmix=0.5, no_aug=True, ratio=(0.9, 1.1)).augmentation()
    assert (augmentation.cutmix, augmentation.no_aug, augmentation.ratio) == (0.5, True, (0.9, 1.1))


def test_devices() -> None:
    assert FinetuneOptions.create(device="cpu").resolved_device() == torch.device("cpu")
    for wrong in ("gpu", "cuda:99"):
        with pytest.raises(UsageError, match="There is no device"):
            FinetuneOptions.create(device=wrong).resolved_device()


def test_what_does_not_go_together_is_told_with_everything_else() -> None:
    with pytest.raises(UsageError) as caught:
        FinetuneOptions.create(epochs=2, warmup_epochs=3, min_lr=2, batch_size=7, cutmix=1, hflip=2, oops=1)
    lines = caught.value.message.splitlines()
    assert lines == [
        "hflip: must be less than or equal to 1, not 2.",
        "There is no option 'oops'.",
        "warmup_epochs (3) must be less than epochs (2).",
        "min_lr (2) must not be above lr (0.05).",
        "batch_size must be even with mixup or cutmix, not 7.",
    ]
    # Nothing is said of the default that stands in for a wrong value.
    with pytest.raises(UsageError) as caught:
        FinetuneOptions.create(epochs="five", warmup_epochs=7, min_lr=2)
    assert len(caught.value.message.splitlines()) == 2
    assert "warmup_epochs" not in caught.value.message

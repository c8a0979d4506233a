from __future__ import annotations

import io
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from fixify.errors import UsageError
from fixify.surgery import fix_classifier_
from fixify.training import FinetuneOptions, RunStarted
from fixify.training.optimisers import freeze_

OPTIONS = FinetuneOptions.create(
    epochs=2, batch_size=8, lr=0.05, no_aug=True, workers=0, device="cpu", freeze=3, ema_decay=0.9
)
FROZEN = ("conv1.", "bn1.", "layer1.", "layer2.")


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """timm's ResNet with one narrow block a stage, and a fixed head."""
    model = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), in_chans=1, num_classes=4)
    fix_classifier_(model, "hadamard")
    return model


def state(path: Path) -> dict[str, Any]:
    return torch.load(io.BytesIO((path / "state.pt").read_bytes()), weights_only=True)


def test_stages_and_their_names() -> None:
    with torch.device("meta"):
        for name, depth, stages in [
            ("resnet50", 2, ("conv1, bn1", "layer1")),
            ("vit_tiny_patch16_224", 2, ("cls_token, pos_embed, patch_embed", "blocks.0")),
            (
                "efficientnet_lite0",
                8,
                ("conv_stem, bn1", *(f"blocks.{i}" for i in range(6)), "blocks.6, conv_head, bn2"),
            ),
        ]:
            model = timm.create_model(name)
            assert freeze_(model, depth).stages == stages
            for key, parameter in model.named_parameters():
                started = any(key.startswith(part) for stage in stages for part in stage.split(", "))
                assert parameter.requires_grad != started, key


def test_too_many_stages_are_listed_and_the_head_is_none_of_them(resnet: nn.Module) -> None:
    with pytest.raises(UsageError) as caught:
        freeze_(deepcopy(resnet), 6)
    first, *stages = caught.value.message.splitlines()
    assert "5" in first and "6" in first
    assert stages == [
        "  1 conv1, bn1",
        "  2 layer1",
        "  3 layer2",
        "  4 layer3",
        "  5 layer4",
    ]
    assert "0 to 5" in str(caught.value.hint)
    model = deepcopy(resnet)
    freeze_(model, 5)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"fc.scale", "fc.bias"}


def test_a_model_without_stages_is_refused(new_model: Any) -> None:
    with pytest.raises(UsageError, match="Small"):
        freeze_(new_model(), 1)


@pytest.fixture(scope="module")
def frozen_run(
    run: Any, resnet: nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, nn.Module, list[Any]]:
    """A run with three frozen stages: its folder, the model afterwards, its events."""
    out, model, events = tmp_path_factory.mktemp("frozen"), deepcopy(resnet), list[Any]()
    run(out, OPTIONS, model, on_event=events.append)
    return out, model, events


def test_frozen_stages_stay_bit_for_bit_and_the_rest_learns(frozen_run: Any, resnet: nn.Module) -> None:
    out, model, events = frozen_run
    before = resnet.state_dict()
    for key, value in state(out)["model"].items():
        if key.startswith(FROZEN):
            assert torch.equal(value, before[key]), key
        elif "num_batches" not in key and key != "fc.codes":
            assert not torch.equal(value, before[key]), key
    started = next(event for event in events if isinstance(event, RunStarted))
    assert started.frozen == ("conv1, bn1", "layer1", "layer2")
    counts = [(p.numel(), name.startswith(FROZEN)) for name, p in model.named_parameters()]
    assert started.parameters == sum(count for count, _ in counts)
    assert started.trainable == sum(count for count, frozen in counts if not frozen)
    # Nothing of them is with the optimiser.
    learning = [name for name, _ in model.named_parameters() if not name.startswith(FROZEN)]
    assert sum(len(group["params"]) for group in state(out)["optimiser"]["param_groups"]) == len(learning)


def test_a_resumed_run_is_exact(run: Any, crash_at: Any, frozen_run: Any, tmp_path: Path, resnet: nn.Module) -> None:
    with pytest.raises(crash_at.error):
        run(tmp_path, OPTIONS, deepcopy(resnet), on_event=crash_at(1, 2))
    run(tmp_path, OPTIONS, deepcopy(resnet), resume=True)
    whole, parts = state(frozen_run[0]), state(tmp_path)
    assert all(torch.equal(value, parts["model"][key]) for key, value in whole["model"].items())
    assert all(torch.equal(value, parts["ema"][key]) for key, value in whole["ema"].items())


def test_dropout_within_frozen_stages_does_not_drop() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, drop_path_rate=0.5
    )
    frozen = freeze_(model, 2)
    frozen.train(model)
    modes = {name: module.training for name, module in model.named_modules() if name.endswith("drop_path1")}
    assert modes == {"blocks.0.drop_path1": False, "blocks.1.drop_path1": True}


def test_frozen_blocks_among_the_last_ones(run: Any, tmp_path: Path, resnet: nn.Module) -> None:
    model = deepcopy(resnet)
    before: dict[str, Tensor] = {key: value.clone() for key, value in model.state_dict().items()}
    run(tmp_path, OPTIONS.replace(freeze=5, epochs=0, last_block_epochs=2), model)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed >= {"fc.scale", "fc.bias"}
    assert all(key.startswith("fc.") for key in changed)


def test_frozen_statistics_stay_while_everything_else_learns(run: Any, tmp_path: Path, new_model: Any) -> None:
    options = OPTIONS.replace(freeze=0, freeze_bn=True, last_block_epochs=1)
    model = new_model()
    run(tmp_path / "two", options, model)
    start, end = new_model().state_dict(), model.state_dict()
    kept = [name for name in start if name.startswith("body.") and ("running_" in name or "num_batches" in name)]
    assert kept and all(torch.equal(start[name], end[name]) for name in kept)
    for name in ("body.1.weight", "body.3.weight", "fc.scale"):
        assert not torch.equal(start[name], end[name])
    longer = new_model()
    run(tmp_path / "three", options.replace(epochs=3), longer)
    assert torch.equal(longer.fc.center, end["fc.center"])  # as calibration left it, before training
    run(tmp_path / "free", options.replace(freeze_bn=False), model)
    assert not torch.equal(model.fc.center, longer.fc.center)

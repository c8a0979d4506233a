from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from fixify.errors import UsageError
from fixify.training import FinetuneOptions
from fixify.training.engine import check_checkpointing, checkpoint_activations_


def kept_bytes(model: nn.Module, images: torch.Tensor) -> tuple[float, int]:
    """The loss, and the bytes of activations that its graph keeps until the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images).square().mean()
    loss.backward()
    return loss.item(), sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize(
    ("name", "given", "share"),
    [
        # Real architectures; batch norm with statistics, and a transformer.
        ("resnet18", {}, 0.6),
        ("mobilenetv3_small_050", {}, 0.4),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 4, "embed_dim": 48}, 0.3),
    ],
)
def test_less_is_kept_and_the_result_is_the_same(name: str, given: dict[str, Any], share: float) -> None:
    plain = timm.create_model(name, num_classes=10, **given).train()
    saving = copy.deepcopy(plain)
    check_checkpointing(saving)
    checkpoint_activations_(saving)
    images = torch.randn(4, 3, 64, 64)
    for step in range(2):
        (loss, kept), (own_loss, own_kept) = (kept_bytes(model, images + step) for model in (plain, saving))
        assert own_loss == loss
        assert own_kept < share * kept
        for parameter, own in zip(plain.parameters(), saving.parameters(), strict=True):
            assert parameter.grad is not None and own.grad is not None and torch.equal(parameter.grad, own.grad)
    # The second forward pass must not count twice in the running statistics.
    own_state = saving.state_dict()
    assert all(torch.equal(value, own_state[key]) for key, value in plain.state_dict().items())
    assert torch.equal(plain.eval()(images), saving.eval()(images))


def test_a_run_is_the_same_with_and_without(run: Any, tmp_path: Any) -> None:
    model = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), in_chans=1, num_classes=4)
    options = FinetuneOptions.create(epochs=2, batch_size=8, no_aug=True, workers=0, device="cpu", ema_decay=0.9)
    without = run(tmp_path / "without", options, copy.deepcopy(model))
    saving = run(tmp_path / "with", options.replace(grad_checkpointing=True), copy.deepcopy(model))
    assert [record.val_loss for record in saving.history] == [record.val_loss for record in without.history]


def test_a_model_without_it_is_refused_before_anything_else(run: Any, tmp_path: Any, new_model: Any) -> None:
    options = FinetuneOptions.create(workers=0, device="cpu", grad_checkpointing=True)
    with pytest.raises(UsageError, match=r"Small .*set_grad_checkpointing"):
        run(tmp_path / "run", options, new_model())
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="InceptionV4"):
        check_checkpointing(timm.create_model("inception_v4", num_classes=2))

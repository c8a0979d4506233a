"""Margins of the right class: read, refused by name, and the same with logits and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixify._files import sha256_of
from fixify.errors import UsageError
from fixify.heads import ArcFace, CosFace, FixedClassifier, HeadSpec, replacement
from fixify.recipes import read_recipe
from fixify.training import FinetuneOptions, losses
from fixify.training.losses import HeadMargin, make_margin, training_loss
from fixify.training.options import read_margin

CPU = torch.device("cpu")


def options(**given: Any) -> FinetuneOptions:
    settings = {"epochs": 2, "batch_size": 8, "lr": 0.05, "no_aug": True, "workers": 0, "device": "cpu"}
    return FinetuneOptions.create(**{**settings, **given})


def margin_of(model: nn.Module, margin: str = "cosface:0.35") -> HeadMargin | None:
    return make_margin(model, options(margin=margin), input_size=(1, 16, 16), device=CPU)


def test_they_are_read() -> None:
    assert read_margin("cosface:0.2") == ("cosface", 0.2)
    assert read_margin("arcface") == ("arcface", 0.5)
    assert options(margin="cosface").margin == "cosface:0.35"
    assert options(margin="cosface:0.350") == options(margin="cosface:0.35")


@pytest.mark.parametrize("margin", ["sphereface", "cosface:", "cosface:1", "arcface:-1", "arcface:nan", "arcface:3.2"])
def test_others_are_refused(margin: str) -> None:
    with pytest.raises(UsageError, match="margin"):
        options(margin=margin)


@pytest.mark.parametrize(
    "other", [{"loss": "cosine"}, {"mixup": 0.2}, {"cutmix": 1.0}, {"unlabelled": True}, {"shard": 1}]
)
def test_what_excludes_them(other: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"margin .*{next(iter(other))}"):
        options(margin="arcface", **other)


@pytest.mark.parametrize("margin", [CosFace(0.3), ArcFace(0.6)])
@pytest.mark.parametrize(("bias", "lengths"), [(True, False), (False, False), (True, True)])
def test_the_loss_with_logits_is_that_of_the_head(margin: Any, bias: bool, lengths: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    head = FixedClassifier(HeadSpec("hadamard", 32, 40, bias=bias), scale=7.0)
    if lengths:
        spec = HeadSpec("binary", 32, 40, bits_per_class=32, gains=True)
        vectors = torch.randn(40, 32, generator=generator) * torch.rand(40, 1, generator=generator).add(0.5)
        head = replacement(spec, vectors, scale=7.0).head
        assert head.row_scales is not None and float(head.row_scales.min()) < 0.7
    if head.bias is not None:
        head.bias.data = torch.randn(40, generator=generator)
    labels = torch.randint(40, (6,), generator=generator)
    found = []
    for loss_of in (
        lambda x: training_loss(head(x), labels, None, options(smoothing=0.1), HeadMargin(margin, head)),
        lambda x: head.loss(x, labels, label_smoothing=0.1, margin=margin),
    ):
        head.zero_grad()
        x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss: Tensor = loss_of(x)
        loss.backward()
        found.append((loss.detach(), x.grad, *(parameter.grad for parameter in head.parameters())))
    for plain, blocked in zip(*found, strict=True):
        torch.testing.assert_close(plain, blocked, rtol=1e-4, atol=1e-6)
    assert float(found[0][0]) > float(training_loss(head(x).detach(), labels, None, options(smoothing=0.1)))


def test_a_run_with_a_margin_is_the_same_with_logits_and_without(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(margin="arcface:0.4")
    plain = run(tmp_path / "plain", given)
    without = run(tmp_path / "none", options())
    monkeypatch.setattr(losses, "BLOCKED_FROM", 1)
    blocked = run(tmp_path / "blocked", given)
    for first, second in zip(plain.history, blocked.history, strict=True):
        for name in ("train_loss", "train_top1", "val_loss", "val_top1"):
            assert getattr(second, name) == pytest.approx(getattr(first, name), rel=1e-3, abs=1e-3), name
    assert plain.history[0].train_loss > without.history[0].train_loss
    assert plain.before == without.before or plain.before.loss == without.before.loss  # validation has no margin
    assert read_recipe(tmp_path / "plain" / "recipe.yaml").finetune.margin == "arcface:0.4"  # type: ignore[union-attr]
    assert sha256_of(plain.last_path) != sha256_of(without.last_path)


def test_it_moves_the_last_blocks_too(run: Any, new_model: Any, tmp_path: Path) -> None:
    told: list[float] = []

    def listen(event: Any) -> None:
        told.extend([event.loss] if type(event).__name__ == "LastBlockEpoch" else [])

    for margin in (None, "cosface:0.5"):
        run(tmp_path / str(margin), options(margin=margin, epochs=0, last_block_epochs=1), on_event=listen)
    assert told[1] > told[0] + 0.5


def test_heads_that_cannot_have_one(new_model: Any) -> None:
    assert make_margin(new_model(), options(), input_size=(1, 16, 16), device=CPU) is None
    found = margin_of(new_model(), "arcface:0.25")
    assert found is not None and found.margin == ArcFace(0.25)
    with pytest.raises(UsageError, match="learned"):
        margin_of(new_model(fixed=False))
    model = new_model()
    model.fc = FixedClassifier(HeadSpec("hadamard", 32, 4, normalize=False))
    with pytest.raises(UsageError, match=r"fc .*norm"):
        margin_of(model)
    with pytest.raises(UsageError, match="output"):
        margin_of(nn.Sequential(new_model(), nn.ReLU()))
    with pytest.raises(UsageError, match="several"):
        margin_of(nn.Sequential(new_model(), FixedClassifier(HeadSpec("hadamard", 4, 4))))

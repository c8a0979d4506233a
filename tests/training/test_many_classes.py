"""Runs with very many classes, whose loss and metrics are computed without logits; here the limit is lowered to 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fixify.errors import UsageError
from fixify.heads import FixedClassifier, HeadSpec
from fixify.many_classes import ends_in_its_head
from fixify.training import FinetuneOptions, distributed, losses


def options(**given: Any) -> FinetuneOptions:
    settings = {"epochs": 3, "batch_size": 8, "lr": 0.05, "no_aug": True, "workers": 0, "device": "cpu"}
    return FinetuneOptions.create(**{**settings, **given})


@pytest.fixture
def notes() -> list[str | None]:
    return []


@pytest.fixture
def both(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str | None]) -> Any:
    """Do a run with all logits and one without, and return the two results."""

    def listen(event: Any) -> None:
        if type(event).__name__ == "RunStarted":
            notes.append(event.loss_note)

    def do(**given: Any) -> list[Any]:
        plain = run(tmp_path / "plain", options(**given), on_event=listen)
        monkeypatch.setattr(losses, "BLOCKED_FROM", 1)
        return [plain, run(tmp_path / "blocked", options(**given), on_event=listen)]

    return do


def assert_alike(plain: Any, blocked: Any) -> None:
    assert len(plain.history) == len(blocked.history)
    for first, second in zip(plain.history, blocked.history, strict=True):
        for name in ("train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "val_ece", "scale"):
            assert getattr(second, name) == pytest.approx(getattr(first, name), rel=1e-3, abs=1e-3), name


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"smoothing": 0.1},
        {"mixup": 0.4, "cutmix": 1.0, "smoothing": 0.1},
        {"ema_decay": 0.9, "grad_accum": 2, "clip_grad": 1.0, "nan_skip": 1},
    ],
    ids=lambda given: "+".join(given) or "plain",
)
def test_a_run_without_logits_equals_one_with_them(both: Any, notes: list[str | None], given: dict[str, Any]) -> None:
    assert_alike(*both(**given))
    assert notes[0] is None
    assert "block by block" in str(notes[1])


def test_autocast(both: Any) -> None:
    plain, blocked = both(amp="bf16")
    assert blocked.history[-1].train_loss == pytest.approx(plain.history[-1].train_loss, rel=0.2)


@pytest.mark.parametrize("given", [{"last_block_epochs": 1}, {"compile": True}], ids=str)
def test_where_logits_are_needed_the_run_says_why(new_model: Any, given: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(losses, "BLOCKED_FROM", 1)
    plan = plan_of(new_model(), options(**given))
    assert not plan.blocked
    assert "because" in str(plan.note)


def plan_of(model: nn.Module, given: FinetuneOptions, *, has_teacher: bool = False) -> Any:
    device = torch.device("cpu")
    return losses.plan_loss(model, given, input_size=(1, 16, 16), device=device, has_teacher=has_teacher)


@pytest.mark.parametrize(
    ("classes", "given", "wins"),
    [(1200, {}, True), (200, {}, False), (1200, {"amp": "bf16"}, False), (1200, {"mixup": 0.2}, False)],
)
def test_codes_and_their_negatives_win_from_fewer_logits(
    classes: int, given: dict[str, Any], wins: bool, new_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "PAIRS_FROM", 8 * classes)
    model = new_model()
    model.fc = nn.Sequential(nn.Linear(32, 256), FixedClassifier(HeadSpec("hadamard", 256, classes)))
    assert plan_of(model, options(**given)).blocked == wins
    monkeypatch.setattr(losses, "PAIRS_FROM", 8 * classes + 1)
    assert not plan_of(model, options(**given)).blocked


def test_teachers_and_learned_classifiers(new_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "BLOCKED_FROM", 1)
    assert plan_of(new_model(), options()).blocked
    assert "teacher" in str(plan_of(new_model(), options(), has_teacher=True).note)
    assert plan_of(new_model(fixed=False), options()) == losses.LossPlan()


class Halved(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(images)
        return logits / 2


def test_a_model_that_computes_with_its_logits_keeps_them(new_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "BLOCKED_FROM", 1)
    model = new_model().train()
    assert ends_in_its_head(model, (1, 16, 16), torch.device("cpu"))
    assert all(module.training for module in model.modules())
    plan = plan_of(Halved(model), options())
    assert not plan.blocked
    assert "returns" not in str(plan.note)
    assert "because" in str(plan.note)


def test_two_processes_equal_one(processes: Any, run: Any, new_model: Any, tmp_path: Path) -> None:
    """With all logits, block by block, and with classes that the processes share; on one process all is plain."""
    given = {"epochs": 2, "batch_size": 4, "lr": 0.05, "no_aug": True, "smoothing": 0.1}
    plain = {"batch_norm": False, "dropout": 0.0, "kind": "orthogonal"}
    shared = {"share_classes": True, "block_classes": 1}  # four blocks of one class, two for each process
    margin = {"margin": "cosface:0.2", "model": plain}
    runs = {
        "plain": {**given, "model": plain},
        "blocked": {**given, "model": plain, "blocked_from": 1},
        "shared": {**given, "model": plain, **shared},
        "margin": {**given, **margin},
        "shared margin": {**given, **margin, **shared},
        "one block": {**given, "model": {**plain, "kind": "hadamard"}, "share_classes": True},  # of one process
    }
    told = processes.together(tmp_path, runs)
    assert all(each["result"] == "done" for every in told.values() for each in every)
    network = new_model(**plain)
    run(tmp_path / "one", options(**{**given, "batch_size": 8}), network)
    for name, weights in network.state_dict().items():
        if not weights.is_floating_point():
            continue  # the head counts batches, and calibrates with other ones
        for kind in ("plain", "blocked", "shared"):
            for each in told[kind]:
                torch.testing.assert_close(each["state"][name], weights, rtol=1e-3, atol=1e-4)
        ours, theirs = (told[kind][1]["state"][name] for kind in ("shared margin", "margin"))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    for kind in ("shared", "one block"):
        first, second = (each["state"] for each in told[kind])
        assert all(torch.equal(first[name], second[name]) for name in first)
    curves = [
        [json.loads(line)["val_top1"] for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
        for kind in ("plain", "shared", "one")
    ]
    assert curves[0] == curves[1] == curves[2]


def test_classes_are_shared_by_several_processes_only(new_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(share_classes=True)
    with pytest.raises(UsageError, match="several processes"):
        plan_of(new_model(), given)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    plan = plan_of(new_model(), given)
    assert plan.blocked and plan.shared and "2 processes" in str(plan.note)
    for model, has_teacher, why in (
        (new_model(fixed=False), False, "learned"),
        (new_model(), True, "teacher"),
        (Halved(new_model()), False, "logits"),
    ):
        with pytest.raises(UsageError, match=f"share-classes .*{why}"):
            plan_of(model, given, has_teacher=has_teacher)
    with pytest.raises(UsageError, match=r"share_classes .*mixup"):
        options(share_classes=True, mixup=0.2)

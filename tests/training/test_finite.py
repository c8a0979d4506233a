"""Losses, gradients and weights that are not finite."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixify.errors import TrainingError
from fixify.training import FinetuneOptions, Step, Warned, loop
from fixify.training.checkpointing import check_weights

OPTIONS = FinetuneOptions.create(
    epochs=3, batch_size=8, lr=0.05, no_aug=True, workers=0, device="cpu", ema_decay=0.9, opt="adamw", nan_skip=20
)


def state(folder: Path) -> dict[str, Any]:
    return torch.load(io.BytesIO((folder / "state.pt").read_bytes()), weights_only=True)


def all_finite(stored: dict[str, Any]) -> bool:
    return all(value.isfinite().all() for value in stored.values() if value.is_floating_point())


def poisoned(model: nn.Module, *, at: tuple[int, ...] = (), some: bool = False) -> nn.Module:
    """The model, whose inputs are NaN in these steps of training, or in `some` that depend on the images alone."""
    calls = []

    def poison(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if not module.training:
            return None
        calls.append(1)
        chosen = int(inputs[0].sum().abs() * 1000) % 3 == 0 if some else len(calls) in at
        return (inputs[0] * math.nan,) if chosen else None

    model.register_forward_pre_hook(poison)
    return model


class TestSkipping:
    def test_a_step_leaves_no_trace_but_a_sentence(self, run: Any, tmp_path: Path, new_model: Any) -> None:
        # The last step of an epoch, so that nothing comes after it: statistics of batch norms and of the head as well.
        model = poisoned(new_model(), at=(5,))
        before: dict[str, Tensor] = {}
        events: list[Any] = []

        def on_event(event: Any) -> None:
            events.append(event)
            if isinstance(event, Step) and event.batch == 4:
                before.update({key: value.clone() for key, value in model.state_dict().items()})

        options = OPTIONS.replace(epochs=1, nan_skip=1)
        result = run(tmp_path, options, model, on_event=on_event)
        after = state(tmp_path)
        assert all(torch.equal(value, before[key]) for key, value in after["model"].items())
        assert (after["progress"]["skipped"], after["progress"]["updates"], result.history[0].step) == (1, 5, 5)
        told = [event.text for event in events if isinstance(event, Warned)]
        (text,) = told
        assert "nan" in text and "epoch 1, batch 5 of 5" in text and "1 of at most 1" in text

    def test_the_one_after_the_last_allowed_stops_and_a_resume_may_allow_more(
        self, run: Any, tmp_path: Path, new_model: Any
    ) -> None:
        options = OPTIONS.replace(nan_skip=2)
        with pytest.raises(TrainingError, match="nan in epoch 2, batch 3 of 5") as caught:
            run(tmp_path, options, poisoned(new_model(), at=(2, 7, 8)))
        assert "2 steps" in caught.value.message and "--nan-skip" in caught.value.message
        stored = state(tmp_path)
        assert (stored["progress"]["epoch"], stored["progress"]["skipped"]) == (1, 1)
        assert all_finite(stored["model"]) and all_finite(stored["ema"])
        with pytest.raises(TrainingError, match="lr was"):
            run(tmp_path, options.replace(lr=0.1), new_model(), resume=True)
        result = run(tmp_path, options.replace(nan_skip=5), poisoned(new_model(), at=(2, 3, 4, 5)), resume=True)
        assert len(result.history) == 3
        assert state(tmp_path)["progress"]["skipped"] == 5

    def test_a_resumed_run_is_exact(self, run: Any, tmp_path: Path, new_model: Any) -> None:
        def crash(event: Any) -> None:  # the third step may be one of those that are skipped
            if isinstance(event, Step) and event.epoch == 1 and event.batch >= 3:
                raise KeyError

        run(tmp_path / "whole", OPTIONS, poisoned(new_model(), some=True))
        with pytest.raises(KeyError):
            run(tmp_path / "parts", OPTIONS, poisoned(new_model(), some=True), on_event=crash)
        run(tmp_path / "parts", OPTIONS, poisoned(new_model(), some=True), resume=True)
        whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
        assert whole["progress"]["skipped"] == parts["progress"]["skipped"] > 0
        for key in ("model", "ema"):
            assert all(torch.equal(value, parts[key][name]) for name, value in whole[key].items())

    def test_part_of_an_accumulated_group(self, run: Any, tmp_path: Path, new_model: Any) -> None:
        model = poisoned(new_model(), at=(2, 3, 4))  # of the groups (1, 2), (3, 4), (5)
        moved: list[bool] = []
        last: list[Tensor] = [model.fc.scale.detach().clone()]

        def on_event(event: Any) -> None:
            if isinstance(event, Step | Warned):
                moved.append(not torch.equal(last[0], model.fc.scale.detach()))
                last[0] = model.fc.scale.detach().clone()

        options = OPTIONS.replace(epochs=1, grad_accum=2, warmup_epochs=0)
        result = run(tmp_path, options, model, on_event=on_event)
        assert result.history[0].step == 3
        # Step 1; skipped 2, then the update by 1 alone; skipped 3 and 4, no update; 5 and its update.
        assert moved == [False, False, True, False, True]
        assert all_finite(state(tmp_path)["model"])

    def test_gradients(self, run: Any, tmp_path: Path, new_model: Any) -> None:
        model = new_model()
        calls = []

        def poison(gradient: Tensor) -> Tensor:
            calls.append(1)
            return gradient * math.inf if len(calls) == 3 else gradient

        model.fc.scale.register_hook(poison)
        events: list[Any] = []
        run(tmp_path, OPTIONS.replace(epochs=1), model, on_event=events.append)
        told = [event.text for event in events if isinstance(event, Warned)]
        (text,) = told
        assert "gradient" in text and "epoch 1, batch 3 of 5" in text and "1 of at most 20" in text
        assert all_finite(state(tmp_path)["model"])

    @pytest.mark.filterwarnings("ignore:.*GradScaler.*:UserWarning")
    def test_a_scalers_overflow_is_its_own_business(self, run: Any, tmp_path: Path, new_model: Any) -> None:
        model = new_model()
        model.fc.scale.register_hook(lambda gradient: gradient * math.inf)
        events: list[Any] = []
        run(tmp_path, OPTIONS.replace(epochs=1, amp="fp16", nan_skip=1), model, on_event=events.append)
        assert not [event for event in events if isinstance(event, Warned)]
        stored = state(tmp_path)
        assert stored["progress"]["skipped"] == 0 and stored["scaler"]["scale"] < 2**16
        assert all_finite(stored["model"])


def test_a_gradient_that_no_loss_tells_of_is_found_before_anything_is_written(
    run: Any, tmp_path: Path, new_model: Any
) -> None:
    model = new_model()
    calls = []

    def poison(gradient: Tensor) -> Tensor:
        calls.append(1)
        return gradient * math.nan if len(calls) == 10 else gradient

    model.fc.scale.register_hook(poison)
    with pytest.raises(TrainingError, match=r"update 10 .*fc\.scale"):
        run(tmp_path, OPTIONS.replace(nan_skip=0), model)
    for name in ("state.pt", "best.fixed.safetensors", "last.fixed.safetensors"):
        stored = torch.load(io.BytesIO((tmp_path / name).read_bytes()), weights_only=True)
        assert all_finite(stored["model" if name == "state.pt" else "weights"]), name
    assert state(tmp_path)["progress"]["updates"] == 5


def test_losses_that_are_read_late_are_read_before_anything_is_written(
    run: Any, tmp_path: Path, new_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on an accelerator.
    monkeypatch.setattr(loop._PendingLosses, "due", False)
    options = OPTIONS.replace(nan_skip=0, val_every=4)
    with pytest.raises(TrainingError, match="nan in epoch 1, batch 3 of 5"):
        run(tmp_path, options, poisoned(new_model(), at=(3,)))
    stored = state(tmp_path)
    assert stored["progress"]["updates"] == 0 and not stored["progress"]["history"]
    assert all_finite(stored["model"])


def test_masks_may_hold_infinities() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2,), -math.inf))
    check_weights(model, 0)
    model.mask[0] = math.nan  # type: ignore[index,operator]
    with pytest.raises(TrainingError, match="mask"):
        check_weights(model, 0)

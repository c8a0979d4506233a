"""The learning rate that a short test chooses."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fixify.data.idx import ArrayImages
from fixify.errors import DataError, UsageError
from fixify.training import Event, FinetuneOptions, OpenedInputs, RateChosen, distributed, rate_search
from fixify.training.options import GENTLE_RATE, USUAL_RATE, TrainOptions
from fixify.training.rate_search import FACTORS, find_rate

OPTIONS = FinetuneOptions.create(epochs=1, batch_size=8, workers=0, device="cpu", lr="auto", ema_decay=0.9, mixup=0.2)


def weights(out: Path) -> dict[str, torch.Tensor]:
    state = torch.load(io.BytesIO((out / "state.pt").read_bytes()), weights_only=True)
    return {**state["model"], **{f"ema.{name}": value for name, value in state["ema"].items()}}


def chosen(events: list[Event]) -> RateChosen:
    (found,) = [event for event in events if isinstance(event, RateChosen)]
    return found


def test_a_run_with_the_chosen_rate_given_is_the_same_run(run: Any, tmp_path: Path, new_model: Any) -> None:
    events: list[Event] = []
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    run(tmp_path / "auto", OPTIONS, on_event=events.append)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    rate = chosen(events).lr
    assert json.loads((tmp_path / "auto" / "run.json").read_text())["options"]["lr"] == rate
    assert f"lr: {rate:g}" in (tmp_path / "auto" / "recipe.yaml").read_text()
    run(tmp_path / "given", OPTIONS.replace(lr=rate))
    ours, theirs = weights(tmp_path / "auto"), weights(tmp_path / "given")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_keeps_its_rate(run: Any, tmp_path: Path, crash_at: Any) -> None:
    with pytest.raises(crash_at.error):
        run(tmp_path, OPTIONS, on_event=crash_at(0, 2))
    events: list[Event] = []
    run(tmp_path, OPTIONS, resume=True, on_event=events.append)
    assert not any(isinstance(event, RateChosen) for event in events)


def search(model: Any, opened: OpenedInputs, options: FinetuneOptions) -> RateChosen:
    events: list[Event] = []
    rate = find_rate(model, opened, options, events.append)
    assert chosen(events).lr == rate
    return chosen(events)


def test_the_lowest_loss_decides_and_the_model_stays(
    new_model: Any, stripes: Any, preprocessing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, model = OpenedInputs(*stripes, preprocessing), new_model()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    options = OPTIONS.replace(lr=USUAL_RATE)
    found = search(model, opened, options)
    assert [rate for rate, _ in found.losses] == pytest.approx([factor * USUAL_RATE for factor in FACTORS])
    losses = dict(found.losses)
    assert losses[found.lr] == min(losses.values()) < found.before
    assert all(torch.equal(start[name], value) for name, value in model.state_dict().items())
    assert search(model, opened, options) == found
    # Rates that destroy the model: the lowest is taken, also where losses are not finite.
    monkeypatch.setattr(rate_search, "FACTORS", (1e3, 1e30))
    assert search(model, opened, options).lr == 1e3 * USUAL_RATE


def test_it_starts_from_the_default_of_the_head(
    run: Any, tmp_path: Path, new_model: Any, stripes: Any, preprocessing: Any
) -> None:
    events: list[Event] = []
    run(tmp_path, OPTIONS, new_model(fixed=False), on_event=events.append)
    assert chosen(events).losses[FACTORS.index(1.0)][0] == GENTLE_RATE
    scratch = TrainOptions.create(model="resnet18", lr="auto", batch_size=8, workers=0, device="cpu")
    assert scratch.peak_rate == TrainOptions.create(model="resnet18").lr == 0.1


def test_what_it_cannot_do_is_refused(
    new_model: Any, stripes: Any, preprocessing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = stripes
    few = replace(train, images=ArrayImages(train.images.pixels[:4], train.images.labels[:4]))
    with pytest.raises(DataError, match="there are 4"):
        find_rate(new_model(), OpenedInputs(few, val, preprocessing), OPTIONS, lambda _event: None)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UsageError, match="one process") as caught:
        find_rate(new_model(), OpenedInputs(train, val, preprocessing), OPTIONS, lambda _event: None)
    assert "--lr" in str(caught.value)


def test_a_rate_is_a_number_or_the_word() -> None:
    assert [FinetuneOptions.create(lr=lr).lr for lr in ("auto", "0.5", 0.5, None)] == ["auto", 0.5, 0.5, None]
    for lr, said in ((-1, "greater than 0"), ("fast", "a number")):
        with pytest.raises(UsageError, match=said) as caught:
            FinetuneOptions.create(lr=lr)
        assert str(caught.value).count("lr:") == 1

"""The thin log of steps, and what a run notes when it starts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixify.metrics import Confusions
from fixify.training import Event, FinetuneOptions, FinetuneResult, Step
from fixify.training.run_folder import is_logged

Run = Callable[..., FinetuneResult]
OPTIONS = FinetuneOptions.create(epochs=2, batch_size=4, lr=0.05, no_aug=True, workers=0, device="cpu")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_steps_that_are_logged_are_evenly_spaced_on_a_log_axis() -> None:
    logged = [step for step in range(1, 100_001) if is_logged(step)]
    assert logged[:15] == [*range(1, 15), 15] and not is_logged(0)
    assert {10, 100, 1000, 10_000, 100_000} <= set(logged)
    far = [step for step in logged if step >= 1000]
    assert len(far) == 2 * 32 + 1
    assert max(b / a for a, b in itertools.pairwise(far)) < 1.08


def test_steps_have_the_loss_since_the_one_before(run: Run, tmp_path: Path) -> None:
    def listen(event: Event) -> None:
        if isinstance(event, Step):
            totals[event.step] = (event.epoch, event.loss * event.batch)

    totals: dict[int, tuple[int, float]] = {}
    run(tmp_path, OPTIONS, on_event=listen)
    losses = {}  # of each step alone, from the means over the epoch (of 11 steps) so far
    for step, (epoch, total) in totals.items():
        before = totals.get(step - 1, (epoch, 0.0))
        losses[step] = total - (before[1] if before[0] == epoch else 0.0)
    records = lines(tmp_path / "steps.jsonl")
    assert [record["step"] for record in records] == [step for step in range(1, 23) if is_logged(step)]
    first = 1
    for record in records:
        covered = [losses[step] for step in range(first, record["step"] + 1)]
        assert record["loss"] == pytest.approx(sum(covered) / len(covered), rel=1e-9)
        assert record["epochs"] == pytest.approx(record["step"] / 11)
        assert record["scale"] > 0
        first = record["step"] + 1


@pytest.mark.parametrize(("accum", "when"), [(1, (0, 5)), (2, (1, 4))])
def test_a_resumed_run_logs_the_same_steps(
    run: Run, crash_at: Any, tmp_path: Path, when: tuple[int, int], accum: int
) -> None:
    options = OPTIONS.replace(grad_accum=accum)
    run(tmp_path / "whole", options)
    with pytest.raises(crash_at.error):
        run(tmp_path / "crashed", options, on_event=crash_at(*when))
    run(tmp_path / "crashed", options, resume=True)
    for name in ("steps.jsonl", "confusions.json"):
        assert (tmp_path / "crashed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_the_last_validation_got_wrong(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path, OPTIONS)
    stored = json.loads((tmp_path / "confusions.json").read_text())
    found = Confusions.from_dict(stored)
    assert stored["step"] == result.history[-1].step == 22
    assert found.images == (5, 5, 5, 5)
    assert 100 * sum(found.right) / 20 == result.history[-1].val_top1


@pytest.mark.parametrize("fixed", [True, False])
def test_what_a_run_notes_when_it_starts(run: Run, tmp_path: Path, new_model: Any, fixed: bool) -> None:
    model = new_model(fixed=fixed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result = run(tmp_path, OPTIONS, model, command="fixify finetune 'a b' --data c")
    noted = json.loads((tmp_path / "run.json").read_text())
    assert noted["command"] == "fixify finetune 'a b' --data c"
    assert noted["before"]["top1"] == result.before.top1
    facts = noted["model"]
    assert (facts["head"], facts["num_features"], facts["num_classes"]) == ("hadamard" if fixed else "learned", 32, 4)
    assert facts["parameters"] == parameters
    assert facts["classifier_parameters"] == (1 + 4 if fixed else 32 * 4 + 4)
    assert facts["classifier_bytes"] == (4 * (1 + 4 + 2 * 32) + 8 if fixed else 4 * (32 * 4 + 4))

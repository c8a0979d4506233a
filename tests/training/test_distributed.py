"""Several processes against one: real ones, connected by gloo."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fixify.errors import TrainingError, UsageError
from fixify.training import FinetuneOptions, OpenedInputs, RunFacts, distributed
from fixify.training.checkpointing import check_stored_run, newest_state
from fixify.training.parallel import check_shard

# Without batch norm and dropout several processes compute what one does.
PLAIN = {"batch_norm": False, "dropout": 0.0}
HERE = {"workers": 0, "device": "cpu"}
SAME = {
    "epochs": 2,
    "lr": 0.02,
    "opt": "adamw",
    "ema_decay": 0.9,
    "reprob": 0.5,
    "mixup": 0.2,
    "cutmix": 0.2,
    "clip_grad": 1.0,
    "auto_augment": "rand-m3",
    "val_every": 1,
}


def load(path: Path) -> dict[str, Any]:
    return torch.load(io.BytesIO(path.read_bytes()), weights_only=True)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


CURVE = "epoch step lr train_loss train_top1 val_loss val_top1 val_top5 val_ece scale"


def assert_same_curve(ours: Path, theirs: Path) -> None:
    for left, right in zip(metrics(ours), metrics(theirs), strict=True):
        for name in CURVE.split():
            assert left[name] == pytest.approx(right[name], rel=1e-4, abs=1e-6), name
    left, right = (load(out / "last.fixed.safetensors")["weights"] for out in (ours, theirs))
    for name in (name for name, value in left.items() if value.is_floating_point()):
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def done(
    run: Any, processes: Any, crash_at: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[Any]]]:
    """All runs of this module in one pair of processes: their folder, and what the processes tell of each."""
    folder = tmp_path_factory.mktemp("runs")
    one = FinetuneOptions.create(**SAME, **HERE, batch_size=16)
    with pytest.raises(crash_at.error):
        run(folder / "resumed", one, plain_model(run), on_event=crash_at(1, 1))
    statistics = {"batch_size": 4, "epochs": 1, "last_block_epochs": 1}
    whole = {**SAME, "ema_decay": None, "epochs": 1, "batch_size": 8, "model": PLAIN, "val_images": 1}
    signs = {"epochs": 2, "lr": 0.02, "opt": "adamw", "model": {**PLAIN, "signs": 32}}
    runs = {
        "compared": {**signs, "batch_size": 8},
        "two": {**SAME, "grad_accum": 2, "batch_size": 4, "model": PLAIN},
        "reduce": {**statistics, "dist_bn": "reduce"},
        "broadcast": {**statistics, "dist_bn": "broadcast"},
        "resumed": {**SAME, "batch_size": 8, "model": PLAIN, "output": {"resume": True}},
        "copies": {**whole, "shard": False},
        "shards": {**whole, "shard": True},
    }
    told = processes.together(folder, runs)
    run(folder / "one", one.replace(grad_accum=2, batch_size=8), plain_model(run))
    run(folder / "whole", one, plain_model(run))
    compared = FinetuneOptions.create(**HERE, epochs=2, lr=0.02, opt="adamw", batch_size=16)
    run(folder / "alone", compared, run.model(**signs["model"]))
    return folder, told


def plain_model(run: Any) -> torch.nn.Module:
    model: torch.nn.Module = run.model(**PLAIN)
    return model


@pytest.mark.parametrize("name", ["compared", "two", "reduce", "broadcast", "resumed", "copies", "shards"])
def test_all_processes_finish_with_the_same_weights_and_only_rank_zero_reports(done: Any, name: str) -> None:
    first, second = done[1][name]
    assert first["result"] == second["result"] == "done"
    assert second["events"] == [] and "EpochEnded" in first["events"]
    for key, value in first["state"].items():  # running statistics of batch norms included
        assert torch.equal(value, second["state"][key]), key


def test_two_processes_do_what_one_with_twice_the_batch_does(done: Any) -> None:
    folder, _ = done
    assert_same_curve(folder / "one", folder / "two")
    weights = sum(value.numel() for name, value in done[1]["two"][0]["state"].items() if is_parameter(name))
    last = metrics(folder / "two")[-1]
    assert last["gradient_bytes"] == 4 * weights  # a learned classifier would have 4 x 4 x 32 bytes more
    assert last["statistics_bytes"] == pytest.approx(4 * 65 * 5 / 3)  # of 5 forward passes, in 3 updates


def test_two_processes_compare_with_the_start_as_one_does(done: Any) -> None:
    alone, compared = (
        [(record["gained"], record["lost"]) for record in metrics(done[0] / name)] for name in ("alone", "compared")
    )
    assert alone == compared and any(gained for gained, _ in alone)
    starts = [load(done[0] / name / "state.pt")["progress"]["start_right"] for name in ("alone", "compared")]
    assert starts[0] == starts[1] and starts[0]["num_images"] == 20


def is_parameter(name: str) -> bool:
    return name.endswith((".weight", ".bias", ".scale"))


def test_the_last_blocks_are_calibrated_alike(done: Any) -> None:
    folder, told = done
    kept = load(folder / "reduce/last.fixed.safetensors")["weights"]
    assert torch.equal(kept["fc.center"], told["reduce"][0]["state"]["fc.center"])


def test_a_run_goes_on_in_more_processes_with_the_same_batch(done: Any) -> None:
    folder, told = done
    assert "Warned" in told["resumed"][0]["events"]  # results may differ
    assert_same_curve(folder / "resumed", folder / "whole")


def test_shards_do_what_copies_do_and_validate_fewer_images_than_processes(done: Any) -> None:
    folder, _ = done
    assert_same_curve(folder / "shards", folder / "copies")
    assert metrics(folder / "copies")[0]["val_top1"] in (0.0, 100.0)


def test_other_processes_need_the_same_images_per_step(
    run: Any, tmp_path: Path, stripes: Any, preprocessing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = FinetuneOptions.create(**HERE, epochs=1, batch_size=16, lr=0.05)
    options = options.replace(**{**options.usual_values(), "lr": 0.05})  # what a run records
    run(tmp_path, options)
    stored = newest_state(tmp_path, torch.device("cpu"))
    facts = RunFacts.of(OpenedInputs(*stripes, preprocessing))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    check_stored_run(stored, facts, options.replace(batch_size=8))
    with pytest.raises(TrainingError) as caught:
        check_stored_run(stored, facts, options.replace(batch_size=6))
    assert "16 images per step" in caught.value.message and "2 x 6" in caught.value.message
    assert "--batch-size 8" in str(caught.value.hint)


def test_what_does_not_go_together_with_shards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--shard"):
        check_shard(FinetuneOptions(shard=True))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    check_shard(FinetuneOptions(shard=True))
    for given, name in (
        ({"ema_decay": 0.9}, "--ema-decay"),
        ({"last_block_epochs": 1}, "--last-block-epochs"),
        ({"amp": "fp16"}, "--amp fp16"),
    ):
        with pytest.raises(UsageError, match=name):
            check_shard(FinetuneOptions(shard=True, **given))


def test_each_process_takes_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.device_for("cuda:3") == "cuda:3"  # one process
    for name, value in {"MASTER_ADDR": "here", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.device_for("cpu") == "cpu"
    with pytest.raises(UsageError, match=r"4 processes .*cuda:1"):
        distributed.device_for("cuda:1")
    monkeypatch.setattr(distributed, "resolve_device", torch.device)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert distributed.device_for("cuda") == "cuda:2"
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(UsageError, match=r"4 processes .*2 cuda"):
        distributed.device_for("cuda")
    with pytest.raises(UsageError, match="mps"):
        distributed.device_for("mps")

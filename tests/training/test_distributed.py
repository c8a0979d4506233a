"""Several processes against one: real ones, connected by gloo."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fixify.errors import UsageError
from fixify.training import EpochStarted, Event, FinetuneOptions, distributed
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


def test_two_processes_do_what_one_with_twice_the_batch_does(
    run: Any, several: Any, new_model: Any, tmp_path: Path
) -> None:
    options = {**SAME, "grad_accum": 2}
    run(tmp_path / "one", FinetuneOptions.create(**options, **HERE, batch_size=8), model=new_model(**PLAIN))
    first, second = several(tmp_path / "two", 2, model=PLAIN, batch_size=4, **options)
    assert first["result"] == second["result"] == "done"
    assert_same_curve(tmp_path / "one", tmp_path / "two")
    assert second["events"] == [] and "EpochEnded" in first["events"]
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    weights = sum(parameter.numel() for parameter in new_model(**PLAIN).parameters())
    last = metrics(tmp_path / "two")[-1]
    assert last["gradient_bytes"] == 4 * weights  # a learned classifier would have 4 x 4 x 32 bytes more
    assert last["statistics_bytes"] == pytest.approx(4 * 65 * 5 / 3)  # of 5 forward passes, in 3 updates


@pytest.mark.parametrize("dist_bn", ["reduce", "broadcast"])
def test_batch_norms_leave_no_process_with_statistics_of_its_own(several: Any, tmp_path: Path, dist_bn: str) -> None:
    first, second = several(tmp_path / "run", 2, batch_size=4, epochs=1, dist_bn=dist_bn, last_block_epochs=1)
    assert first["result"] == second["result"] == "done"
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    kept = load(tmp_path / "run/last.fixed.safetensors")["weights"]
    assert torch.equal(kept["fc.center"], first["state"]["fc.center"])


def test_a_run_goes_on_in_other_processes_with_the_same_batch(
    run: Any, several: Any, new_model: Any, tmp_path: Path
) -> None:
    options = FinetuneOptions.create(**SAME, **HERE, batch_size=16)
    run(tmp_path / "whole", options, model=new_model(**PLAIN))

    def crash(event: Event) -> None:
        if isinstance(event, EpochStarted) and event.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", options, model=new_model(**PLAIN), on_event=crash)
    given = {"resume": True}
    for each in several(tmp_path / "run", 2, model=PLAIN, given=given, batch_size=6, **SAME):
        assert "started with 16 images a step, and this would be 2 x 6 images a step" in str(each["result"])
        assert "Resume with --batch-size 8" in str(each["result"])
    first, _ = several(tmp_path / "run", 2, model=PLAIN, given=given, batch_size=8, **SAME)
    assert first["result"] == "done" and "Warned" in first["events"]
    assert_same_curve(tmp_path / "run", tmp_path / "whole")


def test_shards_do_what_copies_do_and_validate_fewer_images_than_processes(several: Any, tmp_path: Path) -> None:
    options = {**SAME, "ema_decay": None, "batch_size": 8}
    for kind, shard in (("copies", False), ("shards", True)):
        done = several(tmp_path / kind, 2, val_images=1, model=PLAIN, shard=shard, **options)
        assert [each["result"] for each in done] == ["done", "done"]
    assert_same_curve(tmp_path / "shards", tmp_path / "copies")
    assert metrics(tmp_path / "copies")[0]["val_top1"] in (0.0, 100.0)


def test_what_does_not_go_together_with_shards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="spreads the model over several processes, and this is one"):
        check_shard(FinetuneOptions(shard=True))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    check_shard(FinetuneOptions(shard=True))
    for given, name in (
        ({"ema_decay": 0.9}, "--ema-decay"),
        ({"last_block_epochs": 1}, "--last-block-epochs"),
        ({"amp": "fp16"}, "--amp fp16"),
    ):
        with pytest.raises(UsageError, match=f"--shard does not go together with {name}"):
            check_shard(FinetuneOptions(shard=True, **given))


def test_each_process_takes_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.device_for("cuda:3") == "cuda:3"  # one process
    for name, value in {"MASTER_ADDR": "here", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.device_for("cpu") == "cpu"
    with pytest.raises(UsageError, match="4 processes cannot share cuda:1"):
        distributed.device_for("cuda:1")
    monkeypatch.setattr(distributed, "resolve_device", torch.device)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert distributed.device_for("cuda") == "cuda:2"
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="4 processes were started here, and there are 2 cuda devices"):
        distributed.device_for("cuda")
    with pytest.raises(UsageError, match="cannot train on mps"):
        distributed.device_for("mps")

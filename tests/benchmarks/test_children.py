"""Measurements in processes of their own: losses, conversions, steps."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from fixify._memory import resident_bytes
from fixify.benchmarks import child, convert, loss, step
from fixify.benchmarks.child import Failure, PeakMemory, run_in_child
from fixify.benchmarks.convert import ConvertRow, benchmark_convert, conversion_spec, correlated_classes
from fixify.benchmarks.loss import Cost, LossRow, benchmark_loss, measure_loss
from fixify.benchmarks.samples import Size
from fixify.benchmarks.step import Phases, benchmark_step, measure_steps
from fixify.errors import ArchitectureError, HeadSpecError, ResourceError, UsageError


@pytest.mark.slow
def test_a_child_answers_or_says_why_not() -> None:
    arguments = {"num_features": 64, "num_classes": 20, "kind": "binary", "num_images": 0}
    found = run_in_child(convert.measure_conversion, arguments, num_threads=1)
    assert isinstance(found, dict) and found["seconds"] > 0 and found["peak_bytes"] >= 0
    # kinds that cannot be made, and functions that fail
    found = run_in_child(convert.measure_conversion, arguments | {"kind": "binary-65"}, num_threads=1)
    assert isinstance(found, Failure) and "65" in found.reason
    with pytest.raises(ResourceError):
        run_in_child(convert.measure_conversion, {"unknown": 1}, num_threads=1)
    assert run_in_child(convert.measure_conversion, arguments, num_threads=1, timeout=0.01) == Failure("over 0 s")


def test_a_child_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    started, start = [], child._start
    monkeypatch.setattr(child, "_start", lambda *given: started.append(start(*given)) or started[-1])
    with child.child(convert.measure_conversion, {}, num_threads=1):
        assert started[0].poll() is None
    assert started[0].returncode == -9


@pytest.mark.skipif(os.name != "posix", reason="processes have no parent to lose")
def test_a_child_ends_after_a_parent_that_was_killed() -> None:
    parent = (
        "import os, json, subprocess, sys\n"
        "task = {'module': 'signal', 'function': 'pause', 'arguments': {}, 'parent': os.getpid()}\n"
        "code = 'from fixify.benchmarks.child import main; print(1, flush=True); main()'\n"
        "subprocess.run([sys.executable, '-c', code, json.dumps(task)])\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        process.kill()
        process.communicate(timeout=120)  # the child holds the pipe until it ends


def test_the_peak_of_a_block() -> None:
    size = 64_000_000
    with PeakMemory() as memory:
        block = mmap.mmap(-1, size)  # not by malloc, which may have kept as much from the tests before
        torch.frombuffer(block, dtype=torch.uint8).fill_(1)
    assert memory.bytes >= 0.9 * size
    assert resident_bytes() > size


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_memory(**_: Any) -> Mapping[str, Any]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes.")

    monkeypatch.setattr(convert, "measure_conversion", without_memory)
    task = {"module": convert.__name__, "function": "measure_conversion", "arguments": {}}
    assert child._done(task) == {"failure": "out of memory"}


# Conversions.


def test_class_vectors_are_correlated_and_the_same_every_time() -> None:
    weight = correlated_classes(Size(64, 500))
    assert torch.equal(weight, correlated_classes(Size(64, 500)))
    assert not torch.equal(weight, correlated_classes(Size(64, 500), seed=1))
    cosines = torch.nn.functional.normalize(weight) @ torch.nn.functional.normalize(weight).T
    assert float((cosines.fill_diagonal_(0).amax(dim=1) > 0.7).float().mean()) > 0.9  # neighbours in the same cluster
    spectrum = torch.linalg.svdvals(weight - weight.mean(dim=0))
    assert float(spectrum[:16].square().sum() / spectrum.square().sum()) > 0.6


@pytest.mark.parametrize("images", [0, 40])
@pytest.mark.parametrize("kind", convert.KINDS)
def test_conversions_are_those_of_the_library(kind: str, images: int) -> None:
    found = convert.measure_conversion(64, 20, kind, images)
    assert found["seconds"] > 0 and found["peak_bytes"] >= 0
    assert conversion_spec(kind, Size(64, 20), has_features=images > 0).can_fit


def test_conversions_that_fail_have_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([{"seconds": 2.0, "peak_bytes": 512}, Failure("over 600 s")])
    monkeypatch.setattr(convert, "run_in_child", lambda *_, **__: next(answers))
    found = benchmark_convert([Size(8, 4)], kinds=["binary", "matched"], num_threads=1)
    assert found.rows == (ConvertRow(8, 4, "binary", 2.0, 512), ConvertRow(8, 4, "matched", None, None, "over 600 s"))
    assert found.rows[0].memory_ratio == 4 and found.rows[1].memory_ratio is None
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("given", [{"kinds": ["hadamard"]}, {"num_threads": 0}, {"num_images": -1}, {"timeout": 0.0}])
def test_conversions_that_make_no_sense(given: dict) -> None:
    with pytest.raises(UsageError):
        benchmark_convert([Size(8, 4)], **given)


# Losses.


@pytest.mark.parametrize("way", loss.WAYS)
def test_losses_are_measured(way: str) -> None:
    found = measure_loss(way, "hadamard", 64, 300, 4, 2)
    assert 0 < found["seconds"] < float("inf") and found["peak_bytes"] >= 0


def test_a_head_that_does_not_exist() -> None:
    with pytest.raises(HeadSpecError):
        measure_loss("plain", "identity", 8, 9, 1, 1)


def test_what_cannot_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, int]] = []

    def answer(_: object, arguments: Mapping[str, Any], **__: object) -> dict[str, Any]:
        tried.append((arguments["way"], arguments["num_classes"]))
        return {"seconds": 1.0 if arguments["way"] == "blocked" else 3.0, "peak_bytes": 1000}

    monkeypatch.setattr(loss, "run_in_child", answer)
    found = benchmark_loss([1_000_000, 1000], num_features=512, batch=64, num_threads=1, budget=1e9)
    assert tried == [(way, 1000) for way in loss.WAYS] + [("plain", 1_000_000), ("blocked", 1_000_000)]
    small, large = found.rows
    assert small.time_ratio("learned") == 3 and small.memory_ratio("plain") == 1
    assert large.costs["learned"] == Cost(failure="needs 5 GB") and large.time_ratio("learned") is None
    assert large.to_dict()["time_ratios"] == {"learned": None, "plain": 3.0}
    json.dumps(found.to_dict(), allow_nan=False)


def test_ratios_of_a_loss_that_failed() -> None:
    row = LossRow(10, {"learned": Cost(1.0, 8), "plain": Cost(1.0, 8), "blocked": Cost(failure="over 600 s")})
    assert row.time_ratio("learned") is None and row.memory_ratio("learned") is None


# Steps.

STEP = {"model": "timm/test_efficientnet", "head": "hadamard", "num_classes": 300, "batch": 2, "image_size": 32}


@pytest.mark.parametrize("head", ["hadamard", "binary"])
def test_the_parts_of_a_step(head: str) -> None:
    start = time.perf_counter()
    found = measure_steps(**STEP | {"head": head}, repeats=2, rank=0, world_size=1, meeting_point="")
    took = time.perf_counter() - start
    for phases in (Phases(**found["learned"]), Phases(**found["fixed"])):
        assert phases.all_reduce == 0
        assert min(phases.head_forward, phases.head_backward, phases.optimiser, phases.rest) > 0
        assert phases.total < took


@pytest.mark.slow
def test_two_processes_meet() -> None:
    found = benchmark_step("test_efficientnet", num_classes=50, batch=2, image_size=32, processes=[2], repeats=2)
    (row,) = found.rows
    assert row.processes == 2 and row.learned.rest > 0 and row.fixed.rest > 0
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["learned"]["total"] == row.learned.total


def test_steps_that_make_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError):
        benchmark_step(processes=[0])
    with pytest.raises(UsageError, match="64 x 64"):
        benchmark_step("vit_tiny_patch16_224")
    with pytest.raises(ArchitectureError):
        benchmark_step("no_such_net")
    monkeypatch.setattr(step, "run_in_children", lambda *_, **__: [Failure("out of memory")])
    with pytest.raises(ResourceError, match="out of memory"):
        benchmark_step("test_efficientnet", processes=[1])

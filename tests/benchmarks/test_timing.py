"""Timing in turns, with a clock that the calls move."""

from __future__ import annotations

import pytest

from fixify.benchmarks.machine import cores, this_machine, thread_counts, threads
from fixify.benchmarks.timing import seconds_in_turns
from fixify.errors import UsageError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float):  # the last one again and again
        left = list(seconds)

        def run() -> None:
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_the_least_of_all_turns_counts() -> None:
    clock = Clock()
    slow, quick = clock.call("slow", 9, 9, 3, 2, 4), clock.call("quick", 9, 9, 1, 1, 0.5, 1)
    assert seconds_in_turns([slow, quick], repeats=4, limit=1000, clock=clock) == [2, 0.5]
    assert clock.order == ["slow"] * 2 + ["quick"] * 2 + ["slow", "quick"] * 4


def test_turns_end_after_the_limit_but_there_are_three() -> None:
    clock = Clock()
    seconds_in_turns([clock.call("a", 10)], repeats=50, limit=1, clock=clock)
    assert len(clock.order) == 2 + 3
    clock = Clock()
    seconds_in_turns([clock.call("a", 10)], repeats=50, limit=65, clock=clock)
    assert len(clock.order) == 2 + 7


def test_quick_calls_are_repeated_within_a_sample() -> None:
    clock = Clock()
    assert seconds_in_turns([clock.call("a", 1e-4)], repeats=3, clock=clock) == pytest.approx([1e-4])
    assert len(clock.order) == 2 + 3 * 20


def test_threads_are_set_back() -> None:
    import torch

    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(UsageError), threads(0):
        pass


def test_the_machine_names_processor_and_versions() -> None:
    machine = this_machine()
    assert machine.processor and machine.cores == cores() >= 1
    assert set(machine.versions) == {"fixify", "kernels", "torch", "timm", "python"}
    assert thread_counts() == tuple(sorted({1, cores()}))
    assert all(version in machine.line for version in machine.versions.values())

"""Heads beside nn.Linear: which heads are measured, and ratios against those of another run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fixify.benchmarks.head import HeadBenchmark, HeadRow, benchmark_head, compare_ratios, read_reference
from fixify.benchmarks.machine import this_machine
from fixify.benchmarks.samples import Size, check_kinds, sample_head
from fixify.errors import UsageError

RESULTS = Path(__file__).parent / "results"


def result(**ratios: float) -> HeadBenchmark:
    rows = tuple(
        HeadRow(64, 10, batch, 1, 1.0, {kind: 1 / ratio for kind, ratio in ratios.items()}) for batch in (1, 64)
    )
    return HeadBenchmark(this_machine(), tuple(ratios), False, 3, rows)


def reference(tmp_path: Path, found: HeadBenchmark):
    path = tmp_path / "reference.json"
    path.write_text(json.dumps(found.to_dict()))
    return read_reference(path)


@pytest.mark.parametrize("kind", ["hadamard", "matched", "orthogonal", "simplex", "identity", "binary", "binary-33"])
def test_every_kind_gives_logits(kind: str) -> None:
    head = sample_head(kind, Size(64, 10))
    assert head is not None and head.eval()(torch.randn(3, 64)).shape == (3, 10)


@pytest.mark.parametrize("kind", ["hadamard", "matched", "binary", "binary-64"])
def test_more_classes_than_features(kind: str) -> None:
    head = sample_head(kind, Size(64, 300))
    assert head is not None and head.codebook().unique(dim=0).shape == (300, 64)


@pytest.mark.parametrize(("kind", "size"), [("binary-64", "32x10"), ("identity", "8x9"), ("hadamard", "386x10")])
def test_heads_that_do_not_exist_are_left_out(kind: str, size: str) -> None:
    assert sample_head(kind, Size.parse(size)) is None


@pytest.mark.parametrize("kind", ["learned", "binary-0", "binary64", ""])
def test_unknown_kinds(kind: str) -> None:
    with pytest.raises(UsageError):
        check_kinds((kind,))


@pytest.mark.parametrize("text", ["2048", "2048x", "x1000", "0x10", "2048 x 1000", "2048x1000x2", "-1x5"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        Size.parse(text)


@pytest.mark.parametrize("backward", [False, True])
def test_rows_are_complete(backward: bool) -> None:
    seen: list[HeadRow] = []
    found = benchmark_head(
        [Size(32, 5), Size(32, 40)],
        kinds=["hadamard", "binary-64"],
        batches=[1, 2],
        num_threads=[1],
        backward=backward,
        repeats=3,
        on_row=seen.append,
    )
    assert list(found.rows) == seen
    assert [(row.num_classes, row.batch) for row in found.rows] == [(5, 1), (5, 2), (40, 1), (40, 2)]
    for row in found.rows:
        assert row.ratios == {"hadamard": row.linear / row.seconds["hadamard"]}
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("given", [{"batches": [0]}, {"num_threads": [0]}, {"repeats": 0}, {"kinds": ["none"]}])
def test_impossible_numbers(given: dict) -> None:
    with pytest.raises(UsageError):
        benchmark_head([Size(8, 4)], **{"batches": [1], "num_threads": [1], "repeats": 3, **given})


def test_a_lower_ratio_is_a_regression_and_a_higher_one_is_not(tmp_path: Path) -> None:
    before = reference(tmp_path, result(hadamard=10.0, binary=2.0))
    found = compare_ratios(result(hadamard=6.9, binary=20.0), before, tolerance=0.3)
    assert [(change.kind, change.batch) for change in found.regressions] == [("hadamard", 1), ("hadamard", 64)]
    assert found.regressions[0].share == pytest.approx(0.31)
    assert len(found.changes) == 4 and found.to_dict()["compared"] == 4
    assert not compare_ratios(result(hadamard=7.1), before, tolerance=0.3).regressions


def test_only_equal_rows_are_compared(tmp_path: Path) -> None:
    before = reference(tmp_path, result(hadamard=10.0))
    row = dataclasses.replace(result(hadamard=1.0).rows[0], threads=2)
    with pytest.raises(UsageError):
        compare_ratios(dataclasses.replace(result(hadamard=1.0), rows=(row,)), before)
    with pytest.raises(UsageError):
        compare_ratios(result(binary=1.0), before)
    with pytest.raises(UsageError):
        compare_ratios(dataclasses.replace(result(hadamard=1.0), backward=True), before)
    with pytest.raises(UsageError):
        compare_ratios(result(hadamard=1.0), before, tolerance=1.0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"backward": false, "rows": [{}]}', '{"rows": NaN}', "\udcff"])
def test_references_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError):
        read_reference(path)
    with pytest.raises(UsageError):
        read_reference(tmp_path / "missing.json")


@pytest.mark.parametrize("ratio", ["0", "-1", '"x"'])
def test_ratios_of_a_reference_are_positive(tmp_path: Path, ratio: str) -> None:
    row = '{"num_features": 1, "num_classes": 1, "batch": 1, "threads": 1, "ratios": {"hadamard": %s}}' % ratio  # noqa: UP031
    (tmp_path / "a.json").write_text('{"backward": false, "rows": [%s]}' % row)  # noqa: UP031
    with pytest.raises(UsageError):
        read_reference(tmp_path / "a.json")

"""Reading runs, telling them from checkpoints, and `fixify report` on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fixify.cli.report import report
from fixify.errors import FormatError, OutputExistsError, UsageError
from fixify.reporting.page import write_page
from fixify.reporting.run_report import report_runs
from fixify.reporting.runs import read_runs, runs_in

Write = Callable[..., Path]


def call(*models: object, **options: Any) -> None:
    report([str(model) for model in models], **{"all_models": False, "arch": None, "as_json": False, **options})


class TestWhatAFolderMeans:
    def test_a_run_its_parent_and_neither(self, two_runs: Path, tmp_path: Path) -> None:
        assert runs_in(two_runs / "fixed") == [two_runs / "fixed"]
        assert runs_in(two_runs) == [two_runs / "fixed", two_runs / "learned"]
        assert runs_in(tmp_path / "nothing") == runs_in(tmp_path) == []
        (tmp_path / "run.json").write_text('{"name": "of another program"}')
        assert runs_in(tmp_path) == []

    def test_a_run_holds_checkpoints_and_is_a_run(self, two_runs: Path) -> None:
        torch.save({}, two_runs / "fixed" / "best.fixed.safetensors")
        assert runs_in(two_runs / "fixed") == [two_runs / "fixed"]

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "any.pth"])
    def test_a_folder_with_one_checkpoint_is_that_checkpoint(self, two_runs: Path, name: str) -> None:
        (two_runs / name).write_bytes(b"")
        assert runs_in(two_runs) == []

    def test_a_folder_with_several_checkpoints_and_runs_is_its_runs(self, two_runs: Path) -> None:
        for name in ("a.pth", "b.pth"):
            (two_runs / name).write_bytes(b"")
        assert len(runs_in(two_runs)) == 2


class TestReading:
    def test_everything_comes_back(self, two_runs: Path) -> None:
        fixed, learned = read_runs(runs_in(two_runs))
        assert (fixed.label, learned.label) == ("fixed", "learned")
        assert (fixed.head, learned.head) == ("hadamard", "learned")
        assert [record.to_dict() for record in fixed.history] == [
            json.loads(line) for line in (two_runs / "fixed" / "metrics.jsonl").read_text().splitlines()
        ]
        assert len(fixed.steps) == len((two_runs / "fixed" / "steps.jsonl").read_text().splitlines()) > 60
        assert fixed.best is not None and fixed.best.val_top1 == 85.0
        assert fixed.before is not None and fixed.before.top1 == 50.0
        assert fixed.confusions is not None and len(fixed.confusions.images) == 12

    def test_runs_of_the_same_name_are_told_apart(self, write_run_folder: Write, tmp_path: Path) -> None:
        for parent in ("a", "b"):
            write_run_folder(tmp_path / parent / "run", fixed=True, done=1)
        assert [run.label for run in read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])] == ["a/run", "b/run"]
        assert len(read_runs([tmp_path / "a" / "run", tmp_path / "a" / ".." / "a" / "run"])) == 1

    def test_a_run_of_an_older_fixify(self, two_runs: Path) -> None:
        facts = json.loads((two_runs / "fixed" / "run.json").read_text())
        for name in ("model", "command", "before", "device"):
            del facts[name]
        (two_runs / "fixed" / "run.json").write_text(json.dumps(facts))
        (two_runs / "fixed" / "steps.jsonl").unlink()
        (two_runs / "fixed" / "confusions.json").unlink()
        (found,) = report_runs(read_runs([two_runs / "fixed"])).runs
        assert (found.head, found.size, found.classes, found.command) == ("fixed", None, None, None)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("metrics.jsonl", '{"epoch": 0}\n'),
            ("metrics.jsonl", "{"),
            ("steps.jsonl", "[]\n"),
            ("confusions.json", '{"images": [1], "right": [], "worst": []}'),
            ("confusions.json", '{"images": [1], "right": [1], "worst": [{"label": 3, "taken_for": []}]}'),
            ("metrics.jsonl", "\xff"),
        ],
    )
    def test_a_damaged_file_is_named(self, two_runs: Path, name: str, content: str) -> None:
        (two_runs / "fixed" / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(FormatError, match=name.replace(".", r"\.")):
            read_runs([two_runs / "fixed"])

    def test_a_missing_file_is_named(self, two_runs: Path) -> None:
        (two_runs / "fixed" / "metrics.jsonl").unlink()
        with pytest.raises(FormatError, match=r"metrics\.jsonl"):
            read_runs([two_runs / "fixed"])


class TestWhatIsSaid:
    def test_fixed_against_learned(self, two_runs: Path) -> None:
        found = report_runs(read_runs(runs_in(two_runs)))
        fixed, learned = found.verdict
        assert all(fact in fixed for fact in ("fixed", "hadamard", "85.00 %", "1.00 points below", "0.0 %"))
        assert "learned" in learned and "86.00 %" in learned
        assert found.differences == {"lr": (0.05, 0.02)}
        fixed, learned = found.runs
        assert fixed.size is not None and learned.size is not None
        # What the slim checkpoint holds: 13 = scale and biases, the rest of the network is the same.
        assert (fixed.size.parameters, fixed.size.classifier_parameters) == (488_013, 25)
        assert fixed.size.parameters - 25 == 1_000_000 - 512_012
        assert learned.size.classifier_bytes == 2_048_048

    def test_against_the_original_and_without_anything(self, write_run_folder: Write, tmp_path: Path) -> None:
        original = {"top1": 84.0, "top5": 95.0, "loss": 1.0, "ece": 2.0, "num_images": 600, "seconds": 1.0}
        write_run_folder(tmp_path / "a", fixed=True, original_metrics=original)
        write_run_folder(tmp_path / "b", fixed=True, done=0)
        found = report_runs(read_runs([tmp_path / "a", tmp_path / "b"]))
        assert "85.00 %" in found.verdict[0] and "1.00 points above" in found.verdict[0]
        assert found.verdict[1].startswith("b ")

    def test_a_start_that_no_validation_beat(self, write_run_folder: Write, tmp_path: Path) -> None:
        write_run_folder(tmp_path / "a", fixed=True)
        record = read_runs([tmp_path / "a"])[0].history[0].to_dict()
        start = {**record, "step": 0, "fraction": 0.0, "train_loss": None, "train_top1": None, "val_top1": 98.25}
        write_run_folder(tmp_path / "b", fixed=True, start=start)
        report = report_runs(read_runs([tmp_path / "b"]))
        (run,) = report.runs
        assert run.best_is_start and run.start_top1 == 98.25 and len(run.history) == 3
        assert "98.25 % before training" in report.verdict[0] and "--lr 0.005" in report.verdict[1]
        assert "98.25" in write_page(report)
        # A start that was beaten is no more than the first point of the chart.
        write_run_folder(tmp_path / "c", fixed=True, start={**start, "val_top1": 60.0})
        report = report_runs(read_runs([tmp_path / "c"]))
        assert not report.runs[0].best_is_start and report.runs[0].start_top1 == 60.0
        assert report.verdict[0].startswith("c ") and len(report.verdict) == 1

    def test_the_worst_classes(self, two_runs: Path) -> None:
        fixed, learned = report_runs(read_runs(runs_in(two_runs))).runs
        assert fixed.classes is not None and learned.classes is not None
        shares = [row.right / row.images for row in fixed.classes.worst]
        assert shares == sorted(shares) and shares[-1] < 1
        stored = json.loads((two_runs / "learned" / "confusions.json").read_text())
        names = json.loads((two_runs / "learned" / "run.json").read_text())["class_names"]
        for row in fixed.classes.worst:
            assert row.elsewhere == {"learned": stored["right"][names.index(row.name)]}
            assert sum(other.images for other in row.taken_for) <= row.images - row.right
        assert fixed.classes.total == 12
        assert fixed.classes.step == 600


class TestCommand:
    def test_the_page_is_written_once_and_replaced_with_force(
        self, two_runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        call(two_runs)
        said = capsys.readouterr()
        assert "85.00" in said.out and f"page: {two_runs / 'report.html'}" in said.err
        with pytest.raises(OutputExistsError, match="--force"):
            call(two_runs)
        call(two_runs, force=True)
        call(two_runs / "fixed", two_runs / "learned", out=tmp_path / "other.html")
        page = (tmp_path / "other.html").read_text()
        assert page.count("<figure>") == 4 and page.startswith("<!doctype html>")
        call(two_runs / "fixed")
        assert (two_runs / "fixed" / "report.html").exists()

    def test_json_is_the_pages_data_and_writes_no_page(
        self, two_runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        call(two_runs, as_json=True)
        said = json.loads(capsys.readouterr().out)
        assert [run["label"] for run in said["runs"]] == ["fixed", "learned"]
        assert said["runs"][0]["best"]["val_top1"] == 85.0
        assert said["differences"] == {"lr": [0.05, 0.02]}
        assert not (two_runs / "report.html").exists()
        call(two_runs, as_json=True, out=tmp_path / "page.html")
        assert (tmp_path / "page.html").exists()

    def test_runs_and_models_do_not_mix_and_models_have_no_page(self, two_runs: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="resnet18"):
            call(two_runs / "fixed", "resnet18")
        with pytest.raises(UsageError, match="-o"):
            call("resnet18", out=tmp_path / "page.html")

"""Runs of one recipe that differ in nothing but the head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fixify.errors import OutputExistsError, UsageError
from fixify.recipes import read_recipe
from fixify.recipes.running import compare_recipe, compared
from fixify.training import EpochEnded, Event, TrainOptions

OPTIONS = TrainOptions.create(
    model="test_resnet", in_chans=1, img_size=32, epochs=1, batch_size=40, seed=3, workers=0, device="cpu"
)


def test_the_runs_differ_in_the_head_alone() -> None:
    runs = compared(OPTIONS, (0.1, 10))
    assert list(runs) == ["fixed", "learned", "scale-0.1", "scale-10"]
    assert runs["fixed"] == OPTIONS
    assert runs["learned"] == OPTIONS.replace(head="learned")
    assert runs["scale-0.1"] == OPTIONS.replace(head_scale=0.1, head_fixed_scale=True)
    with pytest.raises(UsageError, match="has to be a fixed one"):
        compared(OPTIONS.replace(head="learned"))
    with pytest.raises(UsageError, match="The scale 1 is given twice"):
        compared(OPTIONS, (1, 1.0))
    with pytest.raises(UsageError, match="head_scale"):
        compared(OPTIONS, (-1,))


def test_a_comparison_that_was_stopped_goes_on_where_it_was(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": str(digits), "train": {"model": "test_resnet"}}))
    recipe, runs = read_recipe(tmp_path / "mine.yaml"), compared(OPTIONS)
    told: list[str] = []
    whole = compare_recipe(recipe, tmp_path / "whole", runs, on_run=told.append)
    assert told == list(whole) == ["fixed", "learned"]
    assert all(result.last_path.parent == tmp_path / "whole" / name for name, result in whole.items())
    with pytest.raises(OutputExistsError, match="There is a run in"):
        compare_recipe(recipe, tmp_path / "whole", runs)

    def stop_in_the_second(event: Event) -> None:
        if isinstance(event, EpochEnded) and (tmp_path / "cut" / "learned").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_recipe(recipe, tmp_path / "cut", runs, on_event=stop_in_the_second)
    done = (tmp_path / "cut" / "fixed" / "last.fixed.safetensors").stat().st_mtime_ns
    resumed = compare_recipe(recipe, tmp_path / "cut", compared(OPTIONS, (1,)), resume=True)
    assert list(resumed) == ["fixed", "learned", "scale-1"]  # the last began only now
    assert (tmp_path / "cut" / "fixed" / "last.fixed.safetensors").stat().st_mtime_ns == done
    for name, result in whole.items():
        first, second = load_file(result.last_path), load_file(resumed[name].last_path)
        assert all(torch.equal(first[key], second[key]) for key in first)

"""What a run knows of itself, and the JSON that it becomes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fixify.errors import TrainingError
from fixify.training import FinetuneOptions, Inputs, Machine, OpenedInputs, Recorded, RunFacts, RunOutput, distributed
from fixify.training.facts import NamedFile, this_machine

# As the versions before these dataclasses wrote them to run.json and state.pt.
FINETUNED = {
    "data": "digits",
    "class_names": ["0", "1"],
    "train_images": 44,
    "val_images": 20,
    "train_listing": "a" * 64,
    "val_listing": "b" * 64,
    "checkpoint": "net.fixed.safetensors",
    "checkpoint_sha256": "c" * 64,
    "class_map": {"name": "map.txt", "sha256": "d" * 64},
    "original": {"name": "net.pth", "sha256": "e" * 64},
    "teacher": {"name": "net.pth", "sha256": "e" * 64},
    "val_labels": "the teacher's answers",
}
FROM_SCRATCH = {**{key: FINETUNED[key] for key in list(FINETUNED)[:6]}, "architecture": "timm/resnet18"}
NAMELESS = {**FROM_SCRATCH, "class_names": None}


@pytest.mark.parametrize("stored", [FINETUNED, FROM_SCRATCH, NAMELESS])
def test_facts_are_stored_as_they_always_were(stored: dict[str, Any]) -> None:
    facts = RunFacts.from_dict(stored)
    assert json.dumps(facts.to_dict()) == json.dumps(stored)  # the order, too
    assert RunFacts.from_dict(facts.to_dict()) == facts


def test_facts_of_opened_data(stripes: Any, preprocessing: Any, teacher: Any) -> None:
    train, val = stripes
    opened = OpenedInputs(train, replace(val, labelled=False), preprocessing, teacher=teacher)
    facts = RunFacts.of(opened)
    assert (facts.data, facts.train_images, facts.val_images) == ("stripes", 44, 20)
    assert facts.teacher == NamedFile(teacher.name, teacher.sha256) and facts.original is None
    assert facts.teacher_labels_val and not RunFacts.of(replace(opened, val=val)).teacher_labels_val
    assert facts.train_listing != facts.val_listing


def test_a_recipe_names_files_by_their_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.fixed.safetensors").touch()
    inputs = Inputs("torch/cifar10", checkpoint="net.fixed.safetensors", distill="resnet18")
    assert list(inputs.to_recipe().items()) == [
        ("checkpoint", str(tmp_path / "net.fixed.safetensors")),
        ("data", "torch/cifar10"),
        ("distill", "resnet18"),
    ]


def test_recorded_inputs_have_to_be_the_same() -> None:
    recorded = Recorded.from_dict({"train_listing": "a" * 64, "text_sha256": None, "unknown": 3})
    recorded.check_inputs(Recorded(train_listing="a" * 64, val_listing="b" * 64))
    recorded.check_inputs(Recorded(text_sha256="b" * 64))  # a run that has no images
    with pytest.raises(TrainingError) as caught:
        recorded.check_inputs(Recorded(train_listing="b" * 64))
    assert "training images" in caught.value.message
    assert "aaaaaaaaaaaa..." in caught.value.message and "bbbbbbbbbbbb..." in caught.value.message
    assert "recorded" in str(caught.value.hint)


@pytest.mark.parametrize(("together", "hint"), [(64, "finetune.batch_size=32"), (63, "--nproc-per-node")])
def test_recorded_images_per_step(monkeypatch: pytest.MonkeyPatch, together: int, hint: str) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    Recorded(images_a_step=64).check_batches(FinetuneOptions(batch_size=32))
    with pytest.raises(TrainingError) as caught:
        Recorded(images_a_step=together).check_batches(FinetuneOptions(batch_size=16))
    assert f"{together} images" in caught.value.message and "2 x 16" in caught.value.message
    assert hint in str(caught.value.hint)


def test_machines_are_compared_by_what_was_stored() -> None:
    here = this_machine(torch.device("cpu"))
    assert Machine.from_dict(here.to_dict()) == here
    assert here.changes_to(here) is None
    then = Machine.from_dict({"torch": "0.1", "processes": 4, "unknown": 1})
    assert then.changes_to(here) == f"torch 0.1 then, {torch.__version__} now, processes 4 then, 1 now"
    assert Machine.from_dict({}).changes_to(here) is None


def test_checkpoints_have_the_suffix_of_their_kind(tmp_path: Path) -> None:
    output = RunOutput(tmp_path, lambda *_: None, ".safetensors")
    assert (output.best_path.name, output.last_path.name) == ("best.safetensors", "last.safetensors")

"""Class lists that lie beside a checkpoint: named, never used in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from fixify.checkpoints.beside import class_lists_beside, remark_on_class_lists
from fixify.checkpoints.labels import read_class_map
from fixify.checkpoints.learned import read_original
from fixify.checkpoints.open import open_model
from fixify.conversion import convert
from fixify.identification import identify

NAMES = [f"{word} dog" for word in ("big", "small", "old", "young", "wet")]
FILES = {
    "class_to_idx.json": json.dumps({name: index for index, name in enumerate(NAMES)}),
    "classes.txt": "\n".join(NAMES),
    "labels.txt": "\n".join(f"{index} {name}" for index, name in enumerate(NAMES)),
    "imagenet_classes.txt": "\n".join(NAMES),
    "model_class_names.yaml": "\n".join(f"- {name}" for name in NAMES),
    "synset.txt": "\n".join(NAMES),
    "config.json": json.dumps({"id2label": {str(index): name for index, name in enumerate(NAMES)}, "model_type": "x"}),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.pth"
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_list_is_named_with_what_to_type(checkpoint: Path, name: str) -> None:
    listed = checkpoint.parent / name
    listed.write_text(FILES[name])
    original = read_original(checkpoint, arch="test_resnet", meta=True)
    assert original.labels is None
    said = [note for note in original.notes if name in note]
    assert len(said) == 1 and f"--class-map {listed}" in said[0] and f"--labels {listed}" in said[0]
    assert read_class_map(listed) == NAMES  # what is said to type works
    assert any(name in note for note in identify(checkpoint).notes)


def test_a_slim_checkpoint_says_so_too(checkpoint: Path) -> None:
    slim = convert(checkpoint, checkpoint.parent / "x.fixed.safetensors", arch="test_resnet").path
    assert open_model(slim).notes == ()
    (slim.parent / "classes.txt").write_text(FILES["classes.txt"])
    opened = open_model(slim)
    assert opened.labels is None and any("classes.txt" in note for note in opened.notes)


def test_lists_of_other_lengths_and_other_files(checkpoint: Path) -> None:
    folder = checkpoint.parent
    (folder / "classes.txt").write_text("\n".join(NAMES[:4]))
    (folder / "labels.json").write_text("{damaged")
    (folder / "requirements.txt").write_text(FILES["classes.txt"])
    (folder / "labels.txt").mkdir()
    assert not read_original(checkpoint, arch="test_resnet", meta=True).notes


def test_two_lists_are_both_named(checkpoint: Path) -> None:
    for name in ("classes.txt", "labels.txt"):
        (checkpoint.parent / name).write_text(FILES[name])
    remark = remark_on_class_lists(class_lists_beside(checkpoint), 5)
    assert remark is not None and "classes.txt and labels.txt" in remark


def test_a_checkpoint_with_names_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"state_dict": timm.create_model("test_resnet", num_classes=5).state_dict(), "classes": NAMES}, path)
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne")
    original = read_original(path, arch="test_resnet", meta=True)
    assert original.labels == NAMES and not any("classes.txt" in note for note in original.notes)

"""Class names, and the pooling, that a training script saved with its weights are used; what is not used is said."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from fixify.checkpoints.labels import find_label_lists
from fixify.checkpoints.learned import read_original
from fixify.checkpoints.slim import read_info
from fixify.conversion import convert
from fixify.errors import ArchitectureError
from fixify.evaluation import evaluate
from fixify.identification import identify
from fixify.prediction import predict

NAMES = ["class0", "class2", "class3", "class1"]  # another order than that of the folders
MAPPING = {name: label for label, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("test_efficientnet", num_classes=4).state_dict()


SAID: list[tuple[dict[str, Any], str]] = [
    ({"class_to_idx": MAPPING}, "class_to_idx"),
    ({"class_to_idx": dict(enumerate(NAMES))}, "class_to_idx"),  # the tutorials' inverted one
    ({"idx_to_class": dict(enumerate(NAMES))}, "idx_to_class"),
    ({"id2label": {str(label): name for label, name in enumerate(NAMES)}}, "id2label"),
    ({"classes": NAMES}, "classes"),
    ({"class_names": tuple(NAMES)}, "class_names"),
    ({"meta": {"CLASSES": tuple(NAMES), "epoch": 3}}, "meta.CLASSES"),
    ({"meta": {"dataset_meta": {"classes": NAMES}}}, "meta.dataset_meta.classes"),
    ({"hyper_parameters": {"class_names": NAMES}}, "hyper_parameters.class_names"),
    ({"args": Namespace(class_to_idx=MAPPING, lr=1.0)}, "args.class_to_idx"),
    ({"classes": sorted(NAMES), "class_to_idx": MAPPING}, "class_to_idx"),
    ({"class_to_idx": {"a": 0, "b": 1}, "classes": NAMES}, "classes"),  # of another number of classes
]


@pytest.mark.parametrize(("said", "place"), SAID)
@pytest.mark.parametrize("arch", [None, "test_efficientnet"])
def test_class_names_of_a_training_checkpoint(
    tmp_path: Path, state: dict[str, torch.Tensor], said: dict[str, Any], place: str, arch: str | None
) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": state, "epoch": 5, **said} | ({} if arch is None else {"arch": arch}), path)
    original = read_original(path)
    assert original.labels == NAMES
    assert any(f"class names from {place}" in note for note in original.notes)
    others = [key for key in said if key != place.split(".")[0]]
    assert all(any(key in note for note in original.notes) for key in others)
    assert any(place in note for note in identify(path).notes)


@pytest.mark.parametrize(
    ("metadata", "place"),
    [
        ({"class_to_idx": json.dumps(MAPPING)}, "class_to_idx"),
        ({"classes": json.dumps(NAMES)}, "classes"),
        ({"id2label": json.dumps(dict(enumerate(NAMES))), "format": "pt"}, "id2label"),
    ],
)
def test_class_names_of_metadata(
    tmp_path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str], place: str
) -> None:
    safetensors.torch.save_file(state, tmp_path / "w.safetensors", metadata=metadata)
    original = read_original(tmp_path / "w.safetensors")
    assert original.labels == NAMES and any(place in note for note in original.notes)


@pytest.mark.parametrize("config", [{"class_to_idx": MAPPING}, {"classes": NAMES}, {"label2id": MAPPING}])
def test_class_names_of_a_config(tmp_path: Path, state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_efficientnet", **config}))
    assert read_original(tmp_path).labels == NAMES


@pytest.mark.parametrize(
    "value",
    [{"a": 0, "b": 2}, {"a": 0, "b": 0}, {"x": "y"}, {1: "a", 2: "b"}, {"٠": "a"}, [], ["a", 1.5], 7, {0: True}, None],
)
def test_what_is_no_list_of_names(value: Any) -> None:
    found, unread = find_label_lists({"class_to_idx": value})
    assert not found and unread == (() if value is None else ("class_to_idx",))


def test_folders_are_matched_by_the_files_own_order(tmp_path: Path, tiny: Path) -> None:
    """The order of torchvision's folders, 1 10 11 12 2 ..., is the usual case."""
    state = torch.load(tiny / "learned.pth", weights_only=True)["state_dict"]
    path = tmp_path / "w.pth"
    torch.save({"state_dict": state, "class_to_idx": MAPPING}, path)
    slim = convert(path, tmp_path / "w.fixed.safetensors").path
    assert read_info(slim).labels == NAMES
    image = tiny / "data/val/class1/0.png"
    (answer,) = predict(path, [image], top=1)
    assert answer.labels == (NAMES[answer.classes[0]],)
    plain = evaluate(tiny / "learned.pth", tiny / "data", workers=0, device="cpu")
    named = evaluate(path, tiny / "data", workers=0, device="cpu")
    assert "by class name" in named.description and "by class name" not in plain.description


@pytest.mark.parametrize("args", [{"global_pool": "avgmax"}, {"gp": "avgmax"}])
@pytest.mark.parametrize("named", [False, True])
def test_the_pooling_that_the_file_states(
    tmp_path: Path, state: dict[str, torch.Tensor], args: dict[str, Any], named: bool
) -> None:
    path = tmp_path / "w.pth"
    model = {"model": "test_efficientnet"} if named else {}
    torch.save({"state_dict": state, "args": Namespace(**args, **model)}, path)
    original = read_original(path)
    assert original.architecture.kwargs["global_pool"] == "avgmax"
    assert any("avgmax" in note for note in original.notes)
    assert "global_pool" not in read_original(path, arch="test_efficientnet,global_pool=avg").architecture.kwargs or (
        read_original(path, arch="test_efficientnet,global_pool=avg").architecture.kwargs["global_pool"] == "avg"
    )


def test_a_pooling_that_needs_other_tensors(tmp_path: Path) -> None:
    vit = timm.create_model("test_vit", num_classes=4)
    path = tmp_path / "w.pth"
    torch.save({"model": vit.state_dict(), "args": Namespace(global_pool=True)}, path)
    with pytest.raises(ArchitectureError, match="global_pool"):
        read_original(path, arch="test_vit")
    torch.save({"model": vit.state_dict(), "args": Namespace(global_pool=False)}, path)
    assert read_original(path, arch="test_vit").architecture.kwargs == {}

"""What follows from where a run starts: the learning rate, and the original as teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import fixify
from fixify.checkpoints.slim import read_info
from fixify.errors import UsageError
from fixify.heads import FixedClassifier, HeadSpec
from fixify.training import FinetuneOptions, FinetuneResult, OpenedInputs, ReferenceModel, api, last_block
from fixify.training.facts import Inputs
from fixify.training.options import (
    GENTLE_RATE,
    GENTLE_TEACHING,
    LAST_BLOCK_EPOCHS,
    USUAL_RATE,
    USUAL_TEACHING,
    TrainOptions,
)
from fixify.training.run_folder import write_sealed
from fixify.training.starting_point import default_teacher, recorded_original, resolved_options, starts_near

Run = Callable[..., FinetuneResult]
OPTIONS = FinetuneOptions.create(epochs=1, batch_size=8, no_aug=True, workers=0, device="cpu")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with learned.pth and what it was converted to: signs, few signs, Hadamard codes."""
    folder = tmp_path_factory.mktemp("converted")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet", in_chans=1, num_classes=4)
    torch.save({"arch": "test_efficientnet", "state_dict": model.state_dict()}, folder / "learned.pth")
    for name, options in (
        ("signs", {"head": "binary"}),
        ("few", {"head": "binary", "bits_per_class": 64}),
        ("rows", {}),
        ("in-order", {"match": False}),
    ):
        fixify.convert(folder / "learned.pth", folder / f"{name}.fixed.safetensors", **options)
    return folder


def test_a_head_is_near_if_it_stores_a_sign_per_weight() -> None:
    near, few = (HeadSpec("binary", 256, 500, bits_per_class=bits) for bits in (256, 255))
    assert starts_near([]) and starts_near([near, near])
    assert not starts_near([few]) and not starts_near([near, HeadSpec("hadamard", 256, 500, matched=True, blocks=2)])


def test_what_follows_from_the_head_unless_it_is_given(
    new_model: Any, stripes: Any, preprocessing: Any, tmp_path: Path
) -> None:
    learned, hadamard = new_model(fixed=False), new_model()
    opened = OpenedInputs(*stripes, preprocessing)
    assert GENTLE_RATE < USUAL_RATE
    assert all(getattr(OPTIONS, name) is None for name in FinetuneOptions.follow_from_start)
    for model, rate, weight, near in (
        (learned, GENTLE_RATE, GENTLE_TEACHING, True),
        (hadamard, USUAL_RATE, USUAL_TEACHING, False),
    ):
        resolved = resolved_options(OPTIONS, model, opened, tmp_path, resume=False)
        assert resolved == OPTIONS.replace(lr=rate, distill_weight=weight, freeze_bn=near, last_block_epochs=0)
        with_rate = resolved_options(OPTIONS.replace(lr=0.3), model, opened, tmp_path, resume=False)
        assert (with_rate.lr, with_rate.freeze_bn) == (0.3, False)
        given = OPTIONS.replace(lr=0.3, distill_weight=0.7, freeze_bn=not near, last_block_epochs=2)
        assert resolved_options(given, model, opened, tmp_path, resume=False) == given
    from_scratch = resolved_options(TrainOptions.create(model="resnet18"), learned, opened, tmp_path, resume=False)
    assert (from_scratch.lr, from_scratch.distill_weight, from_scratch.freeze_bn) == (0.1, USUAL_TEACHING, False)


def test_the_start_teaches_with_less_weight_than_the_original(
    new_model: Any, stripes: Any, preprocessing: Any, tmp_path: Path
) -> None:
    slim = tmp_path / "signs.fixed.safetensors"
    for distill, weight in ((slim, USUAL_TEACHING), (tmp_path / "learned.pth", GENTLE_TEACHING)):
        opened = OpenedInputs(*stripes, preprocessing, given=Inputs("data", slim, distill=distill))
        resolved = resolved_options(OPTIONS, new_model(fixed=False), opened, tmp_path, resume=False)
        assert resolved.distill_weight == weight


def test_matched_codes_with_a_teacher_train_the_last_blocks_first(
    stripes: Any, preprocessing: Any, teacher: ReferenceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocessing = {**preprocessing, "input_size": (1, 32, 32)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet", in_chans=1, num_classes=4)
    fixify.fix_classifier_(model, HeadSpec("hadamard", model.num_features, 4, standardize=True))
    taught = OpenedInputs(*stripes, preprocessing, teacher=teacher)

    def epochs(opened: OpenedInputs, options: FinetuneOptions = OPTIONS) -> int | None:
        return resolved_options(options, model, opened, tmp_path, resume=False).last_block_epochs

    assert epochs(taught) == 0  # codes in order
    head = model.get_classifier()
    matched = HeadSpec("hadamard", head.in_features, 4, standardize=True, matched=True, blocks=1)
    model.classifier = FixedClassifier(matched, codes=torch.arange(4))
    assert epochs(taught) == LAST_BLOCK_EPOCHS
    assert epochs(replace(taught, teacher=None)) == epochs(taught, OPTIONS.replace(last_block_epochs=0)) == 0
    assert epochs(taught, OPTIONS.replace(unlabelled=True)) == 0
    assert epochs(taught, OPTIONS.replace(compile=True)) == epochs(taught, OPTIONS.replace(batch_size=1 << 22)) == 0
    monkeypatch.setattr(last_block, "_MAX_BYTES", 1)  # the features of all images do not fit
    assert epochs(taught) == 0


def test_a_run_records_its_rate_and_resumes_with_it(
    run: Run, new_model: Any, stripes: Any, preprocessing: Any, tmp_path: Path
) -> None:
    run(tmp_path, OPTIONS, new_model(fixed=False))
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["options"]["lr"] == GENTLE_RATE
    assert f"lr: {GENTLE_RATE}" in (tmp_path / "recipe.yaml").read_text()
    # A run of an older version, whose defaults were others and which had no distillation.
    old = tmp_path / "old"
    usual = OPTIONS.replace(lr=USUAL_RATE, distill_weight=USUAL_TEACHING, freeze_bn=False)
    run(old, usual, new_model(fixed=False))
    state, stored = torch.load(old / "state.pt", weights_only=True), json.loads((old / "run.json").read_text())
    for name in ("distill_weight", "freeze_bn", "last_block_copies"):
        del state["recipe"][name], stored["options"][name]
    write_sealed(old, state)
    (old / "run.json").write_text(json.dumps(stored))
    assert run(old, OPTIONS, new_model(fixed=False), resume=True).history
    assert resolved_options(
        OPTIONS, new_model(fixed=False), OpenedInputs(*stripes, preprocessing), old, resume=True
    ) == (usual.replace(last_block_epochs=0))


def test_the_original_is_the_file_of_the_recorded_name_and_hash_beside_the_checkpoint(
    converted: Path, tmp_path: Path
) -> None:
    slim, original = tmp_path / "signs.fixed.safetensors", tmp_path / "learned.pth"
    slim.write_bytes((converted / slim.name).read_bytes())
    info = read_info(slim)
    assert recorded_original(slim, info) is None  # it is not there
    content = (converted / "learned.pth").read_bytes()
    original.write_bytes(content)
    assert recorded_original(slim, info) == original
    original.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert recorded_original(slim, info) is None  # another file of the same name and size
    original.write_bytes(content)
    for changed in ({"name": "../learned.pth"}, {"name": None}, {"ema": True}, {"sha256": None}, {"bytes": 3}):
        assert recorded_original(slim, info.model_copy(update={"source": {**info.source, **changed}})) is None


def test_each_reference_is_opened_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path | str] = []
    real = api.open_reference
    monkeypatch.setattr(api, "open_reference", lambda ref, *given: opened.append(ref) or real(ref, *given))
    original, slim = tmp_path / "learned.pth", tmp_path / "signs.fixed.safetensors"
    original.write_bytes((tiny / "learned.pth").read_bytes())
    fixify.convert(original, slim, head="binary")
    options = OPTIONS.replace(img_size=32, batch_size=4)
    for name, against in (("a", None), ("b", original)):
        opened.clear()
        fixify.finetune(slim, tiny / "data", tmp_path / name, options, against=against)
        assert opened == [original]


def test_signs_learn_from_their_start_if_the_original_is_not_there(tiny: Path, tmp_path: Path) -> None:
    slim = tmp_path / "signs.fixed.safetensors"
    fixify.convert(tiny / "learned.pth", slim, head="binary")
    options = OPTIONS.replace(img_size=32, batch_size=4)
    fixify.finetune(slim, tiny / "data", tmp_path / "run", options)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["teacher"]["name"] == slim.name
    assert (stored["options"]["distill_weight"], stored["options"]["freeze_bn"]) == (USUAL_TEACHING, True)
    assert fixify.finetune(slim, tiny / "data", tmp_path / "run", resume=True).history
    with pytest.raises(UsageError, match="--max-drop"):  # the start does not stand for the original
        fixify.finetune(slim, tiny / "data", tmp_path / "goal", options.replace(max_drop=5.0))
    fixify.finetune(slim, tiny / "data", tmp_path / "alone", options, distill=False)
    assert json.loads((tmp_path / "alone" / "run.json").read_text()).get("teacher") is None


def test_who_has_a_teacher_by_default(converted: Path, tmp_path: Path) -> None:
    original = converted / "learned.pth"

    def chosen(name: str, against: str | None = None, **options: Any) -> Path | str | None:
        slim = converted / f"{name}.fixed.safetensors"
        return default_teacher(slim, read_info(slim), against, OPTIONS.replace(**options))

    assert chosen("signs") == original and chosen("signs", "other.pth") == "other.pth"
    assert chosen("rows") == original  # matched codes
    assert chosen("few") is chosen("in-order") is chosen("in-order", "other.pth") is None
    # Where the original is not known, signs learn from their own start, if it is calibrated.
    for name, own in (("signs", True), ("rows", False), ("few", False)):
        alone = tmp_path / f"{name}.fixed.safetensors"
        alone.write_bytes((converted / alone.name).read_bytes())
        assert default_teacher(alone, read_info(alone), None, OPTIONS) == (alone if own else None)
        assert default_teacher(alone, read_info(alone), None, OPTIONS, calibrated=False) is None
    assert chosen("signs", unlabelled=True) is chosen("signs", loss="cosine") is None
    assert chosen("signs", batch_size=1 << 22) is None  # the logits of all classes would not fit

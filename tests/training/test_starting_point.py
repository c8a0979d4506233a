"""What follows from where a run starts: the learning rate, and the original as teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import fixify
from fixify.checkpoints.slim import read_info
from fixify.heads import HeadSpec
from fixify.training import FinetuneOptions, FinetuneResult, api
from fixify.training.options import GENTLE_RATE, GENTLE_TEACHING, USUAL_RATE, USUAL_TEACHING, TrainOptions
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


def test_rate_and_teaching_follow_from_the_head_unless_they_are_given(new_model: Any, tmp_path: Path) -> None:
    learned, hadamard = new_model(fixed=False), new_model()
    assert OPTIONS.lr is OPTIONS.distill_weight is None and GENTLE_RATE < USUAL_RATE
    for model, rate, weight in ((learned, GENTLE_RATE, GENTLE_TEACHING), (hadamard, USUAL_RATE, USUAL_TEACHING)):
        resolved = resolved_options(OPTIONS, model, tmp_path, resume=False)
        assert resolved == OPTIONS.replace(lr=rate, distill_weight=weight)
        resolved = resolved_options(OPTIONS.replace(lr=0.3, distill_weight=0.7), model, tmp_path, resume=False)
        assert (resolved.lr, resolved.distill_weight) == (0.3, 0.7)
    from_scratch = resolved_options(TrainOptions.create(model="resnet18"), learned, tmp_path, resume=False)
    assert (from_scratch.lr, from_scratch.distill_weight) == (0.1, USUAL_TEACHING)


def test_a_run_records_its_rate_and_resumes_with_it(run: Run, new_model: Any, tmp_path: Path) -> None:
    run(tmp_path, OPTIONS, new_model(fixed=False))
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["options"]["lr"] == GENTLE_RATE
    assert f"lr: {GENTLE_RATE}" in (tmp_path / "recipe.yaml").read_text()
    # A run of an older version, whose defaults were others and which had no distillation.
    old = tmp_path / "old"
    run(old, OPTIONS.replace(lr=USUAL_RATE, distill_weight=USUAL_TEACHING), new_model(fixed=False))
    state, stored = torch.load(old / "state.pt", weights_only=True), json.loads((old / "run.json").read_text())
    del state["recipe"]["distill_weight"], stored["options"]["distill_weight"]
    write_sealed(old, state)
    (old / "run.json").write_text(json.dumps(stored))
    assert run(old, OPTIONS, new_model(fixed=False), resume=True).history


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


def test_who_has_a_teacher_by_default(converted: Path) -> None:
    original = converted / "learned.pth"

    def chosen(name: str, against: str | None = None, **options: Any) -> Path | str | None:
        slim = converted / f"{name}.fixed.safetensors"
        return default_teacher(slim, read_info(slim), against, OPTIONS.replace(**options))

    assert chosen("signs") == original and chosen("signs", "other.pth") == "other.pth"
    assert chosen("rows") == original  # matched codes
    assert chosen("few") is chosen("in-order") is chosen("in-order", "other.pth") is None
    assert chosen("signs", unlabelled=True) is chosen("signs", loss="cosine") is None
    assert chosen("signs", batch_size=1 << 22) is None  # the logits of all classes would not fit

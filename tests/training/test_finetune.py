"""From checkpoint files and data names: convert, finetune, on real images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import fixify
from fixify.checkpoints.slim import read_info
from fixify.data import make_loader, open_data, open_train_val
from fixify.data.idx import DEBIAN_FOLDER, FASHION_CLASSES, read_idx, write_idx
from fixify.errors import DataError, TrainingError, UsageError
from fixify.metrics import evaluate
from fixify.training import EpochEnded, FinetuneOptions, FinetuneResult, OpenedInputs, RunOutput, finetune, train_model

CPU = torch.device("cpu")
OPTIONS = FinetuneOptions.create(
    epochs=3, batch_size=15, lr=0.1, no_aug=True, img_size=32, crop_pct=1.0, workers=0, device="cpu"
)


def _write_fashion(folder: Path, num_train: int, num_val: int) -> Path:
    """The first images of Fashion-MNIST, as idx files."""
    if not DEBIAN_FOLDER.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    folder.mkdir()
    for split, stem, count in (("train", "train", num_train), ("val", "t10k", num_val)):
        kinds = ("images-idx3", "labels-idx1")
        write_idx(folder, split, *(read_idx(DEBIAN_FOLDER / f"{stem}-{kind}-ubyte.gz")[:count] for kind in kinds))
    return folder


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 training and 150 test images."""
    return _write_fashion(tmp_path_factory.mktemp("fashion") / "fashion-mnist", 600, 150)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 training and 20 test images."""
    return _write_fashion(tmp_path_factory.mktemp("few") / "fashion-mnist", 100, 20)


@pytest.fixture(scope="module")
def learned(fashion: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FinetuneResult]:
    """timm's test_efficientnet with a learned classifier, trained on those images, as a training checkpoint."""
    train, val = open_train_val(str(fashion))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet", in_chans=1, num_classes=10)
    out = tmp_path_factory.mktemp("learned")
    preprocessing = {"input_size": (1, 32, 32), "mean": (0.449,), "std": (0.226,), "interpolation": "bicubic"}

    def save(trained: torch.nn.Module, path: Path, record: dict[str, Any]) -> None:
        torch.save({"arch": "test_efficientnet", "state_dict": trained.state_dict()}, path.with_suffix(".pth"))

    options = OPTIONS.replace(crop_pct=None, img_size=None)
    opened = OpenedInputs(train, val, {**preprocessing, "crop_pct": 1.0})
    result = train_model(model, opened, options, RunOutput(out, save))
    return out / "last.fixed.pth", result


@pytest.fixture
def slim(tmp_path: Path) -> Path:
    """A slim checkpoint of the same architecture that was never trained."""
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model("test_efficientnet", in_chans=1, num_classes=10)
    torch.save({"arch": "test_efficientnet", "state_dict": model.state_dict()}, tmp_path / "fresh.pth")
    return fixify.convert(tmp_path / "fresh.pth", tmp_path / "fresh.fixed.safetensors").path


def test_a_converted_model_recovers_its_accuracy(
    fashion: Path, learned: tuple[Path, FinetuneResult], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    slim = fixify.convert(learned[0], tmp_path / "fashion.fixed.safetensors").path
    before_bytes = slim.read_bytes()
    result = finetune(slim, str(fashion), out, OPTIONS)
    original = learned[1].history[-1].val_top1
    assert original > 60
    assert result.before.top1 < 40  # codes in arbitrary order
    assert result.after.val_top1 > original - 4
    assert slim.read_bytes() == before_bytes

    # The file that it left is the model that was measured, and says what it was trained on.
    info = read_info(result.best_path)
    assert info.training is not None and info.training["class_names"] == list(FASHION_CLASSES) == info.labels
    assert info.preprocessing["input_size"] == [1, 32, 32] and info.preprocessing["crop_pct"] == 1.0
    assert info.training["before"]["top1"] == result.before.top1
    assert str(tmp_path) not in info.model_dump_json()
    val = make_loader(open_data(str(fashion), split="val"), info.preprocessing, training=False, batch_size=250)
    metrics = evaluate(fixify.load(result.best_path), val, device=CPU)
    assert metrics.top1 == pytest.approx(result.after.val_top1)
    assert metrics.loss == pytest.approx(result.after.val_loss, rel=1e-4)


def test_a_binary_head_trains_and_resumes_with_its_stored_options(few: Path, slim: Path, tmp_path: Path) -> None:
    """Signs and lengths stay; scale, bias and backbone move; a run that was cut off ends where a whole one does."""
    source = slim.with_name("fresh.pth")
    slim = fixify.convert(source, tmp_path / "b.fixed.safetensors", head="binary", bits_per_class=64).path
    options = OPTIONS.replace(epochs=2, lr=0.01)

    def stop(event: object) -> None:
        if isinstance(event, EpochEnded):
            raise KeyError

    whole = finetune(slim, str(few), tmp_path / "whole", options)
    with pytest.raises(KeyError):
        finetune(slim, str(few), tmp_path / "cut", options, on_event=stop)
    resumed = finetune(slim, str(few), tmp_path / "cut", resume=True)
    assert [record.epoch for record in resumed.history] == [0, 1]
    before, after, again = (load_file(path) for path in (slim, whole.last_path, resumed.last_path))
    for name in ("codes", "gains"):
        assert torch.equal(after[f"classifier.{name}"], before[f"classifier.{name}"])
    for name in ("classifier.scale", "classifier.bias", "conv_stem.weight"):
        assert not torch.equal(after[name], before[name]), name
    assert all(torch.equal(after[key], again[key]) for key in after)
    with pytest.raises(TrainingError, match=r"checkpoint was 'b\.fixed.* and is 'last\.fixed"):
        finetune(whole.last_path, str(few), tmp_path / "cut", resume=True)


def test_data_of_another_label_set_is_refused_before_anything_is_written(slim: Path, tmp_path: Path) -> None:
    for split, shade in (("train", 10), ("val", 20)):
        for name in ("ant", "bee"):
            (tmp_path / "insects" / split / name).mkdir(parents=True)
            Image.new("L", (8, 8), shade).save(tmp_path / "insects" / split / name / "0.png")
    with pytest.raises(DataError, match=r"10 classes .* 2"):
        finetune(slim, str(tmp_path / "insects"), tmp_path / "run", OPTIONS)
    assert not (tmp_path / "run").exists()


def test_class_names_of_an_earlier_training_are_checked(
    few: Path, slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = finetune(slim, str(few), options=OPTIONS.replace(epochs=1))
    assert result.last_path == Path("fresh-finetuned/last.fixed.safetensors")  # the folder that it names itself
    for split in ("train", "val"):
        for label, name in enumerate(sorted(FASHION_CLASSES)):  # the same classes in another order
            folder = tmp_path / "sorted" / split / name.replace("/", "-")
            folder.mkdir(parents=True)
            Image.new("L", (8, 8), 10 * label + len(split)).save(folder / "0.png")
    with pytest.raises(DataError, match="T-shirt/top"):
        finetune(result.last_path, str(tmp_path / "sorted"), tmp_path / "again", OPTIONS)


def test_the_checkpoint_itself_is_never_overwritten(few: Path, slim: Path, tmp_path: Path) -> None:
    best = tmp_path / "run" / "best.fixed.safetensors"
    best.parent.mkdir()
    best.write_bytes(slim.read_bytes())
    with pytest.raises(UsageError, match=re.escape(str(best))):
        finetune(best, str(few), best.parent, OPTIONS, force=True)

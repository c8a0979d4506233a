"""Training from scratch on digits, with a fixed head and a learned one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fixify
from fixify.checkpoints.open import open_model
from fixify.checkpoints.slim import read_info
from fixify.data import make_loader, open_data
from fixify.errors import ArchitectureError, HeadSpecError, TrainingError, UsageError
from fixify.heads import FixedClassifier
from fixify.metrics import evaluate
from fixify.training import EpochEnded, Event, TrainOptions, stored_options, train_from_scratch
from fixify.training.api import new_network

OPTIONS = TrainOptions.create(
    model="test_resnet",
    in_chans=1,
    img_size=32,
    mean=(0.3,),
    std=(0.35,),
    crop_pct=1.0,
    head="hadamard",
    epochs=3,
    batch_size=24,
    lr=0.05,
    no_aug=True,
    workers=0,
    device="cpu",
)
DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def few(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the digits 3 images per class to train on, and 1 to validate."""
    folder = tmp_path_factory.mktemp("data") / "few"
    for split, count in (("train", 3), ("val", 1)):
        for source in sorted((digits / split).iterdir()):
            (folder / split / source.name).mkdir(parents=True)
            for image in sorted(source.iterdir())[:count]:
                shutil.copy(image, folder / split / source.name)
    return folder


@pytest.fixture(scope="module")
def fixed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with a Hadamard head."""
    out = tmp_path_factory.mktemp("runs") / "fixed"
    train_from_scratch(str(digits), out, OPTIONS)
    return out


@pytest.fixture(scope="module")
def learned(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with a learned head."""
    out = tmp_path_factory.mktemp("runs") / "learned"
    train_from_scratch(str(digits), out, OPTIONS.replace(head="learned"))
    return out


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_weights(ours: Path, theirs: Path) -> bool:
    first, second = load_file(ours), load_file(theirs)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("which", ["fixed", "learned"])
def test_it_learns(which: str, request: pytest.FixtureRequest) -> None:
    first, *_, last = losses(request.getfixturevalue(which))
    assert last < first - 0.3


def test_a_fixed_head_leaves_slim_checkpoints(fixed: Path, digits: Path) -> None:
    info = read_info(fixed / "best.fixed.safetensors")
    assert info.architecture.spelled == "timm/test_resnet,in_chans=1"
    assert info.labels == DIGITS
    (head,) = info.heads
    assert (head.spec.kind, head.spec.standardize, head.spec.num_classes) == ("hadamard", True, 10)
    assert info.savings["removed"] == 10 * head.spec.num_features
    assert info.savings["parameters_before"] - info.savings["parameters_after"] == info.savings["removed"] - 1
    assert info.training is not None and info.training["options"]["model"] == "test_resnet"
    raw = (fixed / "best.fixed.safetensors").read_bytes()
    assert str(digits).encode() not in raw and str(fixed).encode() not in raw
    assert isinstance(fixify.load(fixed / "best.fixed.safetensors").get_classifier(), FixedClassifier)  # type: ignore[operator]


def test_a_learned_head_leaves_checkpoints_that_say_what_they_are(learned: Path, digits: Path, tmp_path: Path) -> None:
    assert not list(learned.glob("*.fixed.safetensors"))
    model = json.loads((learned / "run.json").read_text())["model"]
    assert (model["architecture"], model["head"]) == ("timm/test_resnet,in_chans=1", "learned")
    opened = open_model(learned / "last.safetensors")
    assert opened.architecture.spelled == "timm/test_resnet,in_chans=1"
    assert (opened.num_classes, opened.labels) == (10, DIGITS)
    assert opened.preprocessing["mean"] == [0.3] and opened.preprocessing["input_size"] == [1, 32, 32]
    assert opened.preprocessing["crop_pct"] == 1.0
    loader = make_loader(open_data(str(digits), split="val"), opened.preprocessing, training=False, batch_size=60)
    last = json.loads((learned / "metrics.jsonl").read_text().splitlines()[-1])
    assert evaluate(opened.model, loader, device=torch.device("cpu")).loss == pytest.approx(last["val_loss"], rel=1e-5)
    converted = fixify.convert(learned / "last.safetensors", tmp_path / "slim.fixed.safetensors")
    assert not any("Recognised" in note for note in converted.notes)
    assert converted.info.preprocessing == opened.preprocessing and converted.info.labels == DIGITS
    with safe_open(learned / "last.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["training"])["options"]["head"] == "learned"
    assert str(digits).encode() not in (learned / "last.safetensors").read_bytes()


def test_whichever_the_head_the_rest_starts_alike() -> None:
    networks = [new_network(OPTIONS.replace(head=head), DIGITS) for head in ("learned", "hadamard", "orthogonal")]
    first, *others = (
        {key: tensor for key, tensor in network.model.state_dict().items() if not key.startswith("fc.")}
        for network in networks
    )
    for other in others:
        assert first.keys() == other.keys() and all(torch.equal(first[key], other[key]) for key in first)
    another = new_network(OPTIONS.replace(seed=1), DIGITS).model.state_dict()
    assert not torch.equal(first["conv1.0.weight"], another["conv1.0.weight"])


def test_the_callers_random_state_is_untouched() -> None:
    before = torch.get_rng_state()
    new_network(OPTIONS, DIGITS)
    assert torch.equal(before, torch.get_rng_state())


def test_options_of_the_head() -> None:
    options = OPTIONS.replace(
        head="orthogonal", head_standardize=False, head_scale=10, head_fixed_scale=True, head_bias=False, head_seed=7
    )
    (head,) = (module for module in new_network(options, DIGITS).model.modules() if isinstance(module, FixedClassifier))
    assert (head.spec.kind, head.spec.seed, head.spec.standardize, head.spec.bias) == ("orthogonal", 7, False, False)
    assert float(head.scale) == 10 and "scale" not in dict(head.named_parameters())


@pytest.mark.slow
def test_torchvision_and_networks_that_are_built_for_one_size(few: Path, tmp_path: Path) -> None:
    options = OPTIONS.replace(model="torchvision/shufflenet_v2_x0_5", in_chans=None, mean=None, std=None, epochs=1)
    result = train_from_scratch(str(few), tmp_path / "fixed", options.replace(head="simplex"))
    assert read_info(result.best_path).architecture.ref == "torchvision/shufflenet_v2_x0_5"
    result = train_from_scratch(str(few), tmp_path / "learned", options.replace(head="learned"))
    assert open_model(result.best_path).architecture.ref == "torchvision/shufflenet_v2_x0_5"
    vit = new_network(OPTIONS.replace(model="test_vit", img_size=64), DIGITS)
    assert vit.architecture.spelled == "timm/test_vit,in_chans=1,img_size=64"
    assert vit.preprocessing["input_size"] == [1, 64, 64]
    assert vit.model(torch.zeros(1, 1, 64, 64)).shape == (1, 10)


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(UsageError, match=r"resnet50.a1_in1k"):
        new_network(OPTIONS.replace(model="resnet50.a1_in1k"), DIGITS)
    with pytest.raises(UsageError, match=r"3 channels.* 1"):
        new_network(OPTIONS.replace(model="torchvision/resnet18"), DIGITS)
    with pytest.raises(UsageError, match=r"mean .*1 .*3"):
        new_network(OPTIONS.replace(mean=(0.1, 0.2, 0.3), std=(1, 1, 1)), DIGITS)
    with pytest.raises(ArchitectureError, match="resnet1"):
        new_network(OPTIONS.replace(model="resnet1"), DIGITS)
    with pytest.raises(HeadSpecError, match="1,000"):
        new_network(OPTIONS.replace(head="simplex"), [str(number) for number in range(1000)])
    with pytest.raises(UsageError, match="mean and std"):
        OPTIONS.replace(std=None)
    with pytest.raises(UsageError, match="head_scale"):
        TrainOptions.create(model="resnet18", head_scal=1)


def test_a_crash_and_a_resume_are_bit_for_bit_the_whole_run(fixed: Path, digits: Path, tmp_path: Path) -> None:
    def crash(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.record.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_from_scratch(str(digits), tmp_path / "run", OPTIONS, on_event=crash)
    assert stored_options(tmp_path / "run", TrainOptions).recipe() == OPTIONS.recipe()
    train_from_scratch(str(digits), tmp_path / "run", None, resume=True)
    assert same_weights(tmp_path / "run" / "last.fixed.safetensors", fixed / "last.fixed.safetensors")
    with pytest.raises(TrainingError, match="head was 'hadamard' and is 'learned'"):
        train_from_scratch(str(digits), tmp_path / "run", OPTIONS.replace(head="learned"), resume=True)


def test_force_clears_the_other_heads_checkpoints(learned: Path, few: Path, tmp_path: Path) -> None:
    shutil.copytree(learned, tmp_path / "run")
    train_from_scratch(str(few), tmp_path / "run", OPTIONS.replace(epochs=1), force=True)
    assert not (tmp_path / "run" / "best.safetensors").exists()

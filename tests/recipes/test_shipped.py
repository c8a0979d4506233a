"""The recipes that come with fixify: found, described, valid, and each can train."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fixify
from fixify.checkpoints.slim import read_info
from fixify.conversion import Conversion
from fixify.data import OpenedData
from fixify.data.idx import ArrayImages
from fixify.errors import FixifyError, UsageError
from fixify.language import run_language
from fixify.recipes import RecipeError, find_recipe, list_recipes, read_recipe, shipped
from fixify.recipes.measured import Measured
from fixify.savings import count_parameters
from fixify.training import (
    LAST_FILE,
    FinetuneOptions,
    FinetuneResult,
    OpenedInputs,
    RunOutput,
    RunStarted,
    finetune,
    losses,
    train_model,
)
from fixify.training.api import new_network
from fixify.training.options import USUAL_RATE

NAMES = shipped.recipe_names()
RETROFITS = [name for name in NAMES if read_recipe(name).convert is not None]
LANGUAGE = [name for name in NAMES if read_recipe(name).language is not None]
MANY = "identities"  # its million classes are too many for these tests; it has its own
SIGNS = "glyphs-signs"  # a learned classifier at first; it has its own too
FROM_SCRATCH = [name for name in NAMES if read_recipe(name).train is not None and name not in (MANY, SIGNS)]
# A second each.
QUICK = ("digits-resnet20", "fashion-mnist-resnet20", "glyphs-test-efficientnet", "paper-resnet56-cifar10")
# Table 1 of the paper, its section 4.2, and what trains on a CPU: classes; parameters, learned and fixed.
COUNTS = {
    "digits-resnet20": (10, 272_186, 271_547),
    "fashion-mnist-resnet20": (10, 272_186, 271_547),
    "glyphs-test-efficientnet": (500, 227_264, 99_265),
    "paper-densenet100-cifar100": (100, 800_032, 765_833),
    "paper-densenet169-imagenet": (1000, 14_149_480, 12_485_481),
    "paper-mobilenet050-imagenet": (1000, 1_331_592, 819_593),
    "paper-resnet18-050-imagenet": (1000, 3_055_880, 2_799_881),
    "paper-resnet50-imagenet": (1000, 25_557_032, 23_509_033),
    "paper-resnet56-cifar10": (10, 855_770, 855_131),
    "paper-shufflenet-imagenet": (1000, 1_826_554, 866_555),
}
OTHERWISE_ALIKE = {SIGNS: "glyphs-test-efficientnet"}
SHORT = {"epochs": 1, "warmup_epochs": 0, "batch_size": 8, "grad_accum": 1, "img_size": 32, "crop_pct": 1.0}


def _convert(name: str, tiny: Path, out: Path) -> Conversion:
    return fixify.convert(tiny / "learned.pth", out, read_recipe(name).convert)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_valid_and_says_how_to_run_it(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.sections and recipe.description
    text = find_recipe(name).read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    for section in recipe.sections:
        command = "train" if section == "language" else section
        assert any(re.search(rf"fixify {command} (.*--recipe )?{name}\b", line) for line in header)
    assert text.isascii() and max(map(len, text.splitlines())) <= 120


WANTED = {
    "a figure": r"[\d.]+ %|perplexity [\d.]+",
    "its range over seeds, or that it is of one": r"[\d.]+ to [\d.]+ over \d+ seeds|one seed",
    "the hardware": r"\bCPU|\bGPU|\b[AH]\d{2,3}\b",
    "the time": r"\bseconds?\b|\bminutes?\b|\bhours?\b|\d+ (s|min|h)\b",
}


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_to_expect_or_that_it_was_not_run(name: str) -> None:
    recipe = read_recipe(name)
    if not recipe.measured and not recipe.expect.startswith("Not run here"):
        assert [what for what, pattern in WANTED.items() if not re.search(pattern, recipe.expect)] == []


@pytest.mark.parametrize("name", [name for name in NAMES if read_recipe(name).measured])
def test_what_was_measured_can_be_repeated(name: str) -> None:
    recipe = read_recipe(name)
    assert not recipe.expect.startswith("Not run here")
    for measured in recipe.measured:
        assert len(measured.seeds) >= 3
        for what in ("the hardware", "the time"):
            assert re.search(WANTED[what], measured.conditions), what
        if isinstance(measured, Measured):
            assert measured.num_classes == COUNTS[OTHERWISE_ALIKE.get(name, name)][0]
            assert read_recipe(name, measured.set).train is not None
    # `fixify recipes show` prints the file as it is.
    lines = find_recipe(name).read_text().splitlines()
    below = lines[lines.index("measured:") + 1 :]
    assert max(map(len, itertools.takewhile(lambda line: not line or line.startswith(" "), below))) <= 80


@pytest.mark.parametrize("name", RETROFITS)
def test_each_does_a_real_step(name: str, tiny: Path, tmp_path: Path) -> None:
    slim = _convert(name, tiny, tmp_path / "a.fixed.safetensors").path
    options = read_recipe(name).finetune
    if options is None:
        return
    short = options.replace(**SHORT, workers=0, device="cpu")
    result = finetune(slim, str(tiny / "data"), tmp_path / "run", short)
    assert [record.step for record in result.history] == [1]
    before, after = load_file(slim), load_file(tmp_path / "run" / LAST_FILE)
    assert before.keys() == after.keys()
    moved = [key for key in before if before[key].is_floating_point() and not torch.equal(before[key], after[key])]
    assert "classifier.scale" in moved and "conv_stem.weight" in moved

    # The run can be repeated from what it left, to the last bit.
    stored = read_recipe(tmp_path / "run" / "recipe.yaml")
    # By the head, if not given.
    chosen = {name: getattr(stored.finetune, name) for name in FinetuneOptions.follow_from_start}
    assert None not in chosen.values()
    assert stored.finetune == short.replace(workers=None, device="auto", **chosen)
    again = stored.finetune.replace(workers=0, device="cpu")
    finetune(slim, str(tiny / "data"), tmp_path / "again", again)
    repeated = load_file(tmp_path / "again" / LAST_FILE)
    assert all(torch.equal(repeated[key], after[key]) for key in after)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FROM_SCRATCH]
)
def test_each_from_scratch_does_a_real_step(name: str, tmp_path: Path) -> None:
    """On synthetic images of the right shape, as many classes as the data has, and its own optimiser and crops."""
    options = read_recipe(name).train
    assert options is not None and options.head == "auto"
    classes, learned, fixed = COUNTS[name]
    names = [f"class {number}" for number in range(classes)]
    network = new_network(options, names)
    assert count_parameters(new_network(options.replace(head="learned"), names).model) == learned
    assert count_parameters(network.model) == fixed
    channels, *size = network.preprocessing["input_size"]
    shape = (4, *size) if channels == 1 else (4, *size, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = [
        OpenedData(ArrayImages(pixels, np.arange(4)), tuple(names), "", split, "synthetic", split)
        for split in ("train", "val")
    ]
    before = {key: tensor.clone() for key, tensor in network.model.state_dict().items()}
    short = options.replace(epochs=1, batch_size=4, workers=0, device="cpu")
    opened = OpenedInputs(*images, network.preprocessing)
    (record,) = train_model(network.model, opened, short, RunOutput(tmp_path / "run", lambda *_: None)).history
    assert record.step == 1 and record.lr == options.lr and record.train_loss is not None
    moved = {key for key, tensor in network.model.state_dict().items() if not torch.equal(before[key], tensor)}
    (head,) = (key.removesuffix(".scale") for key in before if key.endswith(".scale"))
    assert {f"{head}.scale", f"{head}.bias", next(iter(before))} <= moved


def test_those_of_the_paper_are_all_there() -> None:
    assert set(COUNTS) == set(FROM_SCRATCH)
    for name in FROM_SCRATCH:
        options = read_recipe(name).train
        assert options is not None and options.decay_alpha
        assert (options.head_lr_scale, options.head_standardize) == (1, False)


@pytest.mark.slow
def test_that_of_many_identities_learns_without_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "BLOCKED_FROM", 1)
    notes: list[str | None] = []

    def listen(event: object) -> None:
        notes.extend([event.loss_note] if isinstance(event, RunStarted) else [])

    out, data = tmp_path / "run", "identities/2000/640"
    result = fixify.train(MANY, out, data=data, on_event=listen, device="cpu", epochs=2)
    assert isinstance(result, FinetuneResult)
    assert "block by block" in str(notes[0])
    assert result.after.val_top1 > 50 > 1 > result.before.top1  # chance is 0.05 %
    assert result.peak_memory > 50 << 20
    info = read_info(result.best_path)
    assert info.labels is None and info.num_classes == 2000
    assert (info.training or {})["class_names"] is None
    assert fixify.train(MANY, out, data=data, device="cpu", resume=True).after == result.after


def test_that_of_signs_converts_its_classifier(tmp_path: Path) -> None:
    options, other = (read_recipe(name).train for name in (SIGNS, OTHERWISE_ALIKE[SIGNS]))
    assert options is not None and other is not None and options.converts
    same = {name: value for name, value in other.recipe().items() if not name.startswith("head")}
    own = {name: value for name, value in options.recipe().items() if name in same}
    heads = {"bits_per_class", "calibration_images", "learn_signs", "margin", "decay_alpha"}
    assert {name for name in same if own[name] != same[name]} <= heads
    generator, small = np.random.default_rng(0), {"epochs": 2, "batch_size": 4, "workers": 0, "device": "cpu"}
    for label in range(20):
        for split in ("train", "val"):
            (tmp_path / "data" / split / str(label)).mkdir(parents=True)
            image = Image.fromarray(generator.integers(0, 256, (32, 32), dtype=np.uint8))
            image.save(tmp_path / "data" / split / str(label) / "0.png")
    result = fixify.train(SIGNS, tmp_path / "run", data=tmp_path / "data", **small)
    assert isinstance(result, FinetuneResult)
    assert [record.classifier for record in result.history] == ["converted", None, None]
    (head,) = read_info(result.best_path).heads
    assert (head.spec.kind, head.spec.bits_per_class, head.spec.gains) == ("binary", options.bits_per_class, False)


def test_the_plain_one_spells_the_defaults_out(tiny: Path, tmp_path: Path) -> None:
    assert read_recipe("retrofit").finetune == FinetuneOptions(lr=USUAL_RATE)  # of its kind of head
    fixify.convert(tiny / "learned.pth", tmp_path / "default.fixed.safetensors")
    _convert("retrofit", tiny, tmp_path / "recipe.fixed.safetensors")
    default, recipe = (tmp_path / f"{name}.fixed.safetensors" for name in ("default", "recipe"))
    assert read_info(default) == read_info(recipe)
    first, second = load_file(default), load_file(recipe)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_papers_has_codes_in_order_and_no_statistics(tiny: Path, tmp_path: Path) -> None:
    done = _convert("retrofit-paper", tiny, tmp_path / "a.fixed.safetensors")
    (record,) = done.info.heads
    assert (record.spec.kind, record.spec.matched, record.spec.standardize) == ("hadamard", False, False)
    assert not {"classifier.center", "classifier.codes"} & load_file(done.path).keys()


def test_the_list() -> None:
    recipes = list_recipes()
    assert [recipe.name for recipe in recipes] == NAMES
    assert {"retrofit", "retrofit-paper"} <= set(NAMES)
    for recipe in recipes:
        read = read_recipe(recipe.name)
        assert recipe.sections == read.sections
        assert recipe.description == " ".join(read.description.split())


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped_file = find_recipe("retrofit")
    Path("retrofit").mkdir()  # what is shipped is meant by its name, whatever lies around here
    assert find_recipe("retrofit") == shipped_file
    Path("retrofit.yaml").touch()
    assert find_recipe("retrofit.yaml") == Path("retrofit.yaml")
    Path("mine").touch()
    assert find_recipe("mine") == Path("mine")
    for name, words in (
        ("retrofitt", ["'retrofitt'", "'retrofit'?"]),
        ("retrofit-paper.yaml", ["'retrofit-paper.yaml'", "'retrofit-paper'?"]),
        ("zzz", ["'zzz'"]),
        ("runs/a.yaml", ["runs/a.yaml"]),
    ):
        with pytest.raises(UsageError) as caught:
            find_recipe(name)
        assert all(word in caught.value.message for word in words)
        assert "fixify recipes ls" in str(caught.value)


def test_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "fixify")
    (tmp_path / "recipes").mkdir()  # somebody else's, in site-packages
    with pytest.raises(FixifyError, match=str(tmp_path)):
        shipped.recipes_folder()
    (tmp_path / "pyproject.toml").touch()
    assert shipped.recipes_folder() == tmp_path / "recipes"
    (tmp_path / "fixify" / "_recipes").mkdir(parents=True)
    assert shipped.recipes_folder() == tmp_path / "fixify" / "_recipes"
    (tmp_path / "fixify" / "_recipes" / "broken.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        list_recipes()


@pytest.mark.parametrize("name", LANGUAGE)
def test_each_language_model_trains(name: str, text: Path, tmp_path: Path) -> None:
    options = read_recipe(name).language
    assert options is not None
    if options.words == "word2vec":
        pytest.importorskip("gensim")
    small = {"num_features": 16, "epochs": 1, "batch_size": 4, "seq_len": 10, "warmup_epochs": 0, "device": "cpu"}
    result = run_language(str(text), tmp_path / "run", options.replace(**small))
    assert result.val.loss < 10
    assert (result.size.fixed > 0) == (options.words != "learned")

"""The classes of slim checkpoints are kept, added, renamed and merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fixify
from fixify.errors import DataError, FormatError, HeadSpecError, OutputExistsError, UsageError
from fixify.heads import FixedClassifier

NAMES = ["ant", "bee", "cat", "dog"]
Convert = Callable[..., Path]


@pytest.fixture(scope="module")
def convert(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Options of convert -> a slim checkpoint of 4 classes with names."""
    folder = tmp_path_factory.mktemp("named")
    (folder / "names.txt").write_text("\n".join(NAMES))

    def make(**options: Any) -> Path:
        options = {"labels": str(folder / "names.txt"), **options}
        path = folder / f"net{len(list(folder.iterdir()))}.fixed.safetensors"
        return fixify.convert(tiny / "learned.pth", path, **options).path

    return make


def answers(path: Path) -> torch.Tensor:
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return fixify.load(path)(images)


def backbone(path: Path) -> dict[str, torch.Tensor]:
    model = fixify.load(path)
    return {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("classifier.")}


LEVELS = {"head": "binary", "bits_per_weight": 3}


@pytest.mark.parametrize("options", [{}, {"head": "binary"}, LEVELS, {"head": "hadamard", "match": False}])
def test_keep(convert: Convert, tmp_path: Path, options: Any) -> None:
    slim = convert(**options)
    (tmp_path / "some.txt").write_text("dog\nbee\n")
    done = fixify.keep_classes(slim, tmp_path / "some.txt", tmp_path / "kept.safetensors")
    assert done.info.labels == ["dog", "bee"] and done.before == 4
    torch.testing.assert_close(answers(done.path), answers(slim)[:, [3, 1]], rtol=1e-6, atol=1e-6)
    old, new = backbone(slim), backbone(done.path)
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    assert fixify.verify(done.path).passed and fixify.report(done.path).num_classes == 2
    assert fixify.keep_classes(slim, ["3", "1"], tmp_path / "numbers.safetensors").info.labels == ["dog", "bee"]


def test_names_that_are_not_there(convert: Convert, tmp_path: Path) -> None:
    slim = convert()
    for names in (["dog", "dgo"], ["dog", "7"], ["dog", "dog"], ["dog", "3"], ["dog"], []):
        with pytest.raises(UsageError):
            fixify.keep_classes(slim, names, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_two_classes_of_one_name(convert: Convert, tmp_path: Path) -> None:
    path = fixify.rename_classes(convert(), ["crane", "bee", "crane", "dog"], tmp_path / "a.safetensors").path
    with pytest.raises(UsageError, match="0, 2"):
        fixify.keep_classes(path, ["crane", "bee"], tmp_path / "b.safetensors")
    assert fixify.keep_classes(path, ["2", "bee"], tmp_path / "b.safetensors").info.labels == ["crane", "bee"]


def test_rename(convert: Convert, tmp_path: Path) -> None:
    slim = convert(head="orthogonal")
    done = fixify.rename_classes(slim, {"cat": "Felis", "0": "Formica"}, tmp_path / "a.safetensors")
    assert done.info.labels == ["Formica", "bee", "Felis", "dog"]
    assert torch.equal(answers(done.path), answers(slim))
    assert done.info.heads == fixify.inspect(slim).heads
    with pytest.raises(UsageError):
        fixify.rename_classes(slim, ["a", "b"], tmp_path / "b.safetensors")
    with pytest.raises(UsageError):
        fixify.rename_classes(slim, {"cow": "Bos"}, tmp_path / "b.safetensors")


@pytest.mark.parametrize("options", [{}, LEVELS])
def test_add_without_examples(convert: Convert, tmp_path: Path, options: Any) -> None:
    slim = convert(**options)
    done = fixify.add_classes(slim, ["cow", "emu"], tmp_path / "a.safetensors")
    assert done.info.labels == [*NAMES, "cow", "emu"] and done.notes
    torch.testing.assert_close(answers(done.path)[:, :4], answers(slim), rtol=1e-6, atol=1e-6)
    for names in (["bee"], ["cow", "cow"], []):
        with pytest.raises(UsageError):
            fixify.add_classes(slim, names, tmp_path / "b.safetensors")


@pytest.mark.parametrize("options", [{"head": "binary"}, LEVELS])
def test_merge(convert: Convert, tmp_path: Path, options: Any) -> None:
    slim = convert(**options)
    done = fixify.merge_classes(slim, ["cat", "ant"], "pet", tmp_path / "a.safetensors")
    assert done.info.labels == ["bee", "pet", "dog"]
    torch.testing.assert_close(answers(done.path)[:, [0, 2]], answers(slim)[:, [1, 3]], rtol=1e-6, atol=1e-6)
    with pytest.raises(UsageError):
        fixify.merge_classes(slim, ["cat"], "pet", tmp_path / "b.safetensors")
    with pytest.raises(UsageError):
        fixify.merge_classes(slim, NAMES, "all", tmp_path / "b.safetensors")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of folders: bars and spots, which are new, and ant, which is not."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("bars", "spots", "ant"):
        (folder / name).mkdir()
        for number in range(12):
            pixels = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            if name == "bars":
                pixels[::4] += 180
            elif name == "spots":
                pixels[8:24, 8:24, 0] += 180
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.parametrize("options", [{"head": "binary"}, LEVELS, {"head": "hadamard"}])
def test_add_by_images(convert: Convert, pictures: Path, tmp_path: Path, options: Any) -> None:
    slim = convert(**options)
    done = fixify.add_classes(slim, out=tmp_path / "a.safetensors", images=pictures, device="cpu")
    assert done.info.labels == [*NAMES, "bars", "spots"]
    for name in ("bars", "spots"):
        found = fixify.predict(done.path, sorted((pictures / name).iterdir()), device="cpu")
        right = [each.labels[0] == name for each in found]
        assert np.mean(right) > 0.7
    torch.testing.assert_close(answers(done.path)[:, :4], answers(slim), rtol=1e-6, atol=1e-6)


def test_images_of_one_class_need_others(convert: Convert, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/bars").symlink_to(pictures / "bars")
    with pytest.raises(UsageError):
        fixify.add_classes(
            convert(head="binary"), out=tmp_path / "a.safetensors", images=tmp_path / "one", device="cpu"
        )
    with pytest.raises(DataError):
        fixify.add_classes(convert(), ["cow"], tmp_path / "a.safetensors", images=pictures, device="cpu")


@pytest.mark.parametrize("bits", [None, 1.58, 4])
def test_add_by_embeddings(tmp_path: Path, bits: float | None) -> None:
    rng = np.random.default_rng(0)
    every = rng.standard_normal((40, 64)).astype(np.float32) + 2
    every /= np.linalg.norm(every, axis=1, keepdims=True)
    np.save(tmp_path / "all.npy", every)
    np.save(tmp_path / "old.npy", every[:36])
    np.save(tmp_path / "new.npy", every[36:])
    slim = fixify.convert(
        tmp_path / "old.npy", tmp_path / "old.fixed.safetensors", logit_scale=100.0, head="binary", bits_per_weight=bits
    ).path
    done = fixify.add_classes(
        slim, ["a", "b", "c", "d"], tmp_path / "more.fixed.safetensors", embeddings=tmp_path / "new.npy"
    )
    head, old = fixify.load(done.path), fixify.load(slim)
    assert isinstance(head, FixedClassifier) and head.out_features == 40 and done.info.labels is None
    x = torch.from_numpy(every)
    assert torch.equal(head(x).argmax(dim=1)[36:], torch.arange(36, 40))
    torch.testing.assert_close(head(x)[:, :36], old(x))
    with pytest.raises(UsageError):
        fixify.add_classes(slim, ["a"], tmp_path / "x.safetensors", embeddings=tmp_path / "new.npy")
    with pytest.raises(UsageError):
        fixify.add_classes(slim, ["a"], tmp_path / "x.safetensors", images=tmp_path)


def test_embeddings_need_known_class_vectors(convert: Convert, tmp_path: Path) -> None:
    np.save(tmp_path / "new.npy", np.ones((1, 256), dtype=np.float32))
    with pytest.raises(UsageError):
        fixify.add_classes(convert(), ["a"], tmp_path / "x.safetensors", embeddings=tmp_path / "new.npy")


def test_what_cannot_be_edited(convert: Convert, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(HeadSpecError):
        fixify.keep_classes(convert(head="orthogonal"), ["dog", "bee"], tmp_path / "x.safetensors")
    with pytest.raises(UsageError):
        fixify.keep_classes(tiny / "learned.pth", ["0", "1"], tmp_path / "x.safetensors")
    with pytest.raises(FormatError):
        fixify.keep_classes(tmp_path / "none.safetensors", ["0", "1"], tmp_path / "x.safetensors")
    slim = convert()
    with pytest.raises(OutputExistsError):
        fixify.keep_classes(slim, ["dog", "bee"], slim)
    assert not list(tmp_path.iterdir())

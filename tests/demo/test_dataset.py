"""The demo's folder of images, with 20 of its classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fixify.data import open_train_val
from fixify.demo import glyphs
from fixify.demo.glyphs import MANIFEST, face_images, glyph_classes, write_dataset, write_letter_images
from fixify.errors import OutputError, OutputExistsError

FEW = {"train": ("DejaVuSans",), "val": ("DejaVuSerif-BoldItalic",)}
CLASSES = tuple(entry for entry in glyph_classes() if "digit" in entry.name)[:20]


@pytest.fixture(scope="module", autouse=True)
def _few_classes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "glyph_classes", lambda: CLASSES)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "glyphs", faces=FEW).folder


def test_layout_is_what_finetune_reads(folder: Path) -> None:
    train, val = open_train_val(str(folder))
    assert len(train) == len(val) == 2 * len(CLASSES)
    assert list(train.class_names) == list(val.class_names) == [entry.name for entry in CLASSES]
    with Image.open(folder / "val" / "digit_five" / "DejaVuSerif-BoldItalic-1.png") as image:
        assert (image.mode, image.size) == ("L", (32, 32))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["glyphs"]  # nothing temporary is left


def test_letters_are_what_finetune_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "LETTER_VARIANTS", {"train": 3, "val": 2})
    monkeypatch.setattr(glyphs, "letter_labels", lambda: (1, 3))
    seen: list[tuple[int, int]] = []
    written = write_letter_images(tmp_path / "letters", faces=FEW, on_progress=lambda *counts: seen.append(counts))
    assert (written.num_classes, written.train_images, written.val_images) == (2, 6, 4)
    assert seen[-1] == (10, 10) and (tmp_path / "letters").stat().st_mode & 0o777 == tmp_path_mode(tmp_path)
    train, val = open_train_val(str(written.folder))
    assert (len(train), len(val), train.num_classes) == (6, 4, 2)
    drawn = next(face_images("val", FEW["val"][0], (1, 3), variants=1))
    for index in range(2):
        image, label = val.images.load(index)
        assert label == index and np.array_equal(np.asarray(image), drawn[index])
    assert write_letter_images(tmp_path / "letters", faces=FEW).reused
    with pytest.raises(OutputExistsError):
        write_dataset(tmp_path / "letters", faces=FEW)


def tmp_path_mode(parent: Path) -> int:
    """The mode of an ordinary new folder."""
    (parent / "ordinary").mkdir()
    return (parent / "ordinary").stat().st_mode & 0o777


def test_it_is_reused(folder: Path) -> None:
    written = (folder / MANIFEST).stat().st_mtime_ns
    again = write_dataset(folder, faces=FEW)
    assert again.reused
    assert (folder / MANIFEST).stat().st_mtime_ns == written


def test_another_selection_is_refused(folder: Path) -> None:
    with pytest.raises(OutputExistsError) as caught:
        write_dataset(folder)
    assert str(folder) in caught.value.message and f"rm -r {folder}" in str(caught.value.hint)


def test_a_foreign_folder_is_refused_and_kept(tmp_path: Path) -> None:
    mine = tmp_path / "glyphs" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("keep me")
    with pytest.raises(OutputExistsError) as caught:
        write_dataset(tmp_path / "glyphs", faces=FEW)
    assert str(mine.parent) in caught.value.message
    assert mine.read_text() == "keep me"


def test_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "glyphs", faces=FEW, on_progress=stop)
    assert not list(tmp_path.iterdir())


def test_missing_parent_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        write_dataset(tmp_path / "nowhere" / "glyphs", faces=FEW)
    assert str(tmp_path / "nowhere") in caught.value.message

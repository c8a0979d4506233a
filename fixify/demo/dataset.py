"""The demo's data set: which face goes into which split, how many images of each glyph, and its folder of PNG files."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from fixify.demo.classes import TRAIN_FACES, VAL_FACES, glyph_classes
from fixify.demo.glyphs import IMAGE_SIZE, Images, distort, draw, generator
from fixify.errors import OutputError, OutputExistsError

Split = Literal["train", "val"]
Faces = Mapping[Split, Sequence[str]]
MANIFEST = "glyphs.json"
VERSION = 1
FACES: Faces = {"train": TRAIN_FACES, "val": VAL_FACES}
# Images of each class and face. Validation needs many for a figure that can be trusted, training takes time.
VARIANTS: Mapping[Split, int] = {"train": 2, "val": 2}


@dataclass(frozen=True)
class GlyphData:
    """A data set on disk.

    Attributes:
        folder: Holds train/ and val/ with one folder a class.
        num_classes: Number of classes.
        train_images: Images below train/.
        val_images: Images below val/, all of faces that train/ does not have.
        reused: It was there already.
    """

    folder: Path
    num_classes: int
    train_images: int
    val_images: int
    reused: bool


def face_images(split: Split, face: str) -> Iterator[Images]:
    """The images of one face: [500, 32, 32] in label order for each of its variants."""
    drawn = draw(face, [entry.code_point for entry in glyph_classes()])
    for variant in range(VARIANTS[split]):
        yield distort(drawn, generator(VERSION, *f"{split}/{face}/{variant}".encode()))


def write_dataset(
    folder: Path, *, faces: Faces = FACES, on_progress: Callable[[int, int], object] | None = None
) -> GlyphData:
    """Write train/ and val/ with one folder a class below `folder`, or find that they are there already.

    Everything is written to a temporary folder beside it and renamed at the end, so `folder` is whole or absent.

    Args:
        folder: Where; its parent has to exist.
        faces: The typefaces of each split.
        on_progress: Called with images written and images in all.

    Raises:
        OutputExistsError: `folder` is something else, or was written by another version of fixify.
        OutputError: the disk is full, or the folder cannot be written.
    """
    classes = glyph_classes()
    counts = {split: len(faces[split]) * VARIANTS[split] * len(classes) for split in VARIANTS}
    manifest = {
        "fixify.glyphs": VERSION,
        "image_size": IMAGE_SIZE,
        "num_classes": len(classes),
        "images": counts,
        "faces": {split: list(faces[split]) for split in VARIANTS},
    }
    data = GlyphData(folder, len(classes), counts["train"], counts["val"], reused=folder.exists())
    if data.reused:
        _check_manifest(folder, manifest)
        return data
    try:
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise OutputError(f"Cannot write in {folder.parent}: {error.strerror}.") from error
    try:
        done = 0
        for split in VARIANTS:
            folders = [temporary / split / entry.name for entry in classes]
            for class_folder in folders:
                class_folder.mkdir(parents=True)
            for face in faces[split]:
                for variant, images in enumerate(face_images(split, face)):
                    for class_folder, image in zip(folders, images, strict=True):
                        Image.fromarray(image).save(class_folder / f"{face}-{variant}.png", compress_level=1)
                    done += len(classes)
                    if on_progress is not None:
                        on_progress(done, sum(counts.values()))
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        temporary.chmod((temporary / "train").stat().st_mode)  # mkdtemp's 0700 would keep others out
        temporary.rename(folder)
    except OSError as error:
        raise OutputError(f"Cannot write {folder}: {error.strerror or error}.", hint="Nothing was changed.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return data


def _check_manifest(folder: Path, manifest: dict[str, object]) -> None:
    hint = f"Move it away, or delete it if it is the demo's: rm -r {folder}"
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputExistsError(f"{folder} exists and is not the demo's data set.", hint=hint) from error
    if found != manifest:
        raise OutputExistsError(f"{folder} holds the data set of another version of the demo.", hint=hint)

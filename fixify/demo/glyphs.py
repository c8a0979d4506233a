"""The demo's data set: images of 500 characters, drawn with the typefaces that matplotlib carries.

FreeType draws each character at twice the size of an image (64 x 64). Each image is such a drawing with a small
rotation, shear, magnification and shift, with thinner or thicker strokes, with random brightness of paper and ink, and
with noise. All random numbers come from an explicit generator, so the same seed gives the same images.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from fixify.errors import DataError, OutputError, OutputExistsError

Split = Literal["train", "val"]
Faces = Mapping[Split, Sequence[str]]
Images = npt.NDArray[np.uint8]

# One face of each family is held out. Its style appears in training, spread over the other faces of the family.
TRAIN_FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
)
VAL_FACES = ("DejaVuSans-Oblique", "DejaVuSansMono-Bold", "DejaVuSerif-BoldItalic")
ALL_FACES = tuple(sorted(TRAIN_FACES + VAL_FACES))
FACES: Faces = {"train": TRAIN_FACES, "val": VAL_FACES}
# Images per class and face. More validation images give a more reliable figure; more training images take longer.
VARIANTS: Mapping[Split, int] = {"train": 2, "val": 2}

# The list of classes is a file, because the labels of the shipped checkpoint must not depend on how this machine's
# FreeType rounds. `tests/tools/demo_classes.py` made it.
LIST = Path(__file__).with_name("classes.txt")
MANIFEST = "glyphs.json"
VERSION = 1

IMAGE_SIZE = 32
_DRAWN_SIZE = 2 * IMAGE_SIZE
_FONT_SIZE = 44  # size of the font in pixels of a drawing; accents above capitals still fit

# Ranges of the distortions, which are uniform. Pixels are those of the final image.
_ROTATION = 4.0  # degrees in either direction
_SHEAR = 0.08
_MAGNIFICATION = (0.86, 1.12)
_SHIFT = 2.0  # pixels in either direction
_STROKE = (-0.35, 0.6)  # fraction of one pixel of the drawing that is eroded (-) or dilated (+) on each side
_PAPER = (170.0, 255.0)
_INK = (0.0, 90.0)
_NOISE = (0.0, 14.0)  # standard deviation


@dataclass(frozen=True, order=True)
class GlyphClass:
    """One class.

    Attributes:
        name: Name of its folder, from the character's Unicode name: "latin_small_letter_a".
        code_point: The character's number in Unicode.
    """

    name: str
    code_point: int

    @classmethod
    def of(cls, code_point: int) -> GlyphClass:
        """Make the class of a character.

        Unicode names never change. Those of the list have no digits, so natural and lexical order agree.

        >>> GlyphClass.of(ord("a"))
        GlyphClass(name='latin_small_letter_a', code_point=97)
        """
        return cls(unicodedata.name(chr(code_point)).lower().replace(" ", "_"), code_point)

    @property
    def character(self) -> str:
        """The character itself."""
        return chr(self.code_point)


@cache
def glyph_classes() -> tuple[GlyphClass, ...]:
    """List all classes in label order, which is the order of their names.

    >>> len(glyph_classes())
    500
    """
    lines = LIST.read_text(encoding="ascii").splitlines()
    return tuple(GlyphClass(name, int(code_point, 16)) for code_point, name in (line.split() for line in lines))


_SCRIPTS = ("armenian", "cyrillic", "digit", "georgian", "greek", "latin")


def letter_labels() -> tuple[int, ...]:
    """List the labels of the letters and digits: fewer classes than the shipped network has features (256).

    >>> len(letter_labels())
    224
    """
    return tuple(label for label, entry in enumerate(glyph_classes()) if entry.name.partition("_")[0] in _SCRIPTS)


@dataclass(frozen=True)
class GlyphData:
    """A data set on disk.

    Attributes:
        folder: Holds train/ and val/ with one folder per class.
        num_classes: Number of classes.
        train_images: Number of images in train/.
        val_images: Number of images in val/, all of faces that train/ does not have.
        reused: Whether the data set was there already.
    """

    folder: Path
    num_classes: int
    train_images: int
    val_images: int
    reused: bool


def write_dataset(
    folder: Path,
    *,
    faces: Faces = FACES,
    labels: Sequence[int] | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> GlyphData:
    """Write train/ and val/ with one folder per class below `folder`, unless they are there already.

    Everything is written to a temporary folder next to `folder` and renamed at the end, so `folder` is complete or
    absent.

    Args:
        folder: Where to write; its parent must exist.
        faces: The typefaces of each split.
        labels: The classes to write, rising; their images are the same as among all. None: all.
        on_progress: Called with the number of images written and the number of all images.

    Raises:
        OutputExistsError: `folder` is something else, or was written by another version of fixify.
        OutputError: the disk is full, or the folder cannot be written.
    """
    kept = list(range(len(glyph_classes())) if labels is None else labels)
    classes = [glyph_classes()[label] for label in kept]
    counts = {split: len(faces[split]) * VARIANTS[split] * len(classes) for split in VARIANTS}
    manifest = {
        "fixify.glyphs": VERSION,
        "image_size": IMAGE_SIZE,
        "num_classes": len(classes),
        "images": counts,
        "faces": {split: list(faces[split]) for split in VARIANTS},
        **({} if labels is None else {"labels": kept}),
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
                    for class_folder, image in zip(folders, images[kept], strict=True):
                        Image.fromarray(image).save(class_folder / f"{face}-{variant}.png", compress_level=1)
                    done += len(classes)
                    if on_progress is not None:
                        on_progress(done, sum(counts.values()))
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        temporary.chmod((temporary / "train").stat().st_mode)  # mkdtemp's mode 0700 would lock other users out
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


def face_images(split: Split, face: str) -> Iterator[Images]:
    """Draw the images of one face: [500, 32, 32] in label order, once per variant."""
    drawn = draw(face, [entry.code_point for entry in glyph_classes()])
    for variant in range(VARIANTS[split]):
        yield distort(drawn, generator(VERSION, *f"{split}/{face}/{variant}".encode()))


def generator(*key: int) -> np.random.Generator:
    """Make the random generator of a key. It is the same on every machine and independent of any global state.

    >>> generator(1).integers(0, 100, 3).tolist() == generator(1).integers(0, 100, 3).tolist()
    True
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def draw(face: str, code_points: Sequence[int]) -> Images:
    """Draw characters of a face as ink coverage from 0 to 255, uint8 [n, 64, 64].

    Each character is centred horizontally. All have the same baseline: a comma stays low, and an apostrophe high.
    """
    font = ImageFont.truetype(face_path(face), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    drawn = np.empty((len(code_points), _DRAWN_SIZE, _DRAWN_SIZE), np.uint8)
    for index, code_point in enumerate(code_points):
        left, _, right, _ = ink_box(font, code_point)
        image = Image.new("L", (_DRAWN_SIZE, _DRAWN_SIZE))
        corner = ((_DRAWN_SIZE - left - right) / 2, _DRAWN_SIZE / 2)
        ImageDraw.Draw(image).text(corner, chr(code_point), fill=255, font=font, anchor="lm")
        drawn[index] = np.asarray(image)
    return drawn


def ink_box(font: ImageFont.FreeTypeFont, code_point: int) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a character's ink, relative to the left end of the font's middle line."""
    return font.getbbox(chr(code_point), anchor="lm")


def fits(face: str, code_point: int) -> bool:
    """Check that a character of a face leaves ink and can be drawn without being cut off."""
    font = ImageFont.truetype(face_path(face), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = ink_box(font, code_point)
    half = _DRAWN_SIZE / 2
    return 0 < right - left <= _DRAWN_SIZE - 4 and -half <= top < bottom <= half


def face_path(face: str) -> Path:
    """Return the font file of a face, which matplotlib carries.

    Raises:
        DataError: this installation of matplotlib does not have it.
    """
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not path.is_file():
        raise DataError(
            f"matplotlib's font {path} is missing; the demo draws its images with it.",
            hint="Reinstall it: pip install --force-reinstall matplotlib",
        )
    return path


def distort(drawn: Images, rng: np.random.Generator) -> Images:
    """Make one image from each drawing: [n, 64, 64] ink coverage to [n, 32, 32] brightness."""
    n = len(drawn)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, n).astype(np.float32))

    angle = torch.deg2rad(uniform(-_ROTATION, _ROTATION))
    shear = uniform(-_SHEAR, _SHEAR)
    magnification = uniform(*_MAGNIFICATION)
    cos, sin = torch.cos(angle) / magnification, torch.sin(angle) / magnification
    across, down = uniform(-_SHIFT, _SHIFT), uniform(-_SHIFT, _SHIFT)
    to_unit = 2 / IMAGE_SIZE
    # Rows of the affine map from a pixel of the image to its place in the drawing; coordinates of both are -1 to 1.
    row_x = torch.stack([cos, shear * cos - sin, across * to_unit], dim=1)
    row_y = torch.stack([sin, shear * sin + cos, down * to_unit], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), [n, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)

    ink = torch.from_numpy(drawn).unsqueeze(1).float() / 255
    stroke = uniform(*_STROKE).reshape(n, 1, 1, 1)
    thick = F.max_pool2d(ink, 3, stride=1, padding=1)
    thin = -F.max_pool2d(-ink, 3, stride=1, padding=1)
    ink = ink + stroke.clamp(min=0) * (thick - ink) + stroke.clamp(max=0) * (ink - thin)
    ink = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(1)

    paper, black = uniform(*_PAPER).reshape(n, 1, 1), uniform(*_INK).reshape(n, 1, 1)
    noise = torch.from_numpy(rng.standard_normal(ink.shape, dtype=np.float32)) * uniform(*_NOISE).reshape(n, 1, 1)
    return (paper + (black - paper) * ink + noise).round().clamp(0, 255).to(torch.uint8).numpy()

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

from fixify.data.idx import write_idx
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
# Codes that are not learned need many images, or they end below a learned classifier (tests/benchmarks/README.md).
LETTER_VARIANTS: Mapping[Split, int] = {"train": 108, "val": 8}

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
_AT_ONCE = 64  # drawings that fit into a processor's cache


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


def letter_labels() -> tuple[int, ...]:
    """List the labels of the Latin letters and digits: half as many classes as the shipped network has features (256).

    >>> len(letter_labels())
    132
    """
    return tuple(label for label, entry in enumerate(glyph_classes()) if entry.name.startswith(("digit_", "latin_")))


@dataclass(frozen=True)
class GlyphData:
    """A data set on disk.

    Attributes:
        folder: Holds train/ and val/ with one folder per class, or the four files of MNIST's format.
        num_classes: Number of classes.
        train_images: Number of training images.
        val_images: Number of validation images, all of faces that no training image has.
        reused: Whether the data set was there already.
    """

    folder: Path
    num_classes: int
    train_images: int
    val_images: int
    reused: bool


def write_dataset(
    folder: Path, *, faces: Faces = FACES, on_progress: Callable[[int, int], object] | None = None
) -> GlyphData:
    """Write train/ and val/ with one folder per class below `folder`, unless they are there already.

    Args:
        folder: Where to write; its parent must exist. It is complete or absent.
        faces: The typefaces of each split.
        on_progress: Called with the number of images written and the number of all images.

    Raises:
        OutputExistsError: `folder` is something else, or was written by another version of fixify.
        OutputError: the disk is full, or the folder cannot be written.
    """

    def write(temporary: Path, advance: Callable[[int], None]) -> None:
        for split, variants in VARIANTS.items():
            folders = [temporary / split / entry.name for entry in glyph_classes()]
            for class_folder in folders:
                class_folder.mkdir(parents=True)
            for face in faces[split]:
                for variant, images in enumerate(face_images(split, face, variants=variants)):
                    for class_folder, image in zip(folders, images, strict=True):
                        Image.fromarray(image).save(class_folder / f"{face}-{variant}.png", compress_level=1)
                    advance(len(images))

    return _write_once(folder, faces, VARIANTS, None, write, on_progress)


def write_letter_images(
    folder: Path, *, faces: Faces = FACES, on_progress: Callable[[int, int], object] | None = None
) -> GlyphData:
    """Write many images of the letters and digits in MNIST's format (idx), unless they are there already.

    Class c is `letter_labels()[c]`. Arguments and errors are those of `write_dataset`.
    """
    labels = letter_labels()

    def write(temporary: Path, advance: Callable[[int], None]) -> None:
        for split, variants in LETTER_VARIANTS.items():
            drawn = []
            for face in faces[split]:
                for images in face_images(split, face, labels, variants=variants):
                    drawn.append(images)
                    advance(len(images))
            numbers = np.tile(np.arange(len(labels), dtype=np.uint8), len(drawn))
            write_idx(temporary, split, np.concatenate(drawn), numbers)

    return _write_once(folder, faces, LETTER_VARIANTS, labels, write, on_progress)


def _write_once(
    folder: Path,
    faces: Faces,
    variants: Mapping[Split, int],
    labels: Sequence[int] | None,
    write: Callable[[Path, Callable[[int], None]], None],
    on_progress: Callable[[int, int], object] | None,
) -> GlyphData:
    """Let `write` fill a temporary folder next to `folder`, and rename it; do nothing if the same data are there."""
    num_classes = len(glyph_classes() if labels is None else labels)
    counts = {split: len(faces[split]) * count * num_classes for split, count in variants.items()}
    manifest = {
        "fixify.glyphs": VERSION,
        "image_size": IMAGE_SIZE,
        "num_classes": num_classes,
        "images": counts,
        "faces": {split: list(faces[split]) for split in variants},
        **({} if labels is None else {"labels": list(labels)}),
    }
    data = GlyphData(folder, num_classes, counts["train"], counts["val"], reused=folder.exists())
    if data.reused:
        _check_manifest(folder, manifest)
        return data
    done, total = 0, sum(counts.values())

    def advance(images: int) -> None:
        nonlocal done
        done += images
        if on_progress is not None:
            on_progress(done, total)

    try:
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise OutputError(f"Cannot write in {folder.parent}: {error.strerror}.") from error
    try:
        whole = temporary / folder.name  # not `temporary` itself, whose mode 0700 would lock other users out
        whole.mkdir()
        write(whole, advance)
        (whole / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        whole.rename(folder)
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


def face_images(
    split: Split, face: str, labels: Sequence[int] | None = None, *, variants: int | None = None
) -> Iterator[Images]:
    """Draw some classes (default: all) in one face, [C, 32, 32] in label order, once per variant of the split."""
    classes = glyph_classes()
    chosen = classes if labels is None else [classes[label] for label in labels]
    drawn = draw(face, [entry.code_point for entry in chosen])
    for variant in range(VARIANTS[split] if variants is None else variants):
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

    stroke = uniform(*_STROKE)
    parts = zip(torch.from_numpy(drawn).split(_AT_ONCE), stroke.split(_AT_ONCE), grid.split(_AT_ONCE), strict=True)
    ink = torch.cat([_inked(*part) for part in parts])

    paper, black = uniform(*_PAPER).reshape(n, 1, 1), uniform(*_INK).reshape(n, 1, 1)
    noise = torch.from_numpy(rng.standard_normal(ink.shape, dtype=np.float32)) * uniform(*_NOISE).reshape(n, 1, 1)
    return (paper + (black - paper) * ink + noise).round().clamp(0, 255).to(torch.uint8).numpy()


def _inked(drawn: torch.Tensor, stroke: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Erode or dilate drawings [n, 64, 64] by `stroke` [n] and sample them at `grid`: ink from 0 to 1, [n, 32, 32]."""
    ink, thick, thin = (
        each.unsqueeze(1).float() / 255
        for each in (drawn, _spread(drawn, torch.maximum), _spread(drawn, torch.minimum))
    )
    stroke = stroke.reshape(-1, 1, 1, 1)
    ink = ink + stroke.clamp(min=0) * (thick - ink) + stroke.clamp(max=0) * (ink - thin)
    return F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(1)


def _spread(pixels: torch.Tensor, choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Take the largest or the smallest of each pixel and its eight neighbours, [n, height, width]."""
    for dim in (1, 2):
        length = pixels.shape[dim]
        before, after = pixels.narrow(dim, 0, length - 1), pixels.narrow(dim, 1, length - 1)
        chosen = pixels.clone()
        chosen.narrow(dim, 1, length - 1).copy_(choose(after, before))
        end = chosen.narrow(dim, 0, length - 1)
        end.copy_(choose(end, after))
        pixels = chosen
    return pixels

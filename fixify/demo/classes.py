"""The 500 classes: which characters, in label order, and where the typefaces are.

`classes.txt` is the list; `fixify.demo.selection` made it. It is kept as a file because the labels of the shipped
checkpoint must not depend on how this machine's FreeType happens to round.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib

from fixify.errors import DataError

LIST = Path(__file__).with_name("classes.txt")

# One face of each family is held out, each with a style that the family's other faces have between them.
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
FACES = tuple(sorted(TRAIN_FACES + VAL_FACES))


@dataclass(frozen=True, order=True)
class GlyphClass:
    """One class.

    Attributes:
        name: Its folder and label, from the character's Unicode name: "latin_small_letter_a".
        code_point: The character.
    """

    name: str
    code_point: int

    @classmethod
    def of(cls, code_point: int) -> GlyphClass:
        """The class of a character. Unicode names never change, and these hold no digits, so every order agrees."""
        return cls(unicodedata.name(chr(code_point)).lower().replace(" ", "_"), code_point)

    @property
    def character(self) -> str:
        return chr(self.code_point)


@cache
def glyph_classes() -> tuple[GlyphClass, ...]:
    """All classes, in label order (which is the order of their names)."""
    lines = LIST.read_text(encoding="ascii").splitlines()
    return tuple(GlyphClass(name, int(code_point, 16)) for code_point, name in (line.split() for line in lines))


def face_path(face: str) -> Path:
    """The font file of a face; matplotlib carries it.

    Raises:
        DataError: this installation of matplotlib has been stripped of it.
    """
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not path.is_file():
        raise DataError(
            f"matplotlib's font {path} is missing; the demo draws its images with it.",
            hint="Reinstall it: pip install --force-reinstall matplotlib",
        )
    return path

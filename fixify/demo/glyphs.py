"""Images of glyphs: drawn once a face, then distorted as a scanner or a careless hand would.

A glyph is drawn by FreeType at twice the size (64 x 64). Each image is that drawing under a small rotation, shear,
magnification and shift, with thinner or thicker strokes, on paper and with ink of random brightness, under noise.
All randomness comes from an explicit generator: the same seed gives the same images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from fixify.demo.classes import face_path

IMAGE_SIZE = 32
_DRAWN_SIZE = 2 * IMAGE_SIZE
_FONT_SIZE = 44  # pixels of an em in a drawing: accents above capitals still fit

Images = npt.NDArray[np.uint8]

# Ranges of the distortions, uniform; pixels are those of the final image.
_ROTATION = 4.0  # degrees either way
_SHEAR = 0.08
_MAGNIFICATION = (0.86, 1.12)
_SHIFT = 2.0
_STROKE = (-0.35, 0.6)  # share of the way to one drawn pixel eroded (-) or dilated (+) on each side
_PAPER = (170.0, 255.0)
_INK = (0.0, 90.0)
_NOISE = (0.0, 14.0)  # standard deviation


def generator(*key: int) -> np.random.Generator:
    """A generator of its own for each key, the same on every machine; independent of any global state."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def draw(face: str, code_points: Sequence[int]) -> Images:
    """Draw characters of a face: ink coverage, 0 to 255, [n, 64, 64].

    The baseline is the same for all (so that a comma stays below and an apostrophe above); each is centred from left
    to right.
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
    """Left, top, right and bottom of a character's ink, relative to the left end of its middle line."""
    return font.getbbox(chr(code_point), anchor="lm")


def fits(face: str, code_point: int) -> bool:
    """Whether a character of a face leaves ink and can be drawn without being cut off."""
    font = ImageFont.truetype(face_path(face), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = ink_box(font, code_point)
    half = _DRAWN_SIZE / 2
    return 0 < right - left <= _DRAWN_SIZE - 4 and -half <= top < bottom <= half


def distort(drawn: Images, rng: np.random.Generator) -> Images:
    """Make one image of each drawing: [n, 64, 64] ink coverage to [n, 32, 32] brightness."""
    n = len(drawn)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, n).astype(np.float32))

    angle = torch.deg2rad(uniform(-_ROTATION, _ROTATION))
    shear = uniform(-_SHEAR, _SHEAR)
    magnification = uniform(*_MAGNIFICATION)
    cos, sin = torch.cos(angle) / magnification, torch.sin(angle) / magnification
    across, down = uniform(-_SHIFT, _SHIFT), uniform(-_SHIFT, _SHIFT)
    to_unit = 2 / IMAGE_SIZE
    # Rows of the map from a pixel of the image to where it looks in the drawing, both spanning -1 to 1.
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

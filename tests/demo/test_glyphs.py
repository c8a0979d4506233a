"""Classes and images. The tests check properties, not pixels, because FreeType's versions round differently."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from tools.demo_classes import NUM_CLASSES, distances, select

from fixify.data.dataset import natural_order
from fixify.demo.glyphs import (
    ALL_FACES,
    TRAIN_FACES,
    VAL_FACES,
    GlyphClass,
    distort,
    draw,
    face_path,
    fits,
    generator,
    glyph_classes,
)

POINTS = [entry.code_point for entry in glyph_classes()]


def test_the_list_is_exact_and_sorted() -> None:
    names = [entry.name for entry in glyph_classes()]
    assert len(names) == len(set(names)) == len(set(POINTS)) == NUM_CLASSES
    assert names == sorted(names) == natural_order(names)  # the loader's order of folders is the order of logits
    assert all(entry == GlyphClass.of(entry.code_point) for entry in glyph_classes())


def test_every_face_draws_every_class() -> None:
    for face in ALL_FACES:
        assert set(POINTS) <= set(FT2Font(str(face_path(face))).get_charmap())
        assert all(fits(face, point) for point in POINTS[::50])


def test_no_face_is_in_both_splits() -> None:
    assert not set(TRAIN_FACES) & set(VAL_FACES)
    assert len(ALL_FACES) == 12
    for family in ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif"):
        assert [face.split("-")[0] for face in VAL_FACES].count(family) == 1


def test_classes_differ_in_every_family() -> None:
    for face in ("DejaVuSans", "DejaVuSansMono-Bold", "DejaVuSerif-BoldItalic"):
        apart = distances(face, POINTS)
        np.fill_diagonal(apart, 9)
        assert apart.min() > 0.1


def test_look_alikes_are_not_selected_together() -> None:
    points = [ord(character) for character in "AАΑBО0"]  # Latin, Cyrillic and Greek A; B; Cyrillic O; zero
    apart = distances("DejaVuSans", points)
    assert apart[0, 1] < 0.05
    assert apart[0, 3] > 0.3
    chosen = select(points, apart, count=3)
    assert ord("A") in chosen
    assert not {0x410, 0x391} & set(chosen)


def test_distortion_is_seeded_and_leaves_the_global_state_alone() -> None:
    drawn = draw("DejaVuSerif", POINTS[:64])
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first, again, other = (distort(drawn, generator(seed)) for seed in (1, 1, 2))
    assert first.shape == (64, 32, 32)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_images_are_dark_ink_on_light_paper() -> None:
    images = distort(draw("DejaVuSans", POINTS), generator(3)).reshape(len(POINTS), -1)
    low, high = np.percentile(images, [0.5, 90], axis=1)
    assert (high > 140).mean() > 0.99
    assert (high - low > 30).mean() > 0.97

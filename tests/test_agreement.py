"""convert --agree: the smallest head that keeps the original's answers, and the bound that shows it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fixify
from fixify import agreement as module
from fixify.agreement import candidates, fewest_images, images_to_hold_out, lower_bound
from fixify.conversion_options import ConvertOptions
from fixify.demo.run import SHIPPED
from fixify.errors import DataError, UsageError
from fixify.models.classifiers import ClassifierSite


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.data())
def test_the_bound_is_where_as_many_answers_have_five_percent(count: int, data: st.DataObject) -> None:
    """Clopper and Pearson: if the share were the bound, so many or more would agree in 5 % of samples."""
    same = data.draw(st.integers(1, count))
    share = lower_bound(same, count) / 100
    tail = sum(math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(same, count + 1))
    assert tail == pytest.approx(0.05, rel=1e-6)
    assert lower_bound(same - 1, count) < 100 * share < 100 * same / count


@pytest.mark.parametrize("target", [50, 90, 99, 99.9])
def test_as_many_images_are_held_out_as_can_show_it(target: float) -> None:
    fewest = fewest_images(target)
    assert lower_bound(fewest, fewest) >= target > lower_bound(fewest - 1, fewest - 1)
    wanted = images_to_hold_out(target)
    assert lower_bound(wanted, wanted) > target and lower_bound(wanted - 1, wanted) > target


@pytest.mark.parametrize(("n", "c"), [(64, 10), (256, 500), (386, 1000), (120, 18385), (16, 9)])
def test_candidates_are_heads_from_large_to_small(n: int, c: int) -> None:
    site = ClassifierSite("fc", "Linear", n, c, channel_dim=-1, has_bias=True, num_parameters=c * (n + 1))
    weight = torch.randn(c, n, generator=torch.Generator().manual_seed(0))
    sizes = []
    for flags, config in candidates([site], ConvertOptions(seed=3)):
        assert config.seed == 3
        if c <= 1000:
            (head,) = module.make_heads([site], {"fc.weight": weight, "fc.bias": weight[:, 0]}, config)
            sizes.append(head.record.spec.bytes_per_class)
            assert config.head in flags
    assert sizes == sorted(sizes, reverse=True)
    tried = [config.head for _, config in candidates([site], ConvertOptions())]
    assert ("hadamard" in tried) == (n != 386)


def test_the_smallest_head_that_keeps_the_answers_is_written(glyphs: Path, tmp_path: Path) -> None:
    done = fixify.convert(
        SHIPPED,
        tmp_path / "a.fixed.safetensors",
        calibrate=str(glyphs),
        calibrate_images=300,
        agree=90,
        device="cpu",
    )
    choice = done.choice
    assert choice is not None and choice.chosen is not None and done.calibration is not None
    assert [tried.reached for tried in choice.walked] == [True] * (len(choice.walked) - 1) + [False]
    assert choice.chosen is choice.walked[-2]
    assert done.info.heads[0].spec.bytes_per_class == choice.chosen.bytes_per_class <= 33
    assert choice.chosen.held_out == images_to_hold_out(90) == done.calibration.held_out
    # counted by the whole model, not by the head alone
    assert done.calibration.agreement == pytest.approx(choice.chosen.agreement)
    assert done.calibration.num_images == 225
    assert choice.chosen.bound == pytest.approx(lower_bound(choice.chosen.same, choice.chosen.held_out)) and (
        choice.chosen.bound >= 90
    )
    again = fixify.convert(
        SHIPPED, tmp_path / "b.fixed.safetensors", calibrate=str(glyphs), calibrate_images=300, agree=90, device="cpu"
    )
    assert again.choice == choice


def test_models_whose_head_is_not_last_are_run_whole(tmp_path: Path) -> None:
    """The mean of two heads: no head alone gives the answer."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 70)).save(folder / f"{number}.png")
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=12, depth=1)
    source = tmp_path / "model.pth"
    torch.save({"arch": "deit_tiny_distilled_patch16_224,depth=1", "state_dict": model.state_dict()}, source)
    done = fixify.convert(
        source,
        tmp_path / "out.fixed.safetensors",
        arch="deit_tiny_distilled_patch16_224,depth=1",
        calibrate=str(folder),
        calibrate_images=11,
        agree=20,
        device="cpu",
    )
    assert done.choice is not None and done.choice.chosen is not None and done.calibration is not None
    assert len(done.info.heads) == 2
    assert done.choice.chosen.bytes_per_class == sum(record.spec.bytes_per_class for record in done.info.heads)
    assert done.calibration.agreement == pytest.approx(done.choice.chosen.agreement)


def test_too_few_images_are_refused_before_the_model_runs(glyphs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1,000 images.*2995.*held out"):
        fixify.convert(SHIPPED, tmp_path / "a.fixed.safetensors", calibrate=str(glyphs), agree=99.9, device="cpu")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"agree": 99}, "images"),
        ({"agree": 99, "calibrate": "x", "head": "binary"}, "head"),
        ({"agree": 99, "calibrate": "x", "match": False}, "chance"),
        ({"agree": 100, "calibrate": "x"}, "agree"),
        ({"agree": 99, "calibrate": "x", "num_classes": 3}, "label set"),
    ],
)
def test_options_that_do_not_go_together(options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ConvertOptions.create(**options).replace()  # as `convert` does: a recipe may leave an option to its caller

"""Heads whose classes are changed: what stays, stays bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fixify.errors import HeadSpecError
from fixify.heads import FixedClassifier, HeadSpec, encode, replacement
from fixify.heads.editing import add_classes, keep_classes, merge_classes
from fixify.heads.levels import LEVELS
from fixify.heads.signs import pack_levels

CASES: dict[str, dict[str, Any]] = {
    "hadamard in order": {"kind": "hadamard", "num_features": 64, "num_classes": 40, "standardize": True},
    "hadamard, C > N": {"kind": "hadamard", "num_features": 64, "num_classes": 200},
    "hadamard, large": {"kind": "hadamard", "num_features": 512, "num_classes": 900},
    "matched": {"kind": "hadamard", "num_features": 64, "num_classes": 40, "matched": True, "blocks": 8},
    "matched, C > N": {"kind": "hadamard", "num_features": 64, "num_classes": 300, "matched": True, "blocks": 5},
    "binary": {"kind": "binary", "num_features": 64, "num_classes": 90, "bits_per_class": 64, "gains": True},
    "binary, cosine": {"kind": "binary", "num_features": 64, "num_classes": 90, "bits_per_class": 64, "bias": False},
    "binary, few bits": {"kind": "binary", "num_features": 64, "num_classes": 90, "bits_per_class": 24, "gains": True},
    "levels, ternary": {
        "kind": "binary",
        "num_features": 64,
        "num_classes": 90,
        "bits_per_weight": 1.58,
        "gains": True,
    },
    "levels": {"kind": "binary", "num_features": 64, "num_classes": 90, "bits_per_weight": 3, "gains": True},
    "levels, not rotated": {
        "kind": "binary",
        "num_features": 62,
        "num_classes": 90,
        "bits_per_weight": 2,
        "gains": True,
    },
    "levels, packed": {"kind": "binary", "num_features": 1024, "num_classes": 900, "bits_per_weight": 2, "gains": True},
    "binary, packed": {"kind": "binary", "num_features": 1024, "num_classes": 900, "bits_per_class": 1024},
}


@pytest.fixture(scope="module")
def make_head() -> Callable[[str], FixedClassifier]:
    """The name of a case -> a head with a bias and, if it has them, statistics and stored codes."""

    def make(name: str) -> FixedClassifier:
        spec = HeadSpec(**CASES[name])
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(spec.num_classes, spec.num_features, generator=generator)
        head = replacement(spec, weight).head if spec.matched or spec.needs_classifier else FixedClassifier(spec)
        with torch.no_grad():
            head.scale.fill_(1.7)
            if head.bias is not None:
                head.bias.normal_(generator=generator)
            if head.center is not None and head.spread is not None:
                head.center.copy_(torch.randint(-9, 9, head.center.shape, generator=generator) / 16)
                head.spread.copy_(2.0 ** torch.randint(-1, 2, head.spread.shape, generator=generator))
        return head.eval()

    return make


def exact_features(head: FixedClassifier, count: int = 7) -> torch.Tensor:
    """Features whose sums of products with signs are exact in float32, in whatever order they are added."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-64, 65, (count, head.in_features), generator=generator) / 16


def logits(head: FixedClassifier, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return head(x)


@pytest.mark.parametrize("name", CASES)
def test_kept_classes_have_the_same_logits(make_head: Callable[[str], FixedClassifier], name: str) -> None:
    head = make_head(name)
    chosen = [head.out_features - 1, *range(0, head.out_features - 3, 2)]
    kept = keep_classes(head, chosen)
    x = exact_features(head)
    if name in (
        "binary, packed",
        "levels, packed",
    ):  # so few classes are multiplied as numbers, which rounds the factor another time
        torch.testing.assert_close(logits(kept, x), logits(head, x)[:, chosen], rtol=1e-6, atol=1e-6)
        assert kept.codes is not None and head.codes is not None and torch.equal(kept.codes, head.codes[chosen])
        return
    assert torch.equal(logits(kept, x), logits(head, x)[:, chosen])


@pytest.mark.parametrize("name", CASES)
def test_old_classes_have_the_same_logits_beside_new_ones(
    make_head: Callable[[str], FixedClassifier], name: str
) -> None:
    head = make_head(name)
    more = add_classes(head, 5)
    assert more.out_features == head.out_features + 5
    x = exact_features(head)
    assert torch.equal(logits(more, x)[:, : head.out_features], logits(head, x))


@pytest.mark.parametrize("name", CASES)
def test_edited_heads_are_read_back(make_head: Callable[[str], FixedClassifier], name: str) -> None:
    more = add_classes(keep_classes(make_head(name), range(30)), 3)
    again = FixedClassifier(HeadSpec.from_dict(more.spec.to_dict()))
    again.load_state_dict(more.state_dict())
    x = exact_features(more)
    assert torch.equal(logits(again.eval(), x), logits(more, x))


@pytest.mark.parametrize("name", ["hadamard in order", "matched"])
def test_new_hadamard_codes_are_orthogonal_to_the_old(make_head: Callable[[str], FixedClassifier], name: str) -> None:
    more = add_classes(make_head(name), 20)
    codes = more.codebook()
    torch.testing.assert_close(codes @ codes.T, torch.eye(60), rtol=0, atol=1e-6)


def test_hadamard_codes_stay_in_order_where_they_can(make_head: Callable[[str], FixedClassifier]) -> None:
    head = make_head("hadamard in order")
    assert not add_classes(head, 5).spec.matched
    assert not keep_classes(head, range(12)).spec.matched
    assert keep_classes(head, [3, 1]).spec.matched


@pytest.mark.parametrize(
    "name", ["matched", "matched, C > N", "binary", "binary, few bits", "levels, ternary", "levels"]
)
def test_vectors_choose_the_codes(make_head: Callable[[str], FixedClassifier], name: str) -> None:
    head = make_head(name)
    vectors = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
    units = torch.nn.functional.normalize(vectors, dim=1)
    near, arbitrary = (
        (torch.nn.functional.normalize(made.codebook()[-3:], dim=1) * units).sum(dim=1).mean()
        for made in (add_classes(head, 3, vectors), add_classes(head, 3))
    )
    assert near > arbitrary + 0.05


def rounded(spec: HeadSpec, weight: torch.Tensor) -> FixedClassifier:
    """Make a head whose classes were rounded on their own, as those that are added are."""
    made = encode(spec, weight)
    return FixedClassifier(
        spec, codes=torch.from_numpy(made.codes), gains=torch.from_numpy(made.gains), scale=made.scale
    )


def test_lengths_of_vectors_become_row_scales(make_head: Callable[[str], FixedClassifier]) -> None:
    spec = HeadSpec(**CASES["binary"])
    weight = torch.randn(90, 64, generator=torch.Generator().manual_seed(0))
    head = rounded(spec, weight)
    again = add_classes(head, 2, weight[:2] - weight.mean(dim=0), lengths=True)
    assert head.gains is not None and again.gains is not None
    assert (again.gains[-2:].int() - head.gains[:2].int()).abs().max() <= 1
    typical = add_classes(head, 2, weight[:2])
    assert typical.gains is not None and torch.equal(typical.gains[-2:], head.gains.median().expand(2))


@pytest.mark.parametrize("bits", [1.58, 4])
def test_levels_are_chosen_as_for_the_old_classes(bits: float) -> None:
    """A class that is added with the vector of an old one gets its levels and its step size, but for rounding."""
    spec = HeadSpec("binary", num_features=64, num_classes=90, bits_per_weight=bits, gains=True, normalize=False)
    weight = torch.randn(90, 64, generator=torch.Generator().manual_seed(0))
    head = rounded(spec, weight).eval()
    rows = slice(3, 7)
    again = add_classes(head, 4, weight[rows] - weight.mean(dim=0), lengths=True)
    assert head.gains is not None and again.gains is not None
    assert (again.gains[90:].int() - head.gains[rows].int()).abs().max() <= 1
    codes = again.codebook()
    assert float(torch.nn.functional.cosine_similarity(codes[90:], codes[rows]).min()) > (0.9 if bits < 2 else 0.98)


def test_levels_of_vectors_longer_than_any_saturate() -> None:
    spec = HeadSpec("binary", num_features=64, num_classes=20, bits_per_weight=2, gains=True)
    head = replacement(spec, torch.randn(20, 64, generator=torch.Generator().manual_seed(0))).head
    more = add_classes(head, 1, 9 * torch.randn(1, 64, generator=torch.Generator().manual_seed(1)), lengths=True)
    assert more.gains is not None and more.gains[-1] == 255


def test_equal_vectors_get_different_levels(make_head: Callable[[str], FixedClassifier]) -> None:
    head = make_head("levels")
    more = add_classes(head, 4, torch.ones(4, 64))
    assert more.codes is not None and len({bytes(row.tolist()) for row in more.codes}) == 94


def test_equal_vectors_get_different_signs(make_head: Callable[[str], FixedClassifier]) -> None:
    head = make_head("binary, few bits")
    more = add_classes(head, 4, torch.ones(4, 64))
    assert more.codes is not None and len({bytes(row.tolist()) for row in more.codes}) == 94


def test_no_free_code_is_left() -> None:
    spec = HeadSpec("binary", num_features=3, num_classes=7, bits_per_class=3)
    head = replacement(spec, torch.randn(7, 3, generator=torch.Generator().manual_seed(0))).head
    add_classes(head, 1)
    with pytest.raises(HeadSpecError):
        add_classes(head, 2)
    spec = HeadSpec("binary", num_features=2, num_classes=8, bits_per_weight=1.58, gains=True)
    head = replacement(spec, torch.randn(8, 2, generator=torch.Generator().manual_seed(0))).head
    assert len(add_classes(head, 1).codebook().unique(dim=0)) == 9
    with pytest.raises(HeadSpecError):
        add_classes(head, 2)


def test_merged_signs_are_those_of_the_mean() -> None:
    spec = HeadSpec("binary", num_features=32, num_classes=40, bits_per_class=32, gains=True)
    weight = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    head = replacement(spec, weight, torch.arange(40.0)).head.eval()
    merged = merge_classes(head, [3, 5, 9])
    assert merged.out_features == 38 and merged.bias is not None
    torch.testing.assert_close(merged.bias[3], torch.tensor(17 / 3) + torch.tensor(3.0).log())
    cosine = torch.nn.functional.cosine_similarity
    own, mean = merged.codebook()[3], head.codebook()[[3, 5, 9]].mean(dim=0)
    assert cosine(own, mean, dim=0) > 0.7
    x = exact_features(head)
    rest = [number for number in range(40) if number not in (3, 5, 9)]
    assert torch.equal(logits(merged, x)[:, [n for n in range(38) if n != 3]], logits(head, x)[:, rest])


@pytest.mark.parametrize("bits", [1.58, 3])
def test_merged_levels_are_those_of_the_mean(bits: float) -> None:
    spec = HeadSpec("binary", num_features=32, num_classes=40, bits_per_weight=bits, gains=True)
    weight = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    head = replacement(spec, weight, torch.arange(40.0)).head.eval()
    merged = merge_classes(head, [3, 5, 9])
    assert merged.out_features == 38 and merged.bias is not None
    torch.testing.assert_close(merged.bias[3], torch.tensor(17 / 3) + torch.tensor(3.0).log())
    own, mean = merged.codebook()[3], head.codebook()[[3, 5, 9]].mean(dim=0)
    assert float((own - mean).norm() / mean.norm()) < (0.6 if bits < 2 else 0.3)
    x = exact_features(head)
    rest = [number for number in range(40) if number not in (3, 5, 9)]
    assert torch.equal(logits(merged, x)[:, [n for n in range(38) if n != 3]], logits(head, x)[:, rest])


def test_a_merged_class_makes_way_for_a_later_one() -> None:
    """Its mean has the levels of another class, whose logits must stay."""
    spec = HeadSpec("binary", num_features=4, num_classes=4, bits_per_weight=2, gains=True)
    numbers = np.array([[3, 1, 3, -3], [1, 3, 3, -3], [-1, -1, -1, 1], [1, 1, 3, -3]])
    head = FixedClassifier(spec, codes=torch.from_numpy(pack_levels(numbers, LEVELS[2]))).eval()
    merged = merge_classes(head, [0, 1])
    x = exact_features(head)
    assert torch.equal(logits(merged, x)[:, 1:], logits(head, x)[:, 2:])
    assert not torch.equal(merged.codebook()[0], merged.codebook()[2])


def test_merged_hadamard_class_is_the_first(make_head: Callable[[str], FixedClassifier]) -> None:
    head = make_head("matched")
    merged = merge_classes(head, [6, 2])
    x = exact_features(head)
    assert torch.equal(logits(merged, x), logits(head, x)[:, [n for n in range(40) if n != 2]])


@pytest.mark.parametrize("kind", ["orthogonal", "simplex"])
def test_codes_of_other_kinds_depend_on_the_number_of_classes(kind: str) -> None:
    head = FixedClassifier(HeadSpec(kind, num_features=16, num_classes=8))
    for edit in (
        lambda: keep_classes(head, range(4)),
        lambda: add_classes(head, 1),
        lambda: merge_classes(head, [0, 1]),
    ):
        with pytest.raises(HeadSpecError):
            edit()


def test_identity_takes_the_next_features() -> None:
    head = FixedClassifier(HeadSpec("identity", num_features=16, num_classes=8, normalize=False), scale=1.0).eval()
    x = exact_features(head)
    assert torch.equal(logits(add_classes(head, 2), x), x[:, :10])
    assert torch.equal(logits(keep_classes(head, range(4)), x), x[:, :4])
    with pytest.raises(HeadSpecError):
        keep_classes(head, [1, 0])

"""fixify.models.classifiers: the table of all architectures."""

from collections import Counter

import pytest
import timm
import torchvision
from torch import nn

from fixify.models import build, list_architectures, parse_architecture
from fixify.models.classifiers import coverage
from fixify.models.index import load_index


def test_rows() -> None:
    resnet, deit, dino, encoder, squeezenet = coverage(
        [
            "timm/resnet50",
            "timm/deit_tiny_distilled_patch16_224",
            "timm/vit_small_patch14_dinov2",
            "timm/mobilenetv5_300m_enc",
            "torchvision/squeezenet1_1",
        ]
    )
    assert (resnet.convertible, resnet.reason) == (True, None)
    assert (resnet.head_parameters, resnet.num_parameters) == (2048 * 1000 + 1000, 25_557_032)
    assert deit.head_parameters == 2 * (192 * 1000 + 1000)
    assert squeezenet.head_parameters == 512 * 1000 + 1000
    assert not dino.convertible and dino.takes_classes
    assert dino.reason == "an encoder: no classifier unless built with num_classes"
    assert not encoder.convertible and not encoder.takes_classes
    assert encoder.reason == "an encoder"


@pytest.mark.parametrize("ref", list_architectures()[::97])
def test_sample_agrees_with_the_index(ref: str) -> None:
    """Whatever takes a classifier can be identified; whatever does not, says so."""
    (row,) = coverage([ref])
    assert row.takes_classes == (ref in {entry.architecture.ref for entry in load_index().entries})
    assert (row.reason is None) == row.convertible
    assert row.head_parameters < row.num_parameters


# get_classifier() of timm's models as they are built by default, and how many there are in timm 1.0.31.
KINDS = {
    "Linear": 1091,
    "Conv2d": 39,
    "RepVitClassifier": 17,
    "NormLinear": 8,
    "NormLinear NormLinear": 12,
    "Linear Linear": 19,
    "ModuleList": 15,
    "ModuleList ModuleList": 4,
    "LinearLayer": 9,
    "MlpHead": 8,
    "ClassifierHead": 7,
}
# A ClassifierHead with nothing in it unless they are built with a number of classes: counted above, no classifier.
EMPTY = {"timm/samvit_base_patch16", "timm/samvit_large_patch16", "timm/samvit_huge_patch16"}


@pytest.mark.slow
def test_totals() -> None:
    """1,229 of timm's models have a `get_classifier()` that is not an Identity; torchvision's 80 and our 7 have one.

    Three of the 1,229 have an empty one; all of them convert once they were built with a number of classes.
    """
    if timm.__version__ != "1.0.31" or not torchvision.__version__.startswith("0.29."):
        pytest.skip("the totals are those of timm 1.0.31 and torchvision 0.29")
    rows = {row.ref: row for row in coverage()}
    libraries = Counter(ref.partition("/")[0] for ref in rows)
    convertible = Counter(ref.partition("/")[0] for ref, row in rows.items() if row.convertible)
    assert libraries == {"timm": 1371, "torchvision": 80, "fixify": 7}
    assert convertible == {"timm": 1229 - len(EMPTY), "torchvision": 80, "fixify": 7}
    assert {ref for ref in EMPTY if rows[ref].takes_classes and not rows[ref].convertible} == EMPTY
    assert Counter(row.takes_classes for row in rows.values()) == {True: 1226 + 80 + 7 + 138, False: 7}
    for row in rows.values():
        assert (row.reason is None) == row.convertible
        assert row.head_parameters < row.num_parameters

    kinds: Counter[str] = Counter()
    for ref in list_architectures("timm"):
        model = build(parse_architecture(ref), meta=True)
        classifier = model.get_classifier() if hasattr(model, "get_classifier") else nn.Identity()
        parts = classifier if isinstance(classifier, tuple) else (classifier,)
        kinds[" ".join(type(part).__name__ for part in parts)] += 1
    assert kinds.pop("Identity") == 1371 - 1229
    assert kinds == KINDS
    assert sum(KINDS.values()) == 1229

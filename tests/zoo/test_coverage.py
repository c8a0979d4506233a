"""fixify.zoo.coverage: the table of all architectures."""

from collections import Counter

import pytest
import timm
import torchvision

from fixify.zoo.coverage import coverage


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


@pytest.mark.slow
def test_totals() -> None:
    """Of timm's models, three more have a `ClassifierHead`, with nothing in it: samvit_*_patch16."""
    if (timm.__version__, torchvision.__version__.partition("+")[0]) != ("1.0.31", "0.29.2"):
        pytest.skip("the totals are those of timm 1.0.31 and torchvision 0.29.2")
    rows = list(coverage())
    libraries = Counter(row.ref.partition("/")[0] for row in rows)
    convertible = Counter(row.ref.partition("/")[0] for row in rows if row.convertible)
    assert libraries == {"timm": 1371, "torchvision": 80}
    assert convertible == {"timm": 1226, "torchvision": 80}
    heads = Counter(len(row.sites) for row in rows if row.convertible)
    print(heads, sum(row.takes_classes for row in rows))
    for row in rows:
        assert (row.reason is None) == row.convertible
        assert row.head_parameters < row.num_parameters

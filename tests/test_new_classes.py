"""What the codes of new classes are chosen by."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fixify
from fixify import new_classes
from fixify.bare_conversion import ClassVectors
from fixify.checkpoints.slim import read_info
from fixify.errors import FormatError, UsageError
from fixify.heads import FixedClassifier, HeadSpec
from fixify.new_classes import ClassFeatures

GOLDEN = Path(__file__).parent / "golden" / "v1-binary.fixed.safetensors"
MEAN = base64.b64encode(np.arange(8, dtype="<f4").tobytes()).decode()


def recorded(classifier: Any) -> ClassVectors | None:
    info = read_info(GOLDEN)
    source = {key: value for key, value in info.source.items() if key != "classifier"}
    extra = {} if classifier is None else {"classifier": classifier}
    return ClassVectors.recorded(info.model_copy(update={"source": {**source, **extra}}), 8)


def test_the_record_of_class_vectors() -> None:
    assert recorded(None) is None
    for scale in (None, 100.0, 3):
        found = recorded({"logit_scale": scale, "class_mean": MEAN})
        assert found is not None and found.logit_scale == scale
        assert torch.equal(found.mean, torch.arange(8.0))


NAN = base64.b64encode(np.full(8, np.nan, dtype="<f4").tobytes()).decode()


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        [],
        "x",
        7,
        {"logit_scale": None},
        {"logit_scale": None, "class_mean": None},
        {"logit_scale": None, "class_mean": "no base64!"},
        {"logit_scale": None, "class_mean": MEAN[:-6]},
        {"logit_scale": None, "class_mean": "AAAA"},
        {"logit_scale": None, "class_mean": NAN},
        *({"logit_scale": scale, "class_mean": MEAN} for scale in ("100", 0, -1.0, True, [], float("inf"))),
    ],
)
def test_a_damaged_record_is_refused(damaged: Any) -> None:
    with pytest.raises(FormatError):
        recorded(damaged)


def test_a_feature_that_never_varied_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    head = FixedClassifier(HeadSpec("hadamard", 16, 6, standardize=True)).eval()
    assert head.std is not None and head.mean is not None and head.num_batches_tracked is not None
    head.std.fill_(1.0)[3] = 0.0
    head.mean.zero_()
    head.num_batches_tracked.fill_(1)
    given: list[torch.Tensor] = []
    monkeypatch.setattr(new_classes, "add_classes", lambda head, count, vectors, biases: given.append(vectors) or head)
    monkeypatch.setattr(FixedClassifier, "forward", lambda head, x: torch.zeros(len(x), 7))
    seen = ClassFeatures(("new",), {"fc": {"new": torch.ones(4, 16)}}, ())
    with torch.no_grad():
        head.bias = torch.nn.Parameter(torch.zeros(7))
    new_classes._matched(head, seen, "fc", 1, "net")
    assert float(given[0][0, 0]) == 1.0
    assert float(given[0][0, 3]) < 25  # as everywhere, it counts for at most about 20 typical ones


def test_class_vectors_choose_no_codes_of_a_projection() -> None:
    path = GOLDEN.with_name("v1-projected.fixed.safetensors")
    info = read_info(path)
    mean = base64.b64encode(np.zeros(256, dtype="<f4").tobytes()).decode()
    source = {**info.source, "classifier": {"logit_scale": None, "class_mean": mean}}
    head = fixify.load(path).get_classifier()
    with pytest.raises(UsageError, match="projection"):
        new_classes.by_embeddings(
            info.model_copy(update={"source": source}), path, {"classifier": head}, ["x"], Path("vectors.npy"), ()
        )

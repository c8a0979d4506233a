"""The head of the paper's published code, and checkpoints that were trained with it."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fixify
import fixify.models  # timm knows resnet20_cifar from here on
from fixify.errors import HeadSpecError
from fixify.heads import FixedClassifier, HeadSpec, codebook

TRUNCATED = "truncated-sylvester"


def published(x: Tensor, num_classes: int, scale: Tensor, bias: Tensor) -> Tensor:
    """What that code computes, from its description: the whole matrix of SciPy, cut; the sign is its own."""
    order = 2 ** math.ceil(math.log2(max(x.shape[-1], num_classes)))
    matrix = torch.from_numpy(scipy.linalg.hadamard(order)[:num_classes, : x.shape[-1]]).to(x.dtype)
    return -scale * (x / (x.norm(dim=-1, keepdim=True) + 1e-8)) @ matrix.T + bias


def spec_of(num_features: int, num_classes: int, **options: object) -> HeadSpec:
    return HeadSpec("hadamard", num_features, num_classes, construction=TRUNCATED, **options)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.data())
def test_logits_are_those_of_the_published_code(n: int, data: st.DataObject) -> None:
    c = data.draw(st.integers(1, 1 << (n - 1).bit_length()))
    torch.manual_seed(n)
    scale, bias = torch.rand(1) + 0.1, torch.randn(c)
    head = FixedClassifier(spec_of(n, c))
    head.load_state_dict(OrderedDict(scale=scale, bias=bias))
    x = torch.randn(3, n)
    torch.testing.assert_close(head(x), published(x, c, scale, bias), atol=1e-5, rtol=1e-5)
    assert head.scale.shape == () and head.scale > 0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 130), st.integers(1, 300))
def test_duplicate_rows_are_refused_and_only_those(n: int, c: int) -> None:
    order = 1 << (max(n, c) - 1).bit_length()
    cut = scipy.linalg.hadamard(order)[:c, :n]
    if len(np.unique(cut, axis=0)) == c:
        assert spec_of(n, c).resolve().digest.startswith("sha256:")
    else:
        with pytest.raises(HeadSpecError, match=r"differ: of .* would have the code of class 0") as error:
            spec_of(n, c)
        assert "--head hadamard" in error.value.hint


def test_case_of_the_paper_is_refused() -> None:
    """MobileNet 0.5: 1,000 classes, N = 512. Class 512 and class 0 are one in the published code."""
    with pytest.raises(HeadSpecError, match=r"only 512 rows .* class 512 .* and 488 in all"):
        spec_of(512, 1000)


def test_what_does_not_go_with_it() -> None:
    for options in ({"matched": True, "blocks": 1}, {"blocks": 1}):
        with pytest.raises(HeadSpecError, match="class order"):
            spec_of(64, 10, **options)
    with pytest.raises(HeadSpecError, match="construction"):
        HeadSpec("orthogonal", 64, 10, construction=TRUNCATED)


def test_spec_is_written_and_read() -> None:
    spec = spec_of(48, 60).resolve()
    assert HeadSpec.from_dict(spec.to_dict()).resolve() == spec
    assert spec.construction == TRUNCATED and spec.blocks is None
    assert spec.digest != spec_of(48, 59).resolve().digest
    rows = codebook(spec)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(np.sign(rows), -scipy.linalg.hadamard(64)[:60, :48])


def test_checkpoint_of_the_published_code(tmp_path) -> None:
    """Its key names: the backbone's, `fc.scale` [1], `fc.bias`; the matrix is not stored. Then on to a slim file."""
    torch.manual_seed(0)
    old = timm.create_model("resnet20_cifar", num_classes=10).eval()
    state = OrderedDict((key, value) for key, value in old.state_dict().items() if not key.startswith("fc."))
    state["fc.scale"], state["fc.bias"] = torch.tensor([1 / math.sqrt(10)]), torch.randn(10)
    torch.save(state, tmp_path / "old.pth")

    model = timm.create_model("resnet20_cifar", num_classes=10).eval()
    fixify.fix_classifier_(model, spec_of(64, 10))
    model.load_state_dict(torch.load(tmp_path / "old.pth", weights_only=True))
    x = torch.randn(2, 3, 32, 32)
    features = old.forward_head(old.forward_features(x), pre_logits=True)
    torch.testing.assert_close(
        model(x), published(features, 10, state["fc.scale"], state["fc.bias"]), atol=1e-5, rtol=1e-5
    )
    again = FixedClassifier(spec_of(64, 10))
    again.load_state_dict(model.fc.state_dict())  # its own state is not multiplied once more
    assert torch.equal(again.scale, model.fc.scale)


def test_fixed_scale_of_the_published_code_is_not_in_its_checkpoint() -> None:
    head = FixedClassifier(spec_of(64, 10, fixed_scale=True), scale=0.5 * math.sqrt(64))
    bias = torch.randn(10)
    head.load_state_dict({"bias": bias})
    x = torch.randn(4, 64)
    torch.testing.assert_close(head(x), published(x, 10, torch.tensor([0.5]), bias), atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="scale"):
        FixedClassifier(spec_of(64, 10)).load_state_dict({"bias": bias})

"""The head alone, for every kind of head: ONNX Runtime and NumPy against PyTorch."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tools.some_heads import SPECS, a_head, difference, features_for

from fixify.checkpoints.onnx_file import new_session
from fixify.exporting.head_only import head_arrays
from fixify.exporting.onnx_models import head_model
from fixify.exporting.parts import HeadParts, Picked, Signs
from fixify.heads import HeadSpec

EIGHT_BITS = 0.1  # of the standard deviation of the logits, where ONNX Runtime rounds features to 8 bits


def run(parts: HeadParts, features: torch.Tensor, *, portable: bool, opset: int = 18) -> np.ndarray:
    made = head_model({"fc": parts}, opset=opset, portable=portable)
    (logits,) = new_session(made.SerializeToString()).run(None, {"features": features.numpy()})
    return np.asarray(logits)


@pytest.mark.parametrize("maps", [False, True], ids=["features", "maps"])
@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_head(name: str, maps: bool) -> None:
    spec = SPECS[name]
    head = a_head(spec, channel_dim=1 if maps else -1)
    features = features_for(spec, *((2, 3) if maps else ()))
    with torch.no_grad():
        expected = head(features).numpy()
    parts = HeadParts.of(head)
    assert difference(run(parts, features, portable=True), expected) < 1e-5
    rounds = isinstance(parts.product, Signs)
    assert difference(run(parts, features, portable=False), expected) < (EIGHT_BITS if rounds else 1e-5)


@pytest.mark.parametrize("count", [0, 1, 65])
@pytest.mark.parametrize("name", ["blocks", "binary, few signs"])
def test_any_number_of_images(name: str, count: int) -> None:
    if count == 0 and onnxruntime.__version__.startswith(("1.2", "1.30", "1.31")):
        pytest.skip("ONNX Runtime before 1.32 multiplies no empty batch")
    head = a_head(SPECS[name])
    features = features_for(SPECS[name], count=count)
    got = run(HeadParts.of(head), features, portable=True)
    with torch.no_grad():
        np.testing.assert_allclose(got, head(features).numpy(), atol=1e-4)


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_opsets(opset: int) -> None:
    head = a_head(SPECS["binary, few signs"])
    features = features_for(head.spec)
    with torch.no_grad():
        expected = head(features).numpy()
    assert difference(run(HeadParts.of(head), features, portable=True, opset=opset), expected) < 1e-5


def test_portable_models_are_standard_onnx() -> None:
    for name in SPECS:
        made = head_model({"fc": HeadParts.of(a_head(SPECS[name]))}, opset=18, portable=True)
        onnx.checker.check_model(made, full_check=True)
        assert {each.domain for each in made.opset_import} == {""}


def test_codes_take_at_most_a_bit_per_weight() -> None:
    for name, spec in SPECS.items():
        made = head_model({"fc": HeadParts.of(a_head(spec))}, opset=18, portable=False)
        floats = [tensor for tensor in made.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
        if spec.kind not in ("orthogonal", "simplex"):
            assert all(len(tensor.dims) < 2 for tensor in floats), name
    big = head_model({"fc": HeadParts.of(a_head(HeadSpec("hadamard", 1280, 11264)))}, opset=18, portable=False)
    assert big.ByteSize() < 11264 * 4 + 40_000  # the bias, and what else there is


def test_many_matched_blocks_are_packed_signs() -> None:
    assert isinstance(HeadParts.of(a_head(SPECS["matched, a block per class"])).product, Signs)
    assert isinstance(HeadParts.of(a_head(SPECS["matched in a few of many blocks"])).product, Picked)


def test_several_heads_in_one_file() -> None:
    first, second = a_head(SPECS["C < N"]), a_head(HeadSpec("binary", 64, 10, bits_per_class=40), channel_dim=1)
    heads = {"head": HeadParts.of(first), "aux.head": HeadParts.of(second)}
    session = new_session(head_model(heads, opset=18, portable=True).SerializeToString())
    a, b = features_for(first.spec), features_for(second.spec, 2, 2)
    got = session.run(None, {"features.head": a.numpy(), "features.aux.head": b.numpy()})
    with torch.no_grad():
        assert difference(got[0], first(a).numpy()) < 1e-5
        assert difference(got[1], second(b).numpy()) < 1e-5


def by_numpy(arrays: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Follow the steps that `head_arrays` describes."""

    def signs(packed: np.ndarray, count: int) -> np.ndarray:
        return 1.0 - 2.0 * np.unpackbits(packed, axis=-1, count=count)

    x = (x - arrays.get("mean", 0)) / arrays.get("std", 1)
    if arrays["normalize"]:
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
    matrix = np.kron(arrays["left"], arrays["right"]).astype(float) if "left" in arrays else np.ones((1, 1))
    if "rotation_signs" in arrays:
        x = (x * signs(arrays["rotation_signs"], x.shape[1])) @ matrix.T
    if "directions" in arrays:
        x = (x @ arrays["directions"].T.astype(float))[:, arrays["columns"]] * arrays["factors"]
    if "width" in arrays:
        x = x[:, : int(arrays["width"])]
        if "planes" in arrays:
            x = np.pad(x, [(0, 0), (0, -x.shape[1] % 8)])
            x = np.concatenate([x * float(weight) for weight in arrays["planes"]], axis=1)
        x = x @ signs(arrays["codes"], x.shape[1]).T
    elif "position" in arrays:
        x = np.pad(x, [(0, 0), (0, int(arrays["padding"]))])
        blocks = signs(arrays["block_signs"], x.shape[1]) if "block_signs" in arrays else np.ones((1, x.shape[1]))
        x = np.concatenate([(x * block) @ matrix.T for block in blocks], axis=1)[:, arrays["position"]]
        x = x * (signs(arrays["negative"], x.shape[1]) if "negative" in arrays else 1)
    else:
        x = x[:, : int(arrays["first"])] if "first" in arrays else x @ arrays["codes"].T
    return x * arrays["scale"] * arrays.get("gains", np.uint8(255)) / 255 + arrays.get("bias", 0)


@pytest.mark.parametrize("name", SPECS)
def test_the_arrays_for_numpy_are_enough(name: str) -> None:
    head = a_head(SPECS[name])
    features = features_for(SPECS[name])
    with torch.no_grad():
        expected = head(features).numpy()
    assert difference(by_numpy(head_arrays(HeadParts.of(head)), features.numpy().astype(float)), expected) < 1e-5

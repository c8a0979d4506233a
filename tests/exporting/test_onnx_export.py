"""Whole models as ONNX files: what is in them, and that they answer as PyTorch does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import fixify
from fixify.checkpoints.onnx_file import new_session, open_onnx, read_onnx_info
from fixify.checkpoints.open import open_model
from fixify.errors import CheckFailed, FormatError, OutputExistsError, UsageError
from fixify.exporting import onnx_head
from fixify.exporting.job import Exported

Slims = Callable[..., Path]
Exports = Callable[..., Exported]


def images(count: int = 3, size: int = 160) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def largest_difference(path: Path, slim: Path, count: int = 3) -> float:
    model = fixify.load(slim)
    batch = images(count, model.fixify_info.data_config["input_size"][1])
    with torch.inference_mode():
        expected = model(batch)
    got = open_model(path).model(batch)
    return float((got - expected).abs().max() / expected.std())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_images(slims: Slims, exported: Exports, count: int) -> None:
    done = exported("hadamard", portable=True)
    assert done.num_bytes == done.paths[0].stat().st_size
    assert largest_difference(done.paths[0], slims(head="hadamard"), count) < 1e-4


@pytest.mark.parametrize("head", ["binary", pytest.param("orthogonal", marks=pytest.mark.slow), "hadamard"])
def test_kinds_of_heads(slims: Slims, exported: Exports, head: str) -> None:
    slim = slims(head=head)
    exact = exported(head, portable=True)
    assert largest_difference(exact.paths[0], slim) < 1e-4
    assert exact.checks[0].same == exact.checks[0].count == 5
    fast = exported(head)
    assert largest_difference(fast.paths[0], slim) < 0.1
    assert bool(exact.notes) is (head == "orthogonal")


@pytest.mark.parametrize("bits", [1.58, pytest.param(3, marks=pytest.mark.slow)])
def test_levels(slims: Slims, tmp_path: Path, bits: float) -> None:
    slim = slims(head="binary", bits_per_weight=bits)
    exact = fixify.export(slim, tmp_path / "a.onnx", portable=True)
    assert largest_difference(exact.paths[0], slim) < 1e-4
    fast = fixify.export(slim, tmp_path / "b.onnx")
    assert largest_difference(fast.paths[0], slim) < 0.1


@pytest.mark.parametrize(
    ("name", "head", "arguments"),
    [
        pytest.param("test_vit", "hadamard", {}, marks=pytest.mark.slow),
        ("vit_srelpos_small_patch16_224", "hadamard", {"depth": 1}),  # its fused attention has no form in ONNX
        pytest.param("tiny_vit_5m_224", "binary", {}, marks=pytest.mark.slow),
        ("deit_tiny_distilled_patch16_224", "binary", {"depth": 1}),  # the mean of two heads
        pytest.param("mobilenetv3_small_050", "hadamard", {}, marks=pytest.mark.slow),
    ],
)
def test_backbones(save_slim: Callable[..., Path], tmp_path: Path, name: str, head: str, arguments: Any) -> None:
    slim = save_slim(name, head, **arguments)
    done = fixify.export(slim, tmp_path / "net.onnx", portable=True)
    assert largest_difference(done.paths[0], slim) < 1e-3


def test_the_metadata_describes_the_model_without_a_path(slims: Slims, exported: Exports) -> None:
    done = exported("binary")
    info, about = read_onnx_info(done.paths[0])
    source = fixify.inspect(slims(head="binary"))
    assert info == source
    assert info.labels is not None
    assert info.labels[7] == "thing 7"
    assert about.check[0]["count"] == 5
    assert about.onnxruntime is not None
    made = onnx.load(done.paths[0])
    assert {each.domain for each in made.opset_import} == {"", "com.microsoft"}
    data = done.paths[0].read_bytes()
    assert b".py" not in data
    assert str(done.paths[0].parent).encode() not in data
    metadata = {each.key: each.value for each in made.metadata_props}
    assert json.loads(metadata["fixify"])["heads"][0]["path"] == "classifier"


@pytest.mark.parametrize("operator", [b"\xe5emm", b"\x1b[2J", b"Gemn"])
def test_a_damaged_file_is_refused_and_nothing_of_it_is_printed(
    exported: Exports, tmp_path: Path, capfd: pytest.CaptureFixture[str], operator: bytes
) -> None:
    content = exported("binary").paths[0].read_bytes()
    (tmp_path / "a.onnx").write_bytes(content.replace(b"Conv", operator))
    for read in (open_onnx, read_onnx_info):
        with pytest.raises(FormatError):
            read(tmp_path / "a.onnx")
    assert capfd.readouterr() == ("", "")


def test_a_model_that_is_described_as_a_classifier_alone_is_refused(exported: Exports, tmp_path: Path) -> None:
    made = onnx.load(exported("binary").paths[0])
    (described,) = [each for each in made.metadata_props if each.key == "fixify"]
    info = json.loads(described.value)
    (head,) = info["heads"]
    bare = {"library": "fixify", "name": "classifier", "kwargs": {}, "tag": None}
    info |= {"architecture": bare, "preprocessing": {}, "heads": [{**head, "path": "head"}]}
    described.value = json.dumps(info)
    (tmp_path / "a.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(FormatError):
        open_onnx(tmp_path / "a.onnx")


def test_a_file_of_standard_operators_names_no_least_version(slims: Slims, tmp_path: Path) -> None:
    done = fixify.export(slims(head="binary"), tmp_path / "net.onnx", portable=True, opset=20)
    made = onnx.load(done.paths[0])
    assert [(each.domain, each.version) for each in made.opset_import] == [("", 20)]
    onnx.checker.check_model(made)
    assert read_onnx_info(done.paths[0])[1].onnxruntime is None


def test_softmax(slims: Slims, tmp_path: Path) -> None:
    slim = slims(head="hadamard")
    path = fixify.export(slim, tmp_path / "net.onnx", include_softmax=True, portable=True).paths[0]
    with torch.inference_mode():
        expected = fixify.load(slim)(images()).softmax(dim=-1).numpy()
    (got,) = new_session(str(path)).run(["probabilities"], {"images": images().numpy()})
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(open_model(path).model(images()).softmax(dim=-1), expected, atol=1e-5)


def test_the_largest_values_and_their_classes(slims: Slims, tmp_path: Path) -> None:
    slim = slims(head="hadamard")
    path = fixify.export(slim, tmp_path / "net.onnx", include_softmax=True, top_k=4, portable=True).paths[0]
    with torch.inference_mode():
        expected = fixify.load(slim)(images()).softmax(dim=-1).topk(4)
    values, classes = new_session(str(path)).run(["top_probabilities", "top_classes"], {"images": images().numpy()})
    np.testing.assert_allclose(values, expected.values, atol=1e-5)
    assert classes.tolist() == expected.indices.tolist()
    with pytest.raises(UsageError, match="top-k"):
        open_onnx(path)
    with pytest.raises(UsageError, match="301"):
        fixify.export(slim, tmp_path / "b.onnx", top_k=301)


def test_pixels_in(slims: Slims, tmp_path: Path, pictures: Path) -> None:
    slim = slims(head="hadamard")
    done = fixify.export(slim, tmp_path / "net.onnx", include_preprocessing=True, images=pictures)
    assert done.paths == (tmp_path / "net.onnx",)
    assert [check.count for check in done.checks] == [5, 6]
    model = fixify.load(slim)
    size = model.fixify_info.data_config["input_size"][1]
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    mean, std = (torch.tensor(model.fixify_info.data_config[key])[:, None, None] for key in ("mean", "std"))
    with torch.inference_mode():
        expected = model((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()
    (got,) = new_session(str(done.paths[0])).run(None, {"pixels": pixels})
    assert np.abs(got - expected).max() < 0.1 * expected.std()
    files = sorted(pictures.iterdir())
    ours, theirs = fixify.predict(done.paths[0], files, top=1), fixify.predict(slim, files, top=1)
    assert [each.labels for each in ours] == [each.labels for each in theirs]


def test_a_fixed_number_of_images(slims: Slims, tmp_path: Path) -> None:
    slim = slims(head="hadamard")
    path = fixify.export(slim, tmp_path / "net.onnx", batch=2, portable=True).paths[0]
    assert new_session(str(path)).get_inputs()[0].shape[0] == 2
    assert largest_difference(path, slim, count=5) < 1e-4


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_half_precision_is_stored_and_float32_computed(exported: Exports, dtype: str) -> None:
    whole, half = exported("hadamard"), exported("hadamard", dtype=dtype)
    assert half.num_bytes < 0.7 * whole.num_bytes
    assert half.checks[0].difference < 0.1


def test_a_half_precision_checkpoint_stays_small(slims: Slims, tmp_path: Path) -> None:
    slim = slims(head="hadamard", dtype="float16")
    done = fixify.export(slim, tmp_path / "a.onnx", portable=True)
    assert done.num_bytes < 1.2 * slim.stat().st_size + 40_000
    assert largest_difference(done.paths[0], slim) < 1e-4


def test_a_failed_check_writes_nothing(slims: Slims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_head, "_MINUS", 2)  # a wrong table: zero in place of -1
    with pytest.raises(CheckFailed) as caught:
        fixify.export(slims(head="binary"), tmp_path / "net.onnx")
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_evaluate_runs_an_onnx_file(slims: Slims, exported: Exports, tmp_path: Path, pictures: Path) -> None:
    for split in ("train", "val"):
        for label in (3, 8):
            folder = tmp_path / "data" / split / f"thing {label}"
            folder.mkdir(parents=True)
            for file in pictures.iterdir():
                (folder / f"{label}{file.name}").write_bytes(file.read_bytes())
    slim = slims(head="hadamard")
    path = exported("hadamard", portable=True).paths[0]
    found = fixify.evaluate(path, tmp_path / "data", against=slim, workers=0, device="cpu")
    assert found.metrics.num_images == 12
    assert found.agreement is not None
    assert found.agreement.same == 100
    assert found.metrics.loss == pytest.approx(found.against_metrics.loss, abs=1e-3)  # type: ignore[union-attr]
    with pytest.raises(UsageError):
        fixify.evaluate(path, tmp_path / "data", img_size=64, workers=0, device="cpu")


def test_other_onnx_files_are_refused(tmp_path: Path, slims: Slims) -> None:
    done = fixify.export(slims(head="hadamard"), tmp_path / "head.onnx", head_only=True)
    with pytest.raises(UsageError, match="head alone"):
        open_model(done.paths[0])
    made = onnx.load(done.paths[0])
    del made.metadata_props[:]
    onnx.save(made, tmp_path / "foreign.onnx")
    with pytest.raises(FormatError, match="not written by fixify"):
        open_model(tmp_path / "foreign.onnx")
    (tmp_path / "damaged.onnx").write_bytes(b"\x08\x08not a model")
    with pytest.raises(FormatError):
        open_model(tmp_path / "damaged.onnx")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fixify.version", "9"),
        ("fixify", "{}"),
        ("fixify.onnx", '{"batch": -1}'),
        ("fixify.onnx", '{"preprocessing": true}'),
    ],
)
def test_damaged_metadata_is_refused(tmp_path: Path, exported: Exports, key: str, value: str) -> None:
    made = onnx.load(exported("hadamard").paths[0])
    next(each for each in made.metadata_props if each.key == key).value = value
    onnx.save(made, tmp_path / "net.onnx")
    with pytest.raises(FormatError):
        open_model(tmp_path / "net.onnx")


def test_existing_files_and_other_checkpoints(slims: Slims, small_pth: Path, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_text("mine")
    with pytest.raises(OutputExistsError):
        fixify.export(slims(head="hadamard"), tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_text() == "mine"
    with pytest.raises(UsageError, match="fixify convert"):
        fixify.export(small_pth, tmp_path / "other.onnx")


@pytest.mark.parametrize(
    "options",
    [{"head_only": True, "top_k": 3}, {"to": "dense", "portable": True}, {"to": "torch-export", "head_only": True}],
)
def test_options_that_do_not_go_together(slims: Slims, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        fixify.export(slims(head="hadamard"), tmp_path / "net", **options)

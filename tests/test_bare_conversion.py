"""Classifiers without a network: converted, loaded, checked and exported alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fixify
from fixify.checkpoints.open import open_model
from fixify.errors import FormatError, OutputExistsError, SourceError, UsageError
from fixify.heads import FixedClassifier

C, N = 300, 96


def embeddings(c: int, n: int, seed: int = 0) -> np.ndarray:
    """Unit rows with a large common part, as text embeddings have."""
    rng = np.random.default_rng(seed)
    made = rng.standard_normal((c, n), dtype=np.float32) + rng.standard_normal(n, dtype=np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text embeddings of 300 classes, float32 [300, 96], and labels.txt beside them."""
    folder = tmp_path_factory.mktemp("text")
    np.save(folder / "text.npy", embeddings(C, N))
    (folder / "labels.txt").write_text("".join(f"name {number}\n" for number in range(C)))
    return folder / "text.npy"


@pytest.fixture(scope="module")
def slim(text: Path) -> Path:
    """A cosine head of these, with names."""
    return fixify.convert(
        text, text.parent / "head.fixed.safetensors", logit_scale=50.0, labels=text.parent / "labels.txt"
    ).path


def answers(head: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return head(x)


def test_cosine_head(text: Path, slim: Path) -> None:
    head = fixify.load(slim)
    assert isinstance(head, FixedClassifier) and not head.training
    assert (head.spec.kind, head.spec.normalize, head.spec.standardize, head.bias) == ("binary", True, False, None)
    x = 3 * torch.randn(200, N, generator=torch.Generator().manual_seed(0))
    weight = torch.from_numpy(np.load(text))
    wanted = 50 * F.normalize(x, dim=1) @ weight.T
    found = answers(head, x)
    torch.testing.assert_close(answers(head, 7 * x), found)
    wanted, found = (each - each.mean(dim=1, keepdim=True) for each in (wanted, found))
    assert float((wanted * found).sum() / found.square().sum()) == pytest.approx(1, abs=0.3)
    assert float(F.cosine_similarity(wanted.flatten(), found.flatten(), dim=0)) > 0.7


def test_labels_beside_the_matrix_are_named(text: Path, tmp_path: Path) -> None:
    """A list may belong to something else, so none is read unasked."""
    done = fixify.convert(text, tmp_path / "a.fixed.safetensors", logit_scale=50.0)
    assert done.info.labels is None and any("--labels" in note and "labels.txt" in note for note in done.notes)
    done = fixify.convert(
        text, tmp_path / "b.fixed.safetensors", logit_scale=50.0, labels=str(text.parent / "labels.txt")
    )
    assert not any("--labels" in note for note in done.notes)


def test_linear_head_with_a_bias(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((C, N)).astype(np.float32), rng.standard_normal(C).astype(np.float32)
    np.savez(tmp_path / "fc.npz", kernel=weight.T, bias=bias)
    done = fixify.convert(tmp_path / "fc.npz", tmp_path / "fc.fixed.safetensors")
    head = fixify.load(done.path)
    assert isinstance(head, FixedClassifier) and head.bias is not None
    assert torch.equal(head.bias, torch.from_numpy(bias))
    x = torch.randn(100, N, generator=torch.Generator().manual_seed(0))
    wanted, found = x @ torch.from_numpy(weight).T + torch.from_numpy(bias), answers(head, x)
    wanted, found = (each - each.mean(dim=1, keepdim=True) for each in (wanted, found))
    assert float(F.cosine_similarity(wanted.flatten(), found.flatten(), dim=0)) > 0.7
    assert done.savings.removed == C * N and done.savings.bytes_before == 4 * C * (N + 1)
    assert done.info.is_bare and done.info.projection is None


def test_matched_hadamard_head_has_the_nearest_scale(text: Path, tmp_path: Path) -> None:
    done = fixify.convert(text, tmp_path / "h.fixed.safetensors", head="hadamard", logit_scale=50.0)
    head = fixify.load(done.path)
    assert isinstance(head, FixedClassifier) and head.spec.matched and head.spec.normalize
    weight = torch.from_numpy(np.load(text))
    centered = 50 * (weight - weight.mean(dim=0))
    codes = head.codebook()
    assert float(head.scale.detach()) == pytest.approx(float((codes * centered).sum() / codes.square().sum()), rel=1e-4)


def test_header(text: Path, slim: Path) -> None:
    info = fixify.inspect(slim)
    assert info.is_bare and info.labels == [f"name {number}" for number in range(C)]
    assert info.source["name"] == "text.npy" and info.source["classifier"]["logit_scale"] == 50.0
    assert fixify.report(slim).num_classes == C


def test_verify(text: Path, slim: Path, tmp_path: Path) -> None:
    assert fixify.verify(slim).passed
    assert fixify.verify(slim, source=text).passed
    np.save(tmp_path / "text.npy", embeddings(C, N, seed=1))
    found = fixify.verify(slim, source=tmp_path / "text.npy")
    assert {check.name for check in found.failed} == {"source", "logits"}
    data = bytearray(slim.read_bytes())
    data[-100] ^= 1
    (tmp_path / "damaged.fixed.safetensors").write_bytes(data)
    assert not fixify.verify(tmp_path / "damaged.fixed.safetensors").passed
    with pytest.raises(FormatError):
        fixify.load(tmp_path / "damaged.fixed.safetensors", check=True)


def test_saved_again(slim: Path, tmp_path: Path) -> None:
    head = fixify.load(slim)
    again = fixify.load(fixify.save(head, tmp_path / "again.fixed.safetensors"))
    x = torch.randn(3, N)
    assert torch.equal(answers(head, x), answers(again, x)) and again.fixify_info == head.fixify_info
    fresh = FixedClassifier(fixify.HeadSpec("hadamard", num_features=64, num_classes=10))
    again = fixify.load(fixify.save(fresh, tmp_path / "fresh.fixed.safetensors"))
    assert isinstance(again, FixedClassifier) and again.spec == fresh.spec


def test_export(slim: Path, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    done = fixify.export(slim, tmp_path / "head.onnx")
    assert [path.suffix for path in done.paths] == [".onnx", ".npz"]
    x = torch.randn(4, N, generator=torch.Generator().manual_seed(0))
    (found,) = ort.InferenceSession(done.paths[0]).run(None, {"features": x.numpy()})
    assert (torch.from_numpy(found).argmax(dim=1) == answers(fixify.load(slim), x).argmax(dim=1)).all()
    assert fixify.inspect(done.paths[0]).is_bare
    for options in ({"to": "dense"}, {"to": "torch-export", "images": tmp_path}, {"top_k": 5}):
        with pytest.raises(UsageError):
            fixify.export(slim, tmp_path / "other", **options)


@pytest.mark.parametrize(
    "options", [{"head": "binary"}, {"head": "binary", "bits_per_weight": 2}, {"head": "hadamard"}]
)
def test_a_program_for_torch_export(text: Path, tmp_path: Path, options: Any) -> None:
    slim = fixify.convert(text, tmp_path / "a.fixed.safetensors", logit_scale=50.0, **options).path
    done = fixify.export(slim, tmp_path / "head.pt2", to="torch-export")
    program = torch.export.load(done.paths[0]).module()
    x = torch.randn(7, N, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(program(x), answers(fixify.load(slim), x), rtol=1e-4, atol=1e-4)
    assert done.checks[0].images == "random features"
    assert not [name for name, tensor in program.state_dict().items() if tuple(tensor.shape) == (C, N)]  # packed


def test_what_needs_a_network_is_refused(text: Path, slim: Path, tmp_path: Path) -> None:
    for call in (
        lambda: open_model(slim),
        lambda: fixify.predict(slim, [tmp_path / "image.png"]),
        lambda: fixify.convert(slim),
        lambda: fixify.convert(text, tmp_path / "x.fixed.safetensors", labels=__file__),
    ):
        with pytest.raises(SourceError):
            call()
    for options in (
        {"arch": "resnet18"},
        {"num_classes": 5},
        {"dtype": "float16"},
        {"ema": True},
        {"calibrate": "."},
        {"head": "orthogonal"},
        {"head": "hadamard", "match": False},
        {"head": "simplex", "logit_scale": 10.0},
        {"normalize": False, "logit_scale": 10.0},
    ):
        with pytest.raises(UsageError):
            fixify.convert(text, tmp_path / "x.fixed.safetensors", **options)
    with pytest.raises(UsageError):
        fixify.finetune(slim, str(tmp_path), tmp_path / "run")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputExistsError):
        fixify.convert(text, slim)


@pytest.mark.parametrize("options", [{"rows": "classes"}, {"logit_scale": 10.0}])
def test_options_of_a_bare_classifier_belong_to_one(small_pth: Path, tmp_path: Path, options: Any) -> None:
    with pytest.raises(UsageError):
        fixify.convert(small_pth, tmp_path / "x.fixed.safetensors", **options)


def test_the_same_command_gives_the_same_bytes(text: Path, tmp_path: Path) -> None:
    a, b = (fixify.convert(text, tmp_path / name, logit_scale=50.0).path for name in ("a.safetensors", "b.safetensors"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.slow
def test_a_hundred_thousand_classes(tmp_path: Path) -> None:
    c, n = 100_000, 768
    np.save(tmp_path / "text.npy", embeddings(c, n).astype(np.float16))
    done = fixify.convert(tmp_path / "text.npy", logit_scale=100.0, out=tmp_path / "text.fixed.safetensors")
    assert done.path.stat().st_size < 100_000 * (768 / 8 + 1) + 100_000
    head = fixify.load(done.path, check=True)
    x = torch.from_numpy(np.load(tmp_path / "text.npy", mmap_mode="r")[::12_500].astype(np.float32))
    assert torch.equal(head.top_k(x, 5).classes[:, 0], torch.arange(0, c, 12_500))
    kept = fixify.keep_classes(done.path, [str(number) for number in range(0, c, 100)], tmp_path / "kept.safetensors")
    assert kept.info.num_classes == 1000 and kept.path.stat().st_size < 120_000
    assert torch.equal(fixify.load(kept.path).codes, head.codes[::100])

"""A classifier without a network is put onto an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision

import fixify
from fixify.checkpoints.encoder import read_encoder
from fixify.errors import ExportError, NoClassifierError, SourceError, UsageError
from fixify.heads import FixedClassifier
from fixify.models.projection import ProjectedClassifier

CLIP = "vit_medium_patch32_clip_224.tinyclip_laion400m,depth=1,embed_dim=64,num_heads=2"
Files = dict[str, Path]


def text(c: int, n: int) -> np.ndarray:
    made = np.random.default_rng(c).standard_normal((c, n), dtype=np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A CLIP image tower (64 features, an embedding of 512), an encoder without a classifier and one with 7 classes
    (both of 256 features), and text embeddings of 20 classes of 512, 64, 256 and 100 values.
    """
    folder = tmp_path_factory.mktemp("encoders")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = timm.create_model("vit_medium_patch32_clip_224.tinyclip_laion400m", depth=1, embed_dim=64, num_heads=2)
        models = {"clip": tower}
        models |= {f"net{k}": timm.create_model("test_efficientnet", num_classes=k) for k in (0, 7)}
    for name, model in models.items():
        torch.save(model.state_dict(), folder / f"{name}.pth")
    for n in (512, 64, 256, 100):
        np.save(folder / f"{n}.npy", text(20, n))
    return {path.stem: path for path in folder.iterdir()}


def run(model: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(images)


def test_widths(files: Files) -> None:
    clip = read_encoder(files["clip"], arch=CLIP)
    assert clip.widths == (512, 64) and clip.projection is not None and clip.projection.path == "head"
    for name in ("net0", "net7"):
        plain = read_encoder(files[name], arch="test_efficientnet", meta=True)
        assert plain.widths == (256,) and plain.projection is None


def test_behind_the_projection(files: Files, tmp_path: Path) -> None:
    done = fixify.convert(
        files["clip"], tmp_path / "a.safetensors", arch=CLIP, classifier=files["512"], logit_scale=100.0
    )
    assert done.info.projection == "head" and done.info.heads[0].path == "head.classifier"
    model = fixify.load(done.path)
    assert isinstance(model.head, ProjectedClassifier) and isinstance(model.head.classifier, FixedClassifier)
    tower = timm.create_model(
        "vit_medium_patch32_clip_224.tinyclip_laion400m", depth=1, embed_dim=64, num_heads=2
    ).eval()
    state = torch.load(files["clip"], weights_only=True)
    tower.load_state_dict(state)
    own = model.state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in state.items())
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    embedding = run(tower, images)
    torch.testing.assert_close(run(model, images), run(model.head.classifier, embedding))
    wanted = 100 * F.normalize(embedding, dim=1) @ torch.from_numpy(text(20, 512)).T
    centered = [each - each.mean(dim=1, keepdim=True) for each in (wanted, run(model, images))]
    assert float(F.cosine_similarity(*(each.flatten() for each in centered), dim=0)) > 0.6
    assert fixify.verify(done.path, source=files["clip"]).passed
    again = fixify.load(fixify.save(model, tmp_path / "again.safetensors"))
    assert torch.equal(run(again, images), run(model, images))
    with pytest.raises(ExportError):
        fixify.export(done.path, tmp_path / "dense", to="dense")


def test_in_the_place_of_the_projection(files: Files, tmp_path: Path) -> None:
    done = fixify.convert(files["clip"], tmp_path / "a.safetensors", arch=CLIP, classifier=files["64"])
    assert done.info.projection is None and done.info.heads[0].path == "head"
    assert isinstance(fixify.load(done.path).head, FixedClassifier)
    assert fixify.verify(done.path, source=files["clip"]).passed


def test_as_many_classes_as_the_embedding_is_wide(files: Files, tmp_path: Path) -> None:
    np.save(tmp_path / "many.npy", text(512, 64))
    np.save(tmp_path / "square.npy", text(512, 512))
    for name, projection in (("many", None), ("square", "head")):
        done = fixify.convert(
            files["clip"], tmp_path / f"{name}.safetensors", arch=CLIP, classifier=tmp_path / f"{name}.npy"
        )
        assert done.info.projection == projection and fixify.load(done.path).num_classes == 512


@pytest.mark.parametrize("name", ["net0", "net7"])
def test_on_a_network_with_and_without_a_classifier(files: Files, tmp_path: Path, name: str) -> None:
    done = fixify.convert(
        files[name], tmp_path / "a.safetensors", arch="test_efficientnet", classifier=files["256"], head="hadamard"
    )
    head = fixify.load(done.path).get_classifier()
    assert isinstance(head, FixedClassifier) and head.spec.matched and head.out_features == 20 and head.bias is None
    assert done.savings.classifier_parameters == 20 * 256
    assert fixify.verify(done.path, source=files[name]).passed


def test_a_recognised_network_needs_no_name(files: Files, tmp_path: Path) -> None:
    done = fixify.convert(files["net7"], tmp_path / "a.safetensors", classifier=files["256"])
    assert done.info.architecture.name == "test_efficientnet"
    with pytest.raises(NoClassifierError):
        fixify.convert(files["net0"], tmp_path / "b.safetensors", classifier=files["256"])


def test_calibrated(files: Files, tiny: Path, tmp_path: Path) -> None:
    for name, arch, n in (("clip", CLIP, "512"), ("net7", "test_efficientnet", "256")):
        done = fixify.convert(
            files[name],
            tmp_path / f"{name}.safetensors",
            arch=arch,
            classifier=files[n],
            logit_scale=20.0,
            calibrate=tiny / "data",
            device="cpu",
        )
        assert done.calibration is not None and done.calibration.num_images == 6
        assert done.info.heads[0].spec.normalize and not done.info.heads[0].spec.standardize


def test_other_widths_are_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as refused:
        fixify.convert(files["clip"], tmp_path / "a.safetensors", arch=CLIP, classifier=files["100"])
    assert all(word in refused.value.message for word in ("100", "512", "64"))
    with pytest.raises(SourceError):
        fixify.convert(files["net7"], tmp_path / "a.safetensors", arch="test_efficientnet", classifier=files["clip"])
    slim = fixify.convert(files["256"], tmp_path / "head.fixed.safetensors").path
    with pytest.raises(SourceError):
        fixify.convert(files["net7"], tmp_path / "a.safetensors", arch="test_efficientnet", classifier=slim)
    with pytest.raises(UsageError):
        fixify.convert(files["net7"], tmp_path / "a.safetensors", classifier=files["256"], num_classes=3)
    assert not (tmp_path / "a.safetensors").exists()


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    """A CLIP ResNet with an attention pool (64 features, an embedding of 1,024 values), the model, and what it is."""
    options: dict[str, Any] = {"width_factor": 0.125, "img_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("resnet50_clip.openai", **options).eval()
    with torch.no_grad():
        model.head.proj.bias.normal_(generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("clip") / "resnet.pth"
    torch.save(model.state_dict(), path)
    return path, model, ",".join(("resnet50_clip.openai", *(f"{key}={value}" for key, value in options.items())))


def test_behind_the_projection_of_a_clip_resnet(resnet: tuple[Path, Any, str], tmp_path: Path) -> None:
    path, tower, arch = resnet
    n = tower.num_classes
    with pytest.raises(NoClassifierError) as refused:
        fixify.convert(path, tmp_path / "a.safetensors", arch=arch)
    assert "--classifier" in (refused.value.hint or "")
    np.save(tmp_path / "text.npy", text(40, n))
    done = fixify.convert(
        path, tmp_path / "a.safetensors", arch=arch, classifier=tmp_path / "text.npy", logit_scale=100.0
    )
    assert done.info.projection == "head.proj"
    model = fixify.load(done.path)
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    embedding = run(tower, images)
    found = run(model, images)
    torch.testing.assert_close(found, run(model.head.proj.classifier, embedding))
    wanted = 100 * F.normalize(embedding, dim=1) @ torch.from_numpy(text(40, n)).T  # CLIP's zero-shot logits
    centered = [each - each.mean(dim=1, keepdim=True) for each in (wanted, found)]
    assert float(F.cosine_similarity(*(each.flatten() for each in centered), dim=0)) > 0.6
    assert fixify.verify(done.path, source=path).passed


def test_a_tower_that_looks_like_a_classifier_is_refused(tmp_path: Path) -> None:
    """ConvNeXts are classifiers and CLIP towers under the same names; timm gives the projection a bias of zeros."""
    arch = "convnext_base,depths=[1,1,1,1],dims=[8,16,32,64]"
    model = timm.create_model("convnext_base.clip_laion2b", depths=(1, 1, 1, 1), dims=(8, 16, 32, 64), pretrained=False)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    np.save(tmp_path / "text.npy", text(20, 640))
    for options in ({}, {"classifier": tmp_path / "text.npy"}):
        with pytest.raises(NoClassifierError) as refused:
            fixify.convert(tmp_path / "net.pth", tmp_path / "a.safetensors", arch=arch, **options)
        assert "convnext_base.clip_laion2b --classifier" in (refused.value.hint or "")
    named = arch.replace("convnext_base", "convnext_base.clip_laion2b")
    done = fixify.convert(
        tmp_path / "net.pth", tmp_path / "a.safetensors", arch=named, classifier=tmp_path / "text.npy"
    )
    assert done.info.projection == "head.fc"
    with torch.no_grad():
        model.head.fc.bias.add_(0.1)
    torch.save(model.state_dict(), tmp_path / "tuned.pth")
    assert fixify.convert(tmp_path / "tuned.pth", tmp_path / "b.safetensors", arch=arch).info.num_classes == 640


TORCHVISION: dict[str, tuple[str, dict[str, Any]]] = {
    "mobilenet_v3_small": ("classifier.3", {}),
    "googlenet": ("fc", {"init_weights": False, "transform_input": True}),
}


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("name", TORCHVISION)
def test_on_torchvision_networks(tmp_path: Path, name: str, headless: bool) -> None:
    path, options = TORCHVISION[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = torchvision.models.get_model(name, **options).eval()
    last = model.get_submodule(path)
    model.set_submodule(path, torch.nn.Identity(), strict=True)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    features = run(model, images)
    if not headless:
        model.set_submodule(path, last)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    np.save(tmp_path / "text.npy", text(20, 1024))
    arch = f"torchvision/{name}" + (",transform_input=true" if options else "")
    done = fixify.convert(
        tmp_path / "net.pth", tmp_path / "a.safetensors", arch=arch, classifier=tmp_path / "text.npy", logit_scale=10.0
    )
    made = fixify.load(done.path)
    assert done.info.heads[0].path == path and made.get_submodule(path).out_features == 20
    torch.testing.assert_close(run(made, images), run(made.get_submodule(path), features))
    assert fixify.verify(done.path, source=tmp_path / "net.pth").passed
    assert any("aux1 and aux2" in note for note in done.notes) is (name == "googlenet")


def test_an_encoder_without_its_classifier_names_what_to_type(files: Files, tmp_path: Path) -> None:
    with pytest.raises(NoClassifierError) as refused:
        fixify.convert(files["net0"], tmp_path / "a.safetensors", classifier=files["256"])
    assert "--arch timm/test_efficientnet --classifier" in (refused.value.hint or "")


def test_a_projection_alone_names_the_option(files: Files, tmp_path: Path) -> None:
    with pytest.raises(NoClassifierError) as refused:
        fixify.convert(files["clip"], tmp_path / "a.safetensors", arch=CLIP)
    assert "--classifier" in (refused.value.hint or "")

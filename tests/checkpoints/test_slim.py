from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fixify
from fixify.checkpoints.open import open_model
from fixify.checkpoints.slim import SlimInfo, is_slim, load, read_info, save
from fixify.checkpoints.verify import verify
from fixify.errors import ArchitectureError, CodebookMismatchError, FormatError, OutputExistsError, UsageError
from fixify.heads import FixedClassifier
from fixify.models import build
from fixify.surgery import apply_heads_


@pytest.fixture(scope="module")
def slim(small_pth: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("slim") / "small.fixed.safetensors"
    return fixify.convert(small_pth, out, arch="test_efficientnet").path


def _images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def _rewritten(slim: Path, out: Path, **changes: str) -> Path:
    """The same file with other metadata; a `fixify.spec` change goes into the head spec."""
    with safe_open(slim, framework="pt") as file:
        metadata = dict(file.metadata())
    for key, value in changes.items():
        metadata[key.replace("__", ".")] = value
    save_file(load_file(slim), out, metadata=metadata)
    return out


def test_it_is_an_ordinary_safetensors_file(slim: Path) -> None:
    with safe_open(slim, framework="pt") as file:
        metadata = file.metadata()
        keys = set(file.keys())
    assert metadata["format"] == "pt"
    assert metadata["fixify.version"] == "1"
    assert {"classifier.scale", "classifier.bias", "classifier.center", "classifier.spread"} <= keys
    assert "classifier.weight" not in keys
    assert str(slim.parent) not in json.dumps(metadata)


def test_a_fresh_process_gives_the_same_logits(slim: Path, tmp_path: Path) -> None:
    with torch.inference_mode():
        here = load(slim)(_images())
    code = (
        "import sys, torch, fixify; torch.set_num_threads(1); model = fixify.load(sys.argv[1])\n"
        "images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))\n"
        "with torch.inference_mode(): torch.save(model(images), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(slim), str(tmp_path / "logits.pt")], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), here)


def test_loading_leaves_the_global_random_state_alone(slim: Path) -> None:
    before = torch.get_rng_state()
    load(slim)
    assert torch.equal(torch.get_rng_state(), before)


def test_save_and_load_again(slim: Path, tmp_path: Path) -> None:
    model = load(slim)
    with torch.no_grad():
        model.classifier.scale.fill_(7)
    path = save(model, tmp_path / "again.fixed.safetensors", training={"epochs": 3})
    again = load(path)
    assert again.classifier.scale.item() == 7
    assert again.fixify_info.training == {"epochs": 3}
    with torch.inference_mode():
        assert torch.equal(again(_images()), model(_images()))
    with pytest.raises(OutputExistsError, match="--force"):
        save(model, path)
    save(model, path, force=True)


def test_half_precision_stays_half_on_disk_and_is_float32_in_memory(small_pth: Path, tmp_path: Path) -> None:
    path = fixify.convert(small_pth, tmp_path / "a.fixed.safetensors", arch="test_efficientnet", dtype="float16").path
    model = load(path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    stored = load_file(save(model, tmp_path / "b.fixed.safetensors"))
    assert stored["conv_stem.weight"].dtype == torch.float16
    assert torch.equal(stored["conv_stem.weight"], load_file(path)["conv_stem.weight"])


def test_what_has_no_fixed_head_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)Linear.*fix_classifier_"):
        save(torch.nn.Linear(2, 2), tmp_path / "a.fixed.safetensors")


@pytest.mark.parametrize(
    "options",
    [{"head": "hadamard"}, {"head": "binary", "bits_per_class": 40}, {"head": "orthogonal", "seed": 3}],
    ids=str,
)
def test_convert_writes_byte_for_byte_what_surgery_and_save_write(
    small_pth: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    converted = fixify.convert(small_pth, tmp_path / "a.fixed.safetensors", arch="test_efficientnet", **options).path
    model = fixify.fix_classifier_(open_model(small_pth, arch="test_efficientnet").model, **options)
    assert fixify.save(model, tmp_path / "b.fixed.safetensors").read_bytes() == converted.read_bytes()


def _with_fixed_head(build_model: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model().eval()
    return fixify.fix_classifier_(model, "hadamard", match=False)


@pytest.mark.parametrize(
    ("spelled", "build_model"),
    [
        ("timm/resnet10t", lambda: timm.create_model("resnet10t", num_classes=7)),
        ("timm/resnet10t,in_chans=1", lambda: timm.create_model("resnet10t", num_classes=7, in_chans=1)),
        (
            "timm/vit_tiny_patch16_224,img_size=64",
            lambda: timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64),
        ),
        ("timm/dla46_c", lambda: timm.create_model("dla46_c", num_classes=7)),
        (
            "timm/deit_tiny_distilled_patch16_224",
            lambda: timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7),
        ),
        ("fixify/resnet20_cifar", lambda: timm.create_model("resnet20_cifar", num_classes=10)),
        ("torchvision/maxvit_t", lambda: torchvision.models.get_model("maxvit_t", num_classes=7)),  # no bias
        ("torchvision/squeezenet1_1", lambda: torchvision.models.get_model("squeezenet1_1", num_classes=7)),
        (
            "torchvision/googlenet,aux_logits=true,transform_input=false",
            lambda: torchvision.models.get_model("googlenet", num_classes=7, init_weights=False),
        ),
    ],
)
def test_a_model_that_the_user_built_is_saved_and_loaded(
    spelled: str, build_model: Callable[[], torch.nn.Module], tmp_path: Path
) -> None:
    model = _with_fixed_head(build_model)
    path = save(model, tmp_path / "mine.fixed.safetensors", labels=[f"class {c}" for c in range(model_classes(model))])
    again = load(path)
    info = again.fixify_info
    assert info.architecture.spelled == spelled
    assert info.labels is not None and info.labels[1] == "class 1"
    assert info.savings["removed"] == sum(
        head.in_features * head.out_features for head in model.modules() if isinstance(head, FixedClassifier)
    )
    x = torch.rand(1, *info.preprocessing["input_size"], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def model_classes(model: torch.nn.Module) -> int:
    return next(head.out_features for head in model.modules() if isinstance(head, FixedClassifier))


def test_a_model_that_a_reader_could_not_rebuild_is_refused_until_it_is_named(tmp_path: Path) -> None:
    model = _with_fixed_head(lambda: timm.create_model("resnet10t", num_classes=7, global_pool="max"))
    with pytest.raises(ArchitectureError, match=r"(?s)global_pool.*arch="):
        save(model, tmp_path / "a.fixed.safetensors")
    path = save(model, tmp_path / "a.fixed.safetensors", arch="timm/resnet10t,global_pool=max")
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(load(path)(x), model(x))
    with pytest.raises(ArchitectureError, match="resnet18"):
        save(model, tmp_path / "b.fixed.safetensors", arch="timm/resnet18")
    changed = _with_fixed_head(lambda: timm.create_model("resnet10t", num_classes=7))
    changed.maxpool = torch.nn.AvgPool2d(3, 2, 1)
    with pytest.raises(ArchitectureError, match="maxpool"):
        save(changed, tmp_path / "b.fixed.safetensors")
    changed.layer1 = torch.nn.Identity()
    with pytest.raises(ArchitectureError, match="resnet10t"):
        save(changed, tmp_path / "b.fixed.safetensors")
    assert not (tmp_path / "b.fixed.safetensors").exists()


def test_a_loaded_model_whose_head_is_replaced_again_is_described_anew(slim: Path, tmp_path: Path) -> None:
    model = load(slim)
    model.reset_classifier(12)
    fixify.fix_classifier_(model, "orthogonal")
    again = load(save(model, tmp_path / "again.fixed.safetensors"))
    assert again.fixify_info.heads[0].spec.kind == "orthogonal"
    assert again.fixify_info.num_classes == 12


def test_what_is_not_slim_is_refused(slim: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    assert is_slim(slim)
    assert not is_slim(tmp_path / "plain.safetensors")
    assert not is_slim(tmp_path / "missing")
    with pytest.raises(FormatError, match="plain"):
        read_info(tmp_path / "plain.safetensors")
    with pytest.raises(FormatError, match="missing"):
        read_info(tmp_path / "missing")
    (tmp_path / "cut.safetensors").write_bytes(slim.read_bytes()[:1000])
    with pytest.raises(FormatError, match="cut"):
        read_info(tmp_path / "cut.safetensors")


def test_a_newer_version_is_refused_with_a_sentence(slim: Path, tmp_path: Path) -> None:
    newer = _rewritten(slim, tmp_path / "newer.safetensors", fixify__version="2")
    with pytest.raises(FormatError, match=r"2.*1"):
        read_info(newer)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "architecture"),
        ("[" * 100_000, "damaged"),
    ],
)
def test_a_damaged_header_is_refused(slim: Path, tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        read_info(_rewritten(slim, tmp_path / "damaged.safetensors", fixify=text))


@pytest.mark.parametrize("key", ["input_size", "mean", "std"])
def test_a_header_without_the_preprocessing_of_images_is_refused(slim: Path, tmp_path: Path, key: str) -> None:
    info = json.loads(read_info(slim).model_dump_json())
    del info["preprocessing"][key]
    with pytest.raises(FormatError, match=key):
        read_info(_rewritten(slim, tmp_path / "less.safetensors", fixify=json.dumps(info)))


def test_another_codebook_is_refused(slim: Path, tmp_path: Path) -> None:
    info = json.loads(read_info(slim).model_dump_json())
    info["heads"][0]["spec"]["digest"] = "sha256:" + "0" * 64
    path = _rewritten(slim, tmp_path / "other.safetensors", fixify=json.dumps(info))
    with pytest.raises(CodebookMismatchError):
        load(path)


def test_tensors_of_another_model_are_refused(slim: Path, tmp_path: Path) -> None:
    tensors = load_file(slim)
    del tensors["conv_stem.weight"]
    with safe_open(slim, framework="pt") as file:
        save_file(tensors, tmp_path / "short.safetensors", metadata=file.metadata())
    with pytest.raises(FormatError, match=r"conv_stem\.weight"):
        load(tmp_path / "short.safetensors")


def test_info_survives_a_round_trip(slim: Path) -> None:
    info = read_info(slim)
    assert SlimInfo.model_validate(json.loads(info.model_dump_json())) == info
    assert info.num_classes == 300
    assert info.source["name"] == "small.pth"


@pytest.mark.parametrize("name", ["v1", "v1-binary", "v1-ternary", "v1-levels", "v1-projected"])
def test_the_golden_files_of_version_1_give_their_logits(name: str) -> None:
    """Files that are out there must load, and compute the same, for ever; see golden/make_golden.py."""
    golden = Path(__file__).parents[1] / "golden"
    images = torch.arange(2 * 32 * 32).reshape(2, 1, 32, 32).mul(0.37).sin()
    expected = torch.tensor(json.loads((golden / f"{name}.json").read_text())["logits"])
    assert expected.abs().mean() > 0.1  # else the tolerance would hide everything
    with torch.inference_mode():
        logits = load(golden / f"{name}.fixed.safetensors")(images)
    torch.testing.assert_close(logits[:, :8], expected, atol=1e-4, rtol=1e-4)
    info = read_info(golden / f"{name}.fixed.safetensors")
    assert info.architecture.to_dict() == {
        "library": "timm",
        "name": "test_efficientnet",
        "tag": None,
        "kwargs": {"in_chans": 1},
    }
    assert info.heads[0].spec.matched == (name == "v1")
    assert info.heads[0].spec.bits_per_class == {"v1-binary": 44, "v1-projected": 45}.get(name)
    assert info.heads[0].spec.planes == ((20, 15, 7, 3) if name == "v1-projected" else None)
    assert info.heads[0].spec.bits_per_weight == {"v1-ternary": 1.58, "v1-levels": 3}.get(name)
    assert info.dtype == "float16"


@pytest.fixture(scope="module")
def binary(small_pth: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 classes of 44 signs: five bits of the last byte are used, and there are fewer of each class than features."""
    out = tmp_path_factory.mktemp("binary") / "small.fixed.safetensors"
    return fixify.convert(small_pth, out, arch="test_efficientnet", head="binary", bits_per_class=44).path


def test_binary_save_load_and_half_precision(binary: Path, tmp_path: Path) -> None:
    model = load(binary)
    stored = load_file(binary)
    assert stored["classifier.codes"].shape == (300, 6)
    assert stored["classifier.codes"].dtype == stored["classifier.gains"].dtype == torch.uint8
    again = load(save(model, tmp_path / "again.fixed.safetensors"))
    with torch.inference_mode():
        logits = model(_images())
        assert torch.equal(again(_images()), logits)
        half = load(binary).to(torch.bfloat16)
        torch.testing.assert_close(half(_images().bfloat16()).float(), logits, atol=0.05, rtol=0.05)
    assert half.classifier.codes.dtype == torch.uint8
    assert save(half, tmp_path / "half.fixed.safetensors").is_file()


def test_binary_checkpoint_on_the_meta_device(binary: Path) -> None:
    assert load(binary, device="meta")(_images().to("meta")).shape == (2, 300)
    info = read_info(binary)
    with torch.device("meta"):
        skeleton = build(info.architecture, num_classes=300, meta=True)
        apply_heads_(skeleton, info.heads)
    skeleton.load_state_dict(load_file(binary), assign=True)
    with torch.inference_mode():
        assert torch.equal(skeleton.eval()(_images()), load(binary)(_images()))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("gains", lambda gains: gains.float(), r"gains.*uint8.*float32"),
        ("gains", lambda gains: gains[:299], r"gains.*300.*299"),
        ("gains", lambda gains: gains * 0, r"gains.*1 \.\. 255"),
        ("gains", lambda gains: None, "gains"),
        ("codes", lambda codes: codes.long(), r"codes.*uint8.*int64"),
        ("codes", lambda codes: codes[:, :5], r"codes.*300, 6.*300, 5"),
        ("codes", lambda codes: codes * 0, "0 and 1"),
        ("codes", lambda codes: codes | 1, "bits"),
        ("codes", lambda codes: None, "codes"),
    ],
)
def test_damaged_signs_are_refused_with_a_sentence(
    binary: Path, tmp_path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None], said: str
) -> None:
    tensors = load_file(binary)
    changed = change(tensors.pop(f"classifier.{name}"))
    if changed is not None:
        tensors[f"classifier.{name}"] = changed.contiguous()
    with safe_open(binary, framework="pt") as file:
        save_file(tensors, tmp_path / "bad.safetensors", metadata=file.metadata())
    with pytest.raises(FormatError, match=said):
        load(tmp_path / "bad.safetensors")


def test_one_other_sign_is_not_the_recorded_codebook(binary: Path, tmp_path: Path) -> None:
    tensors = load_file(binary)
    tensors["classifier.codes"][7, 0] ^= 64
    with safe_open(binary, framework="pt") as file:
        save_file(tensors, tmp_path / "bad.safetensors", metadata=file.metadata())
    with pytest.raises(CodebookMismatchError, match="stored signs are not"):
        load(tmp_path / "bad.safetensors")
    failed = [check for check in verify(tmp_path / "bad.safetensors") if not check.passed]
    assert [check.name for check in failed] == ["digest", "codebook"]

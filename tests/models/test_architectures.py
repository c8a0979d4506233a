"""fixify.models.architectures: names, arguments, builds and preprocessing of timm's and torchvision's models."""

import contextlib
import json

import pytest
import timm
import torch
import torchvision

from fixify.errors import ArchitectureError
from fixify.models import (
    Architecture,
    build,
    default_num_classes,
    list_architectures,
    parse_architecture,
    preprocessing,
)
from fixify.models.architectures import known_architecture


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("resnet50", "timm/resnet50"),
        ("resnet50.a1_in1k", "timm/resnet50.a1_in1k"),
        ("timm/resnet50", "timm/resnet50"),
        ("torchvision/resnet50", "torchvision/resnet50"),
        ("torchvision/resnet50.IMAGENET1K_V2", "torchvision/resnet50.IMAGENET1K_V2"),
        ("torchvision/resnet50.DEFAULT", "torchvision/resnet50.IMAGENET1K_V2"),
        ("torchvision/resnet50.ResNet50_Weights.IMAGENET1K_V1", "torchvision/resnet50.IMAGENET1K_V1"),
        ("ResNet50_Weights.IMAGENET1K_V2", "torchvision/resnet50.IMAGENET1K_V2"),
        ("torchvision/ViT_B_16_Weights.DEFAULT", "torchvision/vit_b_16.IMAGENET1K_V1"),
        ("alexnet", "torchvision/alexnet"),  # timm has none
        (" resnet18 ", "timm/resnet18"),
        ("vit_base_patch16_224_in21k", "timm/vit_base_patch16_224.augreg_in21k"),  # timm renamed it
    ],
)
def test_parse(text: str, ref: str) -> None:
    assert parse_architecture(text).ref == ref


def test_every_listed_name_parses_to_itself() -> None:
    refs = list_architectures()
    assert [parse_architecture(ref).ref for ref in refs] == refs
    assert len(list_architectures("torchvision")) == len(torchvision.models.list_models(module=torchvision.models))
    of_timm = set(timm.list_models()) - {"fixify_slim"}  # registered by `import fixify`
    assert len(refs) == len(of_timm) + len(list_architectures("torchvision"))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("resnet5", "'resnet5'", "timm/resnet50"),
        ("mobilenet_v4", "'mobilenet_v4'", "torchvision/mobilenet_v2"),
        ("foo/resnet50", "'foo'", "timm/resnet50"),
        ("resnet50.no_such_tag", "'no_such_tag'", "a1_in1k"),
        ("torchvision/resnet50.V9", "'V9'", "IMAGENET1K_V2"),
        ("torchvision/fcn_resnet50", "segmentation", "fixify report --all"),
        ("fasterrcnn_resnet50_fpn", "object detection", "fixify report --all"),
        ("torchvision/r3d_18", "video classification", "fixify report --all"),
        ("quantized_resnet50", "quantised inference", "fixify report --all"),
        ("raft_small", "optical flow", "fixify report --all"),
        ("", "''", "fixify report --all"),
    ],
)
def test_refused_names(text: str, message: str, hint: str) -> None:
    with pytest.raises(ArchitectureError) as error:
        parse_architecture(text)
    assert message in error.value.message
    assert hint in (error.value.hint or "")


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained", "pretrained_cfg", "weights", "num_classes"])
def test_arguments_that_read_weights_are_refused(name: str) -> None:
    with pytest.raises(ArchitectureError, match=name):
        parse_architecture("resnet18", **{name: "weights.pth"})
    with pytest.raises(ArchitectureError, match=name):
        Architecture.from_dict({"library": "timm", "name": "resnet18", "kwargs": {name: "weights.pth"}})


def test_arguments_must_be_plain_and_suit_the_model() -> None:
    with pytest.raises(ArchitectureError, match="act_layer"):
        parse_architecture("resnet18", act_layer=torch.nn.GELU)
    with pytest.raises(ArchitectureError, match=r"timm/resnet18 .*no_such=1"):
        build(parse_architecture("resnet18", no_such=1), meta=True)
    with pytest.raises(ArchitectureError, match=r"torchvision/resnet18 .*in_chans=1"):
        build(parse_architecture("torchvision/resnet18", in_chans=1), meta=True)


def test_round_trip_through_json() -> None:
    arch = parse_architecture("resnet50.a1_in1k", in_chans=1)
    assert Architecture.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch
    assert {arch: 1}[arch] == 1  # hashable in spite of its dict


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_tag_of_another_version(library: str) -> None:
    """A file may name weights that the installed library does not know; only those weights are unavailable."""
    arch = Architecture.from_dict({"library": library, "name": "resnet18", "tag": "of_tomorrow", "kwargs": {}})
    plain = parse_architecture(f"{library}/resnet18")
    assert Architecture.from_dict(arch.to_dict()) == arch
    assert preprocessing(arch) == preprocessing(plain)
    assert default_num_classes(arch) == 1000
    assert build(arch, meta=True).state_dict().keys() == build(plain, meta=True).state_dict().keys()
    with pytest.raises(ArchitectureError, match="'of_tomorrow'"):
        build(arch, pretrained=True)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"library": "timm"},
        {"library": "timm", "name": "resnet18", "extra": 1},
        {"library": "timm", "name": 3},
        {"library": "timm", "name": "resnet18", "kwargs": [1]},
        {"library": "timm", "name": "resnet18", "tag": 1},
        {"library": "other", "name": "resnet18"},
    ],
)
def test_from_dict_refuses(values: dict) -> None:
    with pytest.raises(ArchitectureError):
        Architecture.from_dict(values)


@pytest.mark.parametrize("name", ["no_such_net", "hf-hub:someone/model", "resnet18,in_chans=1,pretrained=true"])
def test_only_known_architectures_are_built(name: str) -> None:
    """The header of a file is read without asking the libraries; what builds a network asks them."""
    read = Architecture.from_dict({"library": "timm", "name": name})
    with pytest.raises(ArchitectureError):
        known_architecture(read)
    with pytest.raises(ArchitectureError):
        build(read, meta=True)


@pytest.mark.parametrize(
    "ref",
    [
        "timm/resnet10t",
        "timm/swinv2_cr_tiny_224,depths=[1,1,1,1]",
        "torchvision/regnet_y_400mf",
        "torchvision/inception_v3",
        "torchvision/swin_t",
    ],
)
def test_meta_build_has_the_names_and_shapes_of_a_real_one(ref: str) -> None:
    arch = parse_architecture(ref)
    meta = build(arch, num_classes=7, meta=True).state_dict()
    real = build(arch, num_classes=7).state_dict()
    assert all(tensor.is_meta for tensor in meta.values())
    assert [(k, v.shape, v.dtype) for k, v in meta.items()] == [(k, v.shape, v.dtype) for k, v in real.items()]


def test_building_on_meta_leaves_the_next_build_alone() -> None:
    build(parse_architecture("resnet18"), meta=True)
    weight = build(parse_architecture("resnet18")).get_classifier().weight
    assert weight.device.type == "cpu"
    assert weight.std() > 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("resnet18", 1000),
        ("torchvision/vit_b_16", 1000),
        ("vit_base_patch16_224.augreg_in21k", 21843),
        ("vit_small_patch14_dinov2", 0),
    ],
)
def test_default_num_classes(text: str, expected: int) -> None:
    arch = parse_architecture(text)
    assert default_num_classes(arch) == expected
    if arch.library == "timm":
        assert build(arch, meta=True).num_classes == expected


def test_preprocessing_is_that_of_the_library() -> None:
    expected = timm.data.resolve_data_config(model=timm.create_model("tf_efficientnet_lite0"))
    found = preprocessing(parse_architecture("tf_efficientnet_lite0"))
    assert found == {k: list(v) if isinstance(v, tuple) else v for k, v in expected.items()}
    assert found["mean"] == [0.5, 0.5, 0.5]
    assert preprocessing(parse_architecture("torchvision/resnet50.IMAGENET1K_V2")) == {
        "input_size": [3, 224, 224],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear",
        "crop_pct": 224 / 232,
        "crop_mode": "center",
    }
    assert preprocessing(parse_architecture("torchvision/resnet50.IMAGENET1K_V1"))["crop_pct"] == 224 / 256


def test_preprocessing_follows_the_arguments_and_the_given_configuration() -> None:
    found = preprocessing(parse_architecture("vit_tiny_patch16_224", in_chans=1, img_size=96))
    assert (found["input_size"], found["mean"], found["std"]) == ([1, 96, 96], [0.5], [0.5])
    given = {"mean": (0.1, 0.2, 0.3), "crop_pct": 1.0, "std": None, "url": "ignored", "input_size": (3, 64, 64)}
    found = preprocessing(parse_architecture("resnet18"), given)
    assert (found["mean"], found["crop_pct"], found["input_size"]) == ([0.1, 0.2, 0.3], 1.0, [3, 64, 64])
    assert found["std"] == [0.229, 0.224, 0.225]
    assert "url" not in found
    json.dumps(found)


def test_arguments_in_the_name() -> None:
    assert dict(parse_architecture("vit_tiny_patch16_224,img_size=96,in_chans=1").kwargs) == {
        "img_size": 96,
        "in_chans": 1,
    }
    assert parse_architecture("torchvision/googlenet,aux_logits=false").kwargs["aux_logits"] is False
    assert parse_architecture("convnext_atto,head_norm_first=true,act_layer=relu").kwargs["act_layer"] == "relu"
    assert parse_architecture("resnet18,in_chans=1", in_chans=2).kwargs["in_chans"] == 2
    with pytest.raises(ArchitectureError, match="'img_size'"):
        parse_architecture("vit_tiny_patch16_224,img_size")
    with pytest.raises(ArchitectureError, match="checkpoint_path"):
        parse_architecture("resnet18,checkpoint_path=weights.pth")


@pytest.mark.parametrize(
    "text",
    [
        "timm/resnet18.a1_in1k",
        "timm/resnet18,in_chans=1",
        "torchvision/googlenet,aux_logits=false,transform_input=true",
    ],
)
def test_spelled_reads_back(text: str) -> None:
    assert parse_architecture(text).spelled == text


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_weights_of_torchvision_want_their_input_transformed(name: str) -> None:
    """torchvision sets this when it loads its weights; the state dict does not show it."""
    assert build(parse_architecture(f"torchvision/{name}.IMAGENET1K_V1"), meta=True).transform_input
    assert not build(parse_architecture(f"torchvision/{name}"), meta=True).transform_input
    arch = parse_architecture(f"torchvision/{name}.IMAGENET1K_V1,transform_input=false")
    assert not build(arch, meta=True).transform_input


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("torchvision/vit_b_32", 224),
        ("torchvision/vit_b_16.IMAGENET1K_SWAG_E2E_V1", 384),
        ("torchvision/vit_b_16.IMAGENET1K_SWAG_E2E_V1,image_size=224", 224),
    ],
)
def test_vision_transformers_of_torchvision_are_built_for_their_preprocessing(text: str, size: int) -> None:
    arch = parse_architecture(text)
    assert build(arch, meta=True).image_size == size
    assert preprocessing(arch)["input_size"] == [3, size, size]


@pytest.mark.parametrize("ref", ["timm/levit_128s", "timm/swinv2_cr_tiny_224,depths=[1,1,1,1]", "timm/resnet10t"])
def test_a_blank_build_is_complete_once_weights_are_loaded(ref: str) -> None:
    arch = parse_architecture(ref)
    real = build(arch, num_classes=7).eval()
    state = torch.random.get_rng_state()
    blank = build(arch, num_classes=7, blank=True).eval()
    assert torch.equal(torch.random.get_rng_state(), state)
    buffers = dict(real.named_buffers())  # including those that are not in the state dict
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in blank.named_buffers())
    blank.load_state_dict(real.state_dict())
    x = torch.randn(1, *preprocessing(arch)["input_size"])
    with torch.inference_mode():
        assert torch.equal(blank(x), real(x))


def test_a_blank_build_draws_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.random, "fork_rng", lambda **_: contextlib.nullcontext())
    arch = parse_architecture("vit_tiny_patch16_224")
    before = torch.random.get_rng_state()
    build(arch, blank=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    build(arch)
    assert not torch.equal(torch.random.get_rng_state(), before)

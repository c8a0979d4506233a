"""fixify.models.structure: foreign names are matched by their structure, not by the order of a file."""

from __future__ import annotations

import re

import pytest

from fixify.errors import ArchitectureError
from fixify.models import build, parse_architecture
from fixify.models.built import shapes_of
from fixify.models.identify import fit, identify
from fixify.models.structure import match_names

Shapes = dict[str, tuple[int, ...]]


def shapes(ref: str) -> Shapes:
    return shapes_of(build(parse_architecture(ref), num_classes=37, meta=True))


def renamed(own: Shapes, *pairs: tuple[str, str]) -> Shapes:
    found = {}
    for key, shape in own.items():
        for old, new in pairs:
            key = re.sub(old, new, key)
        found[key] = shape
    assert len(found) == len(own)
    return found


# Every module of each is renamed.
FOREIGN = {
    "resnet18": [
        (r"layer(\d)", r"stage\1"),
        (r"conv(\d)", r"c\1"),
        (r"bn(\d)", r"n\1"),
        ("downsample", "skip"),
        ("fc", "out"),
    ],
    "resnet50": [
        (r"layer(\d)", r"stage\1"),
        (r"conv(\d)", r"c\1"),
        (r"bn(\d)", r"n\1"),
        ("downsample", "a_skip"),
        ("fc", "out"),
    ],
    "vit_tiny_patch16_224": [
        *(("blocks", "encoder.layer"), (r"norm(\d)", r"ln_\1"), ("^norm", "a_last_norm"), ("^head", "classifier")),
        *(("attn.qkv", "self.in"), ("attn.proj", "self.out"), ("mlp.fc", "ffn.l"), ("patch_embed.proj", "stem")),
        *(("cls_token", "first"), ("pos_embed", "where")),
    ],
    "convnext_atto": [
        *(("stages", "levels"), ("blocks", "units"), ("conv_dw", "dw"), ("mlp.fc", "pw"), ("gamma", "scale")),
        *(("downsample", "down"), ("head.norm", "final"), ("head.fc", "a_head"), ("stem", "patchify")),
    ],
    "efficientnet_b0": [
        *(("blocks", "stages"), (r"bn(\d)", r"norm\1"), ("conv_dw", "depthwise"), ("conv_pwl", "project")),
        *(("conv_pw", "expand"), ("conv_stem", "stem"), ("conv_head", "top"), ("classifier", "fc"), (r"se\.", "gate.")),
    ],
    "swin_tiny_patch4_window7_224": [("layers", "levels"), ("blocks", "units"), ("norm", "ln"), ("attn", "msa")],
    "densenet121": [("denseblock", "db"), ("denselayer", "l"), ("transition", "t"), ("features", "body")],
    "regnety_002": [("stem", "first"), (r"s(\d)\.b", r"stage\1.block"), (r"conv(\d)", r"cnv\1")],
}


@pytest.mark.parametrize("ref", FOREIGN)
def test_both_containers_give_the_same_map(ref: str) -> None:
    own = shapes(ref)
    foreign = renamed(own, *FOREIGN[ref])
    right = dict(zip(foreign, own, strict=True))
    for given in (foreign, dict(sorted(foreign.items()))):
        found = identify(given)
        (mine,) = [each for each in found.candidates if f"timm/{ref}" in (each.architecture.ref, *each.aliases)]
        assert found.by == "shapes" and mine.num_classes == 37
        assert mine.key_map == right and list(mine.key_map) == list(given)


def test_ties_of_behaviour_are_asked() -> None:
    foreign = renamed(shapes("resnet50"), *FOREIGN["resnet50"])
    refs = {
        tuple(each.architecture.ref for each in identify(given).candidates)
        for given in (foreign, dict(sorted(foreign.items())))
    }
    assert refs == {("timm/resnet50", "timm/resnetaa50", "timm/resnetblur50", "torchvision/resnet50")}


@pytest.mark.parametrize("ref", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_a_wrapper_changes_nothing(ref: str) -> None:
    own = shapes(ref)
    foreign = {f"net.body.{key}": shape for key, shape in renamed(own, *FOREIGN[ref]).items()}
    found = match_names(dict(sorted(foreign.items())), own)
    assert found is not None and found.tie is None
    assert found.key_map == dict(zip(foreign, own, strict=True))


@pytest.mark.parametrize(
    ("first", "second"), [("attn_norm", "ffn_norm"), ("norm_a", "norm_b"), ("ffn_norm", "attn_norm")]
)
def test_names_without_numbers_are_a_tie_in_any_order(first: str, second: str) -> None:
    foreign = renamed(
        shapes("vit_tiny_patch16_224"),
        (r"norm1", first),
        (r"\.norm2", f".{second}"),
        ("blocks", "encoder"),
        ("qkv", "q_k_v"),
    )
    for given in (foreign, dict(sorted(foreign.items())), dict(reversed(foreign.items()))):
        with pytest.raises(ArchitectureError) as error:
            identify(given)
        assert first in error.value.message and second in error.value.message
        with pytest.raises(ArchitectureError):
            fit(parse_architecture("vit_tiny_patch16_224"), given)


def test_a_file_in_an_order_that_contradicts_its_numbers() -> None:
    foreign = renamed(shapes("vit_tiny_patch16_224"), *FOREIGN["vit_tiny_patch16_224"])
    swap = {"ln_1": "ln_2", "ln_2": "ln_1"}
    keys = [re.sub(r"ln_\d", lambda m: swap[m[0]], key) for key in foreign]
    assert sorted(keys) == sorted(foreign) and keys != list(foreign)
    with pytest.raises(ArchitectureError, match=r"ln_2 is stored before encoder\.layer\.0\.ln_1"):
        identify({key: foreign[key] for key in keys})


def test_swin_of_mmpretrain_has_other_channels() -> None:
    """mmcv merges patches with nn.Unfold, whose channels come in another order."""
    own = shapes("swin_tiny_patch4_window7_224")
    pairs = [("patch_embed.proj", "patch_embed.projection"), ("layers", "stages"), (r"attn\.", "attn.w_msa.")]
    foreign = renamed(own, *pairs, ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1"), ("^norm", "norm3"))
    for given in (foreign, dict(sorted(foreign.items()))):
        with pytest.raises(ArchitectureError, match="mmpretrain"):
            identify(given)


def test_vit_of_mmpretrain() -> None:
    own = shapes("vit_tiny_patch16_224")
    pairs = [
        (r"^norm", "ln1"),
        (r"norm(\d)", r"ln\1"),
        ("blocks", "layers"),
        ("patch_embed.proj", "patch_embed.projection"),
    ]
    pairs += [("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1"), ("^", "backbone.")]
    foreign = renamed(own, *pairs, (r"backbone\.head\.", "head.layers.head."))
    for given in (foreign, dict(sorted(foreign.items()))):
        found = identify(given)
        assert found.candidates[0].key_map == {key: dict(zip(foreign, own, strict=True))[key] for key in given}


def test_layers_in_another_order_are_another_network() -> None:
    own = shapes("densenet121")
    foreign = renamed(own, *FOREIGN["densenet121"], (r"norm1", "normX"), (r"norm2", "norm1"), ("normX", "norm2"))
    assert match_names(foreign, own) is None
    assert match_names(dict(sorted(foreign.items())), own) is None


def test_numbers_are_counted_not_spelled() -> None:
    own = {
        f"blocks.{number}.{kind}": (4, 4) if kind == "weight" else (4,)
        for number in range(12)
        for kind in ("weight", "bias")
    }
    foreign = {key.replace("blocks.", "layer_"): shape for key, shape in own.items()}
    found = match_names(dict(sorted(foreign.items())), own)
    assert found is not None and found.tie is None
    assert found.key_map == {key: key.replace("layer_", "blocks.") for key in sorted(foreign)}


def test_branches_that_are_modules_are_preferred() -> None:
    """The skip connection has the shapes of the layer before it."""
    own = {"conv.weight": (8, 8), "bn.weight": (8,), "skip.0.weight": (8, 8), "skip.1.weight": (8,)}
    foreign = {"a.0.weight": (8, 8), "a.1.weight": (8,), "c.weight": (8, 8), "n.weight": (8,)}
    found = match_names(foreign, own)
    assert found is not None and found.tie is None
    assert found.key_map["a.0.weight"] == "skip.0.weight" and found.key_map["n.weight"] == "bn.weight"


def test_standard_tensors_stay_together() -> None:
    own = {"a.weight": (4,), "a.bias": (4,), "b.weight": (4,), "b.bias": (4,)}
    assert match_names({"x.bias": (4,), "x.weight": (4,), "y": (4,), "z": (4,)}, own) is not None
    assert match_names({"x.weight": (4,), "x.bias": (4,)}, {"a.weight": (4,), "b.bias": (4,)}) is None


def test_hostile_names_end_soon() -> None:
    own = {f"m{number}.weight": (4, 4) for number in range(200)}
    letters = {f"{chr(97 + number % 26)}{'x' * (number // 26)}.weight": (4, 4) for number in range(200)}
    found = match_names(letters, own)
    assert found is not None and found.tie is not None
    deep = {("a." * 5000) + key: shape for key, shape in own.items()}
    assert match_names(deep, own) is None

"""fixify.convert: what `convert` decides by itself, and says."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from fixify.checkpoints.learned import read_original
from fixify.checkpoints.slim import load
from fixify.checkpoints.verify import verify
from fixify.conversion import convert
from fixify.conversion_options import ConvertOptions
from fixify.errors import CodebookMismatchError, HeadSpecError, UsageError
from fixify.heads.levels import LEVELS
from fixify.models import build, parse_architecture
from fixify.reporting.about import removed_line

WIDE = "vit_tiny_patch16_224,embed_dim=386,num_heads=2,depth=1,img_size=32"


def test_widths_without_a_hadamard_matrix_get_an_orthogonal_head(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=386, num_heads=2, depth=1, img_size=32, num_classes=10)
    torch.save(model.state_dict(), tmp_path / "wide.pth")
    done = convert(tmp_path / "wide.pth", tmp_path / "out.fixed.safetensors", arch=WIDE)
    assert done.info.heads[0].spec.kind == "orthogonal"
    (note,) = done.notes
    assert "orthogonal" in note and "386" in note
    with pytest.raises(HeadSpecError, match="386"):
        convert(tmp_path / "wide.pth", tmp_path / "other.fixed.safetensors", arch=WIDE, head="hadamard")


# Of scikit-image's photographs.
COMPARED = ("astronaut.png", "coffee.png", "camera.png", "motorcycle_left.png", "grass.png")


def _crops(names: tuple[str, ...], each: int) -> list[Image.Image]:
    """Square crops of photographs, 0.4 to 1.0 of the shorter side, half of them mirrored: 224 x 224."""
    folder = Path(pytest.importorskip("skimage.data").__file__).parent
    rng = np.random.default_rng(0)
    crops = []
    for name in names:
        photograph = Image.open(folder / name).convert("RGB")
        for k in range(each):
            side = int(rng.uniform(0.4, 1.0) * min(photograph.size))
            x, y = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
            crop = photograph.resize((224, 224), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
            crops.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if k % 2 else crop)
    return crops


@torch.inference_mode()
def _answers(model: torch.nn.Module) -> torch.Tensor:
    pixels = np.stack([np.asarray(crop) for crop in _crops(COMPARED, 6)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1  # Lite0's mean and std are 0.5
    return torch.cat([model(batch) for batch in images.split(20)]).argmax(dim=1)


def test_signs_of_a_real_classifier_keep_its_answers(lite0: Path, tmp_path: Path) -> None:
    """EfficientNet-Lite0 of ImageNet without any training: 161 bytes a class, where the weights had 5,120."""
    done = convert(lite0, tmp_path / "plain.fixed.safetensors", head="binary")
    stored = load_file(done.path)
    assert stored["classifier.codes"].dtype == stored["classifier.gains"].dtype == torch.uint8
    assert stored["classifier.codes"].shape == (1000, 160)
    assert stored["classifier.gains"].shape == (1000,)
    assert "classifier.center" not in stored  # no images, no statistics
    assert done.savings.classifier_bytes_after == 1000 * (160 + 1 + 4) + 4
    assert "1280 signs" in done.notes[-1]
    assert all(check.passed for check in verify(done.path, source=lite0))

    expected = _answers(read_original(lite0).model())
    assert len(expected.unique()) > 8  # the question is not always the same
    unmatched = convert(lite0, tmp_path / "hadamard.fixed.safetensors", head="hadamard", match=False).path
    plain, without = (float((_answers(load(path)) == expected).double().mean()) for path in (done.path, unmatched))
    assert without < 0.1
    assert plain > 0.5


def _save(path: Path, name: str, **options: object) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, **options)
    torch.save({"arch": name, "state_dict": model.state_dict()}, path)
    return path


@pytest.mark.parametrize(
    ("name", "num_classes", "heads"),
    [
        ("test_efficientnet", 700, 1),  # more classes than features
        ("dla46_c", 12, 1),  # a 1x1 convolution
        ("deit_tiny_distilled_patch16_224", 12, 2),
    ],
)
def test_binary_heads_of_every_build(tmp_path: Path, name: str, num_classes: int, heads: int) -> None:
    source = _save(tmp_path / "model.pth", name, num_classes=num_classes)
    done = convert(source, tmp_path / "out.fixed.safetensors", head="binary", bits_per_class=40)
    stored = load_file(done.path)
    assert len(done.info.heads) == heads
    for record in done.info.heads:
        assert record.spec.bits_per_class == 40
        assert stored[f"{record.path}.codes"].shape == (num_classes, 5)
    assert all(check.passed for check in verify(done.path, source=source))


def test_one_bit_per_weight_is_the_binary_head(small_pth: Path, tmp_path: Path) -> None:
    plain = convert(small_pth, tmp_path / "a.fixed.safetensors", arch="test_efficientnet", head="binary")
    one = convert(
        small_pth, tmp_path / "b.fixed.safetensors", arch="test_efficientnet", head="binary", bits_per_weight=1
    )
    assert plain.path.read_bytes() == one.path.read_bytes()


@pytest.mark.parametrize("name", ["test_efficientnet", "dla46_c", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("bits", LEVELS)
def test_levels_of_every_build(tmp_path: Path, name: str, bits: float) -> None:
    source = _save(tmp_path / "model.pth", name, num_classes=12)
    done = convert(source, tmp_path / "out.fixed.safetensors", head="binary", bits_per_weight=bits)
    stored = load_file(done.path)
    for record in done.info.heads:
        assert record.spec.bits_per_weight == bits and record.spec.bits_per_class is None
        assert stored[f"{record.path}.codes"].shape == (12, LEVELS[bits].num_bytes(record.spec.num_features))
    assert all(check.passed for check in verify(done.path, source=source))
    assert f"{bits:g} bits" in removed_line(done.savings, done.info.heads)
    damaged = {key: tensor.clone() for key, tensor in stored.items()}
    damaged[f"{done.info.heads[0].path}.codes"][0, 0] ^= 1
    with pytest.raises(CodebookMismatchError):
        load(done.path).load_state_dict(damaged)


def test_widths_without_a_hadamard_matrix_have_signs_of_the_features(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=386, num_heads=2, depth=1, img_size=32, num_classes=10)
    torch.save(model.state_dict(), tmp_path / "wide.pth")
    done = convert(tmp_path / "wide.pth", tmp_path / "out.fixed.safetensors", arch=WIDE, head="binary")
    assert load_file(done.path)["head.codes"].shape == (10, 49)
    assert all(check.passed for check in verify(done.path))
    with pytest.raises(HeadSpecError, match="386") as refused:
        convert(tmp_path / "wide.pth", tmp_path / "b.fixed.safetensors", arch=WIDE, head="binary", bits_per_class=64)
    assert "386" in (refused.value.hint or "")
    assert not (tmp_path / "b.fixed.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head": "binary", "num_classes": 5}, "binary.*new label set"),
        ({"head": "binary", "match": False}, "binary"),
        ({"head": "hadamard", "bits_per_class": 8}, "bits_per_class.*binary.*hadamard"),
        ({"bits_per_class": 8}, "bits_per_class.*binary.*auto"),
        ({"bits_per_weight": 2}, "bits_per_weight.*binary.*auto"),
        ({"head": "binary", "bits_per_weight": 2.5}, "bits_per_weight.*1, 1.58, 2, 3, 4, not 2.5"),
        ({"head": "binary", "bits_per_weight": 0.5}, "bits_per_weight.*0.5.*bits_per_class"),
        ({"head": "binary", "bits_per_weight": 2, "bits_per_class": 8}, "bits_per_class.*bits_per_weight"),
    ],
)
def test_binary_options_that_do_not_go_together(small_pth: Path, tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        convert(small_pth, tmp_path / "out.fixed.safetensors", arch="test_efficientnet", **options)
    assert not list(tmp_path.iterdir())


def test_refusals_name_the_head(tmp_path: Path) -> None:
    source = _save(tmp_path / "model.pth", "crossvit_9_240", num_classes=12)
    with pytest.raises(HeadSpecError, match=r"^head\.0: .*128.*200"):
        convert(source, tmp_path / "out.fixed.safetensors", head="binary", bits_per_class=200)


def test_fixed_scale(tmp_path: Path) -> None:
    """As in the paper's figure 3: alpha stays where it was put, and is no parameter."""
    source = tmp_path / "model.pth"
    torch.save(build(parse_architecture("resnet20_cifar"), num_classes=12).state_dict(), source)
    out = tmp_path / "ten.fixed.safetensors"
    done = convert(source, out, alpha=10.0, fixed_scale=True, bias=False)
    model = load(out)
    head = model.get_classifier()
    assert head.spec.fixed_scale and float(head.scale) == 10.0
    assert list(head.parameters()) == []
    assert done.info.heads[0].spec.fixed_scale
    assert done.savings.parameters_after == sum(parameter.numel() for parameter in model.parameters())


def test_options_objects_and_names_are_the_same(small_pth: Path, tmp_path: Path) -> None:
    options = ConvertOptions.create(head="binary", bits_per_class=24, arch="test_efficientnet")
    paths = [
        convert(small_pth, tmp_path / "a.fixed.safetensors", options).path,
        convert(small_pth, tmp_path / "b.fixed.safetensors", options.replace(bits_per_class=9), bits_per_class=24).path,
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with pytest.raises(UsageError, match="scales"):
        convert(small_pth, tmp_path / "c.fixed.safetensors", scales=3)


def test_alpha_was_called_scale() -> None:
    assert ConvertOptions.create(scale=3.0).alpha == 3.0
    assert ConvertOptions().replace(scale=3.0) == ConvertOptions().replace(alpha=3.0)


@pytest.mark.parametrize("head", ["hadamard", "binary"])
def test_the_progress_of_choosing_codes_is_told(head: str, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=32, num_heads=2, depth=1, img_size=32, num_classes=700)
    torch.save(model.state_dict(), tmp_path / "wide.pth")
    told: list[tuple[str, int, int]] = []
    arch = "vit_tiny_patch16_224,embed_dim=32,num_heads=2,depth=1,img_size=32"
    convert(
        tmp_path / "wide.pth",
        tmp_path / "out.fixed.safetensors",
        arch=arch,
        head=head,
        on_progress=lambda *now: told.append(now),
    )
    assert told[-1][1:] == (700, 700)
    assert all(0 < done <= total for _, done, total in told)

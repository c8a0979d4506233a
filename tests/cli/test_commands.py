"""The commands as a person sees them: output on the right stream, exit codes, one line for each mistake."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Run = Callable[..., tuple[int, str, str]]
KNOWN = ("--arch", "test_efficientnet")  # recognising it takes seconds, and has its own tests


@pytest.fixture(scope="module")
def slim_bytes(small_pth: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from fixify import convert

    out = tmp_path_factory.mktemp("slim") / "small.fixed.safetensors"
    return convert(small_pth, out, arch="test_efficientnet").path.read_bytes()


def test_convert_real_checkpoint_of_foreign_names(run: Run, lite0: Path, tmp_path: Path) -> None:
    code, out, err = run("convert", lite0)
    assert code == 0, err
    slim = tmp_path / "efficientnet-lite0-57934424.fixed.safetensors"
    assert "1,280,000" in out
    assert "27.5 % of" in out
    assert f"next: fixify finetune {slim.name} --data DATA" in err
    stored, original = load_file(slim), torch.load(lite0, weights_only=True, map_location="cpu")
    backbone = [key for key in stored if not key.startswith("classifier.")]
    assert len(backbone) == len(original) - 2
    # Same order, other names: timm's file order is that of the original.
    from fixify.models.architectures import build, parse_architecture

    names = [key for key in build(parse_architecture("tf_efficientnet_lite0")).state_dict() if key in backbone]
    for name, tensor in zip(names, original.values(), strict=False):
        assert torch.equal(stored[name], tensor), name
    assert run("verify", slim, "--source", lite0)[0] == 0


def test_convert_calibrates_on_a_folder_of_images(run: Run, small_pth: Path, tmp_path: Path) -> None:
    folder = tmp_path / "secret" / "pictures"
    folder.mkdir(parents=True)
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    arguments = ("convert", small_pth, *KNOWN, "--head", "orthogonal", "--calibrate", folder, "--device", "cpu")
    code, _, err = run(*arguments, "--calibrate-images", "12")
    assert code == 0, err
    assert re.search(r"on 9 images of pictures; .* [\d.]+ % of 3 others", err)
    assert re.search(r"calibrated +on 9 images of pictures;", run("inspect", "small.fixed.safetensors")[1])
    code, out, _ = run(*arguments, "--json", "--force")
    said = json.loads(out)
    assert said["calibration"] == said["info"]["calibration"]
    assert {key: said["calibration"][key] for key in ("data", "num_images", "held_out")} == {
        "data": "pictures",
        "num_images": 12,
        "held_out": 4,
    }
    assert b"secret" not in (tmp_path / "small.fixed.safetensors").read_bytes()
    code, _, err = run("convert", small_pth, "--calibrate", folder, "--num-classes", "5", "--force")
    assert code == 2 and "label set" in err


def test_nothing_is_replaced_without_force(run: Run, small_pth: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.fixed.safetensors"
    out.write_text("precious")
    code, _, err = run("convert", small_pth)
    assert code == 1
    assert "small.fixed.safetensors" in err and "--force" in err
    assert out.read_text() == "precious"
    assert run("convert", small_pth, *KNOWN, "--force")[0] == 0
    assert out.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "check"),
    [
        (("--head", "orthogonal", "--no-bias", "--seed", 5), {"kind": "orthogonal", "bias": False, "seed": 5}),
        (("--num-classes", 37, "--no-standardize"), {"kind": "hadamard", "num_classes": 37, "standardize": False}),
        (("--no-normalize",), {"kind": "hadamard", "normalize": False, "standardize": True}),
        (("--alpha", 3.5, "--dtype", "bfloat16"), {"kind": "hadamard", "num_classes": 300}),
        (("--scale", 3.5), {"kind": "hadamard"}),  # the old spelling
    ],
)
def test_convert_options_reach_the_head(
    run: Run, small_pth: Path, options: tuple[object, ...], check: dict[str, object]
) -> None:
    code, out, err = run("convert", small_pth, *KNOWN, "--json", "-o", "a.safetensors", *options)
    assert code == 0, err
    said = json.loads(out)
    assert said["path"] == "a.safetensors"
    spec = said["info"]["heads"][0]["spec"]
    assert {key: spec[key] for key in check} == check
    stored = load_file("a.safetensors")
    if 3.5 in options:
        assert stored["classifier.scale"].item() == 3.5
    assert stored["conv_stem.weight"].dtype == (torch.bfloat16 if "bfloat16" in options else torch.float32)


def test_a_binary_head(run: Run, small_pth: Path) -> None:
    binary = ("convert", small_pth, *KNOWN, "--head", "binary")
    code, out, err = run(*binary, "--bits-per-class", 44, "-o", "b.fixed.safetensors")
    assert code == 0, err
    assert "76,800" in out and "13,200" in out and "44" in err
    out = run("inspect", "b.fixed.safetensors")[1]
    assert "44 bits" in out and "7 bytes" in out and max(map(len, out.splitlines())) <= 80
    assert run("verify", "b.fixed.safetensors", "--source", small_pth)[0] == 0
    code, _, err = run("convert", small_pth, "--bits-per-class", 44)
    assert code == 2 and "bits_per_class" in err and "--head binary" in err
    code, _, err = run(*binary, "--num-classes", 5)
    assert code == 2 and "label set" in err


class _Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def _write_bad(kind: str, folder: Path) -> Path:
    path = folder / "bad.pth"
    if kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        torch.save({"a": torch.zeros(100_000)}, path)
        path.write_bytes(path.read_bytes()[:200_000])
    elif kind == "malicious":
        path.write_bytes(pickle.dumps(_Malicious()))
    elif kind == "malicious zip":
        torch.save({"a": torch.zeros(1), "b": _Malicious()}, path)
    elif kind == "unknown":
        torch.save({"a": torch.zeros(2, 3), "b": torch.zeros(7)}, path)
    elif kind == "nan":
        import timm

        state = timm.create_model("test_efficientnet", num_classes=10).state_dict()
        state["conv_stem.weight"][0, 0, 0, 0] = float("nan")
        torch.save(state, path)
    elif kind == "truncated safetensors":
        save_file({"a": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:500])
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("text", "bad.pth"),
        ("empty", "empty"),
        ("truncated", "bad.pth"),
        ("malicious", "system"),
        ("malicious zip", "system"),
        ("unknown", "No architecture"),
        ("nan", "conv_stem.weight"),
        ("truncated safetensors", "bad.pth"),
        ("missing", "no file"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(run: Run, tmp_path: Path, kind: str, said: str) -> None:
    path = _write_bad(kind, tmp_path)
    before = set(tmp_path.iterdir())
    code, out, err = run("convert", path)
    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert "Traceback" not in err
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["convert", "SMALL", "--arch", "resnte50"], 1, "resnet50"),
        (["convert", "SMALL", "--arch", "resnet50"], 1, "timm/resnet50"),
        (["convert", "SMALL", "--head", "hadamrad"], 2, "hadamard"),
        (["convert", "SMALL", "--dtype", "int3"], 2, "float16"),
        (["convert", "SMALL", "--num-classes", "0"], 2, "num_classes"),
        (["convert", "SMALL", "-o", "no/such/folder/a.safetensors"], 1, "mkdir -p no/such/folder"),
        (["convert"], 2, "source"),
        (["convrt"], 2, "convert"),
        (["inspect", "SMALL"], 1, ".safetensors"),
        (["verify", "missing.safetensors"], 1, "no file"),
        (["report", "resnte50"], 1, "resnet50"),
        (["report"], 2, "*.fixed.safetensors"),
        (["report", "vit_base_patch16_clip_224.nothing"], 1, "clip"),
    ],
)
def test_mistakes(run: Run, small_pth: Path, arguments: list[str], code: int, said: str) -> None:
    got, out, err = run(*[str(small_pth) if word == "SMALL" else word for word in arguments])
    assert got == code
    assert said in err.lower() or said in err
    assert "Traceback" not in err
    assert out == ""


def test_inspect_and_report(run: Run, slim_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.fixed.safetensors").write_bytes(slim_bytes)
    code, out, _ = run("inspect", "a.fixed.safetensors")
    assert code == 0
    assert "300 classes x 256 features" in out and max(map(len, out.splitlines())) <= 80
    assert json.loads(run("inspect", "a.fixed.safetensors", "--json")[1])["architecture"]["name"] == "test_efficientnet"

    code, out, _ = run("report")
    assert code == 0
    assert "a.fixed.safetensors" in out
    rows = json.loads(run("report", "resnet50", "mobilenetv3_small_100", "a.fixed.safetensors", "--json")[1])["models"]
    assert [row["savings"]["parameters_before"] for row in rows[:2]] == [25_557_032, 2_542_856]
    assert rows[0]["savings"]["removed"] == 2_048_000
    assert [row["fixed"] for row in rows] == [False, False, True]


def test_names_are_printed_as_they_are(run: Run, small_pth: Path, tmp_path: Path) -> None:
    """`[v2]` and `[/x]` would be styles to rich; the second one of a tag that was never opened, an error."""
    (tmp_path / "model[v2].pth").write_bytes(small_pth.read_bytes())
    labels = ["a", "[/x]", "[bold]", *(f"class {number}" for number in range(297))]
    (tmp_path / "labels.txt").write_text("\n".join(labels) + "\n")
    code, _, err = run("convert", "model[v2].pth", *KNOWN, "--labels", "labels.txt")
    assert code == 0, err
    code, out, err = run("report", "model[v2].pth", *KNOWN)
    assert code == 0 and "model[v2].pth" in out
    code, out, err = run("inspect", "model[v2].fixed.safetensors")
    assert code == 0 and "a, [/x], [bold], class 0" in out and out.startswith("model[v2].fixed.safetensors"), err
    code, out, _ = run("verify", "model[v2].fixed.safetensors")
    assert code == 0 and out.count("ok ") >= 5 and max(map(len, out.splitlines())) <= 80


def test_verify_exits_with_3_if_a_check_fails(run: Run, slim_bytes: bytes, small_pth: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(slim_bytes)
    assert run("verify", "a.safetensors")[0] == 0
    tensors = load_file("a.safetensors")
    with safe_open("a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors["conv_stem.weight"].view(torch.int32)[0, 0, 0, 0] ^= 1  # one bit: finite still, and not the original's
    save_file(tensors, "a.safetensors", metadata=metadata)
    code, out, err = run("verify", "a.safetensors", "--source", small_pth, "--json")
    assert code == 3
    failed = [check["name"] for check in json.loads(out)["checks"] if not check["passed"]]
    assert failed == ["digest", "backbone"] and "digest" in err


def test_predict_says_where_names_come_from(run: Run, slim_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "small.fixed.safetensors").write_bytes(slim_bytes)
    Image.new("RGB", (64, 64)).save(tmp_path / "grey.png")
    code, out, err = run("predict", "small.fixed.safetensors", "grey.png", "--top", 1)
    assert code == 0 and "grey.png" in out
    assert "small.fixed.safetensors" in err and "--labels FILE" in err
    (tmp_path / "names.txt").write_text("\n".join(f"thing {index}" for index in range(300)))
    code, out, err = run("predict", "small.fixed.safetensors", "grey.png", "--labels", "names.txt")
    assert code == 0 and "thing" in out and err == ""

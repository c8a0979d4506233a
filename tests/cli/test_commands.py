"""The commands as a person sees them: output on the right stream, exit codes, one line for each mistake."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def slim_bytes(small_pth: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from fixify import convert

    out = tmp_path_factory.mktemp("slim") / "small.fixed.safetensors"
    return convert(small_pth, out, arch="test_efficientnet").path.read_bytes()


def test_convert_real_checkpoint_of_foreign_names(run: Run, lite0: Path, tmp_path: Path) -> None:
    code, out, err = run("convert", lite0)
    assert code == 0, err
    slim = tmp_path / "efficientnet-lite0-57934424.fixed.safetensors"
    assert "1,280,000 classifier weights are gone" in out
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


def test_convert_says_all_of_it_in_json(run: Run, small_pth: Path, tmp_path: Path) -> None:
    code, out, _err = run("convert", small_pth, "--arch", "test_efficientnet", "--json", "-o", "a.safetensors")
    said = json.loads(out)
    assert code == 0
    assert said["path"] == "a.safetensors"
    assert said["savings"]["removed"] == 300 * 256
    assert said["savings"]["bytes_before"] - said["savings"]["bytes_after"] > 300_000
    assert said["info"]["architecture"]["name"] == "test_efficientnet"
    assert (tmp_path / "a.safetensors").exists()


def test_convert_calibrates_on_a_folder_of_images(run: Run, small_pth: Path, tmp_path: Path) -> None:
    folder = tmp_path / "secret" / "pictures"
    folder.mkdir(parents=True)
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    arguments = ("convert", small_pth, "--head", "orthogonal", "--calibrate", folder, "--device", "cpu")
    code, _, err = run(*arguments, "--calibrate-images", "12")
    assert code == 0, err
    assert re.search(r"Calibrated on 9 images of pictures; agreed with the original on [\d.]+ % of 3 others\.\n", err)
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
    assert code == 2 and "a new label set has none" in err


def test_nothing_is_replaced_without_force(run: Run, small_pth: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.fixed.safetensors"
    out.write_text("precious")
    code, _, err = run("convert", small_pth)
    assert code == 1
    assert err == "error: small.fixed.safetensors exists already.\nChoose another name with -o, or add --force.\n"
    assert out.read_text() == "precious"
    assert run("convert", small_pth, "--force")[0] == 0
    assert out.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "check"),
    [
        (["--head", "orthogonal"], {"kind": "orthogonal"}),
        (["--head", "hadamard"], {"kind": "hadamard"}),
        (["--num-classes", "37"], {"num_classes": 37}),
        (["--seed", "5"], {"seed": 5}),
        (["--no-bias"], {"bias": False}),
        (["--no-standardize"], {"standardize": False}),
    ],
)
def test_convert_options_reach_the_head(
    run: Run, small_pth: Path, options: list[str], check: dict[str, object]
) -> None:
    code, out, err = run("convert", small_pth, "--json", *options)
    assert code == 0, err
    spec = json.loads(out)["info"]["heads"][0]["spec"]
    assert {key: spec[key] for key in check} == check


def test_scale_and_dtype(run: Run, small_pth: Path) -> None:
    assert run("convert", small_pth, "--scale", "3.5", "--dtype", "bfloat16")[0] == 0
    stored = load_file("small.fixed.safetensors")
    assert stored["classifier.scale"].item() == 3.5
    assert stored["conv_stem.weight"].dtype == torch.bfloat16


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
        (["convert", "SMALL", "--arch", "resnet50"], 1, "not a checkpoint of timm/resnet50"),
        (["convert", "SMALL", "--head", "hadamrad"], 1, "hadamard"),
        (["convert", "SMALL", "--dtype", "int3"], 2, "float16"),
        (["convert", "SMALL", "--num-classes", "0"], 2, "num-classes"),
        (["convert", "SMALL", "-o", "no/such/folder/a.safetensors"], 1, "mkdir -p no/such/folder"),
        (["convert"], 2, "source"),
        (["convrt"], 2, "convert"),
        (["inspect", "SMALL"], 1, "not a readable .safetensors"),
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
    assert "300 classes x 256 features" in out
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
    code, _, err = run("convert", "model[v2].pth", "--labels", "labels.txt")
    assert code == 0, err
    code, out, err = run("report", "model[v2].pth")
    assert code == 0 and "model[v2].pth" in out
    code, out, err = run("inspect", "model[v2].fixed.safetensors")
    assert code == 0 and "a, [/x], [bold], class 0" in out and out.startswith("model[v2].fixed.safetensors"), err
    code, out, _ = run("verify", "model[v2].fixed.safetensors")
    assert code == 0 and out.count("ok ") >= 5


def test_tables_fit_80_columns(run: Run, slim_bytes: bytes, small_pth: Path, tmp_path: Path) -> None:
    (tmp_path / "a.fixed.safetensors").write_bytes(slim_bytes)
    for arguments in (["inspect", "a.fixed.safetensors"], ["verify", "a.fixed.safetensors"], ["report", "resnet50"]):
        assert max(map(len, run(*arguments)[1].splitlines())) <= 80


def test_verify_exits_with_3_if_a_check_fails(run: Run, slim_bytes: bytes, small_pth: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(slim_bytes)
    assert run("verify", "a.safetensors", "--source", small_pth)[0] == 0
    tensors = load_file("a.safetensors")
    with safe_open("a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors["conv_stem.weight"].view(torch.int32)[0, 0, 0, 0] ^= 1  # one bit: finite still, and not the original's
    save_file(tensors, "a.safetensors", metadata=metadata)
    code, out, err = run("verify", "a.safetensors", "--source", small_pth, "--json")
    assert code == 3
    assert not json.loads(out)["passed"]
    assert "backbone" in err


def test_a_real_process_and_its_streams(small_pth: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fixify", "convert", str(small_pth), "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == "small.fixed.safetensors"
    assert "\x1b" not in done.stdout + done.stderr
    refused = subprocess.run(
        [sys.executable, "-m", "fixify", "convert", str(small_pth)], cwd=tmp_path, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr.startswith("error: small.fixed.safetensors exists already.")


def test_predict_says_where_names_come_from(run: Run, slim_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "small.fixed.safetensors").write_bytes(slim_bytes)
    Image.new("RGB", (64, 64)).save(tmp_path / "grey.png")
    code, out, err = run("predict", "small.fixed.safetensors", "grey.png", "--top", 1)
    assert code == 0 and "grey.png" in out
    assert "holds no class names, so they are numbers: --labels FILE gives them." in err
    (tmp_path / "names.txt").write_text("\n".join(f"thing {index}" for index in range(300)))
    code, out, err = run("predict", "small.fixed.safetensors", "grey.png", "--labels", "names.txt")
    assert code == 0 and "thing" in out and err == ""


def test_binary_in_a_real_process(small_pth: Path, tmp_path: Path) -> None:
    def fixify(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fixify", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})

    done = fixify("convert", str(small_pth), "--head", "binary", "--bits-per-class", "44", "-o", "b.fixed.safetensors")
    assert done.returncode == 0, done.stderr
    assert "76,800 classifier weights became 13,200 signs" in done.stdout
    assert "classifier: 44 signs a class taken from the old classifier." in done.stderr
    shown = fixify("inspect", "b.fixed.safetensors")
    assert "44 bits a class (7 bytes with its length)" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    checked = fixify("verify", "b.fixed.safetensors", "--source", str(small_pth))
    assert checked.returncode == 0, checked.stderr
    refused = fixify("convert", str(small_pth), "--bits-per-class", "44")
    assert refused.returncode == 2
    assert refused.stderr == "error: bits_per_class belongs to head binary, not auto.\nAdd --head binary.\n"
    refused = fixify("convert", str(small_pth), "--head", "binary", "--num-classes", "5")
    assert refused.returncode == 2
    assert "a new label set has none" in refused.stderr

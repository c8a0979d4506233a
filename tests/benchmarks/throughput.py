"""Compare the training throughput of `fixify finetune` and of timm's train.py.

    python tests/benchmarks/throughput.py PATH/TO/pytorch-image-models/train.py [--out results/throughput.json]

Both train the same model on the same images (Fashion-MNIST from Debian's package dataset-fashion-mnist, as a folder of
RGB PNG files) with the same batch size, image size, augmentation, optimiser, precision and loader processes. They take
turns, and each round reverses the order, so that other work on the machine slows both. The benchmark times the function
that trains one epoch, loading included: `train_one_epoch` of timm's script and `train_epoch` of fixify. It leaves out
the first epoch, in which loader processes start. Besides wall time it reports the processor time of the process and its
loaders, which depends less on other work.

Each round gives one ratio, fixify's to timm's; the result is the median and the range of the ratios. timm's script is
not in its wheel: take it from a checkout of timm.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

import fixify
from fixify import __main__ as cli
from fixify.data import open_data

CASES: dict[str, dict[str, Any]] = {
    "resnet18": {"size": 64, "model": {}},
    "mobilenetv3_small_050": {"size": 96, "model": {}},
    "vit_tiny_patch16_224": {"size": 64, "model": {"img_size": 64}},
}


def write_images(root: Path, train: int, val: int) -> None:
    """Write the first images of Fashion-MNIST as root/train/CLASS/00001.png and root/val/..."""
    for split, count in (("train", train), ("val", val)):
        data = open_data("fashion-mnist", split=split)  # type: ignore[arg-type]
        for index in range(count):
            image, label = data.images.load(index)
            path = root / split / f"class{label}" / f"{index:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.convert("RGB").save(path)


def cpu_seconds(pid: int) -> float:
    """Measure the processor time of a process and of its children, running or waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")
    children = [child for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
    return own + sum(cpu_seconds(int(child)) for child in children)


def timed(train: Callable[..., Any], epochs: list[tuple[float, float]]) -> Callable[..., Any]:
    """Wrap a function so that it adds wall and processor seconds of each call to `epochs`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        wall, cpu = time.perf_counter(), cpu_seconds(os.getpid())
        result = train(*args, **kwargs)
        epochs.append((time.perf_counter() - wall, cpu_seconds(os.getpid()) - cpu))
        return result

    return call


def in_this_process(who: str, script: str, out: str, *arguments: str) -> None:
    """Run one of the two programs with these arguments, and write the times of its epochs."""
    epochs: list[tuple[float, float]] = []
    sys.argv = [script, *arguments]
    if who == "timm":
        spec = importlib.util.spec_from_file_location("timm_train", script)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.train_one_epoch = timed(module.train_one_epoch, epochs)  # type: ignore[attr-defined]
        module.main()
    else:
        from fixify.training import run

        run.train_epoch = timed(run.train_epoch, epochs)
        with contextlib.suppress(SystemExit):
            cli.main()
    Path(out).write_text(json.dumps(epochs))


def measure(
    who: str, script: Path, arguments: list[str], folder: Path, options: argparse.Namespace
) -> dict[str, float]:
    out, log = folder / "epochs.json", folder / f"{who}.log"
    out.unlink(missing_ok=True)
    with log.open("w") as file:
        command = [sys.executable, __file__, "--timed", who, str(script), str(out), *arguments]
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    epochs = json.loads(out.read_text()) if out.exists() else []
    if len(epochs) != options.epochs:
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{log.read_text()[-3000:]}")
    wall, cpu = (sum(times) for times in zip(*epochs[1:], strict=True))
    images = options.images // options.batch_size * options.batch_size * (options.epochs - 1)
    return {"images_per_second": round(images / wall, 2), "images_per_cpu_second": round(images / cpu, 2)}


def arguments_for(who: str, name: str, data: Path, slim: Path, folder: Path, options: argparse.Namespace) -> list[str]:
    size = str(CASES[name]["size"])
    shared = [
        *("--device", "cpu", "--workers", str(options.workers), "--batch-size", str(options.batch_size)),
        *("--epochs", str(options.epochs), "--opt", "sgd", "--lr", "0.01", "--momentum", "0.9", "--crop-pct", "1.0"),
        *("--weight-decay", "1e-4", "--sched", "cosine", "--warmup-epochs", "0"),
        *("--scale", "0.5", "1.0", "--ratio", "0.75", "1.3333", "--hflip", "0.5", "--color-jitter", "0"),
    ]
    if who == "fixify":
        return [
            *("finetune", str(slim), "--data", str(data), "-o", str(folder / "run"), "--force", "--img-size", size),
            *shared,
        ]
    return [
        *("--data-dir", str(data), "--train-split", "train", "--val-split", "val", "--output", str(folder)),
        *("--model", name, "--num-classes", "10", "--input-size", "3", size, size, "--smoothing", "0"),
        *("--sched-on-updates", "--checkpoint-hist", "1", "--log-interval", "100000"),
        *(["--model-kwargs", f"img_size={size}"] if CASES[name]["model"] else []),
        *shared,
    ]


def make_slim(name: str, folder: Path) -> Path:
    """Write a slim checkpoint of an untrained model, because speed does not depend on the weights."""
    model = timm.create_model(name, num_classes=10, **CASES[name]["model"])
    path, slim = folder / f"{name}.pth", folder / f"{name}.fixed.safetensors"
    torch.save(model.state_dict(), path)
    fixify.convert(path, slim, arch=name)
    return slim


def machine() -> dict[str, Any]:
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores_used": len(os.sched_getaffinity(0)),
        "load_average": [
            round(load, 1) for load in os.getloadavg()
        ],  # of the whole machine; a load above its number of cores adds noise
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "fixify": fixify.__version__,
    }


def ratios(rounds: list[dict[str, dict[str, float]]], what: str) -> dict[str, Any]:
    found = [each["fixify"][what] / each["timm"][what] for each in rounds]
    return {"median": round(statistics.median(found), 3), "range": [round(min(found), 3), round(max(found), 3)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="timm's train.py")
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=1920)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="loader processes; timm's script needs at least 1")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON after each round")
    options = parser.parse_args()
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in options.models}
    settings = {key: value for key, value in vars(options).items() if key not in ("script", "out", "models", "rounds")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = folder / "images"
        write_images(data, options.images, options.batch_size)
        slims = {name: make_slim(name, folder) for name in options.models}
        for number in range(options.rounds):
            for name in options.models:
                order = ("timm", "fixify") if number % 2 == 0 else ("fixify", "timm")
                found = {}
                for who in order:
                    arguments = arguments_for(who, name, data, slims[name], folder, options)
                    found[who] = measure(who, options.script, arguments, folder, options)
                rounds[name].append(found)
                wall, cpu = (ratios(rounds[name], f"images_per_{unit}") for unit in ("second", "cpu_second"))
                print(
                    f"{name}, {number + 1} rounds: fixify / timm, images per second {wall}, per CPU second {cpu}",
                    flush=True,
                )
            results = [
                {
                    "model": name,
                    "img_size": CASES[name]["size"],
                    "ratio": ratios(rounds[name], "images_per_second"),
                    "cpu_ratio": ratios(rounds[name], "images_per_cpu_second"),
                    "rounds": rounds[name],
                }
                for name in options.models
            ]
            if options.out is not None:
                content = {"machine": machine(), "settings": settings, "results": results}
                options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--timed"]:
        in_this_process(*sys.argv[2:])
    else:
        main()

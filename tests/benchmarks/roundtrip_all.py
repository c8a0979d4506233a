"""Convert every architecture that has a classifier, load the slim file in another process, and compare.

    python tests/benchmarks/roundtrip_all.py --log roundtrip.jsonl

Each architecture is built with random weights and 37 classes, and run on the smallest images that it takes. Its state
dict is saved and converted with `fixify.convert`; a second process, which sees only slim files, reads it with
`fixify.load` and runs it. The logits must equal those of the original in memory with its classifier layers replaced,
and the inputs of the classifiers must equal those in the original, both bit for bit. For timm's models,
`forward_features`, `forward_head(pre_logits=True)`, `reset_classifier` and the modes are tested too.

Each model adds one line to the log at once; with the same log, an interrupted run continues. A model that is too large
for a workshop machine is built with fewer blocks or for smaller images, and the log says so. The exit code is 1 if any
model failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architecture_variants import UNSUITED, buildable, count, images, original, size_argument, wanted
from safetensors import safe_open
from safetensors.torch import save_file
from second_process import Reader, digest, fixed_heads, observe, tensors, watched
from torch import Tensor, nn

import fixify
from fixify.errors import FixifyError
from fixify.heads import FixedClassifier, codebook
from fixify.models import Architecture, default_num_classes, find_classifiers, preprocessing
from fixify.surgery import apply_heads_

SIZES = (64, 96, 128, 160, 192, 224)  # image sizes to try until the model takes one


@torch.inference_mode()
def round_trip(arch: Architecture, folder: Path, reader: Reader) -> dict[str, Any]:
    """Run the round trip of one architecture; raise if any check fails."""
    seed = int(hashlib.sha256(arch.spelled.encode()).hexdigest()[:6], 16)
    arch, reduced = buildable(arch)
    for gain in (None, 1.5):
        with torch.inference_mode(False):
            model = original(arch, seed, gain)
        sites = {site.path: model.get_submodule(site.path) for site in find_classifiers(model, arch)}
        pixels, x, features, before, plain = first_run(model, arch, sites, seed)
        if all((value[0] - value[1]).norm() > 1e-4 * value.norm() for value in before.values()):
            break  # otherwise the weights hide the image
    size = count(model)
    pre_logits = digest(model.forward_head(features, pre_logits=True)) if features is not None else None

    source, slim = folder / "original.safetensors", folder / "slim.fixed.safetensors"
    save_file({key: value.contiguous() for key, value in untied(model.state_dict()).items()}, source)
    start = time.perf_counter()
    done = fixify.convert(source, slim, arch=arch.spelled)
    seconds = time.perf_counter() - start
    source.unlink()
    check(done.savings.parameters_before == size, "parameters before")

    # The same model in memory: its own backbone with the heads that the file records.
    with torch.inference_mode(False):
        apply_heads_(model, done.info.heads)
    heads = fixed_heads(model)
    with safe_open(slim, framework="pt") as file, torch.inference_mode(False):
        for path, head in heads.items():
            prefix = f"{path}."
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            head.load_state_dict({name[len(prefix) :]: file.get_tensor(name) for name in names})
    model.eval()
    check(done.savings.parameters_after == count(model), "parameters after")
    check(set(heads) == set(sites), "every classifier layer is fixed")
    with recorded(model) as again:
        expected = observe(model, x)
    check(expected["features"] == {path: digest(value) for path, value in before.items()}, "what reaches the heads")
    for path, value in before.items():
        check(close_to_formula(heads[path], value), f"{path} computes the formula")
    logits = np.array(expected["logits"][0])
    check(bool(np.isfinite(logits).all()), "finite logits")
    if features is not None:
        keep_working(model, x, features, again, pre_logits)
    del model, heads, sites

    found = reader.read(slim, pixels, seed)
    check(found["features"] == expected["features"], "features of the file are those of the original")
    check(found["idle"] == expected["idle"], "auxiliary heads of the file")
    exact = found["logits"] == expected["logits"]
    error = float(np.abs(np.subtract(found["logits"][0], logits)).max())
    check(exact or error <= 1e-5 * float(np.abs(logits).max()), f"logits differ by {error}")
    return {
        "heads": Counter(f"{r.layer_type} {r.spec.kind}" for r in done.info.heads),
        "features": [record.spec.num_features for record in done.info.heads],
        "exact": exact,
        "pixels": pixels,
        "reduced": reduced,
        "parameters": size,
        "removed": done.savings.removed,
        "spread": float(f"{logits.reshape(2, -1).std(axis=0).mean():.3g}"),  # between the logits of the two images
        "plain": plain,
        "convert_seconds": round(seconds, 2),
        "load_seconds": found["seconds"],
    }


def first_run(model: Any, arch: Architecture, sites: dict[str, nn.Module], seed: int) -> tuple[Any, ...]:
    """Find the smallest images that the model takes, its features and logits, and the inputs of its classifiers."""
    whole = preprocessing(arch)["input_size"][1]
    fixed = size_argument(arch) is not None
    problem: Exception | None = None
    for pixels in (whole,) if fixed else (*(size for size in SIZES if size < whole), whole):
        x = images(arch, pixels, seed)
        try:
            with watched(sites) as seen, recorded(model) as outputs:
                logits = model(x)
        except UNSUITED as error:
            problem = error
            continue
        if next(tensors(logits)).isfinite().all():
            features = None
            if arch.library == "timm":
                features = outputs[0] if outputs else model.forward_features(x)
            return pixels, x, features, seen, list(next(tensors(logits)).shape)
    raise RuntimeError(f"does not run at {whole}: {problem or 'the logits are not finite'}")


@contextmanager
def recorded(model: Any) -> Iterator[list[Any]]:
    """Record what `forward_features` returns while the model runs."""
    outputs: list[Any] = []
    if not hasattr(model, "forward_features"):
        yield outputs
        return
    inner = model.forward_features

    def outer(*args: Any, **kwargs: Any) -> Any:
        outputs.append(inner(*args, **kwargs))
        return outputs[-1]

    model.forward_features = outer
    try:
        yield outputs
    finally:
        del model.forward_features


def close_to_formula(head: FixedClassifier, features: Tensor) -> bool:
    """Check scale * normalize((x - center) / spread) @ Q.T + bias, in float64 and directly from the codebook."""
    x = features.movedim(1, -1) if head.channel_dim == 1 else features
    x = x.double()
    if head.center is not None and head.num_batches_tracked:
        x = (x - head.center.double()) / head.spread.double()
    x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    codes = None if head.codes is None else head.codes.numpy()
    wanted = head.scale.double() * x @ torch.tensor(codebook(head.spec, codes)).double().T
    if head.bias is not None:
        wanted = wanted + head.bias.double()
    got = head(features)
    got = (got.movedim(1, -1) if head.channel_dim == 1 else got).double()
    return torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)


def keep_working(model: Any, x: Tensor, features: Any, again: list[Any], pre_logits: str | None) -> None:
    """Check what timm's models offer besides logits."""
    again = again[0] if again else model.forward_features(x)
    check(digest(again) == digest(features), "forward_features")
    check(digest(model.forward_head(features, pre_logits=True)) == pre_logits, "forward_head(pre_logits=True)")
    heads = fixed_heads(model).values()
    model.train()
    check(all(head.training for head in heads), "train()")
    model.eval()
    check(not any(head.training for head in heads), "eval()")
    with torch.inference_mode(False):
        model.reset_classifier(5)
    check(not any(isinstance(m, FixedClassifier) for p in parts(model.get_classifier()) for m in p.modules()), "reset")
    logits = model.eval().forward_head(features)
    check(next(tensors(logits)).shape[-1 if next(tensors(logits)).ndim == 2 else 1] == 5, "logits after reset")


def parts(classifier: Any) -> tuple[nn.Module, ...]:
    return classifier if isinstance(classifier, tuple) else (classifier,)


def untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory, which safetensors refuses."""
    seen: set[int] = set()
    free = {}
    for key, value in state.items():
        free[key] = value.clone() if value.data_ptr() in seen and value.numel() else value
        seen.add(value.data_ptr())
    return free


def check(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, help="where the results go, one JSON object per line")
    parser.add_argument("--only", nargs="*", default=[], help="only these architectures (library/name)")
    parser.add_argument(
        "--folder", type=Path, help="folder for the files, of which there is one at a time. Default: /tmp"
    )
    parser.add_argument("--again", action="store_true", help="repeat the models that failed")
    parser.add_argument("--largest", type=float, default=1e12, help="leave out models with more parameters")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = arguments.log.read_text().splitlines() if arguments.log.exists() else []
    rows = {row["arch"]: row for row in map(json.loads, lines)}
    done = {spelled for spelled, row in rows.items() if row["ok"] or not arguments.again}
    reader = Reader()
    with open(arguments.log, "a") as log:
        for size, arch in wanted(arguments.only):
            if arch.spelled in done:
                continue
            if size > arguments.largest:
                print(f"left out: {arch.spelled}, {size:,} parameters")
                continue
            start = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                try:
                    row = {"arch": arch.spelled, "ok": True, **round_trip(arch, Path(folder), reader)}
                    row["encoder"] = not default_num_classes(arch)
                except (FixifyError, *UNSUITED, AttributeError, NotImplementedError) as error:
                    where = traceback.format_exc(limit=-2).splitlines()[-5:]
                    said = f"{type(error).__name__}: {error}"[:500]
                    row = {"arch": arch.spelled, "ok": False, "error": said, "where": where}
            row["seconds"] = round(time.perf_counter() - start, 2)
            rows[arch.spelled] = row
            log.write(json.dumps(row) + "\n")
            log.flush()
    reader.close()
    print("\n".join(summary(list(rows.values()))))
    return int(not all(row["ok"] for row in rows.values()))


def summary(rows: list[dict[str, Any]]) -> list[str]:
    good = [row for row in rows if row["ok"]]
    lines = []
    for title, own in (
        ("timm", [row for row in good if row["arch"].startswith("timm/") and not row["encoder"]]),
        ("torchvision", [row for row in good if row["arch"].startswith("torchvision/")]),
        ("timm's encoders, built with classes", [row for row in good if row["encoder"]]),
    ):
        names = {row["arch"].partition(",")[0] for row in own}
        reduced = [row for row in own if row["reduced"]]
        exact = sum(row["exact"] for row in own)
        lines.append(
            f"{title}: {len(names)} architectures, {len(own)} round trips, {exact} with logits equal bit for bit; "
            f"{len(reduced)} built smaller; {sum(row['spread'] == 0 for row in own)} blind to the image"
        )
    kinds: Counter[str] = Counter()
    for row in good:
        kinds.update(row["heads"])
    lines.append("heads: " + ", ".join(f"{number} {kind}" for kind, number in kinds.most_common()))
    lines += [f"FAILED {row['arch']}: {row['error']}" for row in rows if not row["ok"]]
    return lines


if __name__ == "__main__":
    sys.exit(main())

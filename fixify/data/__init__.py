"""Turn data names into batches of images: `open_data`, `match_classes`, `make_loader`."""

from fixify.data.class_matching import Matched, check_classes, match_classes
from fixify.data.dataset import ClassOrder, DataOptions, ImageSource, OpenedData, Split, Subset, listing_digest
from fixify.data.loader import (
    Augmentation,
    ImageLoader,
    Unreadable,
    UnreadableImages,
    default_workers,
    make_loader,
    name_the_first,
)
from fixify.data.preprocessing import Preprocessing, override
from fixify.data.registry import DATA_NAMES, draw_images, open_data, open_train_val, open_unlabelled
from fixify.data.sampler import Shard

__all__ = [
    "DATA_NAMES",
    "Augmentation",
    "ClassOrder",
    "DataOptions",
    "ImageLoader",
    "ImageSource",
    "Matched",
    "OpenedData",
    "Preprocessing",
    "Shard",
    "Split",
    "Subset",
    "Unreadable",
    "UnreadableImages",
    "check_classes",
    "default_workers",
    "draw_images",
    "listing_digest",
    "make_loader",
    "match_classes",
    "name_the_first",
    "open_data",
    "open_train_val",
    "open_unlabelled",
    "override",
]

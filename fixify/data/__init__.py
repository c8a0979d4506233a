"""Data names to batches of images: `open_data`, `open_unlabelled`, `draw_images`, `check_classes`, `make_loader`."""

from fixify.data.classes import Matched, check_classes, match_classes
from fixify.data.listing import listing_digest
from fixify.data.loader import Augmentation, ImageLoader, default_workers, make_loader
from fixify.data.names import DATA_NAMES, open_data, open_train_val
from fixify.data.opened import ClassOrder, ImageSource, OpenedData, Split, Subset
from fixify.data.options import DataOptions
from fixify.data.order import Share
from fixify.data.preprocessing import override
from fixify.data.unlabelled import draw_images, open_unlabelled
from fixify.data.unreadable import Unreadable, UnreadableImages

__all__ = [
    "DATA_NAMES",
    "Augmentation",
    "ClassOrder",
    "DataOptions",
    "ImageLoader",
    "ImageSource",
    "Matched",
    "OpenedData",
    "Share",
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
    "open_data",
    "open_train_val",
    "open_unlabelled",
    "override",
]

"""How a data set's labels are read, where its name alone leaves it open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fixify.data.opened import ClassOrder


@dataclass(frozen=True)
class DataOptions:
    """How a data set's labels are read. Names are timm's where timm has one.

    Attributes:
        class_order: How the class folders are sorted: "natural" is timm's order (2 before 10), "lexical" torchvision's;
            None is natural.
        class_map: A file that says which class has which label; see `fixify.data.class_map.read_class_map`. Images of
            classes that it does not name are left out.
        input_key: The column (`hfds/...`) or the file endings (`wds/...`, "jpg;png") of the images; None finds it.
        target_key: The column of the labels, or the field of the JSON file beside each image; None finds it.
        need_labels: False takes data without labels too; every label is then 0.
    """

    class_order: ClassOrder | None = None
    class_map: str | Path | None = None
    input_key: str | None = None
    target_key: str | None = None
    need_labels: bool = True

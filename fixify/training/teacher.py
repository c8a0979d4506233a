"""Reference models of a run: the original, whose accuracy is the goal, and the teacher, whose logits are learned."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fixify._files import sha256_of
from fixify._values import counted
from fixify.checkpoints.open import OpenModel, open_model
from fixify.data import ImageLoader, ImageSource, OpenedData, Subset, check_classes, override
from fixify.data.preprocessing import normalization
from fixify.errors import DataError
from fixify.metrics import Precision, autocast, check_input_size, eval_mode
from fixify.models.architectures import Preprocessing
from fixify.training import distributed
from fixify.training.options import FinetuneOptions


@dataclass(frozen=True)
class ReferenceModel:
    """A trained classifier of the same classes as the model that is trained.

    Attributes:
        name: Name of the file or the model, without folders.
        sha256: SHA-256 of the file, or of the weights if there is no single file; 64 hexadecimal digits.
        model: Images to logits, in eval mode.
        preprocessing: timm's data configuration of this model.
        notes: How the file was recognised, and what was read of it and what was left out, for the user.
    """

    name: str
    sha256: str
    model: nn.Module
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()


def open_reference(ref: str | Path, data: OpenedData, options: FinetuneOptions) -> ReferenceModel:
    """Open a checkpoint or a model name as a reference on some images.

    Args:
        ref: A checkpoint or a model name.
        data: The images; their classes match the model that is trained.
        options: Image size and crop.

    Raises:
        FixifyError: it cannot be opened (see `fixify.checkpoints.open.open_model`).
        DataError: it has other classes than the data.
        UsageError: it does not take images of `options.img_size`.
    """
    opened = open_model(ref)
    training = (opened.slim.training if opened.slim is not None else None) or {}
    if opened.num_classes != data.num_classes:
        raise DataError(
            f"{opened.name} has {counted(opened.num_classes, 'class', 'classes')}; the checkpoint that is "
            f"trained has {data.num_classes}.",
            hint="Use the checkpoint that was converted, or another one of the same classes.",
        )
    check_classes(data, opened.num_classes, training.get("class_names"), opened.labels)
    preprocessing = override(opened.preprocessing, img_size=options.img_size, crop_pct=options.crop_pct)
    if options.img_size is not None:
        check_input_size(opened.model, preprocessing["input_size"])
    return ReferenceModel(opened.name, reference_digest(ref, opened), opened.model, preprocessing, opened.notes)


def reference_digest(ref: str | Path, opened: OpenModel) -> str:
    """Compute the SHA-256 of the file `ref`; of the names and values of the weights if it is a folder or a model."""
    path = Path(ref).expanduser()
    if path.is_file():
        return sha256_of(path)
    found = hashlib.sha256()
    for name, tensor in opened.model.state_dict().items():
        found.update(name.encode() + b"\0")
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


class Teacher:
    """A frozen model that gets the same augmented images as the model that is trained.

    If the two models differ in mean, std or size, the images are normalised anew and resized for the teacher. Both take
    the same number of channels, which `fixify.training.facts.OpenedInputs.check` verifies.

    Args:
        reference: The model; it is moved to `device`, and its parameters are frozen.
        preprocessing: timm's data configuration of the model that is trained.
        device: Where the images are.
        amp: Autocast precision of the forward pass.
        channels_last: Use this memory format.
    """

    def __init__(
        self,
        reference: ReferenceModel,
        preprocessing: Preprocessing,
        *,
        device: torch.device,
        amp: Precision = "none",
        channels_last: bool = False,
    ) -> None:
        self.model = reference.model.to(device).eval().requires_grad_(False)
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.device, self.amp = device, amp
        self.size = tuple(reference.preprocessing["input_size"][1:])
        (mean, std), (own_mean, own_std) = normalization(preprocessing), normalization(reference.preprocessing)
        self.same_normalization = (mean, std) == (own_mean, own_std)
        m, s, own_m, own_s = (
            torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std, own_mean, own_std)
        )
        self.factor, self.offset = s / own_s, (m - own_m) / own_s

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Compute the logits, float32 [B, C], of preprocessed images [B, channels, height, width]."""
        if not self.same_normalization:
            images = images * self.factor + self.offset
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        with autocast(self.device, self.amp):
            logits: Tensor = self.model(images)
        return logits.float()


class _WithLabels:
    """Images with other labels than their own, one for each."""

    def __init__(self, images: ImageSource, labels: Sequence[int]) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Load an image and its label."""
        return self.images.load(index)[0], self.labels[index]

    def where(self, index: int) -> str:
        """Name an image."""
        return self.images.where(index)

    def listing(self) -> Iterable[bytes]:
        """List the images, as without labels."""
        return self.images.listing()


def numbered(data: OpenedData) -> OpenedData:
    """Give each image its position as its label, for `label_by_model`."""
    return replace(data, images=_WithLabels(data.images, range(len(data))))


def label_by_model(
    data: OpenedData,
    reference: ReferenceModel,
    loader: ImageLoader,
    *,
    device: torch.device,
    amp: Precision = "none",
    on_batch: Callable[[int], object],
    on_end: Callable[[], object],
) -> OpenedData:
    """Label images with the most probable class of a model, so that top-1 is agreement with that model.

    Args:
        data: Images without labels.
        reference: The model; it is moved to `device`.
        loader: The images of `numbered(data)`, or this process's shard of them, preprocessed for the model.
        device: Where to run the model.
        amp: Autocast precision.
        on_batch: Called after each batch with the number of images so far.
        on_end: Called after the last batch.

    Returns:
        The images that the loader could read, in their order.
    """
    model, labels = reference.model.to(device), dict[int, int]()
    with eval_mode(model), torch.no_grad():
        for images, positions in loader:
            with autocast(device, amp):
                found = model(images.to(device)).argmax(dim=-1)
            labels.update(zip(positions.tolist(), found.tolist(), strict=True))
            on_batch(len(labels))
    on_end()
    everyone = {position: label for part in distributed.all_gather(labels) for position, label in part.items()}
    readable = sorted(everyone)
    source = data.images if len(readable) == len(data) else Subset(data.images, readable)
    return replace(data, images=_WithLabels(source, [everyone[position] for position in readable]), labelled=True)

"""Learning from the original: its logits on the training images, beside the labels or instead of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fixify.data import ImageLoader, ImageSource, OpenedData
from fixify.data.preprocessing import normalization
from fixify.evaluation import Precision, autocast, eval_mode
from fixify.training import distributed
from fixify.training.others import OtherModel


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 times the divergence KL(teacher || student) of the softmaxes at temperature T, mean over the batch, nats.

    Hinton, Vinyals & Dean, "Distilling the knowledge in a neural network" (2015), section 2; the factor keeps the
    gradients' size as the temperature changes.

    Args:
        logits, teacher_logits: Float32 [B, C].
        temperature: T > 0.
    """
    ours = F.log_softmax(logits / temperature, dim=-1)
    theirs = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


class Teacher:
    """A frozen model that sees the very images that another is trained on.

    Args:
        other: The model; moved to `device`, and its parameters are frozen.
        preprocessing: Of the model that is trained. Where the two differ in mean, deviation or size, the images are
            normalised anew and resized for the teacher.
        device: Where the images are.
        amp: Autocast precision of the forward pass.
        channels_last: Memory format.

    Both take images of the same number of channels; `check_others` has made sure.
    """

    def __init__(
        self,
        other: OtherModel,
        preprocessing: Mapping[str, Any],
        *,
        device: torch.device,
        amp: Precision = "none",
        channels_last: bool = False,
    ) -> None:
        self.model = other.model.to(device).eval().requires_grad_(False)
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.device, self.amp = device, amp
        self.size = tuple(other.preprocessing["input_size"][1:])
        (mean, std), (own_mean, own_std) = normalization(preprocessing), normalization(other.preprocessing)
        self.same = (mean, std) == (own_mean, own_std)
        m, s, own_m, own_s = (
            torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std, own_mean, own_std)
        )
        self.factor, self.offset = s / own_s, (m - own_m) / own_s

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits, float32 [B, C], of preprocessed (and augmented) images [B, channels, height, width]."""
        if not self.same:
            images = images * self.factor + self.offset
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        with autocast(self.device, self.amp):
            logits: Tensor = self.model(images)
        return logits.float()


class _Answered:
    """Images whose labels are a model's answers."""

    def __init__(self, images: ImageSource, answers: list[int]) -> None:
        self.images = images
        self.answers = answers

    def __len__(self) -> int:
        return len(self.answers)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.images.load(index)[0], self.answers[index]

    def listing(self) -> Iterable[bytes]:
        return self.images.listing()


def answered(
    data: OpenedData,
    other: OtherModel,
    loader: ImageLoader,
    *,
    device: torch.device,
    amp: Precision = "none",
    on_batch: Callable[[int], object],
    on_end: Callable[[], object],
) -> OpenedData:
    """The data with the most probable class that a model gives each image as its label: top-1 is agreement with it.

    Args:
        data: Images without labels.
        other: The model; moved to `device`.
        loader: All of the images in order, or this process's share of them, preprocessed for the model.
        device: Where to run it.
        amp: Autocast precision.
        on_batch: Called after each batch with the number of images so far.
        on_end: Called after the last one.
    """
    model, answers = other.model.to(device), list[int]()
    with eval_mode(model), torch.no_grad():
        for images, _ in loader:
            with autocast(device, amp):
                answers += model(images.to(device)).argmax(dim=-1).tolist()
            on_batch(len(answers))
    on_end()
    return replace(data, images=_Answered(data.images, distributed.interleaved(answers)), labelled=True)

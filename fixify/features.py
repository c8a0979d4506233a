"""Record what the classifier layers of a model are given: on images without labels, to calibrate fixed heads.

`record_inputs` is the recorder; `Observation` runs the original on a sample of images for `fixify.convert`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fixify._values import counted
from fixify.checkpoints.learned import Original
from fixify.conversion_options import MIN_IMAGES
from fixify.data import (
    OpenedData,
    Subset,
    UnreadableImages,
    default_workers,
    draw_images,
    make_loader,
    name_the_first,
)
from fixify.errors import DataError, resources_explained
from fixify.heads import FixedClassifier
from fixify.metrics import eval_mode
from fixify.surgery import replace_module

_HELD_OUT = 0.25
_BATCH = 32
_MAX_UNREADABLE = 0.01  # as for finetuning
_POSITIONS = 16  # of a feature map; neighbours are much alike, and all of them would take much memory


@contextlib.contextmanager
def record_inputs(
    model: nn.Module, paths: Iterable[str], keep: Callable[[str, Tensor], Tensor] | None = None
) -> Iterator[dict[str, list[Tensor]]]:
    """Record the input of some layers while the block runs the model.

    Args:
        model: The model.
        paths: The layers, by their names in `model.named_modules()`.
        keep: Reduces an input to what is kept, given the path and the input; default: all of it.

    Yields:
        By path the recorded inputs, float32 on the CPU, one entry per call of the layer. A layer that is not called in
        eval mode (an auxiliary classifier) keeps an empty list.

    >>> with record_inputs(nn.Sequential(nn.Linear(2, 3)), ["0"]) as seen:
    ...     pass
    >>> seen
    {'0': []}
    """
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}

    def record(inputs: tuple[Tensor, ...], path: str) -> None:
        x = inputs[0].detach()
        seen[path].append((x if keep is None else keep(path, x)).float().cpu())

    with contextlib.ExitStack() as hooks:
        for path in seen:
            layer = model.get_submodule(path)
            handle = layer.register_forward_pre_hook(lambda _layer, inputs, path=path: record(inputs, path))
            hooks.callback(handle.remove)
        yield seen


def inputs_of(
    model: nn.Module,
    paths: Iterable[str],
    loader: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    keep: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[str, list[Tensor]]:
    """Run a model in eval mode on every image of a loader, and return what some layers were given.

    Args:
        model: The model, on `device`.
        paths: See `record_inputs`, like `keep` and the result.
        loader: Batches of (images, labels); the labels are not used.
        device: Where the model is.
        keep: See `record_inputs`.
    """
    with record_inputs(model, paths, keep) as seen, eval_mode(model), torch.no_grad():
        for images, _ in loader:
            model(images.to(device))
    return seen


def draw_to_calibrate(name: str, count: int, seed: int) -> OpenedData:
    """Draw images without labels; see `fixify.data.draw_images`.

    Raises:
        DataError: there is no such data, or there are fewer than `MIN_IMAGES` images.
    """
    drawn = draw_images(name, count=count, seed=seed)
    if len(drawn) < MIN_IMAGES:
        raise DataError(
            f"{drawn.location} holds {counted(len(drawn), 'image')}; calibrating takes at least {MIN_IMAGES}.",
            hint="Give a folder of a few hundred images like those that the model is for; no labels are needed.",
        )
    return drawn


@dataclass(frozen=True)
class Calibration:
    """How a conversion was calibrated.

    Attributes:
        data: The data's name, without a path of this machine.
        num_images: Images that mean, std, codes, scale and bias were fitted to, without labels.
        held_out: Further images, on which agreement was counted.
        agreement: Percent of those for which the converted model's most probable class is the original's.
    """

    data: str
    num_images: int
    held_out: int
    agreement: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


class Observation:
    """The original, run on some images: three quarters of them to fit heads to, one quarter to check them on.

    Args:
        original: The checkpoint.
        name: A folder of images, or a data name as for `fixify.data.open_data`.
        num_images: How many images are drawn; all, if there are fewer.
        held_out: How many further images are held out, if there are so many, instead of a quarter of `num_images`; and
            the fewest that are enough.
        seed: Decides which images are drawn.
        device: Where the model runs.
        on_images: Called after each batch with its number of images.

    Raises:
        DataError: There is no such data, there are too few images, or more than 1 % of them cannot be read.
        ResourceError, LoaderError: Memory or file handles ran out, or a loader process ended.
    """

    notes: list[str]
    """What is wrong or unusual about the images; images that cannot be read are left out."""

    features: dict[str, Tensor]
    """By the path of a classifier layer its inputs, float32 [samples, N] on the CPU. A layer that is not called in eval
    mode (an auxiliary classifier) is not in it."""

    def __init__(
        self,
        original: Original,
        name: str,
        *,
        num_images: int,
        seed: int,
        device: torch.device,
        held_out: tuple[int, int] | None = None,
        on_images: Callable[[int], object] | None = None,
    ) -> None:
        wanted, fewest = held_out or (0, 0)
        to_fit = num_images - max(1, round(_HELD_OUT * num_images)) if wanted else num_images
        drawn = draw_to_calibrate(name, to_fit + wanted, seed)
        self.data = drawn.name
        self.num_held_out = max(1, round(_HELD_OUT * len(drawn)))
        if wanted:
            self.num_held_out = min(wanted, max(fewest, len(drawn) // 2))
            if len(drawn) - self.num_held_out < MIN_IMAGES:
                raise DataError(
                    f"{drawn.location} holds {counted(len(drawn), 'image')}. That agreement takes at least {fewest} "
                    f"that are held out, even if all answers agree, and {MIN_IMAGES} to fit heads to.",
                    hint="Give a folder of more images, or a lower --agree.",
                )
        self.num_fitted = len(drawn) - self.num_held_out
        self.notes = [f"{drawn.name}: {aside}." for aside in drawn.asides]
        self._unreadable = UnreadableImages(
            len(drawn), _MAX_UNREADABLE, name_the_first(self.notes.append), self.notes.append, option=None
        )
        self._device = device
        self._preprocessing = original.preprocessing
        self._on_images = on_images
        fitted = _part(drawn, 0, self.num_fitted)
        self._held_out = _part(drawn, self.num_fitted, len(drawn))
        self._model = original.model().to(device)
        channel_dims = {site.path: site.channel_dim for site in original.sites}
        with record_inputs(self._model, channel_dims, lambda path, x: samples_of(x, channel_dims[path])) as seen:
            self.num_fitted = sum(len(answers) for answers in self._answers(fitted))
        self.features = {path: torch.cat(parts) for path, parts in seen.items() if parts}
        self._inputs: Tensor | None = None
        self._expected = self._look_at_held_out(list(channel_dims))
        self.num_held_out = len(self._expected)
        if (summary := self._unreadable.summary()) is not None:
            self.notes.append(summary)

    def result(self, heads: Mapping[str, FixedClassifier]) -> Calibration:
        """Put the heads into the model and count on the held-out images how often its answer is the original's."""
        share = self._same_with(heads) / self.num_held_out
        return Calibration(self.data, self.num_fitted, self.num_held_out, 100 * share)

    def _same_with(self, heads: Mapping[str, FixedClassifier]) -> int:
        for path, head in heads.items():
            replace_module(self._model, path, head.to(self._device).eval())
        return int((torch.cat(list(self._answers(self._held_out))) == self._expected).sum())

    def same_answers(self, heads: Mapping[str, FixedClassifier]) -> int:
        """Count the held-out images on which the model with these heads gives the original's answer."""
        if self._inputs is None:
            return self._same_with(heads)
        (head,) = heads.values()
        head.to(self._device).eval()
        with torch.no_grad():
            parts = [head(part.to(self._device)).argmax(dim=-1).cpu() for part in self._inputs.split(_BATCH)]
        return int((torch.cat(parts) == self._expected).sum())

    def _look_at_held_out(self, paths: list[str]) -> Tensor:
        """Compute the original's answers, and keep the inputs of its classifier if that is its last layer.

        It is if there is one, and what it returns is what the model returns. Then heads are tried without the model.
        """
        inputs: list[Tensor] = []
        last: list[Any] = [None]

        def record(_layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            inputs.append(given[0].detach().float().cpu())
            last[0] = output

        expected, is_last = [], len(paths) == 1
        handle = self._model.get_submodule(paths[0]).register_forward_hook(record)
        try:
            for logits in self._logits(self._held_out):
                expected.append(logits.argmax(dim=-1).cpu())
                is_last = is_last and logits is last[0]
        finally:
            handle.remove()
        if is_last:
            self._inputs = torch.cat(inputs)
        return torch.cat(expected)

    def _answers(self, data: OpenedData) -> Iterator[Tensor]:
        for logits in self._logits(data):
            yield logits.argmax(dim=-1).cpu()

    def _logits(self, data: OpenedData) -> Iterator[Tensor]:
        workers = 0 if self._device.type == "cpu" else default_workers(self._device)
        loader = make_loader(
            data,
            self._preprocessing,
            training=False,
            batch_size=_BATCH,
            workers=workers,
            device=self._device,
            unreadable=self._unreadable,
        )
        with loader, eval_mode(self._model), torch.no_grad(), resources_explained("calibrate"):
            for images, _ in loader:
                yield self._model(images.to(self._device))
                if self._on_images is not None:
                    self._on_images(len(images))


def samples_of(x: Tensor, channel_dim: int) -> Tensor:
    """Reshape a layer's input [B, N], [B, ..., N] or, with channel_dim 1, [B, N, ...] to samples [B * positions, N]."""
    x = x.movedim(channel_dim, -1)
    x = x.reshape(len(x), -1, x.shape[-1])
    if x.shape[1] > _POSITIONS:
        x = x[:, torch.linspace(0, x.shape[1] - 1, _POSITIONS, device=x.device).long()]
    return x.flatten(0, 1)


def _part(drawn: OpenedData, start: int, stop: int) -> OpenedData:
    return replace(drawn, images=Subset(drawn.images, list(range(start, stop))))

"""Convert the learned classifier of a run into a fixed head, in the middle of its schedule.

Not in the paper, whose heads are fixed from the first step. With many more classes than features a network hardly
learns codes that were chosen before it knows anything. So the run begins with a learned classifier; after a share of
the steps its weights become the signs of a binary head, fitted on training images as `fixify convert --calibrate` does.
The backbone goes on with its optimiser's state and under the same schedule; what the optimiser knows of the learned
classifier is dropped. tests/benchmarks/many_classes.py measured it.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fixify.checkpoints.slim import Origin, describe
from fixify.data.seeding import Stream
from fixify.description import HeadRecord
from fixify.errors import DataError, UsageError
from fixify.features import inputs_of, samples_of
from fixify.heads import FixedClassifier, kind_of
from fixify.models.architectures import Architecture
from fixify.models.classifiers import find_classifiers
from fixify.surgery import HeadConfig, apply_heads_, fix_classifier_, make_heads
from fixify.training import distributed
from fixify.training.engine import Engine
from fixify.training.events import ClassifierConverted, Listener
from fixify.training.facts import OpenedInputs
from fixify.training.last_block import Preparation
from fixify.training.losses import make_margin
from fixify.training.optimisers import learn_signs_
from fixify.training.options import TrainOptions

_TRIAL_SAMPLES = 16


def head_config(options: TrainOptions) -> HeadConfig:
    """Return the head that the options ask for, which takes its signs from a learned classifier.

    Its codes have no lengths: those of a classifier that is not done yet do harm. With 2,965 kanji, N = 256, 56 signs
    and a length end at 96.5 %, 64 signs at 99.0 (tests/benchmarks/many_classes.py).
    """
    return HeadConfig.create(
        head=options.head,
        seed=options.head_seed,
        bits_per_class=options.bits_per_class,
        gains=False,
        project=False,
        alpha=options.head_scale,
        fixed_scale=options.head_fixed_scale,
        bias=options.head_bias,
        standardize=options.head_standardize,
    )


def check_conversion(model: nn.Module, opened: OpenedInputs, options: TrainOptions) -> None:
    """Convert a copy of a model on random features, so that what is not possible is refused before training.

    Raises:
        NoClassifierError, HeadSpecError: the classifier cannot be replaced by such a head.
        UsageError: the head does not fit the margin or `learn_signs`.
    """
    trial = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    features = {
        site.path: torch.randn(_TRIAL_SAMPLES, site.num_features, generator=generator)
        for site in find_classifiers(trial, _architecture(model))
    }
    fix_classifier_(trial, head_config(options), features=features, arch=_architecture(model))
    if options.learn_signs is not None:
        learn_signs_(trial)
    if options.margin is None:
        return
    head = next(module for module in trial.modules() if isinstance(module, FixedClassifier))
    if not head.spec.normalize:
        raise UsageError(
            f"A margin ({options.margin}) needs normalised features, which a binary head has with fewer signs per "
            f"class than features: {head.in_features}.",
            hint="Set a smaller bits_per_class, or leave out the margin.",
        )
    device = next(trial.parameters()).device
    make_margin(trial, options, input_size=opened.preprocessing["input_size"], device=device)


def conversion_step(options: TrainOptions, updates_per_epoch: int) -> int:
    """Return the number of updates after which the classifier is converted: at least one, and not all.

    Raises:
        UsageError: the run has a single update.
    """
    updates = options.epochs * updates_per_epoch
    if updates < 2:
        raise UsageError(
            "The run has one update, and head binary needs one before its classifier is converted and one after.",
            hint="Take more epochs, or smaller batches.",
        )
    return min(max(round(options.convert_after * updates), 1), updates - 1)


class HeadConversion:
    """Converts the classifier of a run, and restores the converted one when the run is resumed.

    Several processes look at the same images. Rank 0 converts, and the others take over its head.

    Args:
        engine: What is trained.
        opened: The training images, and the preprocessing of the model.
        options: Which head, and when.
        preparation: Draws the images.
        on_event: Called when the classifier was converted.

    Attributes:
        at: Updates after which it is converted.
    """

    def __init__(
        self,
        engine: Engine,
        opened: OpenedInputs,
        options: TrainOptions,
        preparation: Preparation,
        on_event: Listener,
    ) -> None:
        self.engine, self.opened, self.options = engine, opened, options
        self.preparation, self.on_event = preparation, on_event
        self.at = conversion_step(options, engine.updates_per_epoch)
        self._records: tuple[HeadRecord, ...] = ()

    def convert(self, updates: int) -> None:
        """Replace the learned classifier by the fixed head; if a signal stops this, the model is unchanged.

        Args:
            updates: Updates so far.

        Raises:
            HeadSpecError: the learned weights or the features are not finite, or all class vectors are the same.
            DataError: too many images cannot be read.
            Stopped: a signal asked to stop.
        """
        engine = self.engine
        images, features = self._features()
        converted = torch.load(io.BytesIO(distributed.on_rank_zero(lambda: self._convert(features))), weights_only=True)
        self._adopt(converted["heads"], converted["tensors"])
        engine.fit_to_head_(self.opened, updates)
        spec = self._records[0].spec
        per_class = kind_of(spec).bytes_per_class(spec)
        self.on_event(ClassifierConverted(updates, spec.kind, per_class, images, engine.loss_plan.note))

    def records(self) -> list[dict[str, Any]]:
        """Describe the heads as the state of a run holds them, with the signs that they have learned by now."""
        specs = {path: head.spec for path, head in _heads(self.engine.model)}
        return [replace(record, spec=specs[record.path]).to_dict() for record in self._records]

    def restore(self, heads: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        """Replace the learned classifier by the heads of a state; the rest of the state is loaded afterwards.

        Args:
            heads: What `records` returned.
            tensors: The model's state dict.

        Raises:
            FormatError, HeadSpecError, CodebookMismatchError: they are not heads of this model.
            RuntimeError: tensors are missing.
        """
        self._adopt(heads, tensors)
        self.engine.fit_to_head_(self.opened, 0)

    def _features(self) -> tuple[int, dict[str, Tensor]]:
        """Return the number of images, and by path the inputs of the classifier layers on them, float32 [S, N]."""
        engine, seen_images = self.engine, 0
        dims = {site.path: site.channel_dim for site in find_classifiers(engine.model, _architecture(engine.model))}

        def counted(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal seen_images
            for images, labels in batches:
                seen_images += len(images)
                yield images, labels

        with self.preparation.some_images(Stream.CONVERSION, self.options.calibration_images) as loader:
            batches = counted(self.preparation.stoppable(loader))
            seen = inputs_of(engine.model, dims, batches, engine.device, lambda path, x: samples_of(x, dims[path]))
        features = {path: torch.cat(parts) for path, parts in seen.items() if parts}
        if not features:
            raise DataError("None of the images that the classifier is converted on can be read.")
        return seen_images, features

    def _convert(self, features: Mapping[str, Tensor]) -> bytes:
        """Make the heads, as bytes for the other processes."""
        model = self.engine.model
        sites = find_classifiers(model, _architecture(model))
        made = make_heads(sites, model.state_dict(), head_config(self.options), features=features)
        tensors = {f"{new.record.path}.{key}": value for new in made for key, value in new.module.state_dict().items()}
        buffer = io.BytesIO()
        torch.save({"heads": [new.record.to_dict() for new in made], "tensors": tensors}, buffer)
        return buffer.getvalue()

    def _adopt(self, heads: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        model = self.engine.model
        records = tuple(HeadRecord.from_dict(each) for each in heads)
        apply_heads_(model, records)
        for path, head in _heads(model):
            own = {key.removeprefix(f"{path}."): value for key, value in tensors.items() if key.startswith(f"{path}.")}
            own.pop("latent", None)  # signs are not learned yet
            head.load_state_dict(own)
        if isinstance(getattr(model, "fixify_origin", None), Origin):
            model.fixify_info = describe(model)  # type: ignore[assignment]  # for the checkpoints
        self._records = records


def _heads(model: nn.Module) -> list[tuple[str, FixedClassifier]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, FixedClassifier)]


def _architecture(model: nn.Module) -> Architecture | None:
    """Return the architecture of a model that `fixify train` built; None of any other."""
    origin = getattr(model, "fixify_origin", None)
    return origin.architecture if isinstance(origin, Origin) else None

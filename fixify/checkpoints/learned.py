"""An ordinary checkpoint, of a network with a learned classifier, as fixify writes it after training.

A `.safetensors` file of the network's state dict. Its metadata says what a reader would otherwise have to find out, in
the words of timm's config.json: `architecture`, `num_classes`, `model_args`, `pretrained_cfg`, `label_names`.
`fixify.checkpoints` reads them; other programs see a plain file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixify._files import refuse_existing
from fixify.checkpoints.reference_code import ReferenceCodeHead
from fixify.checkpoints.resolve import open_source
from fixify.checkpoints.slim import write_safetensors
from fixify.checkpoints.source import Source
from fixify.errors import AmbiguousArchitectureError, ArchitectureError, FixifyError, SourceError
from fixify.models.architectures import Architecture, build, parse_architecture, preprocessing
from fixify.models.build import load_weights
from fixify.models.classifiers import ClassifierSite, find_classifiers
from fixify.models.identify import Candidate, fit, identify, refuse_headless
from fixify.savings import under
from fixify.surgery import HeadRecord, apply_heads_

SUFFIX = ".safetensors"


def save_ordinary(
    model: nn.Module,
    path: Path | str,
    architecture: Architecture,
    *,
    num_classes: int,
    preprocessing: Mapping[str, Any],
    labels: list[str] | None = None,
    training: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write a network of this architecture, in one step.

    Args:
        model: The network.
        path: Where to write.
        architecture: What it is.
        num_classes: Of its classifier.
        preprocessing: timm's names; see `fixify.models.architectures.preprocessing`.
        labels: Class names in class order.
        training: How it was trained; JSON-safe.
        force: Replace an existing file.

    Raises:
        OutputExistsError, OutputError: the file exists, or cannot be written.
    """
    path = Path(path)
    refuse_existing(path, force=force)
    found = {
        "model_args": dict(architecture.kwargs),
        "pretrained_cfg": dict(preprocessing),
        "label_names": labels,
        "training": None if training is None else dict(training),
    }
    metadata = {
        "format": "pt",  # Hugging Face's loaders insist on it
        "architecture": architecture.ref,
        "num_classes": str(num_classes),
        **{key: json.dumps(value, allow_nan=False) for key, value in found.items() if value is not None},
    }
    write_safetensors(path, model.state_dict(), metadata)
    return path


# An ordinary checkpoint made sense of: which architecture it is, and its tensors under that architecture's names.


# Counters of BatchNorm: older and foreign checkpoints lack them, and nothing that is computed depends on them.
_COUNTER = "num_batches_tracked"
REFERENCE_CODE = "of the paper's published code"


@dataclass(frozen=True)
class Original:
    """A checkpoint with a learned classifier (or one of the paper's published code), whose architecture is known.

    Attributes:
        source: Where it came from.
        architecture: What it is.
        num_classes: Classes of its classifier.
        tensors: Its state dict under the architecture's own key names; values and dtypes as stored.
        sites: Its classifier layers.
        preprocessing: timm's names and plain values.
        labels: Class names, or None.
        notes: How it was recognised, for the person who asked.
        published: By path, a classifier layer that is a fixed one of the paper's published code; `tensors` then has
            its scale and bias, and no weight.
    """

    source: Source
    architecture: Architecture
    num_classes: int
    tensors: dict[str, torch.Tensor]
    sites: tuple[ClassifierSite, ...]
    preprocessing: dict[str, Any]
    labels: list[str] | None
    notes: tuple[str, ...]
    published: Mapping[str, ReferenceCodeHead] = field(default_factory=dict)

    @property
    def learned(self) -> dict[str, torch.Tensor]:
        """`tensors` as they would be with a learned classifier, whose weights have no values: to count bytes by."""
        scales = {f"{path}.scale" for path in self.published}
        stored = {key: tensor for key, tensor in self.tensors.items() if key not in scales}
        return stored | {f"{path}.weight": head.placeholder() for path, head in self.published.items()}

    def reference_code_record(self, site: ClassifierSite, *, fixed_scale: bool = False) -> HeadRecord:
        """What a slim checkpoint says of a published head that is kept.

        Raises:
            SourceError, HeadSpecError: it cannot be rebuilt; see `ReferenceCodeHead.spec`.
        """
        spec = self.published[site.path].spec(site.num_features, fixed_scale=fixed_scale)
        return HeadRecord(site.path, site.layer_type, site.channel_dim, spec)

    @property
    def reference_code_note(self) -> str | None:
        """What its published head is, or why it cannot be rebuilt; None without one."""
        for site in self.sites:
            if site.path in self.published:
                try:
                    self.reference_code_record(site)
                except FixifyError as error:
                    return error.message
                return f"{site.path} is fixed already, a Hadamard head {REFERENCE_CODE}: scale and bias, no weights."
        return None

    def model(self) -> nn.Module:
        """Build the model and put the weights in (float32, eval mode).

        Raises:
            SourceError: the tensors do not fit; `read_original` has compared all shapes, so this is rare. Or the head
                is a published one that cannot be rebuilt, as for HeadSpecError.
        """
        model = build(self.architecture, num_classes=self.num_classes, blank=True)
        apply_heads_(model, [self.reference_code_record(site) for site in self.sites if site.path in self.published])
        try:
            load_weights(model, self.tensors)
        except RuntimeError as error:
            raise SourceError(f"{self.source.name} does not fit {self.architecture.ref}: {error}") from error
        return model.eval()


def read_original(ref: str | Path, *, arch: str | None = None, ema: bool = False, meta: bool = False) -> Original:
    """Read a checkpoint file or a model name, and find out what it is.

    The architecture is, in this order: the one given, the one the file names, the one its keys and shapes fit.

    Args:
        ref: A file, a folder, or a model name.
        arch: The architecture, if the caller knows it.
        ema: Take the averaged weights.
        meta: Read only names, shapes and dtypes; the tensors are on the meta device.

    Raises:
        SourceError: it cannot be read.
        ArchitectureError: no architecture fits, or not the one that was given or that the file names.
        AmbiguousArchitectureError: several fit; the message lists what differs.
        NoClassifierError: the model has no classifier.
    """
    source = open_source(ref, ema=ema, meta=meta)
    candidate, note = _recognise(source, arch)
    learned = _rename(source.learned, candidate)
    architecture, num_classes = candidate.architecture, candidate.num_classes
    skeleton = build(architecture, num_classes=num_classes, meta=True)
    _refuse_other_tensors(source, architecture, learned, skeleton)
    tensors, published = _with_published_head(source, candidate, learned)
    labels = source.labels
    notes = [note] if note else []
    if labels is not None and len(labels) != num_classes:
        notes.append(f"{len(labels)} class names came with {num_classes} classes; the names are left out.")
        labels = None
    return Original(
        source=source,
        architecture=architecture,
        num_classes=num_classes,
        tensors=tensors,
        sites=tuple(find_classifiers(skeleton, architecture)),
        preprocessing=preprocessing(architecture, source.pretrained_cfg),
        labels=labels,
        notes=tuple(notes),
        published=published,
    )


def stated(source: Source) -> Candidate | None:
    """What a source says it is, in itself or in a file beside it, if its tensors are of that architecture."""
    if source.architecture is None:
        return None
    try:
        return fit(parse_architecture(source.architecture, **source.architecture_kwargs), source.shapes)
    except ArchitectureError:  # arguments that do not suit it, or a name that leaves something open
        return None


def _recognise(source: Source, arch: str | None) -> tuple[Candidate, str | None]:
    name = arch or source.architecture
    if name is not None:
        architecture = parse_architecture(name)
        if arch is None or _same_network(architecture, source.architecture):
            # What is written in the name counts more than what stands in the file.
            given = {**source.architecture_kwargs, **architecture.kwargs}
            architecture = parse_architecture(name, **given)
        candidate = fit(architecture, source.shapes)
        if candidate is None:
            refuse_headless(architecture, source.shapes)
            raise ArchitectureError(
                f"{source.name} is not a checkpoint of {architecture.ref}: its tensors have other shapes.",
                hint="Leave out --arch to have it recognised."
                if arch
                else "It or its config.json says so. What fits: fixify identify; then say it: --arch NAME",
            )
        return candidate, None
    found = identify(source.shapes)
    if len(found.candidates) > 1:
        raise AmbiguousArchitectureError(
            f"{source.name} fits several architectures:\n{found.describe()}",
            hint=f"Say which: --arch {found.candidates[0].architecture.spelled}",
            choices=found.choices,
        )
    candidate = found.candidates[0]
    how = "key names and shapes" if candidate.key_map is None else "the order of its shapes"
    if found.scheme is not None:
        how += f" and the key names of {found.scheme.name} ({found.scheme.trait} {found.scheme.value})"
    return candidate, f"Recognised as {candidate.architecture.ref} from {how}."


def _same_network(architecture: Architecture, stated: str | None) -> bool:
    if stated is None:
        return False
    other = parse_architecture(stated)
    return (architecture.library, architecture.name) == (other.library, other.name)


def _rename(tensors: Mapping[str, torch.Tensor], candidate: Candidate) -> dict[str, torch.Tensor]:
    if candidate.key_map is None:
        return dict(tensors)
    return {candidate.key_map[key]: tensor for key, tensor in tensors.items() if key in candidate.key_map}


def _with_published_head(
    source: Source, candidate: Candidate, learned: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, ReferenceCodeHead]]:
    """The tensors under the architecture's names with what is stored of a published head; and that head by its path."""
    head = source.reference_code_head
    if head is None:
        return learned, {}
    key = head.weight_key if candidate.key_map is None else candidate.key_map[head.weight_key]
    path = key.rpartition(".")[0]
    stored = under(source.tensors, head.path)
    tensors = {name: tensor for name, tensor in learned.items() if name != key}
    if head.scale_name == "scale":
        tensors[f"{path}.scale"] = stored[f"{head.path}.scale"]
    return tensors, {path: head}


def _refuse_other_tensors(
    source: Source, architecture: Architecture, tensors: dict[str, torch.Tensor], skeleton: nn.Module
) -> None:
    """Every tensor of the architecture is there with its shape, and no other."""
    expected = {key: tensor.shape for key, tensor in skeleton.state_dict().items()}
    problems = [f"lacks {key}" for key in expected if key not in tensors and not key.endswith(_COUNTER)]
    problems += [f"has {key}, which is unknown" for key in tensors if key not in expected]
    problems += [
        f"has {key} of shape {list(tensor.shape)}, not {list(expected[key])}"
        for key, tensor in tensors.items()
        if key in expected and tensor.shape != expected[key]
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SourceError(f"{source.name} is not a complete {architecture.ref}: it {problems[0]}{more}.")

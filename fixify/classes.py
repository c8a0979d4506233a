"""Change the classes of a slim checkpoint: keep some, add some, rename or merge them.

The network is not touched, and the classes that stay keep their logits bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fixify._files import refuse_existing
from fixify._options import did_you_mean
from fixify._values import counted, shorten
from fixify.checkpoints.labels import read_class_map
from fixify.checkpoints.slim import (
    DTYPES,
    Contents,
    SlimInfo,
    is_slim,
    read_contents,
    write_slim,
)
from fixify.description import HeadRecord
from fixify.errors import DataError, FormatError, UsageError
from fixify.heads import FixedClassifier
from fixify.heads.editing import add_classes as add_to_head
from fixify.heads.editing import keep_classes as keep_of_head
from fixify.heads.editing import merge_classes as merge_in_head
from fixify.models.classifiers import find_heads
from fixify.models.projection import build_with
from fixify.new_classes import by_embeddings, by_images
from fixify.savings import Savings, under

SUFFIX = "-classes.fixed.safetensors"
_SLIM_SUFFIXES = (".fixed.safetensors", ".safetensors")


@dataclass(frozen=True)
class Edited:
    """The result of an edit.

    Attributes:
        path: The slim checkpoint that was written.
        info: What is written in it.
        before: Number of classes before.
        notes: Decisions that a person should know of.
    """

    path: Path
    info: SlimInfo
    before: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify classes ... --json` prints."""
        return {
            "path": str(self.path),
            "classes_before": self.before,
            "classes": self.info.num_classes,
            "labels": self.info.labels,
            "notes": list(self.notes),
        }


def default_out(checkpoint: str | Path) -> Path:
    """Name the file that an edit writes, in the current folder.

    >>> str(default_out("folder/net.fixed.safetensors"))
    'net-classes.fixed.safetensors'
    """
    name = Path(checkpoint).name
    suffix = next((suffix for suffix in _SLIM_SUFFIXES if name.endswith(suffix)), "")
    return Path(name.removesuffix(suffix) + SUFFIX)


def keep_classes(
    checkpoint: str | Path, names: Sequence[str] | str | Path, out: str | Path | None = None, *, force: bool = False
) -> Edited:
    """Keep some classes of a slim checkpoint, in the given order.

    Args:
        checkpoint: The slim checkpoint.
        names: The classes, by name or number, or a file of them, one per line.
        out: The file to write; default: `default_out`.
        force: Replace an existing file.

    Raises:
        UsageError: There is no such class, one is named twice, or fewer than two are left.
        HeadSpecError: The head is of a kind whose codes depend on the number of classes.
        FormatError: The file is not a slim checkpoint, or is damaged.
        OutputExistsError, OutputError: The output exists, or cannot be written.
    """
    job = _Job.open(checkpoint, out, force)
    chosen = job.numbers(_listed(names))
    if len(chosen) < 2:
        raise UsageError(f"A classifier needs at least 2 classes, got {len(chosen)}.")
    heads = {path: keep_of_head(head, chosen) for path, head in job.heads.items()}
    labels = None if job.info.labels is None else [job.info.labels[number] for number in chosen]
    return job.write(heads, labels)


def rename_classes(
    checkpoint: str | Path,
    names: Mapping[str, str] | Sequence[str] | str | Path,
    out: str | Path | None = None,
    *,
    force: bool = False,
) -> Edited:
    """Give classes of a slim checkpoint other names; heads of every kind stay as they are.

    Args:
        checkpoint: The slim checkpoint.
        names: Old name or number -> new name; or the names of all classes in order, or a file of them.
        out: See `keep_classes`.
        force: See `keep_classes`.

    Raises:
        UsageError: There is no such class, or the list does not have one name per class.
        FormatError, OutputExistsError, OutputError: See `keep_classes`.
    """
    job = _Job.open(checkpoint, out, force)
    count = job.info.num_classes
    if isinstance(names, Mapping):
        if job.info.labels is None:
            raise UsageError(
                f"{job.path.name} has no class names to change.", hint="Give all names at once: --labels FILE"
            )
        labels = list(job.info.labels)
        for number, new in zip(job.numbers(list(names)), names.values(), strict=True):
            labels[number] = new
    else:
        labels = _listed(names)
        if len(labels) != count:
            raise UsageError(f"Got {counted(len(labels), 'name')} for {counted(count, 'class', 'classes')}.")
    return job.write(job.heads, labels, forgets=False)


def merge_classes(
    checkpoint: str | Path,
    names: Sequence[str],
    into: str,
    out: str | Path | None = None,
    *,
    force: bool = False,
) -> Edited:
    """Make one class of several; it takes the place of the first. See `fixify.heads.editing.merge_classes`.

    Args:
        checkpoint: The slim checkpoint.
        names: The classes, by name or number.
        into: Name of the new class.
        out: See `keep_classes`.
        force: See `keep_classes`.

    Raises:
        UsageError: There is no such class, fewer than two are named, or fewer than two are left.
        HeadSpecError, FormatError, OutputExistsError, OutputError: See `keep_classes`.
    """
    job = _Job.open(checkpoint, out, force)
    chosen = job.numbers(names)
    left = job.info.num_classes - len(chosen) + 1
    if len(chosen) < 2 or left < 2:
        raise UsageError(
            f"Merging takes at least 2 classes and leaves at least 2; got {len(chosen)} of {job.info.num_classes}."
        )
    heads = {path: merge_in_head(head, chosen) for path, head in job.heads.items()}
    labels = None
    if job.info.labels is not None:
        gone = set(chosen[1:])
        labels = [into if i == chosen[0] else name for i, name in enumerate(job.info.labels) if i not in gone]
    first = "" if all(head.spec.num_stored_signs for head in heads.values()) else ", with the code of the first"
    return job.write(heads, labels, notes=(f"Merged {len(chosen)} classes into {into!r}{first}.",))


def add_classes(
    checkpoint: str | Path,
    names: Sequence[str] | str | Path | None = None,
    out: str | Path | None = None,
    *,
    images: str | Path | None = None,
    embeddings: str | Path | None = None,
    key: Sequence[str] = (),
    device: str | None = None,
    force: bool = False,
) -> Edited:
    """Add classes with free codes behind those of a slim checkpoint.

    The codes are chosen by a few images of each new class, or by its class vectors, if they are given. Images also set
    the biases. Without either, the codes are arbitrary, and only fine-tuning gives them a meaning.

    Args:
        checkpoint: The slim checkpoint.
        names: The new classes, or a file of them; default: the folders of `images`.
        out: See `keep_classes`.
        images: A folder with a folder of images per new class, called like it. Folders that are called like old
            classes serve as examples of what the new ones are not.
        embeddings: Class vectors of the new classes (.npy, .npz, .safetensors), from the model that made those of the
            classifier that the checkpoint was made from.
        key: Name of the matrix in `embeddings`.
        device: Device that runs the images; default: the first accelerator, else the CPU.
        force: See `keep_classes`.

    Raises:
        UsageError: No names are given or one exists, or options do not go together.
        DataError: There are no images of a class.
        HeadSpecError, FormatError, OutputExistsError, OutputError: See `keep_classes`.
    """
    if images is not None and embeddings is not None:
        raise UsageError("Codes are chosen by images or by embeddings, not by both.", hint="Drop --embeddings.")
    job = _Job.open(checkpoint, out, force)
    new = _listed(names) if names is not None else _folders(images, job.info.labels or [])
    known = set(job.info.labels or [])
    twice = [name for i, name in enumerate(new) if name in known or name in new[:i]]
    if not new or twice:
        raise UsageError(
            f"There is a class {twice[0]!r} already." if twice else "No new classes are given.",
            hint="Name them: fixify classes add CKPT NAME..., or --labels FILE.",
        )
    notes: list[str] = []
    if images is not None:
        heads, said = by_images(job.contents, job.path, job.heads, new, Path(images), device)
        notes += said
    elif embeddings is not None:
        heads = by_embeddings(job.info, job.path, job.heads, new, Path(embeddings), key)
    else:
        heads = {path: add_to_head(head, len(new)) for path, head in job.heads.items()}
        notes.append("The new codes are arbitrary: fine-tune, or give --images or --embeddings.")
    labels = None
    if job.info.labels is not None:
        labels = [*job.info.labels, *new]
    else:
        notes.append(f"{job.path.name} has no class names, so the new ones are not kept either.")
    return job.write(heads, labels, notes=notes)


@dataclass(frozen=True)
class _Job:
    """A slim checkpoint that is being edited."""

    path: Path
    target: Path
    force: bool
    contents: Contents
    heads: dict[str, FixedClassifier]

    @classmethod
    def open(cls, checkpoint: str | Path, out: str | Path | None, force: bool) -> _Job:
        path = Path(checkpoint)
        target = default_out(path) if out is None else Path(out)
        refuse_existing(target, force=force)
        if not is_slim(path) and path.exists():
            raise UsageError(
                f"{path} is not a slim checkpoint, and classes of those are changed.",
                hint=f"Make one first: fixify convert {path}",
            )
        contents = read_contents(path)
        contents.check_digest(path)
        heads = {record.path: _head(record, contents.tensors, path) for record in contents.info.heads}
        return cls(path, target, force, contents, heads)

    @property
    def info(self) -> SlimInfo:
        return self.contents.info

    def numbers(self, names: Sequence[str]) -> list[int]:
        """Find classes by their names or numbers."""
        labels, count = self.info.labels, self.info.num_classes
        by_name: dict[str, list[int]] = {}
        for number, label in enumerate(labels or []):
            by_name.setdefault(label, []).append(number)
        found = []
        for name in names:
            same = by_name.get(name)
            if same is not None and len(same) > 1:
                raise UsageError(
                    f"{len(same)} classes are called {name!r}: {shorten(list(map(str, same)))}.",
                    hint="Name them by number.",
                )
            if same is not None:
                found.append(same[0])
            elif name.isascii() and name.isdigit() and len(name) < 9 and int(name) < count:
                found.append(int(name))
            else:
                near = did_you_mean(name, by_name) if len(by_name) <= 100_000 else "."
                raise UsageError(
                    f"{self.path.name} has no class {name[:200]!r}{near}",
                    hint=None if labels else f"It has no class names; classes are numbered 0 to {count - 1}.",
                )
        if len(set(found)) < len(found):
            twice = next(names[i] for i, number in enumerate(found) if number in found[:i])
            raise UsageError(f"The class {twice!r} is given twice.")
        return found

    def write(
        self,
        heads: Mapping[str, FixedClassifier],
        labels: list[str] | None,
        *,
        notes: Sequence[str] = (),
        forgets: bool = True,
    ) -> Edited:
        """Write the checkpoint with other heads; what was measured with the old classes is forgotten."""
        said = list(notes)
        if forgets and (self.info.training is not None or self.info.calibration is not None):
            said.append("What was measured with the old classes is not in the new file.")
        paths = tuple(f"{path}." for path in heads)
        backbone = {key: tensor for key, tensor in self.contents.tensors.items() if not key.startswith(paths)}
        made = {f"{path}.{key}": tensor for path, head in heads.items() for key, tensor in head.state_dict().items()}
        changes: dict[str, Any] = {
            "heads": tuple(replace(record, spec=heads[record.path].spec) for record in self.info.heads),
            "labels": labels,
            "savings": self._savings(backbone, heads).to_dict(),
        }
        if forgets:
            changes |= {"training": None, "calibration": None}
        info = self.info.model_copy(update=changes)
        write_slim(self.target, {**backbone, **made}, info, force=self.force)
        return Edited(self.target, info, self.info.num_classes, tuple(said))

    def _savings(self, backbone: Mapping[str, Tensor], heads: Mapping[str, FixedClassifier]) -> Savings:
        """Count what the heads save beside a learned classifier of as many classes."""
        first = next(iter(heads.values()))
        before = Savings.from_dict(self.info.savings)
        had_bias = before.classifier_parameters > before.removed
        if self.info.is_bare:
            return Savings.of_bare(first, has_bias=had_bias)
        model = build_with(
            self.info.architecture,
            first.out_features,
            projection=self.info.projection,
            width=first.in_features,
            meta=True,
        )
        sites = [site for site in find_heads(model) if site.path in heads]
        dtype = DTYPES[self.info.dtype]
        learned = {k: t.to(dtype) if t.is_floating_point() else t for k, t in model.state_dict().items()}
        return Savings.measure(model, sites, learned=learned, backbone=backbone, heads=heads.values())


def _head(record: HeadRecord, tensors: Mapping[str, Tensor], path: Path) -> FixedClassifier:
    own = {key.removeprefix(f"{record.path}."): tensor for key, tensor in under(tensors, record.path).items()}
    scale = own.get("scale")
    head = FixedClassifier(
        record.spec, channel_dim=record.channel_dim, dtype=torch.float32 if scale is None else scale.dtype
    )
    try:
        head.load_state_dict(own)
    except RuntimeError as error:
        raise FormatError(f"The tensors of {path} are not those of its head {record.path}.") from error
    return head.eval()


def _listed(names: Sequence[str] | str | Path) -> list[str]:
    return read_class_map(Path(names)) if isinstance(names, (str, Path)) else list(names)


def _folders(images: str | Path | None, known: Sequence[str]) -> list[str]:
    if images is None:
        return []
    folder = Path(images)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.")
    old = set(known)
    return sorted(each.name for each in folder.iterdir() if each.is_dir() and each.name not in old)

"""Convert an ordinary checkpoint into a slim one. Nothing is trained; images are only used to calibrate the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fixify._files import refuse_existing
from fixify._watch import OnProgress, unwatched
from fixify.agreement import Choice, choose_head, fewest_images, images_to_hold_out
from fixify.bare_conversion import (
    classifier_record,
    convert_bare,
    read_bare,
    refuse_bare_options,
)
from fixify.checkpoints import check_finite, read_labels
from fixify.checkpoints.encoder import read_encoder, with_classifier
from fixify.checkpoints.learned import Original, read_original
from fixify.checkpoints.matrix import is_matrix
from fixify.checkpoints.recognition import REFERENCE_CODE
from fixify.checkpoints.slim import (
    DTYPES,
    SUFFIX,
    SlimInfo,
    is_slim,
    main_dtype,
    read_info,
    source_record,
    write_slim,
)
from fixify.conversion_options import ConvertOptions
from fixify.errors import SourceError, UsageError
from fixify.features import Calibration, Observation
from fixify.heads import FixedClassifier
from fixify.metrics import resolve_device
from fixify.savings import Savings
from fixify.surgery import HeadRecord, NewHead, heads_of_class_vectors, make_heads

_SOURCE_SUFFIXES = (".npy", ".npz", ".pth.tar", ".pth", ".pt", ".safetensors", ".bin", ".tar", ".ckpt")


@dataclass(frozen=True)
class Conversion:
    """The result of `convert`.

    Attributes:
        path: The slim checkpoint.
        info: What is written in it.
        savings: Parameters and bytes, before and after.
        calibration: How it was calibrated and how often it agrees with the original; None without images.
        notes: Decisions that a person should know of: how the architecture was recognised, why a head was chosen.
        choice: The heads that were tried for the option `agree`; None without it.
    """

    path: Path
    info: SlimInfo
    savings: Savings
    calibration: Calibration | None
    notes: tuple[str, ...]
    choice: Choice | None = None


def convert(
    source: str | Path,
    out: str | Path | None = None,
    options: ConvertOptions | None = None,
    *,
    force: bool = False,
    on_images: Callable[[int], object] | None = None,
    on_progress: OnProgress = unwatched,
    **changes: Any,
) -> Conversion:
    """Replace the classifier of a checkpoint by a fixed one, and write the rest as a slim checkpoint.

    A file that holds a classifier alone (a matrix of C x N in .npy, .npz or .safetensors) becomes a slim head alone,
    which `fixify.load` returns as a `FixedClassifier`. The option `classifier` puts such a classifier onto an encoder.

    Every backbone tensor is written as it was stored, bit for bit, unless `dtype` is given. A checkpoint that was
    trained with the paper's published code keeps its fixed head, with scale and bias. The option `head` or
    `num_classes` puts a new one in its place; its codes are in class order, since there are no class vectors to match.

    Args:
        source: A checkpoint file, or a model name.
        out: The file to write; default: the source's name with `.fixed.safetensors`, in the current folder.
        options: How to convert; default: `ConvertOptions()`.
        force: Replace an existing file.
        on_images: Called while calibrating with the number of images of each batch.
        on_progress: Called while the codes are chosen, with what is being done, how much of it is done and how much
            there is. It can take minutes where there are very many classes.
        changes: Options by name, instead of those in `options`: `convert("model.pth", head="binary")`.

    Raises:
        AgreementNotReached: No head gives the original's answer on as many images as `agree` asks for.
        DataError: There are no such images, too few, or more than 1 % of them cannot be read.
        SourceError, ArchitectureError, NoClassifierError: See `fixify.checkpoints.learned.read_original`.
        HeadSpecError: There is no such codebook, for example no Hadamard matrix of that order.
        OutputExistsError, OutputError: The output exists already, or cannot be written.
        UsageError: An option is out of its range, or options do not go together.
    """
    options = (options or ConvertOptions()).replace(**changes)
    if is_slim(source):
        raise SourceError(f"{source} is a slim checkpoint already.", hint=_next_of(source))
    target = Path(out) if out is not None else default_out(source)
    refuse_existing(target, force=force)
    if options.classifier is None and (is_matrix(source) or options.key):
        bare = convert_bare(Path(source), options, on_progress)
        write_slim(target, bare.tensors, bare.info, force=force)
        return Conversion(target, bare.info, bare.savings, None, bare.notes)
    matrix = None
    if options.classifier is not None:
        encoder = read_encoder(source, arch=options.arch, ema=options.ema)
        matrix, options = read_bare(Path(options.classifier), options, encoder)
        original = with_classifier(encoder, matrix)
    else:
        refuse_bare_options(source, options)
        original = read_original(source, arch=options.arch, ema=options.ema)
    check_finite(original.tensors)
    observed = None
    held_out = None if options.agree is None else (images_to_hold_out(options.agree), fewest_images(options.agree))
    if options.calibrate is not None and not original.reference_code_heads:
        observed = Observation(
            original,
            options.calibrate,
            num_images=options.calibrate_images,
            seed=options.seed,
            device=resolve_device(options.device),
            held_out=held_out,
            on_images=on_images,
        )
    choice = None
    if options.agree is not None and observed is not None:
        heads, choice = choose_head(original, options, observed, on_progress)
    else:
        heads = _heads(original, options, None if observed is None else observed.features, on_progress)
    calibration = None if observed is None else observed.result({head.record.path: head.module for head in heads})
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    backbone = _backbone(original, dtype)
    head_tensors = {
        f"{head.record.path}.{key}": tensor for head in heads for key, tensor in head.module.state_dict().items()
    }
    savings = Savings.measure(
        original.build(meta=True),
        original.sites,
        learned=original.learned,
        backbone=backbone,
        heads=[head.module for head in heads],
    )
    names = original.labels if options.num_classes is None else None
    if options.labels is not None and matrix is None:
        names = read_labels(options.labels, options.num_classes or original.num_classes)
    info = SlimInfo(
        architecture=original.architecture,
        heads=tuple(head.record for head in heads),
        preprocessing=dict(original.preprocessing),
        labels=names,
        source={**source_record(original.source), **classifier_record(matrix, options)},
        savings=savings.to_dict(),
        dtype=options.dtype or main_dtype(original.tensors),
        calibration=None if calibration is None else calibration.to_dict(),
        projection=original.projection,
    )
    write_slim(target, {**backbone, **head_tensors}, info, force=force)
    about_images = () if observed is None else tuple(observed.notes)
    notes = (*original.notes, *about_images, *(note for head in heads for note in head.notes))
    return Conversion(path=target, info=info, savings=savings, calibration=calibration, notes=notes, choice=choice)


def default_out(source: str | Path) -> Path:
    """Name the file that `convert` writes: `folder/model.pth` gives `model.fixed.safetensors` in the current folder.

    >>> str(default_out("folder/model.pth.tar"))
    'model.fixed.safetensors'
    """
    name = str(source).rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    for suffix in _SOURCE_SUFFIXES:
        if name.endswith(suffix):
            name = name.removesuffix(suffix)
            break
    return Path(name + SUFFIX)


def _next_of(source: str | Path) -> str:
    """Say what to type next for a file that is a slim checkpoint already."""
    if read_info(source).is_bare:
        return f"It is a classifier without a network. Next: fixify export {source} --head-only"
    return f"Next: fixify finetune {source} --data DATA"


def _heads(
    original: Original,
    options: ConvertOptions,
    features: Mapping[str, torch.Tensor] | None,
    on_progress: OnProgress,
) -> list[NewHead]:
    """Make the new heads, or keep those of the paper's published code."""
    if not original.reference_code_heads:
        return heads_of_class_vectors(
            original.sites, original.tensors, options, features=features, on_progress=on_progress
        )
    keep = options.head == "auto" and options.num_classes is None
    _refuse_for_reference_code(original, options, keep)
    if keep:
        return [_kept_head(original, site.path, options.fixed_scale) for site in original.sites]
    gone = "a new head, codes in class order; that of the published code is gone."
    return [
        NewHead(head.record, head.module, (*head.notes, f"{head.record.path}: {gone}"))
        for head in make_heads(original.sites, {}, options, num_classes=options.num_classes)
    ]


def _refuse_for_reference_code(original: Original, options: ConvertOptions, keep: bool) -> None:
    """Refuse options that need a learned classifier, or that would change a trained head."""
    what = f"{original.source.name} has a fixed classifier already, {REFERENCE_CODE}"
    if options.calibrate is not None:
        raise UsageError(f"{what}, and calibrating fits to a learned one's answers.", hint="Leave out --calibrate.")
    if options.head == "binary":
        raise UsageError(
            f"{what}, and a binary head takes its signs from a learned one.",
            hint="Leave out --head to keep it, or put a new one in its place: --head hadamard",
        )
    if keep and (options.alpha is not None or not options.bias):
        raise UsageError(
            f"{what}: its scale and bias are trained, and kept.",
            hint=f"Leave out {'--no-bias' if options.alpha is None else '--alpha'}, or put a new one in its place: "
            "--head hadamard",
        )


def _kept_head(original: Original, path: str, fixed_scale: bool) -> NewHead:
    (site,) = [site for site in original.sites if site.path == path]
    record: HeadRecord = original.reference_code_record(site, fixed_scale=fixed_scale)
    module = FixedClassifier(record.spec, channel_dim=record.channel_dim)
    module.load_state_dict({name: original.tensors[f"{path}.{name}"] for name in ("scale", "bias")})
    note = f"{path}: the Hadamard head {REFERENCE_CODE}; scale and bias are kept, nothing is matched."
    return NewHead(record, module, (note,))


def _backbone(original: Original, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return the tensors that are not the classifier's, as stored or in another floating type."""
    classifiers = tuple(f"{site.path}." for site in original.sites)
    return {
        key: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        for key, tensor in original.tensors.items()
        if not key.startswith(classifiers)
    }

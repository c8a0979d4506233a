"""Converting: an ordinary checkpoint goes in, a slim one comes out. No training; images only to calibrate with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fixify._files import refuse_existing
from fixify._options import Conflict
from fixify.checkpoints import check_finite, read_labels
from fixify.checkpoints.learned import REFERENCE_CODE, Original, read_original
from fixify.checkpoints.slim import DTYPES, SUFFIX, SlimInfo, is_slim, write_slim
from fixify.errors import SourceError, UsageError
from fixify.features import MIN_IMAGES, Calibration, Observation
from fixify.heads import FixedClassifier, HeadSpec, choose_kind, replacement
from fixify.metrics import resolve_device
from fixify.models.architectures import build
from fixify.models.classifiers import ClassifierSite
from fixify.savings import Savings, classifier_weights, count_bytes, count_parameters
from fixify.surgery import HeadRecord, naming_head


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        path: The slim checkpoint.
        info: What is written in it.
        savings: Parameters and bytes, before and after.
        calibration: How it was calibrated and how often it agrees with the original; None without images.
        notes: Decisions that a person should know of: how the architecture was recognised, why a head was chosen.
    """

    path: Path
    info: SlimInfo
    savings: Savings
    calibration: Calibration | None
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    out: str | Path | None = None,
    *,
    head: str = "auto",
    seed: int = 0,
    arch: str | None = None,
    num_classes: int | None = None,
    bits_per_class: int | None = None,
    match: bool = True,
    scale: float | None = None,
    fixed_scale: bool = False,
    bias: bool = True,
    standardize: bool = True,
    dtype: str | None = None,
    labels: str | Path | None = None,
    ema: bool = False,
    calibrate: str | Path | None = None,
    calibrate_images: int = 512,
    device: str | None = None,
    force: bool = False,
    on_images: Callable[[int], object] | None = None,
) -> Conversion:
    """Replace the classifier of a checkpoint by a fixed one, and write what is left as a slim checkpoint.

    Every backbone tensor is written as it was stored, bit for bit (unless `dtype` is given). Of a checkpoint that was
    trained with the paper's published code the fixed head is kept, with its scale and bias; `head` or `num_classes`
    puts a new one in its place, whose codes go to classes in order, since there are no class vectors to match.

    Args:
        source: A checkpoint file, or a model name.
        out: Where to write; default: the source's name with `.fixed.safetensors`, in the current folder.
        head: "hadamard", "orthogonal", "simplex", "binary" (signs of the old classifier), or "auto": Hadamard where a
            matrix of that order is known.
        seed: Seed of the codebook (of the random orthogonal matrix, or of the sign flips where C > 2N).
        arch: The architecture, if it cannot be told from the file.
        num_classes: Number of classes of a new label set; default: the original's. A new label set is not matched.
        bits_per_class: Signs that a `binary` head stores for a class, 1 to the number of features (the default).
        match: Give each class the code nearest to its old class vector (Hadamard heads; `fixify.heads.match`), and
            keep the old bias. Costs 1 to 4 bytes a class; without it codes go to classes in order, as in the paper.
            A `binary` head is always taken from the old classifier.
        scale: Initial value of alpha; default: where softmax reaches 0.95 at cosine 1.
        fixed_scale: Alpha is not learned afterwards but stays as it is (paper, section 3.1 and figure 3: 1 or 10).
        bias: Keep a learned bias, one number a class (paper, section 2.2).
        standardize: Standardise each feature by its running mean and deviation before normalising; a binary head, if
            calibrated, only centers them.
        dtype: "float32", "float16" or "bfloat16": store the backbone in this type.
        labels: A file of class names or "imagenet" (see `fixify.checkpoints.read_labels`); default: the source's.
        ema: Take the averaged weights of a training checkpoint.
        calibrate: A folder of images, or a data name; labels are not used. The original is run on some of them: center
            and spread of the features are set, codes are matched and scale and bias fitted to its answers there.
        calibrate_images: How many images are drawn (with `seed`), 8 or more. A quarter is kept to count on how often
            original and converted model agree.
        device: Where the original runs when calibrating; default: the first accelerator there is, else the CPU.
        force: Replace an existing file.
        on_images: Called while calibrating with the number of images that each batch had.

    Raises:
        DataError: no such images, too few, or one that cannot be read.
        SourceError, ArchitectureError, NoClassifierError: see `fixify.checkpoints.learned.read_original`.
        HeadSpecError: no such codebook, for example no Hadamard matrix of that order.
        OutputExistsError, OutputError: the output exists already, or cannot be written.
        UsageError: an option is out of its range.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    if calibrate_images < MIN_IMAGES:
        raise UsageError(f"calibrate_images must be {MIN_IMAGES} or more, not {calibrate_images}.")
    if found := list(conflicts(head, num_classes, bits_per_class, match, calibrate, device)):
        hints = dict.fromkeys(each.hint for each in found if each.hint is not None)
        raise UsageError("\n".join(f"{each.sentence}." for each in found), hint=" ".join(hints) or None)
    if is_slim(source):
        raise SourceError(f"{source} is a slim checkpoint already.", hint=f"Next: fixify finetune {source} --data DATA")
    target = Path(out) if out is not None else default_out(source)
    refuse_existing(target, force=force)
    original = read_original(source, arch=arch, ema=ema)
    check_finite(original.tensors)
    keep = head == "auto" and num_classes is None
    if original.reference_code_heads:
        _refuse_for_published(original, keep, head, scale=scale, bias=bias, calibrate=calibrate)

    notes = list(original.notes)
    names = original.labels if num_classes is None else None
    if labels is not None:
        names = read_labels(labels, num_classes or original.num_classes)
    observed = None
    if calibrate is not None:
        observed = Observation(
            original,
            str(calibrate),
            num_images=calibrate_images,
            seed=seed,
            device=resolve_device(device),
            on_images=on_images,
        )
    records, heads = [], {}
    for site in original.sites:
        with naming_head(site.path, original.sites):
            if keep and site.path in original.reference_code_heads:
                records.append(original.reference_code_record(site, fixed_scale=fixed_scale))
                heads[site.path] = _kept_head(records[-1], original.tensors)
                notes.append(
                    f"{site.path}: the Hadamard head {REFERENCE_CODE}; scale and bias are kept, nothing is matched."
                )
                continue
            classes = num_classes or site.num_classes
            kind, reason = choose_kind(site.num_features, classes) if head == "auto" else (head, None)
            spec = HeadSpec(
                kind=kind,
                num_features=site.num_features,
                num_classes=classes,
                seed=seed,
                bias=bias,
                standardize=standardize,
                fixed_scale=fixed_scale,
                bits_per_class=(bits_per_class or site.num_features) if kind == "binary" else None,
                gains=kind == "binary",
            )
            if kind == "binary":
                # Without statistics the old logits are nearest when the features are left as they are. With some, a
                # deviation of few scenes would blow up the features that they happen not to use.
                calibrated = observed is not None and site.path in observed.features
                spec = replace(
                    spec, standardize="center" if standardize and calibrated else False, normalize=calibrated
                )
            learned = site.path not in original.reference_code_heads
            if kind == "binary" or (match and num_classes is None and kind == "hadamard" and learned):
                fixed, note = _taken_head(spec, site, original.tensors, scale, observed)
                notes.append(note)
            else:
                fixed = FixedClassifier(spec, scale=scale, channel_dim=site.channel_dim)
                if observed is not None and standardize and site.path in observed.features:
                    observed.calibrate_(fixed, site.path)
                    notes.append(f"{site.path}: codes are not matched, so calibrating sets only center and spread.")
                if reason is not None:
                    notes.append(f"{site.path}: {kind} head, since {reason}.")
                if not learned:
                    notes.append(f"{site.path}: a new head, codes in class order; that of the published code is gone.")
            heads[site.path] = fixed
            records.append(HeadRecord(site.path, site.layer_type, site.channel_dim, fixed.spec))
    calibration = None if observed is None else observed.result(heads)

    tensors, savings = _replace_heads(original, heads, None if dtype is None else DTYPES[dtype])
    info = SlimInfo(
        architecture=original.architecture,
        heads=tuple(records),
        preprocessing=original.preprocessing,
        labels=names,
        source={
            "name": original.source.name,
            "sha256": original.source.sha256,
            "bytes": original.source.num_bytes,
            "ema": original.source.used_ema,
        },
        savings=savings.to_dict(),
        dtype=dtype or _main_dtype(original.tensors),
        calibration=None if calibration is None else calibration.to_dict(),
    )
    write_slim(target, tensors, info, force=force)
    return Conversion(path=target, info=info, savings=savings, calibration=calibration, notes=tuple(notes))


def default_out(source: str | Path) -> Path:
    """Where `convert` writes unless told: `folder/model.pth` gives `model.fixed.safetensors` in the current folder."""
    name = str(source).rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    for suffix in (".pth.tar", ".pth", ".pt", ".safetensors", ".bin", ".tar", ".ckpt"):
        if name.endswith(suffix):
            name = name.removesuffix(suffix)
            break
    return Path(name + SUFFIX)


def conflicts(
    head: str,
    num_classes: int | None,
    bits_per_class: int | None,
    match: bool,
    calibrate: str | Path | None,
    device: str | None,
) -> Iterator[Conflict]:
    """Options of `convert` that do not go together; a recipe is checked for them too."""
    if calibrate is None and device is not None:
        yield Conflict(
            ("device", "calibrate"),
            "Only calibrating runs the model on a device",
            "Add --calibrate FOLDER, or drop --device.",
        )
    if calibrate is not None and num_classes is not None:
        yield Conflict(
            ("calibrate", "num_classes"),
            "Calibrating fits the head to the original's answers, and a new label set has none",
            "Drop --calibrate: fixify finetune takes center and spread from its training images.",
        )
    if head != "binary" and bits_per_class is not None:
        yield Conflict(
            ("bits_per_class", "head"), f"bits_per_class belongs to head binary, not {head}", "Add --head binary."
        )
    if head == "binary" and num_classes is not None:
        yield Conflict(
            ("head", "num_classes"),
            "A binary head takes its signs from the old classifier, and a new label set has none",
            "Drop --head binary: the codes of a Hadamard head need no old classifier.",
        )
    if head == "binary" and not match:
        yield Conflict(
            ("match", "head"),
            "A binary head has no codes that could go to classes in order: its signs are the old classifier's",
            "Drop --no-match, or take --head hadamard.",
        )


def _refuse_for_published(
    original: Original, keep: bool, head: str, *, scale: float | None, bias: bool, calibrate: str | Path | None
) -> None:
    """Options that need a learned classifier, or that would change a trained head."""
    what = f"{original.source.name} has a fixed classifier already, {REFERENCE_CODE}"
    if calibrate is not None:
        raise UsageError(f"{what}, and calibrating fits to a learned one's answers.", hint="Leave out --calibrate.")
    if head == "binary":
        raise UsageError(
            f"{what}, and a binary head takes its signs from a learned one.",
            hint="Leave out --head to keep it, or put a new one in its place: --head hadamard",
        )
    if keep and (scale is not None or not bias):
        raise UsageError(
            f"{what}: its scale and bias are trained, and kept.",
            hint=f"Leave out {'--no-bias' if scale is None else '--scale'}, or put a new one in its place: "
            "--head hadamard",
        )


def _kept_head(record: HeadRecord, tensors: dict[str, torch.Tensor]) -> FixedClassifier:
    fixed = FixedClassifier(record.spec, channel_dim=record.channel_dim)
    fixed.load_state_dict({name: tensors[f"{record.path}.{name}"] for name in ("scale", "bias")})
    return fixed


def _taken_head(
    spec: HeadSpec,
    site: ClassifierSite,
    tensors: dict[str, torch.Tensor],
    scale: float | None,
    observed: Observation | None,
) -> tuple[FixedClassifier, str]:
    """A head whose codes are chosen by the old classifier, and fitted if there are features; what came of it."""
    made = replacement(
        spec,
        tensors[f"{site.path}.weight"],
        tensors[f"{site.path}.bias"] if site.has_bias else None,
        features=None if observed is None else observed.features.get(site.path),
        scale=scale,
        channel_dim=site.channel_dim,
    )
    return made.head, f"{site.path}: {made.note}."


def _replace_heads(
    original: Original, heads: dict[str, FixedClassifier], dtype: torch.dtype | None
) -> tuple[dict[str, torch.Tensor], Savings]:
    """The tensors of the slim checkpoint: the backbone's as they were, then each head's; and what that saves."""
    learned, classifiers = original.learned, tuple(f"{site.path}." for site in original.sites)
    tensors = {key: tensor for key, tensor in original.tensors.items() if not key.startswith(classifiers)}
    if dtype is not None:
        tensors = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    head_tensors = {
        f"{path}.{key}": tensor for path, head in heads.items() for key, tensor in head.state_dict().items()
    }
    before = count_parameters(build(original.architecture, num_classes=original.num_classes, meta=True))
    classifier = sum(site.num_parameters for site in original.sites)
    savings = Savings(
        parameters_before=before,
        parameters_after=before - classifier + sum(count_parameters(head) for head in heads.values()),
        classifier_parameters=classifier,
        removed=sum(classifier_weights(site) for site in original.sites),
        bytes_before=count_bytes(learned.values()),
        bytes_after=count_bytes(tensors.values()) + count_bytes(head_tensors.values()),
        classifier_bytes_before=count_bytes(tensor for key, tensor in learned.items() if key.startswith(classifiers)),
        classifier_bytes_after=count_bytes(head_tensors.values()),
    )
    return tensors | head_tensors, savings


def _main_dtype(tensors: dict[str, torch.Tensor]) -> str:
    """The floating type that most of the backbone's elements are stored in."""
    elements = dict.fromkeys(DTYPES, 0)
    names = {dtype: name for name, dtype in DTYPES.items()}
    for tensor in tensors.values():
        if tensor.dtype in names:
            elements[names[tensor.dtype]] += tensor.numel()
    return max(elements, key=lambda name: elements[name])

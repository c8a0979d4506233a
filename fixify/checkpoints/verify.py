"""Check a slim checkpoint: rebuild its codebook, load it, run it, and compare its backbone with the original's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixify._files import sha256_of, unchanged
from fixify._values import counted
from fixify.checkpoints.digests import compare_digests, digest_of
from fixify.checkpoints.encoder import read_encoder
from fixify.checkpoints.learned import read_original
from fixify.checkpoints.locate import locate_slim
from fixify.checkpoints.matrix import MatrixOptions, class_mean, read_matrix
from fixify.checkpoints.slim import SlimInfo, load_contents, read_contents
from fixify.checkpoints.source import check_finite
from fixify.errors import CodebookMismatchError, FixifyError, FormatError, SourceError
from fixify.heads import coherence

# Above 2^24 float32 has no digits left for a difference of one.
_CHECKED_CLASSES = 256
_AT_ONCE = 16
_LEAST_CORRELATION = 0.05
_LARGEST_LOGIT = 2.0**24


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: What was checked.
        passed: Whether the check passed.
        detail: What was found.
    """

    name: str
    passed: bool
    detail: str


def verify(path: str | Path, *, source: str | Path | None = None) -> list[Check]:
    """Check a slim checkpoint.

    Args:
        path: The slim checkpoint; see `fixify.load`.
        source: The original checkpoint; if given, the backbones are compared bit for bit.

    Raises:
        FormatError: the file is not a slim checkpoint, or is too damaged to be checked.
        SourceError: `source` cannot be read, or a repository of the Hugging Face hub.
    """
    path = locate_slim(path)
    with unchanged(path, FormatError):
        return _checks(path, source)


def _checks(path: Path, source: str | Path | None) -> list[Check]:
    contents = read_contents(path)
    info, tensors = contents.info, contents.tensors
    classes = counted(info.num_classes, "class", "classes")
    what = "a classifier without a network" if info.is_bare else info.architecture.ref
    checks = [Check("header", True, f"format version 1, {what}, {classes}")]
    checks += [_finite(tensors), check_digest(tensors, contents.digest, path)]
    try:
        model = load_contents(contents, path)
    except CodebookMismatchError as error:
        checks.append(Check("codebook", False, error.message))
        return checks
    except FixifyError as error:
        checks.append(Check("tensors", False, error.message))
        return checks
    checks.append(Check("tensors", True, f"{counted(len(tensors), 'tensor')}, as {what} has them"))
    checks.append(_codebook(info, model))
    checks.append(_forward(info, model))
    if source is not None:
        checks += _against_matrix(info, model, source) if info.is_bare else _against(info, tensors, source)
    return checks


def _finite(tensors: dict[str, torch.Tensor]) -> Check:
    try:
        check_finite(tensors)
    except SourceError as error:
        return Check("values", False, error.message)
    return Check("values", True, "all finite")


def check_digest(tensors: Mapping[str, torch.Tensor], recorded: str | None, path: Path | str) -> Check:
    """Compare tensors with the recorded digest, which notices a single flipped bit."""
    if recorded is None:
        return Check("digest", True, "none recorded: the file was written by an older version")
    try:
        compare_digests(digest_of(tensors), recorded, path)
    except FormatError as error:
        return Check("digest", False, error.message.rstrip("."))
    return Check("digest", True, "tensors as written")


def _codebook(info: SlimInfo, model: nn.Module) -> Check:
    """Check that no two classes have the same code; loading has already compared the codebook's digest."""
    found = []
    for record in info.heads:
        head: Any = model if info.is_bare else model.get_submodule(record.path)
        codes = None if head.codes is None else head.codes.cpu().numpy()
        facts = coherence(record.spec, codes, head.product.projection)
        if facts.max_cosine > 1 - 1e-6:
            return Check("codebook", False, f"{record.path}: two classes have the same code")
        found.append(f"{record.path}: digest as recorded, largest cosine {facts.max_cosine:.3f}")
    return Check("codebook", True, "; ".join(found))


def _forward(info: SlimInfo, model: nn.Module) -> Check:
    """Run the model on unlike images, and check that its logits depend on the image and have a possible size."""
    if info.is_bare:
        images, what = _unlike_features(info.heads[0].spec.num_features), "features"
    else:
        images, what = _unlike_images(info.preprocessing.get("input_size", [3, 224, 224])), "images"
    size = list(images.shape)
    try:
        with torch.inference_mode():
            logits = model(images)
    # What layers and builders of timm raise for an input that they were not made for.
    except (RuntimeError, ValueError, AssertionError, ArithmeticError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return Check("forward", False, f"{what} {size} cannot be run: {reason[:200]}")
    if logits.shape != (len(images), info.num_classes):
        return Check("forward", False, f"{what} {size} give logits {list(logits.shape)}")
    fault = _fault(logits.float())
    return Check("forward", fault is None, f"{what} {size} give logits {list(logits.shape)}{fault or ''}")


def _unlike_images(input_size: Sequence[int]) -> torch.Tensor:
    """Make four images, float32 [4, channels, height, width]: noise, darker noise, a gradient, and stripes."""
    channels, height, width = input_size
    noise = torch.rand(channels, height, width, generator=torch.Generator().manual_seed(0))
    gradient = torch.linspace(-2, 2, width).expand(channels, height, width)
    stripes = (torch.arange(height) // 8 % 2 * 4.0 - 2)[:, None].expand(channels, height, width)
    return torch.stack([noise, noise - 2, gradient, stripes])


def _unlike_features(num_features: int) -> torch.Tensor:
    """Make four vectors of features: float32 [4, N]."""
    return torch.randn(4, num_features, generator=torch.Generator().manual_seed(0))


def _fault(logits: torch.Tensor) -> str | None:
    """Say what makes logits [B, C] useless; None if they can be answers."""
    if not bool(logits.isfinite().all()):
        return ", which are not all finite"
    largest = float(logits.abs().max())
    if largest > _LARGEST_LOGIT:
        return f" as large as {largest:.3g}: float32 cannot tell such logits one apart"
    spread = 1e-6 * max(largest, 1e-30)
    if float((logits.amax(0) - logits.amin(0)).max()) <= spread:
        return ", which are the same for every image"
    if logits.shape[1] > 1 and float((logits.amax(1) - logits.amin(1)).max()) <= spread:
        return ", which are the same for every class"
    return None


def _against_matrix(info: SlimInfo, head: nn.Module, source: str | Path) -> list[Check]:
    """Compare a head alone with the matrix that it was made from: the file, and whether the logits go together."""
    known: Any = info.source.get("classifier") or {}
    options = MatrixOptions(
        keys=known.get("keys", ()), rows=known.get("rows"), logit_scale=known.get("logit_scale") or 1.0
    )
    matrix = read_matrix(source, options)
    same = matrix.sha256 == info.source.get("sha256")
    checks = [
        Check("source", same, "the file it was made from" if same else "another file than the one it was made from")
    ]
    wanted, found = list(matrix.weight.shape), [head.out_features, head.in_features]
    if wanted != found:
        detail = f"{wanted[0]} classes of {wanted[1]} features there, {found[0]} of {found[1]} here"
        return [*checks, Check("classes", False, detail)]
    some = torch.linspace(0, len(matrix.weight) - 1, min(_CHECKED_CLASSES, len(matrix.weight))).long()
    own = matrix.weight[some] - class_mean(matrix.weight, directions=False)
    with torch.inference_mode():
        made = torch.cat([head(part)[:, some] for part in own.split(_AT_ONCE)])
    expected = own @ matrix.weight[some].T
    right = float(_correlation(made, expected))
    return [*checks, Check("logits", right > _LEAST_CORRELATION, f"correlation {right:.3f} with those of the matrix")]


def _correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute the correlation of logits [M, C] after their mean over classes is removed."""
    a, b = (logits.double() - logits.double().mean(dim=1, keepdim=True) for logits in (a, b))
    return (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30)


def _against(info: SlimInfo, tensors: dict[str, torch.Tensor], source: str | Path) -> list[Check]:
    known, ema = info.architecture.spelled, bool(info.source.get("ema"))
    attached = "classifier" in info.source
    stored = (
        read_encoder(source, arch=known, ema=ema).tensors
        if attached
        else read_original(source, arch=known, ema=ema).tensors
    )
    checks = []
    if Path(source).is_file():
        same = sha256_of(Path(source)) == info.source.get("sha256")
        checks.append(
            Check("source", same, "the file it was made from" if same else "another file than the one it was made from")
        )
    heads = tuple(f"{record.path}." for record in info.heads)
    backbone = [key for key in stored if not key.startswith(heads)]
    changed = [key for key in backbone if key not in tensors or not _identical(tensors[key], stored[key])]
    detail = f"{counted(len(backbone), 'tensor')}, bit for bit"
    if changed:
        detail = f"{changed[0]} differs" if len(changed) == 1 else f"{changed[0]} and {len(changed) - 1} more differ"
    return [*checks, Check("backbone", not changed, detail)]


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat_a, flat_b = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return bool(torch.equal(flat_a, flat_b))

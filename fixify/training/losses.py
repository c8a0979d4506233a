"""Training losses: cross-entropy, the paper's cosine loss (section 2.2), and distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fixify.errors import UsageError
from fixify.heads import FixedClassifier
from fixify.many_classes import ends_in_its_head, only_head
from fixify.training.options import USUAL_TEACHING, FinetuneOptions


def cosine_loss(cosines: Tensor, targets: Tensor) -> Tensor:
    """Compute 1 - q_t x for the right class t, plus the mean of 1 + q_i x over the others; a batch mean in 0 .. 4.

    The paper prints a brace with "q_i x - 1 if i = t" and "q_i x + 1 otherwise", without a sum over i and without a
    norm. Minimised as printed, the first line would turn features *away* from their code. So both lines are read as
    the distance of a cosine from its target, |q_t x - 1| and |q_i x + 1|, which for -1 <= q x <= 1 are 1 - q_t x and
    1 + q_i x. The distances of the other classes are averaged, not summed: with a sum, the best features for C
    orthonormal codes have a cosine of only 1 / sqrt(C) with their own code (0.03 for 1,000 classes), with the mean
    sqrt((C - 1) / C).

    Args:
        cosines: Cosines of features and codes, [B, C], in -1 .. 1: the logits of a head that passes
            `check_cosine_heads`.
        targets: Labels int64 [B], or distributions [B, C] of mixed images, which weight the two parts.
    """
    classes = cosines.shape[-1]
    right = F.one_hot(targets, classes).to(cosines.dtype) if targets.ndim == 1 else targets.to(cosines.dtype)
    near = (right * (1 - cosines)).sum(dim=-1)
    far = ((1 - right) * (1 + cosines)).sum(dim=-1) / max(classes - 1, 1)
    return (near + far).mean()


def check_cosine_heads(model: nn.Module) -> None:
    """Check that the logits of a model are cosines.

    Raises:
        UsageError: it has no fixed head, or one with a bias, a scale other than a fixed 1, codes of several lengths, or
            features that are not normalised.
    """
    heads = {path: module for path, module in model.named_modules() if isinstance(module, FixedClassifier)}
    if not heads:
        raise UsageError("The cosine loss needs a fixed classifier; this model has a learned one.")
    for path, head in heads.items():
        spec, scale = head.spec, float(head.scale.detach())
        wrong = [
            text
            for text, found in (
                ("a bias", spec.bias),
                ("a learned scale", not spec.fixed_scale),
                (f"scale {scale:g}", spec.fixed_scale and scale != 1.0),
                ("codes of several lengths", spec.row_scales),
                ("no norm of the features", not spec.normalize),
            )
            if found
        ]
        if wrong:
            raise UsageError(
                f"The cosine loss needs logits that are cosines; {path or 'the head'} has {', '.join(wrong)}.",
                hint="Convert with: fixify convert SOURCE --head hadamard --alpha 1 --fixed-scale --no-bias",
            )


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute T^2 KL(teacher || student) of the softmaxes at temperature T; batch mean, in nats.

    Hinton, Vinyals & Dean, "Distilling the knowledge in a neural network" (2015), section 2. The factor keeps the size
    of the gradients when the temperature changes.

    Args:
        logits: Of the student, float32 [B, C].
        teacher_logits: Of the teacher, float32 [B, C].
        temperature: T > 0.
    """
    ours = F.log_softmax(logits / temperature, dim=-1)
    theirs = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def training_loss(logits: Tensor, targets: Tensor, teacher_logits: Tensor | None, options: FinetuneOptions) -> Tensor:
    """Compute the loss that is minimised: cross-entropy or the cosine loss, mixed with the distillation loss.

    Args:
        logits: [B, C].
        targets: Labels int64 [B], or distributions [B, C].
        teacher_logits: Float32 [B, C]; None without a teacher.
        options: Which loss, the teacher's weight and temperature, and label smoothing.
    """
    logits = logits.float()
    if teacher_logits is not None and options.unlabelled:
        return distillation_loss(logits, teacher_logits, options.distill_temperature)
    if options.loss == "cosine":
        loss = cosine_loss(logits, targets)
    else:
        # Targets that are distributions are smoothed already.
        smoothing = options.smoothing if targets.ndim == 1 else 0.0
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    if teacher_logits is None:
        return loss
    weight = USUAL_TEACHING if options.distill_weight is None else options.distill_weight
    return (1 - weight) * loss + weight * distillation_loss(logits, teacher_logits, options.distill_temperature)


# Very many classes.

BLOCKED_FROM = 1 << 23
"""Logits of a batch (images x classes) from which the loss is computed block by block (`fixify.heads.loss`): from about
there on it is faster, and always smaller. See tests/benchmarks/README.md."""


@dataclass(frozen=True)
class LossPlan:
    """How the loss of a run is computed.

    Attributes:
        blocked: Block by block, without logits.
        note: A sentence that says so, or why not; None with few classes or a learned classifier.
    """

    blocked: bool = False
    note: str | None = None


def plan_loss(
    model: nn.Module,
    options: FinetuneOptions,
    *,
    input_size: Sequence[int],
    device: torch.device,
    has_teacher: bool,
) -> LossPlan:
    """Decide how the loss is computed. Below `BLOCKED_FROM` logits the model does not run.

    Args:
        model: The model, on `device`.
        options: Options of the run.
        input_size: (channels, height, width) of the images.
        device: Where the model is.
        has_teacher: Whether the logits of a teacher are learned.
    """
    heads = [module for module in model.modules() if isinstance(module, FixedClassifier)]
    classes = max((head.out_features for head in heads), default=0)
    if options.batch_size * classes < BLOCKED_FROM:
        return LossPlan()
    reasons = {
        "the cosine loss needs all cosines": options.loss != "cross-entropy",
        "a teacher has logits of all classes": has_teacher,
        "--compile compiles a model that returns logits": options.compile,
        "--shard shards a model that returns logits": options.shard,
        "the last blocks are trained alone first (--last-block-epochs)": options.last_block_epochs > 0,
    }
    reason = next((text for text, applies in reasons.items() if applies), None)
    if reason is None and not (only_head(model) and ends_in_its_head(model, input_size, device)):
        reason = "the model does more with the logits than to return them"
    if reason is None:
        return LossPlan(True, f"loss of {classes:,} classes: exact, computed block by block without logits in memory")
    return LossPlan(False, f"loss of {classes:,} classes: with all logits in memory, because {reason}")


def blocked_loss(
    head: FixedClassifier, features: Tensor, targets: Tensor, options: FinetuneOptions
) -> tuple[Tensor, Tensor]:
    """Compute what `training_loss` does, from the features that a deferred head returned.

    Args:
        head: The head.
        features: [B, N].
        targets: Labels int64 [B], or distributions [B, C].
        options: Label smoothing.

    Returns:
        The mean loss, and bool [B]: has the label, or the heaviest of a distribution, the largest logit?
    """
    smoothing = options.smoothing if targets.ndim == 1 else 0.0  # distributions are smoothed already
    losses, right = head.losses_of_scaled(features, targets, label_smoothing=smoothing)
    return losses.mean(), right

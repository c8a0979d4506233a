"""Training losses: cross-entropy, the paper's cosine loss (section 2.2), and distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fixify.errors import UsageError
from fixify.heads import ArcFace, CosFace, FixedClassifier, Margin
from fixify.many_classes import ends_in_its_head, only_head
from fixify.training import distributed
from fixify.training.options import USUAL_TEACHING, FinetuneOptions, read_margin


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


@dataclass(frozen=True)
class HeadMargin:
    """A margin, and the head whose logits it changes.

    Attributes:
        margin: The margin.
        head: The head.
    """

    margin: Margin
    head: FixedClassifier

    def apply(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Replace the logit of the right class; `fixify.heads.loss.cross_entropy` does the same without logits.

        Args:
            logits: Of the head, float32 [B, C].
            targets: int64 [B].
        """
        place, scale = targets[:, None], self.head.scale.float()
        bias, lengths = self.head.bias, self.head.row_scales
        offset = torch.zeros_like(scale) if bias is None else bias[place].float()
        scale = scale if lengths is None else scale * lengths[place]
        cosine = (logits.gather(1, place) - offset) / scale
        return logits.scatter(1, place, self.margin.apply(cosine) * scale + offset)


def make_margin(
    model: nn.Module, options: FinetuneOptions, *, input_size: Sequence[int], device: torch.device
) -> HeadMargin | None:
    """Return the margin that the options ask for, or None.

    Args:
        model: The model, on `device`; it runs once if there is a margin.
        options: Options of the run.
        input_size: (channels, height, width) of the images.
        device: Where the model is.

    Raises:
        UsageError: the model has no fixed head or several, or its logits are not cosines times a scale, plus a bias.
    """
    if options.margin is None:
        return None
    name, number = read_margin(options.margin)
    heads = {path: module for path, module in model.named_modules() if isinstance(module, FixedClassifier)}
    if not heads:
        raise UsageError(
            f"A margin ({options.margin}) needs a fixed classifier; this model has a learned one.",
            hint="Leave out the margin, or train a fixed classifier: fixify convert SOURCE; in a recipe, head: auto.",
        )
    path, head = next(iter(heads.items()))
    wrong = [
        text
        for text, found in (
            ("several heads", len(heads) > 1),
            ("no norm of the features", not head.spec.normalize),
        )
        if found
    ]
    if not wrong and not ends_in_its_head(model, input_size, device):
        wrong = ["logits that are not the model's output"]
    if wrong:
        raise UsageError(
            f"A margin ({options.margin}) needs logits that are cosines; {path or 'the head'} has {', '.join(wrong)}.",
            hint="Leave out --margin, or convert again: fixify convert SOURCE --head hadamard",
        )
    return HeadMargin(CosFace(number) if name == "cosface" else ArcFace(number), head)


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


def training_loss(
    logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor | None,
    options: FinetuneOptions,
    margin: HeadMargin | None = None,
) -> Tensor:
    """Compute the loss that is minimised: cross-entropy or the cosine loss, mixed with the distillation loss.

    Args:
        logits: [B, C].
        targets: Labels int64 [B], or distributions [B, C].
        teacher_logits: Float32 [B, C]; None without a teacher.
        options: Which loss, the teacher's weight and temperature, and label smoothing.
        margin: Of the right class in the cross-entropy.
    """
    logits = logits.float()
    if teacher_logits is not None and options.unlabelled:
        return distillation_loss(logits, teacher_logits, options.distill_temperature)
    if options.loss == "cosine":
        loss = cosine_loss(logits, targets)
    else:
        # Targets that are distributions are smoothed already.
        smoothing = options.smoothing if targets.ndim == 1 else 0.0
        moved = logits if margin is None else margin.apply(logits, targets)
        loss = F.cross_entropy(moved, targets, label_smoothing=smoothing)
    if teacher_logits is None:
        return loss
    weight = USUAL_TEACHING if options.distill_weight is None else options.distill_weight
    return (1 - weight) * loss + weight * distillation_loss(logits, teacher_logits, options.distill_temperature)


# Very many classes.

BLOCKED_FROM = 1 << 23
"""Logits of a batch (images x classes) from which the loss is computed block by block (`fixify.heads.loss`): from about
there on it is faster, and always smaller. See tests/benchmarks/README.md."""
PAIRS_FROM = 1 << 21
"""The same where codes are rows of Hadamard blocks and their negatives, whose exponentials are computed together."""


@dataclass(frozen=True)
class LossPlan:
    """How the loss of a run is computed.

    Attributes:
        blocked: Block by block, without logits.
        shared: Whether each process computes the logits of its own classes, for the images of all.
        note: A sentence that says so, or why not; None with few classes or a learned classifier.
    """

    blocked: bool = False
    shared: bool = False
    note: str | None = None


def plan_loss(
    model: nn.Module,
    options: FinetuneOptions,
    *,
    input_size: Sequence[int],
    device: torch.device,
    has_teacher: bool,
) -> LossPlan:
    """Decide how the loss is computed. Where logits are few the model does not run, unless classes are shared.

    Args:
        model: The model, on `device`.
        options: Options of the run.
        input_size: (channels, height, width) of the images.
        device: Where the model is.
        has_teacher: Whether the logits of a teacher are learned.

    Raises:
        UsageError: `share_classes` in a single process, or where the loss needs all logits.
    """
    heads = [module for module in model.modules() if isinstance(module, FixedClassifier)]
    classes = max((head.out_features for head in heads), default=0)
    shared, processes = options.share_classes, distributed.world_size()
    if shared and processes == 1:
        raise UsageError(
            "--share-classes needs several processes, and this is one.",
            hint="Add --nproc-per-node N, or leave out --share-classes.",
        )
    num_logits = options.batch_size * classes
    early = num_logits >= PAIRS_FROM and _gains_early(heads, options, device)
    if num_logits < BLOCKED_FROM and not early and not shared:
        return LossPlan()
    reasons = {
        "the cosine loss needs all cosines": options.loss != "cross-entropy",
        "a teacher has logits of all classes": has_teacher,
        "--compile compiles a model that returns logits": options.compile,
        "--shard shards a model that returns logits": options.shard,
        "the last blocks are trained alone first (--last-block-epochs)": bool(options.last_block_epochs),
        "the signs of the head are learned (--learn-signs)": options.learn_signs is not None,
    }
    reason = next((text for text, applies in reasons.items() if applies), None)
    if not heads:
        reason = "a learned classifier has a gradient for each class"
    if reason is None and not (only_head(model) and ends_in_its_head(model, input_size, device)):
        reason = "the model does more with the logits than to return them"
    if reason is None:
        where = f", each of {processes} processes its share" if shared else ""
        note = f"loss of {classes:,} classes: exact, computed block by block without logits in memory{where}"
        return LossPlan(True, shared, note)
    if shared:
        raise UsageError(f"--share-classes is not possible: {reason}.", hint="Leave out --share-classes.")
    return LossPlan(note=f"loss of {classes:,} classes: with all logits in memory, because {reason}")


def _gains_early(heads: Sequence[FixedClassifier], options: FinetuneOptions, device: torch.device) -> bool:
    """Check whether the loss in blocks is the faster one from `PAIRS_FROM` logits on; see `fixify.heads.loss`."""
    mixes = options.mixup > 0 or options.cutmix > 0  # targets are distributions then
    pairs = bool(heads) and all(head.product.has_pairs and head.gains is None for head in heads)
    return pairs and device.type == "cpu" and options.amp == "none" and not mixes


def blocked_loss(
    head: FixedClassifier,
    features: Tensor,
    targets: Tensor,
    options: FinetuneOptions,
    margin: HeadMargin | None = None,
    *,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute what `training_loss` does, from the features that a deferred head returned.

    Args:
        head: The head.
        features: [B, N].
        targets: Labels int64 [B], or distributions [B, C].
        options: Label smoothing.
        margin: Of the right class.
        shared: Whether the processes share the classes; all have as many images.

    Returns:
        The mean loss, and bool [B]: has the label, or the heaviest of a distribution, the largest logit?
    """
    smoothing = options.smoothing if targets.ndim == 1 else 0.0  # distributions are smoothed already
    losses, right = head.losses_of_scaled(
        features,
        targets,
        label_smoothing=smoothing,
        margin=None if margin is None else margin.margin,
        group=dist.group.WORLD if shared else None,
    )
    return losses.mean(), right

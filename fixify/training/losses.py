"""The paper's loss without a softmax (section 2.2): the cosine of features and code of the class."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fixify.errors import UsageError
from fixify.heads import FixedClassifier
from fixify.training.options import FinetuneOptions


def cosine_loss(cosines: Tensor, targets: Tensor) -> Tensor:
    """1 - q_t x for the right class plus the mean of 1 + q_i x over the others; mean over the batch, 0 to 4.

    The paper prints a brace with "q_i x - 1 if i = t" and "q_i x + 1 otherwise", without a sum over i and without a
    norm. Minimised as printed, the first line would turn features *away* from their code. So both lines are read as
    distances of a cosine from where it should be, |q_t x - 1| and |q_i x + 1|, which for -1 <= q x <= 1 are 1 - q_t x
    and 1 + q_i x. The others are averaged, not added up: of their sum the best features for C orthonormal codes have
    a cosine of only 1 / sqrt(C) with their own code (0.03 for 1,000 classes), of the mean sqrt((C - 1) / C).

    Args:
        cosines: Of features and codes, [B, C], in -1 .. 1: the logits of a head as `check_cosine_heads` wants it.
        targets: Labels int64 [B], or distributions [B, C] (of mixed images), by which the two parts are weighted.
    """
    classes = cosines.shape[-1]
    right = F.one_hot(targets, classes).to(cosines.dtype) if targets.ndim == 1 else targets.to(cosines.dtype)
    near = (right * (1 - cosines)).sum(dim=-1)
    far = ((1 - right) * (1 + cosines)).sum(dim=-1) / max(classes - 1, 1)
    return (near + far).mean()


def check_cosine_heads(model: nn.Module) -> None:
    """Refuse a model whose logits are not cosines.

    Raises:
        UsageError: it has no fixed head, or one with a bias, a scale other than a fixed 1, lengths of codes, or without
            the norm of the features.
    """
    heads = {path: module for path, module in model.named_modules() if isinstance(module, FixedClassifier)}
    if not heads:
        raise UsageError("The cosine loss is for a fixed classifier, and this model has a learned one.")
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
                f"The cosine loss needs a head whose logits are cosines; {path or 'the head'} has {', '.join(wrong)}.",
                hint="Make one: fixify convert SOURCE --head hadamard --scale 1 --fixed-scale --no-bias",
            )


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


def training_loss(logits: Tensor, targets: Tensor, teacher_logits: Tensor | None, options: FinetuneOptions) -> Tensor:
    """What is minimised: cross-entropy with the labels (or the cosine loss), and what the teacher would rather see.

    Args:
        logits: [B, C].
        targets: Labels int64 [B], or distributions [B, C].
        teacher_logits: The teacher's logits, float32 [B, C], if there is one.
        options: Which loss, the teacher's weight and temperature, and label smoothing.
    """
    logits = logits.float()
    if teacher_logits is not None and options.unlabelled:
        return distillation_loss(logits, teacher_logits, options.distill_temperature)
    if options.loss == "cosine":
        loss = cosine_loss(logits, targets)
    else:
        # Mixed targets are distributions that include the smoothing already.
        smoothing = options.smoothing if targets.ndim == 1 else 0.0
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    if teacher_logits is None:
        return loss
    share = options.distill_weight
    return (1 - share) * loss + share * distillation_loss(logits, teacher_logits, options.distill_temperature)

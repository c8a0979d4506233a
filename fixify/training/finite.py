"""Numbers that are not finite: found before they reach the weights, or at the latest before they reach a file."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fixify.errors import TrainingError
from fixify.training import distributed
from fixify.training.shards import own_part

HINT = "Try a lower --lr, a longer --warmup-epochs, or --clip-grad 1."


class Buffers:
    """The buffers of a model as they are now: running statistics, which a forward pass changes.

    Args:
        model: The model. Tables that can be rebuilt (buffers that are not stored) are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        stored = model.state_dict(keep_vars=True)
        self._kept = [(own, own.clone()) for name, own in model.named_buffers() if stored.get(name) is own]

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back."""
        for own, kept in self._kept:
            own.copy_(kept)


def gradients_are_finite(model: nn.Module) -> bool:
    """Whether all gradients are, in all processes."""
    gradients = [own_part(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    bad = bool(gradients) and not bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())
    return distributed.largest(int(bad)) == (0,)


def check_weights(model: nn.Module, updates: int) -> None:
    """Refuse to go on with weights or statistics that are not finite; to be called before they are written.

    A loss tells of such weights one step later; the last step of an epoch has none. Buffers may hold an infinity on
    purpose (masks), so of them only NaN is refused.

    Args:
        model: What would be written.
        updates: After how many updates, for the message.

    Raises:
        TrainingError: some are not; the names of the first are in it.
    """
    parameters = {name for name, _ in model.named_parameters()}
    here = [name for name, value in model.state_dict().items() if _is_bad(own_part(value), name in parameters)]
    bad = list(dict.fromkeys(name for names in distributed.gathered(here) for name in names))
    if bad:
        named = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise TrainingError(
            f"After update {updates} some weights are not finite: {named}.",
            hint=f"They were not written; the files are those of the last validation or save before. {HINT}",
        )


def _is_bad(value: Tensor, is_parameter: bool) -> bool:
    if not value.is_floating_point():
        return False
    return bool((~value.isfinite()).any() if is_parameter else value.isnan().any())

"""Putting weights that are known to fit into a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict of the model's own names and shapes, strictly; only BatchNorm's counters may be missing.

    A state dict of torch carries the version of each module, by which modules translate older ones; a safetensors file
    does not, and torchvision's MNASNet refuses to be loaded without. What fits is taken to be of today's version.

    Raises:
        RuntimeError: torch's, if anything is missing, unknown or of another shape.
    """
    own = model.state_dict()
    state = OrderedDict(tensors)
    for path, module in model.named_modules():
        counter = f"{path}.num_batches_tracked"
        if isinstance(module, nn.modules.batchnorm._NormBase) and counter in own:
            state.setdefault(counter, own[counter])
    state._metadata = own._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state)

"""What a run records about the model that it trains."""

from __future__ import annotations

from typing import Any

from torch import nn

from fixify.counts import count_bytes, count_parameters
from fixify.errors import NoClassifierError
from fixify.heads import FixedClassifier
from fixify.zoo.classifiers import find_classifiers


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Parameters and bytes of a model and of its classifier, JSON-safe.

    Returns:
        `architecture` (a name), `head` (the kind of its fixed head, or "learned"), `num_features` and `num_classes`
        (None if no classifier is found), `parameters`, `bytes` (of every stored tensor), `classifier_parameters`,
        `classifier_bytes`, and `savings` (see `fixify.counts.Savings`) if it is a converted model.
    """
    info = getattr(model, "fixify_info", None)
    fixed = [module for module in model.modules() if isinstance(module, FixedClassifier)]
    layers: list[nn.Module] = [*fixed]
    head = "learned"
    num_features: int | None = None
    num_classes: int | None = None
    if fixed:
        spec = fixed[0].spec
        head, num_features, num_classes = spec.kind, spec.num_features, spec.num_classes
    else:
        try:
            sites = find_classifiers(model)
        except NoClassifierError:
            sites = []
        layers = [model.get_submodule(site.path) for site in sites]
        if sites:
            num_features, num_classes = sites[0].num_features, sites[0].num_classes
    return {
        "architecture": type(model).__name__ if info is None else info.architecture.ref,
        "head": head,
        "num_features": num_features,
        "num_classes": num_classes,
        "parameters": count_parameters(model),
        "bytes": count_bytes(model.state_dict().values()),
        "classifier_parameters": sum(count_parameters(layer) for layer in layers),
        "classifier_bytes": sum(count_bytes(layer.state_dict().values()) for layer in layers),
        **({} if info is None else {"savings": info.savings}),
    }

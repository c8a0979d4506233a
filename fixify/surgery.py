"""Replace the classifier layers of a model by fixed ones.

This is the only place where the head spec, the codes of the classes and the record of a head are decided.
`fix_classifier_` works on a model in memory, `fixify.convert` on the tensors of a checkpoint; both call `make_heads`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fixify._values import counted
from fixify._watch import OnProgress, unwatched
from fixify.conversion_options import ConvertOptions, HeadConfig
from fixify.description import HeadRecord
from fixify.errors import FormatError, HeadSpecError, NoClassifierError, UsageError
from fixify.heads import KINDS, FixedClassifier, HeadSpec, choose_kind, kind_of, replacement, wide_blocks
from fixify.heads.codes import HadamardRows
from fixify.heads.projection_choice import choose_projection, may_be_projected
from fixify.models.architectures import Architecture
from fixify.models.classifiers import (
    ClassifierSite,
    find_classifiers,
    find_heads,
    has_hand_made_head,
    is_auxiliary,
    refuse_projection,
)
from fixify.models.influence import run_once

_CLASSES_AT_ONCE = 4096
_LEAST_SCALE = 1e-3
_BATCH = 32  # rows of features per step when only the mean and std of a head are set


@dataclass(frozen=True)
class NewHead:
    """A fixed head for one classifier layer.

    Attributes:
        record: Its description for a slim checkpoint.
        module: The head; float32 on the CPU unless the old weights are on the meta device.
        notes: Decisions that a person should know of.
    """

    record: HeadRecord
    module: FixedClassifier
    notes: tuple[str, ...] = ()


def fix_classifier_(
    model: nn.Module,
    head: str | HeadConfig | HeadSpec = "auto",
    *,
    features: Mapping[str, Tensor] | None = None,
    arch: Architecture | None = None,
    **options: Any,
) -> nn.Module:
    """Replace every classifier layer of a model by a fixed head, in place.

    After that `model.get_classifier()` is the fixed head, or contains it where it is more than a linear layer (RepVit's
    BatchNorm + Linear). `fixify.save` writes the model as a slim checkpoint. `reset_classifier()` gives a timm model a
    learned classifier again. Merging BatchNorm into the classifier (`fuse()` of LeViT, RepVit and the like) is no
    longer possible: a fixed classifier has no weights to merge it into.

    A forward pass on one small random image checks that each layer produces the logits (`run_once`). A model that
    cannot be run, such as one on the meta device, is believed by its structure.

    Heads of the same width share one codebook. Distilled models average the logits of their heads, so the features of
    both heads are drawn to the same code.

    Args:
        model: A timm or torchvision classification model, or one with a layer named like torchvision's.
        head: A kind ("hadamard", "orthogonal", "simplex", "binary", "identity", or "auto": Hadamard where a matrix of
            that order is known); a `HeadConfig`; or a `HeadSpec`, which is taken as it is and must have the model's
            numbers of features and classes.
        features: The input of the classifier layers by path, float [S, N] in random order, without labels. Codes are
            then chosen by what the layer sees, mean and std are set, and scale and bias are fitted to the old answers.
        arch: Names the model in messages.
        options: Options of `HeadConfig` by name: `fix_classifier_(model, "binary", bits_per_class=64)`.

    Returns:
        `model`. The new heads have the device, the floating type and the training mode of the old layers.

    Raises:
        NoClassifierError: The model has no classifier, it is fixed already, or the layer that looks like it does not
            produce the logits: it makes an embedding (CLIP), is one of several heads, or more layers follow.
        HeadSpecError: There is no such codebook, or a spec has other sizes than the model. The model is unchanged.
        UsageError: An option is unknown or out of its range, or options do not go together.

    >>> import torch
    >>> model = torch.nn.Module()
    >>> model.fc = torch.nn.Linear(64, 10)
    >>> fix_classifier_(model, "hadamard").fc(torch.ones(1, 64)).shape
    torch.Size([1, 10])
    """
    if any(isinstance(module, FixedClassifier) for module in model.modules()):
        raise NoClassifierError(
            f"The classifier of this {type(model).__name__} is fixed already.",
            hint="model.reset_classifier(num_classes) gives a timm model a learned one again.",
        )
    sites = _confirmed_classifiers(model, arch)
    layers: dict[str, Any] = {site.path: model.get_submodule(site.path) for site in sites}
    tensors = {
        f"{path}.{name}": tensor for path, layer in layers.items() for name, tensor in layer.state_dict().items()
    }
    if isinstance(head, HeadSpec):
        if options:
            raise HeadSpecError(f"A HeadSpec already holds its options; leave out {next(iter(options))}.")
        config: HeadConfig | HeadSpec = head
    else:
        config = HeadConfig.create(head=head, **options) if isinstance(head, str) else head.replace(**options)
    for made in make_heads(sites, tensors, config, features=features):
        old = layers[made.record.path]
        new = made.module.to(device=old.weight.device, dtype=old.weight.dtype).train(old.training)
        replace_module(model, made.record.path, new)
    return model


def make_heads(
    sites: Sequence[ClassifierSite],
    tensors: Mapping[str, Tensor],
    head: HeadConfig | HeadSpec,
    *,
    features: Mapping[str, Tensor] | None = None,
    num_classes: int | None = None,
    on_progress: OnProgress = unwatched,
) -> list[NewHead]:
    """Make the fixed heads that replace some classifier layers.

    The codes of a binary head, and of a matched Hadamard head, are chosen by the old weights, which keeps what a
    trained model knows. Other codes go to the classes in order, as in the paper.

    Args:
        sites: The classifier layers.
        tensors: A state dict with their weights and biases. A layer without a weight in it, or with one on the meta
            device, gets a head whose stored codes are empty until `load_state_dict`.
        head: The config, or one spec for all layers.
        features: See `fix_classifier_`.
        num_classes: Size of a new label set; None: the classes of the layers. Codes are then in class order.
        on_progress: See `fixify.heads.replacement`.

    Returns:
        One head per layer, in the order of `sites`.

    Raises:
        HeadSpecError: See `fix_classifier_`; or there is one class.
    """
    features = features or {}
    unknown = sorted(set(features) - {site.path for site in sites})
    if unknown:
        raise HeadSpecError(
            f"There is no classifier at {unknown[0]}; this model's: {', '.join(site.path for site in sites)}."
        )
    if any((num_classes or site.num_classes) == 1 for site in sites):
        raise HeadSpecError(
            "A classifier of one logit has no classes to fix: its answer is a sigmoid or a number.",
            hint="If it tells two classes apart, give both a logit: "
            "weight = torch.cat([torch.zeros_like(weight), weight]), and the same for the bias.",
        )
    made = []
    for site in sites:
        with naming_head(site.path, sites):
            made.append(_make_head(site, tensors, head, features.get(site.path), num_classes, on_progress))
    return made


def heads_of_class_vectors(
    sites: Sequence[ClassifierSite],
    tensors: Mapping[str, Tensor],
    options: ConvertOptions,
    *,
    features: Mapping[str, Tensor] | None = None,
    on_progress: OnProgress = unwatched,
) -> list[NewHead]:
    """Make the heads that replace some classifiers, cosine or linear ones as the options say.

    Raises:
        HeadSpecError: See `make_heads`.
        UsageError: A cosine classifier is to be replaced by codes that are not chosen by its class vectors.
    """
    if options.logit_scale is None:
        return make_heads(
            sites, tensors, options, features=features, num_classes=options.num_classes, on_progress=on_progress
        )
    require_fitted_codes(options, "--logit-scale would mean nothing")
    return [
        make_cosine_head(
            site,
            tensors,
            options,
            options.logit_scale,
            features=(features or {}).get(site.path),
            on_progress=on_progress,
        )
        for site in sites
    ]


def require_fitted_codes(head: HeadConfig, otherwise: str) -> None:
    """Refuse a head whose codes are not chosen by the old class vectors.

    Args:
        head: The config.
        otherwise: What would follow, for the message.

    Raises:
        UsageError: The kind is one of those, or matching is off.
    """
    if not KINDS[head.head].can_fit or not head.match:
        raise UsageError(
            f"The codes of head {head.head}{'' if head.match else ' with --no-match'} are not chosen by class vectors: "
            f"{otherwise}.",
            hint="Take --head binary, or --head hadamard.",
        )


def make_cosine_head(
    site: ClassifierSite,
    tensors: Mapping[str, Tensor],
    head: HeadConfig,
    logit_scale: float,
    *,
    features: Tensor | None = None,
    on_progress: OnProgress = unwatched,
) -> NewHead:
    """Make the fixed head that replaces a cosine classifier: `logits = logit_scale * cos(x, w_c) + bias`.

    The zero-shot classifiers of CLIP are of that form: the class vectors are text embeddings. The head normalises its
    features and does not standardise them. Without features, alpha gives the logits that are nearest to the old ones
    for features that point anywhere; the mean over classes, which softmax does not see, is removed first.

    Args:
        site: The classifier layer.
        tensors: A state dict with its weight, whose rows may have any length, and with its bias if it has one.
        head: The config; its kind must be one whose codes are chosen by class vectors.
        logit_scale: What the cosines are multiplied with; CLIP's are about 100.
        features: Inputs of the layer, float [S, N] in random order, without labels.
        on_progress: See `fixify.heads.replacement`.

    Raises:
        HeadSpecError: See `make_heads`.
        UsageError: The config leaves the norm.
    """
    if not head.normalize:
        raise UsageError("A head of cosines divides by the norm.", hint="Drop --no-normalize.")
    spec, _ = _spec_for(site, head, site.num_classes, features is not None)
    spec = replace(spec, normalize=True, standardize=False)
    if head.wide_search and spec.can_match:
        spec = replace(spec, matched=True, blocks=wide_blocks(spec.num_features, spec.num_classes))
    vectors = tensors[f"{site.path}.weight"].detach().to("cpu", torch.float32).reshape(site.num_classes, -1)
    vectors = F.normalize(vectors, dim=1).mul_(logit_scale)
    made = replacement(
        spec,
        vectors,
        tensors[f"{site.path}.bias"] if site.has_bias else None,
        features=None if features is None else F.normalize(features.float(), dim=1),
        scale=head.alpha,
        channel_dim=site.channel_dim,
        on_progress=on_progress,
    )
    if features is None and head.alpha is None and spec.can_match:
        with torch.no_grad():
            made.head.scale.fill_(max(_projection(made.head, vectors), _LEAST_SCALE))
    return NewHead(site.record(made.head.spec), made.head, (f"{site.path}: {made.note}.",))


def _projection(head: FixedClassifier, vectors: Tensor) -> float:
    """Compute the alpha at which `alpha * Q` is nearest to class vectors whose mean is removed."""
    mean, total = vectors.mean(dim=0), 0.0
    codes = cast(HadamardRows, kind_of(head.spec).codes(head.spec, head.product.stored))
    for start in range(0, len(vectors), _CLASSES_AT_ONCE):
        part = vectors[start : start + _CLASSES_AT_ONCE]
        table = torch.from_numpy(codes.select(np.arange(start, start + len(part))).table())
        total += float((table * (part - mean)).sum())
    return total / len(vectors)


def apply_heads_(model: nn.Module, records: Iterable[HeadRecord]) -> nn.Module:
    """Replace classifier layers by the heads that a slim checkpoint records, in place.

    Raises:
        FormatError: The model has no classifier at a recorded path, or one of another size.
        CodebookMismatchError: A codebook rebuilt here is not the recorded one. The model is unchanged.
    """
    sites = {site.path: site for site in find_heads(model)}
    heads = {}
    for record in records:
        site = sites.get(record.path)
        if site is None:
            raise FormatError(f"There is no classifier at {record.path}; this model's: {', '.join(sites)}.")
        sizes = (site.num_features, site.num_classes, site.channel_dim)
        if sizes != (record.spec.num_features, record.spec.num_classes, record.channel_dim):
            raise FormatError(f"The head recorded for {record.path} does not have the size of the model's classifier.")
        old: Any = model.get_submodule(record.path)
        new = FixedClassifier(
            record.spec, channel_dim=site.channel_dim, device=old.weight.device, dtype=old.weight.dtype
        )
        heads[record.path] = new.train(old.training)
    for path, new in heads.items():
        replace_module(model, path, new)
    return model


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` where `model.get_submodule(path)` is."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


@contextlib.contextmanager
def naming_head(path: str, sites: Sequence[ClassifierSite]) -> Iterator[None]:
    """Add the path of the layer to a `HeadSpecError` raised in the block, if the model has several classifiers."""
    try:
        yield
    except HeadSpecError as error:
        if len(sites) == 1:
            raise
        raise HeadSpecError(f"{path}: {error.message}", hint=error.hint) from error


def _confirmed_classifiers(model: nn.Module, arch: Architecture | None) -> list[ClassifierSite]:
    """Find the classifier layers of a model, and check by a forward pass that they produce the logits.

    A model that cannot be run is believed by its structure, unless its head was made by hand.

    Raises:
        NoClassifierError: A layer does not produce the logits; the message names it.
    """
    refuse_projection(model, arch)
    sites = find_classifiers(model, arch)
    paths = [site.path for site in sites]
    found = run_once(model, paths)
    name = arch.ref if arch is not None else type(model).__name__
    if found is None:
        if has_hand_made_head(model):
            raise NoClassifierError(
                f"{name} has a hand-made head, and cannot be run to see whether {', '.join(paths)} gives the logits.",
                hint="Move the model to one device, with its weights, and make sure that model(images) works.",
            )
        return sites
    for path in paths:
        if found[path].reason is not None and (found[path].called or not is_auxiliary(path)):
            raise NoClassifierError(
                f"{name}: {path} {found[path].reason}.",
                hint="fixify replaces a layer whose outputs are the logits of the model, one per class.",
            )
    return sites


def _make_head(
    site: ClassifierSite,
    tensors: Mapping[str, Tensor],
    head: HeadConfig | HeadSpec,
    features: Tensor | None,
    num_classes: int | None,
    on_progress: OnProgress,
) -> NewHead:
    weight = tensors.get(f"{site.path}.weight")
    if isinstance(head, HeadSpec):
        spec, reason, match, alpha = head, None, False, None
    else:
        spec, reason = _spec_for(site, head, num_classes or site.num_classes, features is not None)
        match, alpha = head.match and num_classes is None and spec.can_match, head.alpha
    if (spec.num_features, spec.num_classes) != (site.num_features, num_classes or site.num_classes):
        raise HeadSpecError(
            f"The head spec is for {counted(spec.num_features, 'feature')} and "
            f"{counted(spec.num_classes, 'class', 'classes')}; the classifier "
            f"{site.path} has {site.num_features} and {num_classes or site.num_classes}."
        )
    by_weights = (match or spec.stores_codes) and spec.digest is None
    if by_weights and weight is not None and not weight.is_meta:
        if match and isinstance(head, HeadConfig) and head.wide_search:
            spec = replace(spec, matched=True, blocks=wide_blocks(spec.num_features, spec.num_classes))
        bias = tensors[f"{site.path}.bias"] if site.has_bias else None
        may_project = isinstance(head, HeadConfig) and head.project and head.bits_per_class is not None
        if features is not None and may_project and may_be_projected(spec):
            spec = choose_projection(spec, weight, bias, features, scale=alpha, on_progress=on_progress).spec
        made = replacement(
            spec,
            weight,
            bias,
            features=features,
            scale=alpha,
            channel_dim=site.channel_dim,
            on_progress=on_progress,
        )
        return NewHead(site.record(made.head.spec), made.head, (f"{site.path}: {made.note}.",))
    device = "meta" if weight is not None and weight.is_meta else "cpu"
    new = FixedClassifier(spec, scale=alpha, channel_dim=site.channel_dim, device=device)
    notes = []
    if features is not None and spec.standardize:
        new.calibrate_(features.split(_BATCH))
        notes.append(f"{site.path}: codes are not matched, so calibrating sets only mean and std.")
    if reason is not None:
        notes.append(f"{site.path}: {spec.kind} head, since {reason}.")
    return NewHead(site.record(new.spec), new, tuple(notes))


def _spec_for(
    site: ClassifierSite, config: HeadConfig, num_classes: int, has_features: bool
) -> tuple[HeadSpec, str | None]:
    """Derive the spec of one layer's head, and say why the kind was chosen if the config leaves it open."""
    kind: str = config.head
    reason = None
    if kind == "auto":
        kind, reason = choose_kind(site.num_features, num_classes)
    options: dict[str, Any] = {
        "standardize": config.standardize,
        **KINDS[kind].default_options(
            site.num_features,
            has_features=has_features,
            bits_per_weight=config.bits_per_weight,
            bits_per_class=config.bits_per_class,
        ),
    }
    if not config.standardize:
        options["standardize"] = False
    if not config.normalize:
        options["normalize"] = False
    if not config.gains:
        options.pop("gains", None)
    if config.bits_per_class is not None:
        options["bits_per_class"] = config.bits_per_class
    spec = HeadSpec(
        kind=kind,
        num_features=site.num_features,
        num_classes=num_classes,
        seed=config.seed,
        bias=site.has_bias if config.bias is None else config.bias,
        fixed_scale=config.fixed_scale,
        **options,
    )
    return spec, reason

"""Judge the tensors of a file that no network of a library has: normalisation, temperature, adapters, parametrizations.

What changes the answers is applied if that is exact and simple, and is refused by name otherwise. What no answer
depends on (the class weights of a loss, the counters of a metric) is left out and listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from fixify._values import counted
from fixify.checkpoints.outline import AnyTensor, dtype_name
from fixify.errors import SourceError

# Modules that people wrap a model in. A leading one is removed if all names are below it. No model of timm or
# torchvision has all its names below one of these, as it would for "encoder".
WRAPPERS = frozenset({"module", "model", "net", "network", "backbone", "base_model", "timm_model", "trunk"})
# Names that only torch.compile, FSDP and activation checkpointing add; they may occur anywhere in a key.
INNER_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

_MEANS = {"mean": "std", "mu": "sigma"}
_AFFIXES = ("", "_", "new_", "norm_", "pixel_", "image_", "img_", "input_")
_MAX_CHANNELS = 16
_TEMPERATURES = frozenset({"temperature", "temp", "T"})
# Modules that training needs and the answers do not: losses, and the metrics of torchmetrics.
_TRAINING_ONLY = re.compile(
    r"(?:criterion|loss(?:es)?|loss_\w+|\w+_loss(?:_fn)?|\w*_?(?:metrics?|acc|accuracy|f1|auroc|auc|precision|recall)"
    r"|\w*confmat|\w*confusion_matrix)\d*"
)
# The names that peft and loralib give to adapters: LoRA, DoRA, LoHa, LoKr, (IA)3, OFT, VeRA, trained copies of modules.
_ADAPTER = re.compile(
    r"(?:^|\.)(?:lora_\w+|hada_w\d\w*|lokr_w\d\w*|ia3_l|oft_[rs]|vera_lambda_\w+|modules_to_save|adapters?|adapter_\w+)"
    r"(?:\.|$)"
)
_PARAMETRIZED = re.compile(r"(?P<path>.*?)\.?parametrizations\.(?P<name>\w+)\.(?P<rest>.+)")
# torch.nn.utils.weight_norm, spectral_norm and prune: weight_g, weight_v; weight_orig, weight_u, weight_v; weight_mask.
_OLD_PARTS = ("g", "v", "orig", "u", "mask")


@dataclass(frozen=True)
class Extras:
    """What was applied and what was left out of a file's tensors.

    Attributes:
        mean, std: The network's own input normalisation, of values in 0..1; None without one.
        temperature: The logits are divided by it; None without one.
        applied: What was applied, in words.
        left_out: Names of tensors that no answer depends on.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    temperature: float | None = None
    applied: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def take_extras(tensors: Mapping[str, AnyTensor], name: str) -> tuple[dict[str, AnyTensor], Extras]:
    """Separate from the network's tensors an input normalisation, a temperature, losses and metrics.

    Args:
        tensors: Name -> tensor, names as they were saved.
        name: The file's name, for messages.

    Returns:
        The other tensors, and what was found. Values on the meta device are unknown; they stay None.

    Raises:
        SourceError: a normalisation or a temperature has values that mean nothing, or a loss holds a matrix, which can
            be the trained classifier.

    >>> import torch
    >>> rest, found = take_extras({"model.fc.bias": torch.zeros(2), "temperature": torch.tensor([4.0])}, "model.pth")
    >>> list(rest), found.temperature
    (['model.fc.bias'], 4.0)
    """
    short = {key: _without_wrappers(key) for key in tensors}
    applied: list[str] = []
    taken: set[str] = set()
    mean = std = temperature = None
    pairs = _normalisations(tensors, short)
    if len(pairs) > 1:
        raise _refusal(name, [key for pair in pairs for key in pair], "several input normalisations")
    for mean_key, std_key in pairs:
        mean, std = _read_normalisation(tensors[mean_key], tensors[std_key], f"{mean_key}, {std_key}", name)
        taken |= {mean_key, std_key}
        applied.append(f"{mean_key} and {std_key} (mean and std of the images)")
    warm = [key for key in tensors if _is_temperature(short[key], tensors[key])]
    if len(warm) > 1:
        raise _refusal(name, warm, "several temperatures")
    for key in warm:
        temperature = _read_temperature(tensors[key], key, name)
        taken.add(key)
        applied.append(_describe_temperature(key, temperature))
    left_out = []
    for key, tensor in tensors.items():
        first, dot, _ = short[key].partition(".")
        if dot and _TRAINING_ONLY.fullmatch(first):
            if tensor.is_floating_point() and tensor.ndim >= 2:
                raise _refusal(name, [key], "a matrix in a loss, which can be the trained classifier (ArcFace)")
            left_out.append(key)
    rest = {key: tensor for key, tensor in tensors.items() if key not in taken and key not in left_out}
    return rest, Extras(mean, std, temperature, tuple(applied), tuple(left_out))


def refuse_unknown(outside: Mapping[str, AnyTensor], name: str) -> None:
    """Refuse floating-point tensors beside a wrapped network, because nobody can tell what they do to its answers.

    Raises:
        SourceError: there are some.
    """
    unknown = [key for key, tensor in outside.items() if tensor.is_floating_point()]
    if unknown:
        raise _refusal(name, unknown, "numbers that may change its answers")


def refuse_adapters(names: Iterable[str], name: str) -> None:
    """Refuse a state dict with adapters (LoRA and its relatives), whose strength is not in the file.

    Raises:
        SourceError: there are some.
    """
    found = [key for key in names if _ADAPTER.search(key)]
    if found:
        raise SourceError(
            f"{name} holds adapters (LoRA or another kind), for example {found[0]}, in "
            f"{counted(len(found), 'tensor')}. fixify does not apply them: how strongly they count is not in the file.",
            hint="Merge them into the network where it was made: model = model.merge_and_unload(); "
            "torch.save(model.state_dict(), 'merged.pth')",
        )


def fold_parametrizations(tensors: Mapping[str, AnyTensor], name: str) -> tuple[dict[str, AnyTensor], tuple[str, ...]]:
    """Compute the weights of parametrized layers, exactly as torch does: weight and spectral normalisation, pruning.

    Args:
        tensors: Name -> tensor.
        name: The file's name, for messages.

    Returns:
        The tensors with plain weights in place of the parts, and what was computed, in words.

    Raises:
        SourceError: a parametrization is of another kind.

    >>> import torch
    >>> parts = {"fc.weight_g": torch.full((2, 1), 5.0), "fc.weight_v": torch.tensor([[3.0, 4.0], [0.0, 2.0]])}
    >>> fold_parametrizations(parts, "model.pth")[0]["fc.weight"].tolist()
    [[3.0, 4.0], [0.0, 5.0]]
    """
    parts: dict[str, dict[str, AnyTensor]] = {}  # the plain name -> its parts
    owner: dict[str, str] = {}
    for key, tensor in tensors.items():
        found = _PARAMETRIZED.fullmatch(key)
        if found is not None:
            plain = f"{found['path']}.{found['name']}".lstrip(".")
            parts.setdefault(plain, {})[found["rest"]] = tensor
            owner[key] = plain
    for key in [key for key in tensors if key.endswith((".weight_g", ".weight_orig"))]:
        plain = key.rpartition("_")[0]
        own = {part: f"{plain}_{part}" for part in _OLD_PARTS if f"{plain}_{part}" in tensors}
        parts[plain] = {part: tensors[other] for part, other in own.items()}
        owner |= dict.fromkeys(own.values(), plain)
    if not parts:
        return dict(tensors), ()
    folded = {plain: _fold(plain, own, name) for plain, own in parts.items()}
    result: dict[str, AnyTensor] = {}
    for key, tensor in tensors.items():
        plain = owner.get(key, "")
        path = key.rpartition(".")[0]
        if key.endswith(".bias") and f"{path}.weight" in folded:
            plain = f"{path}.weight"  # a plain layer stores its weight before its bias
        if plain and plain not in result:
            result[plain] = folded[plain][0]
        if key not in owner:
            result[key] = tensor
    return result, tuple(f"{how} of {plain}" for plain, (_, how) in folded.items())


def _read_temperature(value: AnyTensor, key: str, name: str) -> float | None:
    """Read a temperature; None on the meta device.

    Raises:
        SourceError: it is not a positive number.
    """
    if value.is_meta:
        return None
    temperature = float(value.reshape(()).item())
    if not 1e-6 < temperature < 1e6:  # also false for a NaN
        raise _refusal(name, [key], f"a temperature of {temperature:g}")
    return temperature


def _describe_temperature(key: str, temperature: float | None) -> str:
    """Say that a temperature divides the logits."""
    return key + ("" if temperature is None else f" {temperature:.6g}") + " (it divides the logits)"


def _read_normalisation(
    mean: AnyTensor, std: AnyTensor, keys: str, name: str
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Read an input normalisation, for values in 0..1 or in 0..255; None on the meta device.

    Returns:
        mean and std of values in 0..1.

    Raises:
        SourceError: the values are of neither kind.
    """
    if mean.is_meta or std.is_meta:
        return None, None
    means, stds = mean.double().reshape(-1).tolist(), std.double().reshape(-1).tolist()
    largest = max(map(abs, means))
    if all(0 < value <= 3 for value in stds) and largest <= 3:
        return tuple(means), tuple(stds)
    if all(0 < value <= 765 for value in stds) and largest <= 765 and (largest > 3 or (largest == 0 and min(stds) > 3)):
        return tuple(value / 255 for value in means), tuple(value / 255 for value in stds)
    shown = ", ".join(f"{value:g}" for value in (*means, *stds))
    raise _refusal(name, keys.split(", "), f"an input normalisation whose values are unusual ({shown})")


def _without_wrappers(key: str) -> str:
    parts = [part for part in key.split(".") if part not in INNER_WRAPPERS]
    while len(parts) > 1 and parts[0] in WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def _normalisations(tensors: Mapping[str, AnyTensor], short: Mapping[str, str]) -> list[tuple[str, str]]:
    found = []
    for key, brief in short.items():
        if brief.count(".") > 1:
            continue
        module, dot, last = brief.rpartition(".")
        for affix in _AFFIXES:
            std = _MEANS.get(last.removeprefix(affix)) if last.startswith(affix) else None
            if std is None:
                continue
            other = next((k for k, b in short.items() if b == f"{module}{dot}{affix}{std}"), None)
            if other is not None and _per_channel(tensors[key]) and _per_channel(tensors[other]):
                found.append((key, other))
            break
    return found


def _per_channel(tensor: AnyTensor) -> bool:
    return 0 < tensor.numel() <= _MAX_CHANNELS and tensor.numel() == max(tensor.shape, default=1)


def _is_temperature(brief: str, tensor: AnyTensor) -> bool:
    return brief.count(".") <= 1 and brief.rpartition(".")[2] in _TEMPERATURES and tensor.numel() == 1


def _fold(plain: str, parts: Mapping[str, AnyTensor], name: str) -> tuple[AnyTensor, str]:
    """Compute one weight from its parts."""
    match sorted(parts):
        case ["original0", "original1"] if _is_norm_of(parts["original0"], parts["original1"]):
            return _weight_norm(parts["original0"], parts["original1"]), "weight normalisation"
        case ["g", "v"] if _is_norm_of(parts["g"], parts["v"]):
            return _weight_norm(parts["g"], parts["v"]), "weight normalisation"
        case ["0._u", "0._v", "original"]:
            folded = _spectral_norm(parts["original"], parts["0._u"], parts["0._v"])
        case ["orig", "u", "v"]:
            folded = _spectral_norm(parts["orig"], parts["u"], parts["v"])
        case ["mask", "orig"] if parts["mask"].shape == parts["orig"].shape:
            folded = parts["orig"]
            return folded if folded.is_meta else folded * parts["mask"].to(folded.dtype), "pruning mask"
        case _:
            folded = None
    if folded is not None:
        return folded, "spectral normalisation"
    path, _, parameter = plain.rpartition(".")
    raise SourceError(
        f"{name} holds {plain} in parametrized form ({', '.join(sorted(parts))}), which fixify cannot compute.",
        hint="Remove the parametrization where the model was made, then save it again: "
        f'torch.nn.utils.parametrize.remove_parametrizations(model.{path}, "{parameter}")',
    )


def _is_norm_of(g: AnyTensor, v: AnyTensor) -> bool:
    return g.numel() == 1 or (g.ndim == v.ndim and _kept(g, v) is not None)


def _kept(g: AnyTensor, v: AnyTensor) -> int | None:
    """Return the dimension over which the lengths differ; None if `g` has not the shape of lengths."""
    kept = [dim for dim, size in enumerate(g.shape) if size > 1]
    return kept[0] if len(kept) == 1 and g.shape[kept[0]] == v.shape[kept[0]] else None


def _weight_norm(g: AnyTensor, v: AnyTensor) -> AnyTensor:
    kept = _kept(g, v) if g.ndim == v.ndim else None
    if v.is_meta:
        return v
    import torch

    g, v = _float32(g), _float32(v)
    if kept is None:  # one length for the whole weight
        return v * (g.reshape(()) / torch.linalg.vector_norm(v))
    return torch._weight_norm(v, g, kept)


def _spectral_norm(original: AnyTensor, u: AnyTensor, v: AnyTensor) -> AnyTensor | None:
    """Divide a weight by its largest singular value, as estimated by the vectors u and v; None if they do not fit."""
    for dim in (0, 1):  # 1 in transposed convolutions
        if original.ndim <= dim or u.shape != (original.shape[dim],):
            continue
        if v.shape == (prod(size for axis, size in enumerate(original.shape) if axis != dim),):
            if original.is_meta:
                return original
            import torch

            matrix = original.movedim(dim, 0).flatten(1)
            return _float32(original) / torch.vdot(_float32(u), torch.mv(_float32(matrix), _float32(v)))
    return None


def _float32(tensor: AnyTensor) -> AnyTensor:
    """Return at least single precision: a weight is computed as the model in float32 computes it."""
    return tensor if dtype_name(tensor) == "float64" else tensor.float()


def _refusal(name: str, keys: list[str], what: str) -> SourceError:
    first = keys[0].rpartition(".")[0] or keys[0]
    return SourceError(
        f"{name} holds {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''} besides the network: {what}. fixify "
        "cannot apply that, and does not leave it out in silence.",
        hint="If the answers do not depend on it, save the network without it: torch.save({k: v for k, v in "
        f"state.items() if not k.startswith({first!r})}}, 'network.pth')",
    )

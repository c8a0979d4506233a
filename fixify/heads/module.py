"""The fixed classifier as a layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fixify.errors import HeadSpecError
from fixify.heads.binary import GAIN_STEPS
from fixify.heads.codebooks import codebook
from fixify.heads.spec import HeadSpec
from fixify.heads.statistics import MOMENTUM, exact, floored, update_running_
from fixify.heads.transform import CodeProduct

_NORM_EPSILON = 1e-6
"""Smallest norm that is divided by. The division is in float32, where it neither vanishes nor blows a gradient up."""


def initial_scale(num_classes: int, confidence: float = 0.95) -> float:
    """Scale alpha at which softmax reaches `confidence` for a class at cosine 1 with all others at cosine 0.

    e^alpha / (e^alpha + C - 1) = p gives alpha = ln((C - 1) p / (1 - p)); about 9.9 for 1000 classes. Cosines lie in
    [-1, 1], so a smaller scale cannot express certainty at all (paper, section 2.2).
    """
    return math.log(max(num_classes - 1, 1) * confidence / (1.0 - confidence))


class FixedClassifier(nn.Module):
    """Classifier whose weights are fixed codes: `logits = scale * normalize((x - center) / spread) @ Q.T + bias`.

    Hoffer, Hubara & Soudry, "Fix your classifier" (ICLR 2018), sections 2.2 and 2.3; `center` and `spread` are 0 and 1
    there. Standardising and the norm are computed in float32 at least, the product in the type that `nn.Linear` would
    use (the input's, or autocast's), in which the logits are returned too.

    Standardising uses the running statistics in training too (each batch updates them first), not those of the batch as
    `nn.BatchNorm1d` does: what is trained is what is evaluated, samples of a batch do not depend on each other, and a
    batch of one is right. Measured on 100 glyph classes, N = 128, against batch statistics: 97.8 % and 96.5 from
    scratch, 88.5 and 87.5 after 1/16 of the steps on a trained backbone, 95.7 and 97.0 after a quarter (without
    standardising 95.7, 74.0, 95.7; one seed, 400 test images): no loss. Each process of several that train together has
    statistics of its own share of the images, unless `synchronized` is set: then they add up their batch's, 2N + 1
    numbers, before each product, and all have those of one process with the whole batch.

    Learned: `scale` [] (unless `spec.fixed_scale`) and `bias` [C] (if `spec.bias`). Buffers that are saved: `center`
    and `num_batches_tracked` [] (if `spec.standardize`), `spread` [N] (unless that is "center"), `codes` (code indices
    [C] if `spec.matched`, packed signs uint8 [C, ceil(d / 8)] if binary), `gains` uint8 [C] (if `spec.gains`): lengths
    of the codes in steps of 1/255.

    Args:
        spec: The head spec; resolved and verified here.
        codes: Code index of each class, integers [C], for a matched head; packed signs for a binary one. May be left
            out and loaded with `load_state_dict`, which verifies them against the spec's digest.
        gains: Lengths of the codes, uint8 [C], if the spec has them; default: all 255, that is length 1.
        scale: Initial scale; None: `initial_scale(num_classes)`, over sqrt(N) if features are not normalised: then
            they are taken to have norm sqrt(N), as the +-1 activations of a binarised network, where that constant goes
            into the scale and there is no need of a per-sample norm (paper, section 4.3).
        channel_dim: -1 for features [..., N]; 1 for feature maps [B, N, ...], as after a 1x1 convolution.

    Raises:
        HeadSpecError: The spec cannot be built, or `codes` does not fit.
        CodebookMismatchError: The codebook is not the one the spec was written for.
    """

    scale: Tensor
    bias: Tensor | None
    center: Tensor | None
    spread: Tensor | None
    num_batches_tracked: Tensor | None
    codes: Tensor | None
    gains: Tensor | None

    synchronized: bool = False
    """Whether the running statistics are of the batches of all processes of torch.distributed's default group."""

    def __init__(
        self,
        spec: HeadSpec,
        *,
        codes: Tensor | None = None,
        gains: Tensor | None = None,
        scale: float | None = None,
        channel_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channel_dim not in (-1, 1):
            raise HeadSpecError(f"channel_dim must be -1 (features) or 1 (feature maps), got {channel_dim!r}.")
        indices = None if codes is None else codes.detach().cpu().numpy()
        device = torch.get_default_device() if device is None else torch.device(device)
        self.spec = spec.resolve(indices)
        self.in_features = spec.num_features
        self.out_features = spec.num_classes
        self.channel_dim = channel_dim
        constant_norm = 1.0 if spec.normalize else math.sqrt(spec.num_features)
        self.starting_scale = initial_scale(spec.num_classes) / constant_norm if scale is None else float(scale)

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        if spec.fixed_scale:
            self.register_buffer("scale", new())
        else:
            self.scale = nn.Parameter(new())
        self.register_parameter("bias", nn.Parameter(new(spec.num_classes)) if spec.bias else None)
        self.register_buffer("center", new(spec.num_features) if spec.standardize else None)
        self.register_buffer("spread", new(spec.num_features) if spec.standardize is True else None)
        count = torch.zeros((), dtype=torch.int64, device=device) if spec.standardize else None
        self.register_buffer("num_batches_tracked", count)
        self.register_buffer("codes", None)
        if gains is not None and (not spec.gains or gains.shape != (spec.num_classes,) or gains.dtype != torch.uint8):
            raise HeadSpecError(f"gains must be uint8 [{spec.num_classes}], and only for a spec that has them.")
        self.register_buffer("gains", None)
        if spec.gains:
            self.gains = torch.full((spec.num_classes,), GAIN_STEPS, dtype=torch.uint8, device=device)
            if gains is not None:
                self.gains.copy_(gains)
        if spec.kind == "binary":
            shape = (spec.num_classes, -(-(spec.bits_per_class or 0) // 8))
            signs = torch.zeros(shape, dtype=torch.uint8) if indices is None else torch.from_numpy(indices)
            self.codes = signs.to(device=device, copy=True)
        if spec.matched:
            # int64 in memory, since distributed training cannot broadcast unsigned 16 and 32 bit buffers.
            stored = torch.zeros(spec.num_classes) if indices is None else torch.from_numpy(indices.astype(np.int64))
            self.codes = stored.to(device=device, dtype=torch.int64)
        self.product = CodeProduct(self.spec, indices, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale to its starting value, bias to zero, statistics to those of no data."""
        with torch.no_grad():
            self.scale.fill_(self.starting_scale)
            if self.bias is not None:
                self.bias.zero_()
            if self.codes is not None and self.product.codes is not None:
                self.codes.copy_(torch.from_numpy(self.product.codes.astype(str(self.codes.dtype).split(".")[1])))
        self.reset_statistics()

    def reset_statistics(self) -> None:
        """Forget the running statistics: center 0, spread 1."""
        if self.center is not None and self.num_batches_tracked is not None:
            self.center.zero_()
            self.num_batches_tracked.zero_()
        if self.spread is not None:
            self.spread.fill_(1.0)

    def calibrate_(self, batches: Iterable[Tensor]) -> FixedClassifier:
        """Set center and spread to the exact mean and deviation of some features (no labels needed).

        Args:
            batches: What `forward` would be given, batch by batch: [..., N], or [B, N, ...] with channel_dim=1.

        Raises:
            HeadSpecError: The head has no statistics (`standardize`), or the features do not fit.
        """
        if self.center is None or self.num_batches_tracked is None:
            raise HeadSpecError("This head does not standardise its features; there is nothing to calibrate.")
        center, spread, count = exact((self._channels_last(batch) for batch in batches), self.in_features)
        self.center.copy_(center)
        if self.spread is not None:
            self.spread.copy_(spread)
        # However they were cut into batches: the first batch of a training must not outweigh them.
        self.num_batches_tracked.fill_(max(count, round(1 / MOMENTUM)))
        return self

    def codebook(self) -> Tensor:
        """The codes Q, one row a class (of unit norm unless there are gains), for export: float32 [C, N] on the CPU."""
        codes = torch.from_numpy(np.array(codebook(self.spec, self.product.codes)))
        return codes if self.gains is None else codes * (self.gains.cpu().float()[:, None] / GAIN_STEPS)

    def _channels_last(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1) if self.channel_dim == 1 else x

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            x: Features [..., N]; with channel_dim=1 feature maps [B, N, ...]. Any batch size, 0 and 1 included.

        Returns:
            Logits [..., C], or [B, C, ...].
        """
        x = self._channels_last(x)
        z = x.to(torch.promote_types(x.dtype, torch.float32))  # squares of half-precision features overflow
        if self.center is not None and self.num_batches_tracked is not None:
            if self.training:
                update_running_(
                    self.center, self.spread, self.num_batches_tracked, z.detach(), synchronized=self.synchronized
                )
            z = z - self.center
            if self.spread is not None:
                z = z / floored(self.spread)
        if self.spec.normalize:
            z = F.normalize(z, dim=-1, eps=_NORM_EPSILON)
        logits = self.product((z * (self.scale * self.product.prescale)).to(x.dtype))
        if self.gains is not None:
            logits = logits * (self.gains.to(logits.dtype) * (1.0 / GAIN_STEPS))
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        return logits.movedim(-1, 1) if self.channel_dim == 1 else logits

    def extra_repr(self) -> str:
        parts = [f"{self.spec.kind}", f"in_features={self.in_features}", f"out_features={self.out_features}"]
        parts += [f"bias={self.bias is not None}"]
        parts += [name for name in ("standardize", "fixed_scale", "matched", "gains") if getattr(self.spec, name)]
        if self.spec.standardize == "center":
            parts[parts.index("standardize")] = "standardize='center'"
        if self.spec.bits_per_class is not None:
            parts.append(f"bits_per_class={self.spec.bits_per_class}")
        if not self.spec.normalize:
            parts.append("normalize=False")
        if self.channel_dim != -1:
            parts.append(f"channel_dim={self.channel_dim}")
        return ", ".join(parts)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.codes is not None and self.spec.matched:
            destination[prefix + "codes"] = destination[prefix + "codes"].to(self._codes_dtype())

    def _codes_dtype(self) -> torch.dtype:
        """Smallest unsigned integer type that holds every index of the code space."""
        last = 2 * self.spec.num_features * (self.spec.blocks or 1) - 1
        return torch.uint8 if last < 1 << 8 else torch.uint16 if last < 1 << 16 else torch.uint32

    def _stored_problems(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """What is wrong with codes and gains of a state dict: torch would cast them without a word."""
        found = []
        for name, own in (("codes", self.codes), ("gains", self.gains)):
            stored = state_dict.get(prefix + name)
            if own is None or stored is None:
                continue
            packed = name == "gains" or self.spec.kind == "binary"
            wanted = "uint8" if packed else "an integer type"
            right = stored.dtype == torch.uint8 if packed else not (stored.is_floating_point() or stored.is_complex())
            if not right or stored.shape != own.shape:
                kind = str(stored.dtype).removeprefix("torch.")
                found.append(
                    f"{prefix}{name} must be {wanted} of shape {list(own.shape)}, not {kind} {list(stored.shape)}."
                )
            elif name == "gains" and not stored.is_meta and not bool(stored.all()):
                found.append(f"{prefix}gains must lie in 1 .. {GAIN_STEPS}: a code of length 0 cannot tell its class.")
        return found

    def _from_published_code(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """The scale of the paper's published code: [1], of codes of norm sqrt(N), and not stored where it is fixed."""
        key = f"{prefix}scale"
        stored = state_dict.get(key)
        if stored is not None and stored.shape == (1,):
            return {**state_dict, key: stored[0] * math.sqrt(self.in_features)}
        if stored is None and self.spec.fixed_scale:
            return {**state_dict, key: self.scale}
        return state_dict

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        problems = self._stored_problems(state_dict, prefix)
        if problems:
            args[-1].extend(problems)  # the errors that load_state_dict raises together
            return
        if self.spec.truncated:
            state_dict = self._from_published_code(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.scale.is_meta:
            return
        device, dtype = self.scale.device, self.scale.dtype
        if self.codes is not None and prefix + "codes" in state_dict:
            self.codes = self.codes.to(torch.int64 if self.spec.matched else torch.uint8)
            indices = self.codes.cpu().numpy()
            self.spec = self.spec.resolve(indices)
            self.product.rebuild(indices, device=device, dtype=dtype)
        elif any(table.is_meta for table in self.product.buffers()):
            self.product.rebuild(self.product.codes, device=device, dtype=dtype)

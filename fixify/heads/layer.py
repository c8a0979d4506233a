"""The fixed classifier as a layer."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fixify.errors import CodebookMismatchError, HeadSpecError
from fixify.heads.base_kind import GAIN_STEPS
from fixify.heads.kinds import codebook
from fixify.heads.learned_signs import latent_of, packed_signs, signs_of
from fixify.heads.levels import SIGNS
from fixify.heads.loss import Margin, Reduction, SoftTarget, cross_entropy
from fixify.heads.normalisation import NORM_EPSILON, ScaledDirections
from fixify.heads.prepared import PreparedHead, is_traced, prepare
from fixify.heads.product import CodeProduct
from fixify.heads.projection import Projection
from fixify.heads.spec import AVERAGE_WITHOUT_BUFFERS, HeadSpec
from fixify.heads.state_dict import from_reference_code, projection_in, stored_problems
from fixify.heads.statistics import MOMENTUM, exact_statistics, floor_std, update_running_
from fixify.heads.top_k import TopK, fits_at_once, largest_by_block, largest_by_sample
from fixify.heads.training_step import OneBlockLogits


def _checksum(*arrays: np.ndarray) -> int:
    found = 0
    for array in arrays:
        found = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, found)
    return found


def initial_scale(num_classes: int, confidence: float = 0.95) -> float:
    """Compute the scale at which softmax reaches a confidence for a class at cosine 1 with all others at cosine 0.

    e^alpha / (e^alpha + C - 1) = p gives alpha = ln((C - 1) p / (1 - p)). Cosines lie in [-1, 1], so a smaller scale
    cannot express certainty at all (paper, section 2.2).

    Args:
        num_classes: C.
        confidence: p, between 0 and 1.

    >>> round(initial_scale(1000), 1)
    9.9
    """
    return math.log(max(num_classes - 1, 1) * confidence / (1.0 - confidence))


class FixedClassifier(nn.Module):
    """Classifier whose weights are fixed codes: `logits = scale * normalize((x - mean) / std) @ Q.T + bias`.

    Hoffer, Hubara & Soudry, "Fix your classifier" (ICLR 2018), sections 2.2 and 2.3, where mean is 0 and std is 1.
    Standardisation and norm are computed in float32 at least. The product is computed in the type that `nn.Linear`
    would use (that of the input, or of autocast), and the logits have that type.

    Standardisation uses the running statistics in training too (each batch updates them first), not those of the batch
    as `nn.BatchNorm1d` does. So what is trained is what is evaluated, samples of a batch do not depend on each other,
    and a batch of one is correct. Measured on 100 glyph classes, N = 128, against batch statistics: 97.8 % and 96.5 %
    from scratch, 88.5 and 87.5 after 1/16 of the steps on a trained backbone, 95.7 and 97.0 after a quarter (without
    standardisation 95.7, 74.0, 95.7; one seed, 400 test images): no loss. Each of several training processes has the
    statistics of its own share of the images, unless `synchronized` is set: then they sum those of their batches,
    2N + 1 numbers, before each product, and all have those of one process with the whole batch.

    `torch.distributed.fsdp.fully_shard` splits parameters along their first dimension, which a scalar lacks: call
    `shardable_` first.

    Learned: `scale` [] (unless `spec.fixed_scale`) and `bias` [C] (if `spec.bias`). Saved buffers: `center` [N], the
    running mean, and `num_batches_tracked` [] (if `spec.standardize`), `spread` [N], the running std (unless that is
    "center"), `codes` (code indices [C] if `spec.matched`, packed signs uint8 [C, ceil(d / 8)] if binary, or packed
    levels), `gains` uint8 [C] (if `spec.gains`), the row scales in steps of 1/255, and `projection` int8 [d, N] with
    `projection_steps` [d] (if `spec.planes`). The properties `mean`, `std` and `row_scales` read them. `learn_signs_`
    makes the signs of a binary head learnable.

    Stored signs and levels stay packed in memory, 1 to 4 bits each (1.6 for 1.58): in the buffer `codes`, in the
    product, and in evaluation on a processor once more, in the order of the compiled code (`fixify.heads.kernels`). In
    training up to 2^24 of them are numbers too, as are up to 2^19 before the mode is set, and in evaluation without
    that code.

    Args:
        spec: The head spec; resolved and verified here.
        codes: Code index of each class, integers [C], for a matched head; packed signs for a binary one. May be left
            out and loaded with `load_state_dict`, which verifies them against the spec's digest.
        gains: Row scales, uint8 [C], if the spec has them; default: all 255, which is length 1.
        projection: The stored projection of a spec with `planes`; it comes with `codes`.
        scale: Initial scale; None: `initial_scale(num_classes)`. If features are not normalised, that is divided by
            sqrt(N): their norm is then taken to be sqrt(N), as that of the +-1 activations of a binarised network.
            The scale absorbs that constant, so no per-sample norm is needed (paper, section 4.3).
        channel_dim: -1 for features [..., N]; 1 for feature maps [B, N, ...], as after a 1x1 convolution.
        device: Device; None: torch's default.
        dtype: Floating-point type; None: torch's default.

    Raises:
        HeadSpecError: The spec cannot be built, or `codes` or `gains` does not fit.
        CodebookMismatchError: The codebook is not the one the spec was written for.

    >>> head = FixedClassifier(HeadSpec("hadamard", num_features=64, num_classes=10))
    >>> head(torch.randn(5, 64)).shape
    torch.Size([5, 10])
    """

    scale: Tensor
    bias: Tensor | None
    center: Tensor | None
    spread: Tensor | None
    num_batches_tracked: Tensor | None
    codes: Tensor | None
    gains: Tensor | None
    projection: Tensor | None
    projection_steps: Tensor | None
    latent: nn.Parameter | None  # [C, d], while signs are learned: they are its signs

    deferred: bool = False
    """Whether `forward` returns features instead of logits, for code that passes them to `losses_of_scaled` or `top_k`:
    those of `scaled_features` in training mode, the unchanged input in eval mode."""
    synchronized: bool = False
    """Whether the running statistics are those of the batches of all processes of torch.distributed's default group."""
    keeps_statistics: bool = False
    """Whether the running statistics stay as they are in training mode."""

    _prepared: PreparedHead | None = None  # of the last evaluation
    _checksum: int | None = None  # of the stored codes; see `check_codes`

    def __init__(
        self,
        spec: HeadSpec,
        *,
        codes: Tensor | None = None,
        gains: Tensor | None = None,
        projection: Projection | None = None,
        scale: float | None = None,
        channel_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channel_dim not in (-1, 1):
            raise HeadSpecError(f"channel_dim must be -1 (features) or 1 (feature maps), got {channel_dim!r}.")
        if gains is not None and (not spec.gains or gains.shape != (spec.num_classes,) or gains.dtype != torch.uint8):
            raise HeadSpecError(f"gains must be uint8 [{spec.num_classes}], and only for a spec that has them.")
        stored = None if codes is None else codes.detach().cpu().numpy()
        device = torch.get_default_device() if device is None else torch.device(device)
        self.spec = spec.resolve(stored, projection)
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
        self.register_parameter("latent", None)
        self.register_buffer("codes", self._new_codes(stored, device))
        if stored is not None and self.codes is not None and self.codes.dtype == torch.uint8:
            stored = self.codes.cpu().numpy()  # signs and levels are large; on a processor this is the same memory
        self.register_buffer("gains", None)
        if spec.gains:
            self.gains = torch.full((spec.num_classes,), GAIN_STEPS, dtype=torch.uint8, device=device)
            if gains is not None:
                self.gains.copy_(gains)
        self.register_buffer("projection", None)
        self.register_buffer("projection_steps", None)
        if spec.planes is not None:
            shape = (spec.planes[0], spec.num_features)
            self.projection = torch.zeros(shape, dtype=torch.int8, device=device)
            self.projection_steps = new(spec.planes[0])
        self.product = CodeProduct(self.spec, stored, projection, device=device, dtype=dtype)
        self._checksum = self._checksum_of(stored, projection)
        self.reset_parameters()

    def _new_codes(self, stored: np.ndarray | None, device: torch.device) -> Tensor | None:
        """Make the buffer `codes` in the type it has in memory; zeros until the codes are known."""
        tensor = self.spec.stored_codes
        if tensor is None:
            return None
        dtype = tensor.memory_dtype or tensor.dtype
        if stored is None:
            return torch.zeros(tensor.shape, dtype=getattr(torch, dtype or ""), device=device)
        return torch.from_numpy(stored.astype(dtype)).to(device)  # a copy: the caller keeps its array

    def _checksum_of(self, stored: np.ndarray | None, projection: Projection | None) -> int | None:
        """Compute what `check_codes` compares with, of codes in the type that they have in memory."""
        tensor = self.spec.stored_codes
        if tensor is None or stored is None:
            return None
        codes = stored.astype(tensor.memory_dtype or tensor.dtype, copy=False)
        return _checksum(codes) if projection is None else _checksum(codes, projection.directions)

    @property
    def mean(self) -> Tensor | None:
        """Running mean of the features, [N], or None without standardisation; the buffer is called `center`."""
        return self.center

    @property
    def std(self) -> Tensor | None:
        """Running std of the features, [N], or None if it is not used; the buffer is called `spread`."""
        return self.spread

    @property
    def row_scales(self) -> Tensor | None:
        """Length of each class's code, float32 [C], at most 1, or None if all are 1; the buffer is called `gains`."""
        return None if self.gains is None else self.gains.float() / GAIN_STEPS

    def reset_parameters(self) -> None:
        """Reset the scale to its starting value, the bias to zero, and the statistics to those of no data."""
        with torch.no_grad():
            self.scale.fill_(self.starting_scale)
            if self.bias is not None:
                self.bias.zero_()
            if self.codes is not None and self.product.stored is not None:
                self.codes.copy_(torch.from_numpy(self.product.stored.astype(str(self.codes.dtype).split(".")[1])))
            if self.projection is not None and self.projection_steps is not None:
                known = self.product.projection
                self.projection.copy_(torch.zeros(()) if known is None else torch.from_numpy(known.directions))
                self.projection_steps.copy_(torch.ones(()) if known is None else torch.from_numpy(known.steps))
            if self.latent is not None and self.product.stored is not None:
                self.latent.copy_(latent_of(self.product.stored, self.product.num_kept))
        self.reset_statistics()

    def learn_signs_(self) -> FixedClassifier:
        """Make the signs of a binary head learnable, until `hold_signs_`.

        In training mode the codes are then the signs of `latent`, a parameter [C, d] that starts at the signs
        themselves, and gradients pass through the sign unchanged (Courbariaux, Bengio & David, "BinaryConnect", NIPS
        2015). `eval()` stores the signs, and spec and codes are the new ones from then on. Call this before the
        optimiser is made. Only the signs of `latent` count: Adam at a rate of 0.1 moves them well, SGD hardly.

        Returns:
            The head itself.

        Raises:
            HeadSpecError: The head stores no signs, they have not been loaded, or they are those of a projection.
        """
        product = self.product
        if product.packed is None or product.levels != SIGNS or product.stored is None:
            raise HeadSpecError(
                f"Only stored signs can be learned; this head of kind {self.spec.kind!r} has none.",
                hint="Convert with: fixify convert SOURCE --head binary",
            )
        if self.spec.planes is not None:
            raise HeadSpecError(
                "The signs of a head with a stored projection are digits of levels, of different weights: they are not "
                "learned.",
                hint="Leave --learn-signs out, or convert with --no-project: signs of rotated features can be learned.",
            )
        if self.latent is None:
            latent = latent_of(product.stored, product.num_kept).to(self.scale.device, self.scale.dtype)
            self.latent = nn.Parameter(latent)
        return self

    def hold_signs_(self) -> FixedClassifier:
        """Store the signs that were learned, and hold them from now on.

        Returns:
            The head itself.
        """
        if self.latent is not None:
            self._store_signs(self.latent)
            self.latent = None
        return self

    def _store_signs(self, latent: Tensor) -> None:
        stored = packed_signs(latent)
        if self.codes is None or self.product.stored is None or np.array_equal(stored, self.product.stored):
            return
        self.spec = replace(self.spec, digest=None).resolve(stored)
        self.codes.copy_(torch.from_numpy(stored))
        self._checksum = self._checksum_of(stored, None)
        self.product.rebuild(stored, device=self.scale.device, dtype=self.scale.dtype)

    def _refuse_learned_signs(self) -> None:
        if self.latent is not None and self.training:
            raise HeadSpecError(
                "The signs of this head are being learned, and only `forward` knows those of this step.",
                hint="Call the head itself, or first hold_signs_() or eval().",
            )

    def shardable_(self) -> FixedClassifier:
        """Give the scale one dimension, [1] instead of [], so that `torch.distributed.fsdp.fully_shard` accepts it.

        Call this before the optimiser is made. State dicts with either shape load. What depends on the scale is then
        computed anew in each forward pass.

        Returns:
            The head itself.

        Raises:
            HeadSpecError: The head is one of the paper's published code, where that shape has another meaning.
        """
        if self.spec.is_reference:
            raise HeadSpecError("A head of the paper's published code cannot be sharded: its scale [1] is another one.")
        if isinstance(self.scale, nn.Parameter) and self.scale.ndim == 0:
            self.scale = nn.Parameter(self.scale.detach().reshape(1), requires_grad=self.scale.requires_grad)
        return self

    def reset_statistics(self) -> None:
        """Reset the running statistics to mean 0 and std 1."""
        if self.center is not None and self.num_batches_tracked is not None:
            self.center.zero_()
            self.num_batches_tracked.zero_()
        if self.spread is not None:
            self.spread.fill_(1.0)

    def calibrate_(self, batches: Iterable[Tensor]) -> FixedClassifier:
        """Set mean and std to the exact ones of some features; no labels are needed.

        Args:
            batches: Inputs of `forward`, batch by batch: [..., N], or [B, N, ...] with channel_dim=1.

        Returns:
            The head itself.

        Raises:
            HeadSpecError: The head has no statistics (`standardize`), or the features do not fit.
        """
        if self.center is None or self.num_batches_tracked is None:
            raise HeadSpecError("This head does not standardise its features; there is nothing to calibrate.")
        mean, std, count = exact_statistics((self._channels_last(batch) for batch in batches), self.in_features)
        self.center.copy_(mean)
        if self.spread is not None:
            self.spread.copy_(std)
        # However they were cut into batches, the first batch of a training run must not outweigh them.
        self.num_batches_tracked.fill_(max(count, round(1 / MOMENTUM)))
        return self

    def check_codes(self) -> None:
        """Check that the stored codes, which never change, are those that the head was made or loaded with.

        Raises:
            CodebookMismatchError: They are others.
        """
        if self.codes is None or self.codes.is_meta or self._checksum is None:
            return
        held = [part.cpu().numpy() for part in (self.codes, self.projection) if part is not None]
        if _checksum(*held) != self._checksum:
            raise CodebookMismatchError(
                "The codes that this head stores have changed since it was made. A moving average of all buffers does "
                "that: it truncates whole numbers.",
                hint=f"{AVERAGE_WITHOUT_BUFFERS} To mend this one: average.module.load_state_dict({{k: v for k, v in "
                "model.state_dict().items() if not v.is_floating_point()}, strict=False)",
            )

    def codebook(self) -> Tensor:
        """Build the codes Q, one row per class, for export; of unit norm without row scales and without a projection.

        Returns:
            float32 [C, N] on the CPU.
        """
        codes = torch.from_numpy(np.array(codebook(self.spec, self.product.stored, self.product.projection)))
        return codes if self.row_scales is None else codes * self.row_scales.cpu()[:, None]

    def _channels_last(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1) if self.channel_dim == 1 else x

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of a batch; in training mode, update the running statistics first.

        Args:
            x: Features [..., N]; with channel_dim=1 feature maps [B, N, ...]. Any batch size, 0 and 1 included.

        Returns:
            Logits [..., C], or [B, C, ...].
        """
        if self.deferred:
            return self.scaled_features(x) if self.training else x
        if not (torch.compiler.is_compiling() or self.training or torch.is_grad_enabled()):
            prepared = self._prepare(x)
            if prepared is not None:
                if x.ndim == 2 and self.channel_dim == -1:
                    return prepared.call(x)
                features = self._channels_last(x)
                logits = prepared.call(features).view(*features.shape[:-1], self.out_features)
                return logits.movedim(-1, 1) if self.channel_dim == 1 else logits
        return self._formula(x)

    def _prepare(self, x: Tensor) -> PreparedHead | None:
        """Return the prepared forward pass for inputs like `x`, or None where only the formula will do."""
        if is_traced(x):
            return None
        prepared = self._prepared
        if prepared is None or not prepared.fits(x):
            self._prepared = prepared = prepare(self, x)
            if prepared is not None:  # once, not for every batch
                self.check_codes()
        return prepared

    def train(self, mode: bool = True) -> FixedClassifier:
        """Set the mode, as `nn.Module.train`; drop what the other one prepared, and store signs that are learned."""
        self._prepared = None
        if self.latent is not None and not mode:
            self._store_signs(self.latent)
        super().train(mode)
        self.product.hold_numbers(mode, self.scale.dtype)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedClassifier:
        self._prepared = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave what was prepared out of copies and pickles."""
        return {**self.__dict__, "_prepared": None}

    def _formula(self, x: Tensor) -> Tensor:
        """Compute the logits by the formula, with gradients."""
        x = self._observed(x)
        block = self.product.one_block() if self._may_fuse(x) else None
        if block is None:
            logits = self._logits_of_scaled(self._scaled(x))
        else:
            scale, std = self._scale_and_std()
            features = x.reshape(-1, self.in_features)
            logits = OneBlockLogits.apply(features, scale, self.bias, self.center, std, block)
            logits = logits.view(*x.shape[:-1], self.out_features)
        return logits.movedim(-1, 1) if self.channel_dim == 1 else logits

    def _may_fuse(self, x: Tensor) -> bool:
        """Check that features are of the head's own type, and that only features, scale and bias have gradients."""
        return (
            self.spec.normalize
            and self.gains is None
            and x.dtype == self.scale.dtype
            and x.dtype in (torch.float32, torch.float64)
            and not self._may_record(x)
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _logits_of_scaled(self, scaled: Tensor) -> Tensor:
        if self.latent is not None and self.training:
            unit = 1.0 if self.product.table is None else self.product.unit
            logits = F.linear(self.product.rotate(scaled), (signs_of(self.latent) * unit).to(scaled.dtype))
        else:
            logits = self.product(scaled)
        if self.gains is not None:
            logits = logits * (self.gains.to(logits.dtype) * (1.0 / GAIN_STEPS))
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        return logits

    def _scalar(self) -> Tensor:
        """Return the scale, []; see `shardable_`."""
        return self.scale if self.scale.ndim == 0 else self.scale.squeeze(0)

    def _scale_and_std(self) -> tuple[Tensor, Tensor | None]:
        """Return what features are multiplied with before the product, [], and divided by, [N]."""
        std = None if self.spread is None else floor_std(self.spread)
        return self._scalar() * self.product.prescale, std

    def _observed(self, x: Tensor) -> Tensor:
        """Return features as [..., N]; in training mode, update the running statistics by them."""
        x = self._channels_last(x)
        learns = self.training and not self.keeps_statistics
        if learns and self.center is not None and self.num_batches_tracked is not None:
            z = x.detach().to(torch.promote_types(x.dtype, torch.float32))
            update_running_(self.center, self.spread, self.num_batches_tracked, z, synchronized=self.synchronized)
        return x

    def _may_record(self, x: Tensor) -> bool:
        """Check whether each operation on features may have to be recorded by itself."""
        statistics = any(part is not None and part.requires_grad for part in (self.center, self.spread))
        return statistics or torch.compiler.is_compiling() or is_traced(x) or is_traced(self.scale)

    def _scaled(self, x: Tensor) -> Tensor:
        """Standardise, normalise and scale features [..., N] for the product."""
        scale, std = self._scale_and_std()
        if self.spec.normalize and not self._may_record(x):
            scaled: Tensor = ScaledDirections.apply(x, scale, self.center, std)
            return scaled
        z = x.to(torch.promote_types(x.dtype, torch.float32))  # squares of half-precision features overflow
        if self.center is not None:
            z = z - self.center
            if std is not None:
                z = z / std
        if self.spec.normalize:
            z = F.normalize(z, dim=-1, eps=NORM_EPSILON)
        return (z * scale).to(x.dtype)

    @torch.no_grad()
    def top_k(self, x: Tensor, k: int, *, probabilities: bool = False) -> TopK:
        """Find the classes with the largest logits, without holding the logits of all classes.

        Some samples are scored at a time, or a block of classes. The memory is that of about four million logits, or
        of one Hadamard block per sample. There are no gradients, and the running statistics stay as they are.

        Args:
            x: Features, as for `forward`.
            k: Number of classes per sample, 1 .. C.
            probabilities: Return softmax probabilities over all classes instead of logits.

        Returns:
            Values [..., k], largest first, and classes int64 [..., k]; with channel_dim=1 [B, k, ...].

        Raises:
            HeadSpecError: `k` is out of range, the codes have not been loaded, or signs are being learned.

        >>> head = FixedClassifier(HeadSpec("identity", num_features=4, num_classes=3, normalize=False), scale=1.0)
        >>> head.top_k(torch.tensor([3.0, 1.0, 2.0, 0.0]), 2).classes
        tensor([0, 2])
        """
        self._refuse_learned_signs()
        if not 1 <= k <= self.out_features:
            raise HeadSpecError(f"k must be between 1 and the {self.out_features} classes, got {k}.")
        x = self._channels_last(x)
        by_block = torch.compiler.is_compiling() or not fits_at_once(self.out_features)
        prepared = None if by_block else self._prepare(x)
        if prepared is not None and prepared.is_compiled:  # all logits of some samples take less time than some of all
            samples = x.reshape(-1, self.in_features)
            largest, numbers = largest_by_sample(prepared.call, samples, k, self.out_features, probabilities)
        else:
            z = self.product.rotate(self._scaled(x))
            z = z.reshape(-1, z.shape[-1])
            largest, numbers = largest_by_block(self.product, z, k, self.gains, self.bias, probabilities)
        shaped = [part.view(*x.shape[:-1], k) for part in (largest, numbers)]
        return TopK(*(part.movedim(-1, 1) for part in shaped)) if self.channel_dim == 1 else TopK(*shaped)

    def scaled_features(self, x: Tensor) -> Tensor:
        """Compute what is multiplied with the codes; in training mode, update the running statistics first.

        Args:
            x: Features [..., N]; with channel_dim=1 feature maps [B, N, ...].

        Returns:
            [..., N], standardised and normalised as the spec says, times the scale.
        """
        return self._scaled(self._observed(x))

    def loss(
        self,
        x: Tensor,
        target: Tensor | SoftTarget,
        *,
        label_smoothing: float = 0.0,
        margin: Margin | None = None,
        reduction: Reduction = "mean",
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """Compute the exact softmax cross-entropy of a batch without its logits in memory; see `fixify.heads.loss`.

        It equals `F.cross_entropy(self(x), target)` in value and gradients, and takes O(batch x block) memory. It is
        the faster one from about 8 million logits (samples x classes) on, on a processor from 2 million where codes are
        Hadamard rows in order and C > N. In training mode, it updates the running statistics first.

        Args:
            x: Features [..., N]; with channel_dim=1 feature maps [B, N, ...].
            target: Labels, int64 [...], as `F.cross_entropy` takes them. For features [B, N] also distributions [B, C],
                or a `SoftTarget` of few classes.
            label_smoothing: Weight of the uniform distribution, 0 to 1.
            margin: `CosFace` or `ArcFace`; for labels and normalised features.
            reduction: "mean", "sum", or "none": the losses in the shape of the labels.
            group: Processes that share the classes: each computes the logits of its share for the samples of all. Every
                process calls this with the same number of samples, and gets the loss of its own. Gradients are those of
                the sum over processes, which DistributedDataParallel averages as it averages others.

        Raises:
            HeadSpecError: The target does not fit, a margin is given to a head whose logits are no cosines, or signs
                are being learned.

        >>> head = FixedClassifier(HeadSpec("hadamard", num_features=64, num_classes=1000, bias=False))
        >>> x, y = torch.randn(5, 64), torch.arange(5)
        >>> bool(torch.isclose(head.loss(x, y), F.cross_entropy(head(x), y)))
        True
        """
        if not 0 <= label_smoothing <= 1:
            raise HeadSpecError(f"label_smoothing must lie in 0 .. 1, got {label_smoothing}.")
        if margin is not None and not self.spec.normalize:
            raise HeadSpecError("A margin needs normalised features.")
        z = self.scaled_features(x)
        losses, _ = self.losses_of_scaled(z, target, label_smoothing=label_smoothing, margin=margin, group=group)
        if reduction == "none":
            return losses.view(z.shape[:-1])
        return losses.mean() if reduction == "mean" else losses.sum()

    def losses_of_scaled(
        self,
        z: Tensor,
        target: Tensor | SoftTarget,
        *,
        label_smoothing: float = 0.0,
        margin: Margin | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses of a batch from what `scaled_features` returned, for code that runs the two apart.

        Args:
            z: [..., N]; M samples in all.
            target: See `loss`.
            label_smoothing: See `loss`.
            margin: See `loss`.
            group: See `loss`.

        Returns:
            The losses, [M] in float32 at least, and whether the right class has the largest logit, bool [M].

        Raises:
            HeadSpecError: See `loss`.
        """
        self._refuse_learned_signs()
        if isinstance(target, Tensor) and not target.is_floating_point():
            if target.shape != z.shape[:-1]:
                raise HeadSpecError(f"Expected labels of shape {list(z.shape[:-1])}, got {list(target.shape)}.")
            target = target.reshape(-1)
        gains = None
        if self.gains is not None:
            gains = self.gains.to(torch.promote_types(z.dtype, torch.float32)) * (1.0 / GAIN_STEPS)
        return cross_entropy(
            self.product,
            z.reshape(-1, self.in_features),
            target,
            bias=self.bias,
            gains=gains,
            label_smoothing=label_smoothing,
            margin=None if margin is None else (margin, self._scalar()),
            group=group,
        )

    def extra_repr(self) -> str:
        """Describe the head in the way of torch's own layers."""
        parts = [f"{self.spec.kind}", f"in_features={self.in_features}", f"out_features={self.out_features}"]
        parts += [f"bias={self.bias is not None}"]
        parts += [name for name in ("standardize", "fixed_scale", "matched", "gains") if getattr(self.spec, name)]
        if self.spec.standardize == "center":
            parts[parts.index("standardize")] = "standardize='center'"
        if self.spec.bits_per_class is not None:
            parts.append(f"bits_per_class={self.spec.bits_per_class}")
        if self.spec.planes is not None:
            parts.append(f"planes={self.spec.planes}")
        if self.spec.bits_per_weight is not None:
            parts.append(f"bits_per_weight={self.spec.bits_per_weight:g}")
        if not self.spec.normalize:
            parts.append("normalize=False")
        if self.channel_dim != -1:
            parts.append(f"channel_dim={self.channel_dim}")
        return ", ".join(parts)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        scale = destination.get(prefix + "scale")
        if scale is not None and scale.ndim == 1 and type(scale) in (Tensor, nn.Parameter):  # a shard stays one
            destination[prefix + "scale"] = scale.squeeze(0)
        tensor = self.spec.stored_codes
        if tensor is not None and tensor.memory_dtype is not None:
            destination[prefix + "codes"] = destination[prefix + "codes"].to(getattr(torch, tensor.dtype or ""))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        problems = stored_problems(self.spec, state_dict, prefix)
        if problems:
            args[-1].extend(problems)  # the errors that load_state_dict raises together
            return
        if self.spec.is_reference:
            own_scale = self.scale if self.spec.fixed_scale else None
            state_dict = from_reference_code(state_dict, f"{prefix}scale", self.in_features, own_scale)
        scale = state_dict.get(prefix + "scale")
        if scale is not None and scale.ndim < self.scale.ndim:
            state_dict = {**state_dict, prefix + "scale": scale.reshape(1)}
        stored, spec = None, self.spec
        tensor, codes = self.spec.stored_codes, state_dict.get(prefix + "codes")
        projection = projection_in(self.spec, state_dict, prefix)
        is_known = codes is not None and not codes.is_meta and (projection is not None or self.projection is None)
        if tensor is not None and codes is not None and is_known:
            memory_dtype = getattr(torch, tensor.memory_dtype or tensor.dtype or "")
            stored = codes.detach().to("cpu", memory_dtype).numpy()
            # The signs that a run learns are not those that it began with.
            wanted = self.spec if self.latent is None else replace(self.spec, digest=None)
            spec = wanted.resolve(stored, projection)  # before anything is overwritten
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.scale.is_meta:
            return
        device, dtype = self.scale.device, self.scale.dtype
        if self.codes is not None and stored is not None:
            self.codes = self.codes.to(memory_dtype)
            stored = self.codes.cpu().numpy()
            self.spec, self._checksum = spec, self._checksum_of(stored, projection)
            self.product.rebuild(stored, projection, device=device, dtype=dtype)
        elif any(table.is_meta for table in self.product.buffers()):
            self.product.rebuild(self.product.stored, self.product.projection, device=device, dtype=dtype)

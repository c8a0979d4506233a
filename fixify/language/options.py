"""Everything that decides how a language model is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fixify._options import CheckedOptions, Conflict
from fixify.language.network import Dropouts
from fixify.metrics import resolve_device

LEARNED = ("learned", "tied")


class LanguageOptions(CheckedOptions):
    """Options of a language model: an LSTM, and what stands for words before and behind it.

    Attributes:
        words: "learned", an embedding and a classifier of their own; "tied", one weight for both (Press & Wolf, 2017);
            or fixed vectors for both: see `fixify.language.vectors`.
        num_features: Width of the embedding and of every layer.
        num_layers: Of the LSTM.
        head_normalize: Divide the features by their norm before a fixed classifier, as in the paper (equation 1).
        head_scale: Initial alpha; None: where softmax reaches 0.95 at cosine 1, or 1 if features are not normalised.
        head_fixed_scale: Alpha is not learned.
        head_lr_scale: Alpha and the bias learn at this multiple of the rate.
        head_rank: Rank of a learned correction of the fixed classifier; 0: none.
        head_signs: Keep only the signs of the fixed vectors, one bit a weight.
        embedding_scale: Length of a fixed word vector as the LSTM sees it.
        min_count, lowercase: See `fixify.language.read_corpus`.
        dropout_words, dropout_inputs, dropout_hidden, dropout_output, dropout_weights: See
            `fixify.language.network.Dropouts`.
        activation_decay, activation_change: Weights of the squared output, and of the squares of its changes from word
            to word, in the loss (Merity et al., 2017, section 4.6: alpha and beta).
        epochs: Passes over the text.
        batch_size: Parts of the text that are read side by side.
        seq_len: Words of each between two updates; the state goes on, the gradient does not.
        vary_seq_len: Draw each length around `seq_len`, or with 5 % around its half, and the rate in proportion
            (Merity et al., 2017, section 4.1).
        opt: "sgd", "adam", "adamw"; or "asgd", which is SGD until validation has not got better for `patience` epochs,
            and from there on the mean of the weights is what is evaluated and kept (Merity et al., 2017, section 3,
            NT-ASGD).
        lr, weight_decay: Of the optimiser. Weight decay is for all that is learned, as there.
        sched: "constant", or "cosine" to 0.
        warmup_epochs: Epochs, or a part of one, during which the rate rises.
        clip_grad: Largest norm of the gradient.
        patience: Of "asgd".
        seed: Of the initial weights, dropout and sequence lengths, and of fixed vectors.
        device: "auto", or torch's name of a device.
        save_minutes: Write the state, from which the run can be resumed, when it is that old; None only after epochs.
    """

    section: ClassVar[str] = "language"
    machine: ClassVar[tuple[str, ...]] = ("device", "save_minutes")

    words: Literal["learned", "tied", "orthogonal", "hadamard", "pmi", "word2vec"]
    num_features: int = Field(default=512, ge=1, le=1 << 16)  # a file's header has them, too
    num_layers: int = Field(default=2, ge=1, le=64)
    head_normalize: bool = True
    head_scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    head_fixed_scale: bool = False
    head_lr_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    head_rank: int = Field(default=0, ge=0, le=1 << 16)
    head_signs: bool = False
    embedding_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    min_count: int = Field(default=1, ge=1)
    lowercase: bool = False

    dropout_words: float = Field(default=0.0, ge=0, lt=1)
    dropout_inputs: float = Field(default=0.0, ge=0, lt=1)
    dropout_hidden: float = Field(default=0.0, ge=0, lt=1)
    dropout_output: float = Field(default=0.0, ge=0, lt=1)
    dropout_weights: float = Field(default=0.0, ge=0, lt=1)
    activation_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    activation_change: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    epochs: int = Field(default=40, ge=1)
    batch_size: int = Field(default=32, ge=1)
    seq_len: int = Field(default=35, ge=1)
    vary_seq_len: bool = False
    opt: Literal["asgd", "sgd", "adam", "adamw"] = "adam"
    lr: float = Field(default=2e-3, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    sched: Literal["constant", "cosine"] = "cosine"
    warmup_epochs: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    clip_grad: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    patience: int = Field(default=5, ge=1)
    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    save_minutes: float | None = Field(default=10.0, gt=0, allow_inf_nan=False)

    def _conflicts(self) -> Iterator[Conflict]:
        if self.warmup_epochs >= self.epochs:
            yield Conflict(
                ("warmup_epochs", "epochs"),
                f"warmup_epochs ({self.warmup_epochs:g}) must be less than epochs ({self.epochs})",
            )
        if self.opt == "asgd" and self.sched != "constant":
            yield Conflict(("sched", "opt"), "opt asgd averages weights at a constant rate; give sched: constant")
        if self.is_learned:
            given = sorted(name for name in self.model_fields_set if name.startswith("head_") and self._changed(name))
            if given:
                yield Conflict(
                    (*given, "words"), f"{', '.join(given)} belong to fixed vectors, and words is {self.words}"
                )

    def _changed(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    @property
    def is_learned(self) -> bool:
        """Whether embedding and classifier are learned."""
        return self.words in LEARNED

    @property
    def label(self) -> str:
        """What stands for words, in a few words: "pmi, no norm, rank 8"."""
        facts = {
            "signs": self.head_signs,
            "no norm": not self.is_learned and not self.head_normalize,
            f"rank {self.head_rank}": self.head_rank > 0,
        }
        return ", ".join([self.words, *(text for text, holds in facts.items() if holds)])

    def with_learned_words(self) -> LanguageOptions:
        """The same with an embedding and a classifier that are learned, to compare with."""
        own = {name for name in type(self).model_fields if name.startswith("head_")} | {"words", "embedding_scale"}
        return self.create(words="learned", **self.model_dump(exclude=own))

    def dropouts(self) -> Dropouts:
        """Those of the network."""
        return Dropouts(**{name: getattr(self, f"dropout_{name}") for name in Dropouts._fields})

    def resolved_device(self) -> torch.device:
        """The device; raises UsageError if it is not on this machine."""
        return resolve_device(self.device)

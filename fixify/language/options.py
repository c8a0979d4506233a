"""Options of training a language model.

Importing this module needs no torch, because the command line reads the class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from fixify._options import CheckedOptions, Conflict, option

if TYPE_CHECKING:
    import torch

    from fixify.language.network import Dropouts

LEARNED = ("learned", "tied")


class LanguageOptions(CheckedOptions):
    """Options of a language model: an LSTM, its word vectors, and how both are trained.

    Merity et al. (2017) are the source of `activation_decay` and `activation_change` (section 4.6: alpha and beta), of
    `vary_seq_len` (4.1) and of asgd (section 3, NT-ASGD). Fixed vectors are those of `fixify.language.vectors`.

    >>> LanguageOptions.create(words="pmi", head_rank=8).label
    'pmi, rank 8'
    """

    section: ClassVar[str] = "language"
    machine: ClassVar[tuple[str, ...]] = ("device", "save_minutes")

    # "tied" is one weight for embedding and classifier (Press & Wolf, 2017).
    words: Literal["learned", "tied", "orthogonal", "hadamard", "pmi", "word2vec"] = option(
        ..., "Word vectors: learned (embedding and classifier apart), tied (one weight for both), or fixed for both."
    )
    # A file's header holds the width and the layers as well: hence the limits.
    num_features: int = option(512, "Width of the embedding and of every layer.", ge=1, le=1 << 16)
    num_layers: int = option(2, "Layers of the LSTM.", ge=1, le=64)
    head_normalize: bool = option(True, "Divide features by their norm before a fixed classifier (equation 1).")
    head_scale: float | None = option(
        None,
        "Initial alpha. Default: softmax reaches 0.95 at cosine 1, or 1 if features are not normalised.",
        gt=0,
        allow_inf_nan=False,
    )
    head_fixed_scale: bool = option(False, "Hold alpha; do not learn it.")
    head_lr_scale: float = option(1.0, "Factor on the learning rate of alpha and the bias.", gt=0, allow_inf_nan=False)
    head_rank: int = option(0, "Rank of a learned correction of the fixed classifier; 0 for none.", ge=0, le=1 << 16)
    head_signs: bool = option(False, "Keep only the signs of the fixed vectors, one bit per weight.")
    embedding_scale: float = option(
        1.0, "Length of a fixed word vector at the input of the LSTM.", gt=0, allow_inf_nan=False
    )

    min_count: int = option(1, "Replace training words that occur less often by <unk>.", ge=1)
    lowercase: bool = option(False, "Write the text in lower case.")

    # See `fixify.language.network.Dropouts`.
    dropout_words: float = option(0.0, "Dropout of whole words of the embedding.", ge=0, lt=1)
    dropout_inputs: float = option(0.0, "Dropout of the input of the LSTM.", ge=0, lt=1)
    dropout_hidden: float = option(0.0, "Dropout between layers.", ge=0, lt=1)
    dropout_output: float = option(0.0, "Dropout of the output of the LSTM.", ge=0, lt=1)
    dropout_weights: float = option(0.0, "Dropout of the recurrent weights.", ge=0, lt=1)
    activation_decay: float = option(0.0, "Weight of the squared output in the loss.", ge=0, allow_inf_nan=False)
    activation_change: float = option(
        0.0, "Weight of the squared change of the output from word to word.", ge=0, allow_inf_nan=False
    )

    epochs: int = option(40, "Passes over the text.", ge=1)
    batch_size: int = option(32, "Parts of the text that are read side by side.", ge=1)
    # The hidden state is kept from one update to the next, the gradient is not.
    seq_len: int = option(35, "Words of each part per update.", ge=1)
    vary_seq_len: bool = option(
        False, "Draw each length around seq_len, with 5 % around its half, and scale the rate in proportion."
    )
    opt: Literal["asgd", "sgd", "adam", "adamw"] = option(
        "adam", "Optimiser; asgd is SGD until validation stops improving, then keeps the mean of the weights."
    )
    lr: float = option(2e-3, "Learning rate.", gt=0, allow_inf_nan=False)
    weight_decay: float = option(0.0, "Weight decay of everything that is learned.", ge=0, allow_inf_nan=False)
    sched: Literal["constant", "cosine"] = option("cosine", "Schedule of the learning rate; cosine ends at 0.")
    warmup_epochs: float = option(0.0, "Epochs of warmup, also a fraction of one.", ge=0, allow_inf_nan=False)
    clip_grad: float | None = option(1.0, "Largest norm of the gradient.", gt=0, allow_inf_nan=False)
    patience: int = option(5, "Epochs without improvement before asgd starts averaging.", ge=1)
    seed: int = option(0, "Seed of initial weights, dropout, sequence lengths and fixed vectors.", ge=0)
    device: str = option("auto", "Device: cpu, cuda, mps, ...", panel="machine")
    save_minutes: float | None = option(
        10.0, "Save the resumable state every N minutes, not only after epochs.", panel="machine", gt=0,
        allow_inf_nan=False,
    )  # fmt: skip

    def _conflicts(self) -> Iterator[Conflict]:
        if self.warmup_epochs >= self.epochs:
            yield Conflict(
                ("warmup_epochs", "epochs"),
                f"warmup_epochs ({self.warmup_epochs:g}) must be less than epochs ({self.epochs})",
            )
        if self.opt == "asgd" and self.sched != "constant":
            yield Conflict(("sched", "opt"), "opt asgd needs a constant rate; give sched: constant")
        if self.is_learned:
            given = sorted(name for name in self.model_fields_set if name.startswith("head_") and self._changed(name))
            if given:
                yield Conflict((*given, "words"), f"{', '.join(given)} need fixed vectors, and words is {self.words}")

    def _changed(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    @property
    def is_learned(self) -> bool:
        """Whether embedding and classifier are learned, tied or not."""
        return self.words in LEARNED

    @property
    def label(self) -> str:
        """The word vectors in a few words: "pmi, no norm, rank 8"."""
        facts = {
            "signs": self.head_signs,
            "no norm": not self.is_learned and not self.head_normalize,
            f"rank {self.head_rank}": self.head_rank > 0,
        }
        return ", ".join([self.words, *(text for text, holds in facts.items() if holds)])

    def with_learned_words(self) -> LanguageOptions:
        """Return the same options with learned words, to compare with."""
        own = {name for name in type(self).model_fields if name.startswith("head_")} | {"words", "embedding_scale"}
        return self.create(words="learned", **self.model_dump(exclude=own))

    def dropouts(self) -> Dropouts:
        """Return the dropouts of the network."""
        from fixify.language.network import Dropouts

        return Dropouts(**{name: getattr(self, f"dropout_{name}") for name in Dropouts._fields})

    def resolved_device(self) -> torch.device:
        """Return the device; raises UsageError if this machine does not have it."""
        from fixify.metrics import resolve_device

        return resolve_device(self.device)

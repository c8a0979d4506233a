"""Checking the file of a language model: what can be rebuilt is, what is stored is loaded, and it reads a few words."""

from __future__ import annotations

from pathlib import Path

import torch

from fixify.errors import CodebookMismatchError, FormatError
from fixify.language.saving import Loaded, load_language, read_language_info
from fixify.verification import Check


def verify_language(path: Path | str) -> list[Check]:
    """Check the file of a language model.

    Raises:
        FormatError: it is none, or its header is damaged.
    """
    info = read_language_info(path)
    checks = [Check("header", True, f"words: {info.options.words}; {len(info.words):,} of them")]
    try:
        loaded = load_language(path)
    except (CodebookMismatchError, FormatError) as error:
        name = "codebook" if isinstance(error, CodebookMismatchError) else "tensors"
        return [*checks, Check(name, False, error.message)]
    state = loaded.model.state_dict()
    checks.append(Check("tensors", True, f"{len(state)} tensors are those of the model"))
    bad = next((name for name, tensor in state.items() if not bool(tensor.isfinite().all())), None)
    checks.append(Check("values", bad is None, "all finite" if bad is None else f"{bad} holds a NaN or an infinity"))
    if not info.options.is_learned:
        checks.append(_vectors(loaded))
    return [*checks, _forward(loaded)]


def _vectors(loaded: Loaded) -> Check:
    spec, lengths = loaded.info.codebook, loaded.model.embedding.weight.norm(dim=1)
    if spec is not None:  # compared while it was loaded
        return Check("codebook", True, "digest as recorded")
    off = float((lengths - 1).abs().max())
    return Check("vectors", off < 1e-4, f"lengths differ from 1 by up to {off:.1g}")


def _forward(loaded: Loaded) -> Check:
    model = loaded.model
    words = torch.randint(model.num_words, (7, 2), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, _ = model(words, model.start(2))
    good = tuple(logits.shape) == (7, 2, model.num_words) and bool(logits.isfinite().all())
    return Check("forward", good, f"words [7, 2] give logits {list(logits.shape)}")

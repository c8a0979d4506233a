"""The checkpoint of a language model: a .safetensors file with its options, its words, and what cannot be rebuilt."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fixify._io import atomic_path
from fixify.errors import FormatError, UsageError
from fixify.heads.packed import unpack
from fixify.language.building import assemble
from fixify.language.network import LanguageModel
from fixify.language.options import LanguageOptions
from fixify.language.vectors import REBUILT, rebuilt_vectors

KEY = "fixify.language"
_VERSION = 1
_VECTORS, _SIGNS = "embedding.weight", "embedding.signs"


@dataclass(frozen=True)
class Loaded:
    """A language model from a file.

    Attributes:
        model: In eval mode, on the CPU.
        words: Its vocabulary.
        options: How it was made.
        training: The record of its training.
    """

    model: LanguageModel
    words: tuple[str, ...]
    options: LanguageOptions
    training: dict[str, Any]


def save_language(
    model: LanguageModel, path: Path, options: LanguageOptions, words: tuple[str, ...], training: Mapping[str, Any]
) -> None:
    """Write a model; fixed vectors only where they cannot be rebuilt from the options, signs as bits.

    Raises:
        OutputError: it cannot be written.
    """
    tensors = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    if options.words == "tied":
        del tensors["classifier.weight"]
    if not options.is_learned:
        del tensors["classifier.codes"]
        vectors = tensors.pop(_VECTORS)
        if options.head_signs and options.words not in REBUILT:
            tensors[_SIGNS] = pack_signs(vectors)
        elif options.words not in REBUILT:
            tensors[_VECTORS] = vectors
    about = {"version": _VERSION, "options": options.recipe(), "words": list(words), "training": dict(training)}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt", KEY: json.dumps(about)})


def load_language(path: Path | str) -> Loaded:
    """Read a model.

    Raises:
        FormatError: it is no language model of fixify, is damaged, or of a newer version.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise FormatError(f"{path} cannot be read as a .safetensors file: {error}.") from error
    if not isinstance(about, dict):
        raise FormatError(f"{path} is not a language model that fixify wrote.", hint="Those are made by: fixify train")
    if about.get("version") != _VERSION:
        raise FormatError(f"{path} is of version {about.get('version')}; this fixify reads version {_VERSION}.")
    try:
        options, words = LanguageOptions.create(**about["options"]), tuple(map(str, about["words"]))
    except (KeyError, TypeError, UsageError) as error:
        raise FormatError(f"{path} is damaged: {error}") from error
    vectors = None
    if not options.is_learned:
        vectors = _vectors(tensors, options, len(words))
    model = assemble(options, len(words), vectors)
    if vectors is not None:
        tensors[_VECTORS] = tensors["classifier.codes"] = model.embedding.weight.detach()
    if options.words == "tied":
        tensors["classifier.weight"] = tensors[_VECTORS]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise FormatError(f"{path} is damaged: {str(error).splitlines()[-1].strip()}") from error
    return Loaded(model.eval(), words, options, about.get("training", {}))


def pack_signs(vectors: Tensor) -> Tensor:
    """Signs of vectors [C, N] as bits, uint8 [C, ceil(N / 8)]; 1 is a minus sign, highest bit first."""
    missing = -vectors.shape[1] % 8
    bits = torch.nn.functional.pad((vectors < 0).to(torch.uint8), (0, missing)).view(len(vectors), -1, 8)
    return (bits << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(dim=-1).to(torch.uint8)


def _vectors(tensors: dict[str, Tensor], options: LanguageOptions, num_words: int) -> Tensor:
    width = options.num_features
    if options.words in REBUILT:
        return rebuilt_vectors(options.words, num_words, width, seed=options.seed)
    stored = tensors.pop(_SIGNS if options.head_signs else _VECTORS, None)
    if stored is None:
        raise FormatError(f"The fixed vectors of {options.words} are missing in the file.")
    return unpack(stored, width, torch.float32) / math.sqrt(width) if options.head_signs else stored

"""Read, write and verify checkpoints of language models.

A checkpoint is a .safetensors file with the options, the words, and the tensors that cannot be rebuilt.
"""

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

from fixify._files import require_regular
from fixify._values import counted, parse_json
from fixify.checkpoints.digests import digest_of
from fixify.checkpoints.header import DIGEST_KEY, LANGUAGE_KEY, has_metadata, recorded_digest
from fixify.checkpoints.slim import write_safetensors
from fixify.checkpoints.verify import Check, check_digest
from fixify.errors import CodebookMismatchError, FormatError, HeadSpecError, UsageError
from fixify.heads import HeadSpec, codebook, unpack_signs
from fixify.language.model import Size, assemble, size_of
from fixify.language.network import LanguageModel
from fixify.language.options import LanguageOptions
from fixify.language.vectors import REBUILT, rebuilt_spec

_VERSION = 1
_VECTORS, _SIGNS = "embedding.weight", "embedding.signs"


@dataclass(frozen=True)
class LanguageInfo:
    """The header of a language model's file.

    Attributes:
        options: Options of the run that made it.
        words: The vocabulary.
        codebook: The spec from which the fixed vectors are rebuilt; None if they are stored or learned.
        training: The record of its training.
    """

    options: LanguageOptions
    words: tuple[str, ...]
    codebook: HeadSpec | None
    training: dict[str, Any]

    @property
    def size(self) -> Size:
        """The number of parameters."""
        return size_of(self.skeleton(), self.options)

    def skeleton(self) -> LanguageModel:
        """Build the model on the meta device: shapes without values."""
        vectors = None
        with torch.device("meta"):
            if not self.options.is_learned:
                vectors = torch.empty(len(self.words), self.options.num_features)
            return assemble(self.options, len(self.words), vectors)

    def to_dict(self) -> dict[str, Any]:
        """Return the values, JSON-safe."""
        return {
            "options": self.options.recipe(),
            "words": list(self.words),
            "codebook": None if self.codebook is None else self.codebook.to_dict(),
            "size": self.size.to_dict(),
            "training": self.training,
        }


@dataclass(frozen=True)
class Loaded:
    """A language model that was read from a file, in eval mode on the CPU, and the header of the file."""

    model: LanguageModel
    info: LanguageInfo


def save_language(
    model: LanguageModel, path: Path, options: LanguageOptions, words: tuple[str, ...], training: Mapping[str, Any]
) -> None:
    """Write a model; fixed vectors only if they cannot be rebuilt from a head spec, signs as bits.

    Raises:
        OutputError: it cannot be written.
    """
    about = {"version": _VERSION, "options": options.recipe(), "words": list(words), "training": dict(training)}
    if options.words in REBUILT:
        spec = rebuilt_spec(options.words, len(words), options.num_features, seed=options.seed)
        about["codebook"] = spec.to_dict()
    tensors = _stored({name: tensor.cpu() for name, tensor in model.state_dict().items()}, options)
    metadata = {"format": "pt", LANGUAGE_KEY: json.dumps(about), DIGEST_KEY: digest_of(tensors)}
    write_safetensors(path, tensors, metadata)


def is_language(path: Path | str) -> bool:
    """Check whether a file is a language model that fixify wrote, of any version."""
    return has_metadata(path, LANGUAGE_KEY)


def read_language_info(path: Path | str) -> LanguageInfo:
    """Read the header of a language model's file, and nothing else.

    Raises:
        FormatError: it is not a language model of fixify, is damaged, or is of another version.
    """
    require_regular(path, FormatError)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = parse_json((file.metadata() or {}).get(LANGUAGE_KEY, "null"))
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise FormatError(f"{path} cannot be read as a .safetensors file: {error}.") from error
    if not isinstance(about, dict):
        raise FormatError(f"{path} is not a language model that fixify wrote.", hint="fixify train makes one.")
    if about.get("version") != _VERSION:
        raise FormatError(f"{path} is of version {about.get('version')}; this fixify reads version {_VERSION}.")
    try:
        options, words = LanguageOptions.create(**about["options"]), tuple(map(str, about["words"]))
        spec = HeadSpec.from_dict(about["codebook"]) if options.words in REBUILT else None
    except (KeyError, TypeError, UsageError, HeadSpecError) as error:
        raise FormatError(f"{path} is damaged: {error}") from error
    if spec is not None and (spec.kind, spec.num_classes, spec.num_features) != (
        options.words, len(words), options.num_features,
    ):  # fmt: skip
        raise FormatError(f"{path} is damaged: its codebook does not have {counted(len(words), 'word')}.")
    training = about.get("training")
    return LanguageInfo(options, words, spec, training if isinstance(training, dict) else {})


def load_language(path: Path | str) -> Loaded:
    """Read a model.

    Raises:
        FormatError: it is not a language model of fixify, is damaged, or is of another version.
        CodebookMismatchError: the rebuilt fixed vectors differ from those that it was written with.
    """
    info = read_language_info(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise FormatError(f"{path} cannot be read as a .safetensors file: {error}.") from error
    _check_shapes(path, tensors, info)  # before allocating anything of the size that the header claims
    vectors = None if info.options.is_learned else _vectors(tensors, info)
    model = assemble(info.options, len(info.words), vectors)
    if vectors is not None:
        tensors[_VECTORS] = tensors["classifier.codes"] = model.embedding.weight.detach()
    if info.options.words == "tied":
        tensors["classifier.weight"] = tensors[_VECTORS]
    model.load_state_dict(tensors)
    return Loaded(model.eval(), info)


def pack_signs(vectors: Tensor) -> Tensor:
    """Pack the signs of vectors [C, N] into bits, uint8 [C, ceil(N / 8)]; 1 is a minus sign, highest bit first.

    >>> pack_signs(torch.tensor([[-1.0, 1.0, -1.0]])).tolist()
    [[160]]
    """
    missing = -vectors.shape[1] % 8
    bits = torch.nn.functional.pad((vectors < 0).to(torch.uint8), (0, missing)).view(len(vectors), -1, 8)
    return (bits << torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)).sum(dim=-1).to(torch.uint8)


def _stored(state: Mapping[str, Tensor], options: LanguageOptions) -> dict[str, Tensor]:
    """Select the tensors of a state dict that a file holds."""
    tensors = dict(state)
    if options.words == "tied":
        del tensors["classifier.weight"]
    if not options.is_learned:
        del tensors["classifier.codes"]
        vectors = tensors.pop(_VECTORS)
        if options.words not in REBUILT:
            tensors |= {_SIGNS: pack_signs(vectors)} if options.head_signs else {_VECTORS: vectors}
    return tensors


def _check_shapes(path: Path | str, tensors: Mapping[str, Tensor], info: LanguageInfo) -> None:
    expected, found = (
        {name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for name, tensor in each.items()}
        for each in (_stored(info.skeleton().state_dict(), info.options), tensors)
    )
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise FormatError(
                f"{path} is damaged: {name} is {found.get(name, 'missing')}, but should be "
                f"{expected.get(name, 'missing')}."
            )


def _vectors(tensors: dict[str, Tensor], info: LanguageInfo) -> Tensor:
    """Rebuild the fixed vectors [C, N], or take the stored ones out of `tensors`."""
    if info.codebook is not None:
        return torch.tensor(codebook(info.codebook.resolve()))
    if not info.options.head_signs:
        return tensors.pop(_VECTORS)
    width = info.options.num_features
    return unpack_signs(tensors.pop(_SIGNS), width, torch.float32) / math.sqrt(width)


# Verifying a file.


def verify_language(path: Path | str) -> list[Check]:
    """Check a language model's file: rebuild its vectors, load its tensors, and predict a few words.

    Raises:
        FormatError: it is not a language model, or its header is damaged.
    """
    info = read_language_info(path)
    checks = [Check("header", True, f"words: {info.options.words}; {len(info.words):,} of them")]
    with safetensors.safe_open(path, framework="pt") as file:
        recorded = recorded_digest(path, file.metadata() or {})
        checks.append(check_digest({name: file.get_tensor(name) for name in file.offset_keys()}, recorded, path))
    try:
        loaded = load_language(path)
    except (CodebookMismatchError, FormatError) as error:
        name = "codebook" if isinstance(error, CodebookMismatchError) else "tensors"
        return [*checks, Check(name, False, error.message)]
    state = loaded.model.state_dict()
    checks.append(Check("tensors", True, f"{counted(len(state), 'tensor')}, as the model has them"))
    bad = next((name for name, tensor in state.items() if not bool(tensor.isfinite().all())), None)
    checks.append(Check("values", bad is None, "all finite" if bad is None else f"{bad} holds a NaN or an infinity"))
    if not info.options.is_learned:
        checks.append(_check_vectors(loaded))
    return [*checks, _forward(loaded)]


def _check_vectors(loaded: Loaded) -> Check:
    spec, lengths = loaded.info.codebook, loaded.model.embedding.weight.norm(dim=1)
    if spec is not None:  # loading has compared the digest
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

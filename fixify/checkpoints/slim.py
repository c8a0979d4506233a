"""Read, write, load and save slim checkpoints (format version 1).

A slim checkpoint is an ordinary `.safetensors` file. Its tensors are the backbone under the key names of its library
and, below the classifier's path, those of `scale`, `bias`, `center` (the mean), `spread` (the std),
`num_batches_tracked`, `codes`, `gains` (the row scales), `projection` and `projection_steps` that the head has. Its
metadata holds `format: "pt"`, `fixify.version`, under `fixify` one JSON object: `SlimInfo`, and under `fixify.tensors`
a digest of the tensors, which older files lack. The codebook is not in the file: it is rebuilt from the head spec, and
its digest is compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fixify._files import atomic_path, refuse_existing, require_regular, unchanged
from fixify._leftovers import private_folder, remove_leftovers
from fixify.checkpoints.digests import add_to_digest, compare_digests, digest_of
from fixify.checkpoints.header import (
    DIGEST_KEY,
    DTYPE_NAMES,
    FORMAT_VERSION,
    SLIM_KEY,
    VERSION_KEY,
    SlimInfo,
    has_metadata,
    info_as_text,
    info_of_text,
    parse_metadata,
)
from fixify.checkpoints.locate import locate_slim
from fixify.checkpoints.safetensors_file import TensorFile, on_meta
from fixify.checkpoints.source import Source
from fixify.description import BARE, BARE_PATH, HeadRecord
from fixify.errors import ArchitectureError, FormatError, HeadSpecError, OutputError, UsageError
from fixify.heads import FixedClassifier
from fixify.heads.spec import DAMAGED_CODES
from fixify.models.architectures import (
    Architecture,
    Preprocessing,
    build,
    known_architecture,
    parse_architecture,
    preprocessing,
)
from fixify.models.build import Bounds, load_weights
from fixify.models.built import module_traits
from fixify.models.classifiers import find_heads
from fixify.models.identify import Candidate, fit, identify
from fixify.models.projection import build_with
from fixify.savings import Savings
from fixify.surgery import apply_heads_, replace_module

SUFFIX = ".fixed.safetensors"


@dataclass(frozen=True)
class Origin:
    """What is known of a model that was opened from an ordinary checkpoint; `describe` writes it into a slim one.

    Attributes:
        architecture: What it is.
        preprocessing: timm's names and plain values.
        labels: Class names in class order, or None.
        source: File name, SHA-256, bytes; see `source_record`.
        dtype: The floating type in which the backbone was stored, for example "float16".
    """

    architecture: Architecture
    preprocessing: Preprocessing
    labels: list[str] | None
    source: dict[str, Any]
    dtype: str


def source_record(source: Source) -> dict[str, Any]:
    """Say which file a slim checkpoint was made from, without a path of the machine.

    "applied" and "left_out" are only there if the file held something besides the network's weights.
    """
    found = {"applied": list(source.extras.applied), "left_out": [*source.beside, *source.dropped][:_MOST_LEFT_OUT]}
    return {
        "name": source.name,
        "sha256": source.sha256,
        "bytes": source.num_bytes,
        "ema": source.used_ema,
        **{key: names for key, names in found.items() if names},
    }


def main_dtype(tensors: Mapping[str, torch.Tensor]) -> str:
    """Name the floating type in which most elements of some tensors are stored.

    >>> main_dtype({"a": torch.zeros(3, dtype=torch.float16), "b": torch.zeros(2)})
    'float16'
    """
    elements = dict.fromkeys(DTYPES, 0)
    names = {dtype: name for name, dtype in DTYPES.items()}
    for tensor in tensors.values():
        if tensor.dtype in names:
            elements[names[tensor.dtype]] += tensor.numel()
    return max(elements, key=lambda name: elements[name])


_MOST_LEFT_OUT = 100  # names in the header
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


def is_slim(path: Path | str) -> bool:
    """Check whether a file is a slim checkpoint of any version."""
    return has_metadata(path, SLIM_KEY)


@dataclass(frozen=True)
class Contents:
    """A slim checkpoint as it is stored.

    Attributes:
        info: What it says about itself.
        tensors: Its tensors, memory-mapped, so a file that is cut off meanwhile ends the process (SIGBUS); on the meta
            device if only the header was read.
        digest: The recorded digest of the tensors; None in files of older versions, which have none.
    """

    info: SlimInfo
    tensors: dict[str, torch.Tensor]
    digest: str | None

    def check_digest(self, path: Path | str) -> None:
        """Check that the tensors are those that were written; nothing is checked in a file without digest.

        Raises:
            FormatError: they are not.
        """
        if self.digest is not None:
            compare_digests(digest_of(self.tensors), self.digest, path)


def read_contents(path: Path | str, *, header_only: bool = False) -> Contents:
    """Read a slim checkpoint. The file is opened once, so header and tensors are of the same file.

    Args:
        path: The file.
        header_only: Leave out the tensors' values.

    Raises:
        FormatError: The file is not a regular file, is damaged, was not written by fixify, or has a newer version.
    """
    path = Path(path)
    require_regular(path, FormatError)
    try:
        with safe_open(path, framework="pt") as file:
            header = parse_metadata(path, file.metadata() or {})
            info = header.info
            if not info.is_bare:
                info = info.model_copy(update={"architecture": known_architecture(info.architecture)})
            read = partial(on_meta, file) if header_only else file.get_tensor
            tensors = {name: read(name) for name in file.offset_keys()}
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path} is not a readable .safetensors file: {error}.",
            hint=f"If it is an ordinary checkpoint, make a slim one of it first: fixify convert {path}",
        ) from error
    return Contents(info, tensors, header.digest)


def read_info(path: Path | str) -> SlimInfo:
    """Read the description in a slim checkpoint; of the file only the header is read.

    Raises:
        FormatError: The file is not a safetensors file, is damaged, was not written by fixify, or has a newer version.
    """
    return read_contents(path, header_only=True).info


@torch.inference_mode(False)  # tensors made in that mode never tell whether they changed, so heads prepare nothing
def load(path: Path | str, *, device: str | torch.device = "cpu", check: bool = False) -> nn.Module:
    """Load a slim checkpoint as a model that is ready for inference.

    The architecture is built, the codebook is rebuilt from the head spec and compared with its digest, and the stored
    weights are read into the model without a second copy of all of them. As in timm, weights stored in half precision
    become float32.

    Args:
        path: A slim checkpoint: a file, a folder with model.safetensors, or a repository of the Hugging Face hub as
            "hf-hub:organisation/name", with "@revision" for a revision other than the main branch.
        device: The device of the model.
        check: Compare the tensors with the digest in the file, which notices a single changed bit. It is not the
            default, because it about doubles the time; `fixify.verify` and the commands always do it. Files of older
            versions have no digest.

    Returns:
        The model in eval mode; the `FixedClassifier` itself if the file holds a classifier alone. Its `SlimInfo` is
        `model.fixify_info`.

    Raises:
        FormatError: The file is damaged, changes while it is read, or its tensors do not fit its architecture; or the
            folder or repository holds no slim checkpoint.
        CodebookMismatchError: The codebook rebuilt here is not the one that the file was written with.
        SourceError: The repository does not exist or needs permission, or the hub cannot be reached.
    """
    path = locate_slim(path)
    with unchanged(path, FormatError):
        contents = read_contents(path, header_only=True)
        model = _build(contents)
        try:
            tensors, digest = _read_into(model, contents, path, check=check)
        except (OSError, EOFError, ValueError, LookupError) as error:  # it was another file when its header was read
            raise FormatError(f"{path} cannot be read: {error}.") from error
        if check and contents.digest is not None:
            compare_digests(digest, contents.digest, path)
        return _fill(model, contents.info, tensors, path).to(device)


def _read_into(model: nn.Module, contents: Contents, path: Path, *, check: bool) -> tuple[dict[str, torch.Tensor], str]:
    """Read the tensors of a file into those of a model, one by one, so that no second copy of all is in memory.

    Args:
        model: The model.
        contents: The file's header.
        path: The file.
        check: Compute the digest.

    Returns:
        The tensors under their names: the model's own, or another one if it does not fit or belongs to a head, whose
        loading compares old and new values; and the digest.

    Raises:
        OSError, EOFError, ValueError, LookupError: the file cannot be read, or is not the one that has the header.
    """
    own, total = model.state_dict(), hashlib.sha256()
    heads = tuple(f"{record.path}." for record in contents.info.heads)
    tensors = {}
    with open(path, "rb") as raw:
        file = TensorFile(raw)
        for name in sorted(contents.tensors):
            stored, mine = contents.tensors[name], own.get(name)
            fits = mine is not None and mine.shape == stored.shape and not name.startswith(heads)
            direct = fits and mine is not None and mine.dtype == stored.dtype and mine.is_contiguous()
            read = mine if direct and mine is not None else torch.empty_like(stored, device="cpu")
            file.read_into(name, read)
            if check:
                add_to_digest(total, name, read)
            tensors[name] = mine.copy_(read) if fits and not direct and mine is not None else read
    return tensors, f"sha256:{total.hexdigest()}"


def load_contents(contents: Contents, path: Path | str) -> nn.Module:
    """Build the model of a slim checkpoint that was read; see `load`."""
    return _fill(_build(contents), contents.info, contents.tensors, path)


def _build(contents: Contents) -> nn.Module:
    """Build the model of a slim checkpoint, without values; a classifier alone is the only module of a dictionary."""
    info = contents.info
    if info.is_bare:
        return nn.ModuleDict({record.path: FixedClassifier(record.spec) for record in info.heads})
    codes = sum(record.spec.num_features * record.spec.num_classes for record in info.heads)
    within = Bounds.of(contents.tensors, classifier=codes)
    model = build_with(
        info.architecture,
        info.num_classes,
        projection=info.projection,
        width=info.heads[0].spec.num_features,
        blank=True,
        within=within,
    )
    apply_heads_(model, info.heads)
    return model


def _fill(model: nn.Module, info: SlimInfo, tensors: Mapping[str, torch.Tensor], path: Path | str) -> nn.Module:
    try:
        load_weights(model, tensors)
    except RuntimeError as error:
        raise FormatError(
            f"The tensors of {path} are not those of {info.architecture.ref}: {_first_problem(error)}"
        ) from error
    except HeadSpecError as error:
        raise FormatError(
            f"The codes in {path} do not fit its head spec: {error.message}",
            hint=DAMAGED_CODES,
        ) from error
    if info.is_bare:
        model = model[BARE_PATH]  # type: ignore[index]
    model.fixify_info = info  # type: ignore[assignment]
    return model.eval()


def save(
    model: nn.Module,
    path: Path | str,
    *,
    arch: str | Architecture | None = None,
    labels: list[str] | None = None,
    force: bool = False,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model with a fixed head as a slim checkpoint.

    The file has to say what to build. fixify knows that of models from `load`; of any other timm or torchvision model
    it is recognised from the model itself (see `describe`).

    The weights are stored in the floating type that a loaded model was stored in (`SlimInfo.dtype`), else in the
    model's own. The tensors of the head stay as they are.

    Args:
        model: A model whose classifier was replaced, by `fixify.fix_classifier_` or by hand.
        path: The file to write.
        arch: The architecture, if it cannot be recognised: a name such as "timm/resnet18", or an `Architecture`.
        labels: Class names in class order; default: those that the model came with.
        force: Replace an existing file.
        training: What the model was trained on and with what result; kept in `SlimInfo.training`.

    Raises:
        UsageError: The model has no fixed head.
        ArchitectureError: The model is not of a known architecture, or was changed in a way that a reader of the file
            could not rebuild; a quantised layer is such a change.
        CodebookMismatchError: The stored codes were changed, as an average of all buffers does.
        OutputExistsError, OutputError: The file exists, or cannot be written.
    """
    refuse_existing(Path(path), force=force)
    _refuse_unstorable(model)
    info = getattr(model, "fixify_info", None)
    info = _with_learned_signs(info, model) if isinstance(info, SlimInfo) else info
    if not isinstance(info, SlimInfo) or arch is not None or not _describes(info, model):
        info = describe(model, arch)
    changes = {"labels": labels, "training": None if training is None else dict(training)}
    info = info.model_copy(update={name: value for name, value in changes.items() if value is not None})
    head_keys = tuple(f"{record.path}." for record in info.heads)
    if info.is_bare:
        return write_slim(Path(path), bare_tensors(model), info, force=force)
    tensors = {
        key: tensor.to(DTYPES[info.dtype]) if tensor.is_floating_point() and not key.startswith(head_keys) else tensor
        for key, tensor in model.state_dict().items()
    }
    return write_slim(Path(path), tensors, info, force=force)


def _refuse_unstorable(model: nn.Module) -> None:
    """Refuse a model whose codes were changed, or whose layers hold something that a network of the library does not.

    Raises:
        ArchitectureError: A layer is quantised.
        CodebookMismatchError: The codes of a head are not those that it was made with.
    """
    for module in model.modules():
        if isinstance(module, FixedClassifier):
            module.check_codes()
    for key, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor) or value.is_quantized:
            raise ArchitectureError(
                f"{key} of this {type(model).__name__} is not a tensor of numbers: the layer is quantised, or holds a "
                "state of its own.",
                hint="Save the model before its layers are quantised, and quantise them after fixify.load.",
            )


def bare_tensors(head: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a classifier alone under the names that they have in a file."""
    return {f"{BARE_PATH}.{key}": tensor for key, tensor in head.state_dict().items()}


def describe_bare(head: FixedClassifier, savings: Savings, **known: Any) -> SlimInfo:
    """Describe a classifier alone.

    Args:
        head: The classifier.
        savings: What it saves.
        known: Other fields of `SlimInfo`.
    """
    record = HeadRecord(BARE_PATH, "Linear", -1, head.spec)
    return SlimInfo(architecture=BARE, heads=(record,), preprocessing={}, savings=savings.to_dict(), **known)


def describe(model: nn.Module, arch: str | Architecture | None = None) -> SlimInfo:
    """Describe a model with fixed heads, so that a reader of its slim checkpoint can rebuild it.

    A model that fixify opened from a checkpoint carries its `Origin`. Of other models the architecture is recognised:
    a timm model names it in its `pretrained_cfg`, a torchvision model is found by the names and shapes of its tensors.
    The arguments that it was built with follow from the shapes. The architecture is then built, without values, and
    compared with the model: names, shapes, and what each module computes.

    Args:
        model: The model.
        arch: The architecture, if the caller knows it.

    Raises:
        UsageError: The model has no fixed head.
        ArchitectureError: See `save`.
    """
    heads = {path: module for path, module in model.named_modules() if isinstance(module, FixedClassifier)}
    if not heads:
        raise UsageError(
            f"This {type(model).__name__} has no fixed head, so there is nothing slim about it.",
            hint="Replace its classifier first: fixify.fix_classifier_(model).",
        )
    if isinstance(model, FixedClassifier):
        if arch is not None or model.channel_dim != -1:
            raise UsageError(
                "A classifier alone has no architecture, and takes features [..., N].",
                hint="Save the model that it belongs to, or leave arch out.",
            )
        return describe_bare(model, Savings.of_bare(model, has_bias=model.bias is not None))
    origin: Origin | None = getattr(model, "fixify_origin", None)
    if origin is None or arch is not None:
        architecture = architecture_of(model, heads, arch)
        cfg = getattr(model, "pretrained_cfg", None)
        origin = Origin(architecture, preprocessing(architecture, cfg), None, {}, main_dtype(model.state_dict()))
    num_classes = next(iter(heads.values())).out_features
    original = build(origin.architecture, num_classes=num_classes, meta=True)
    sites = {site.path: site for site in find_heads(original, origin.architecture)}
    dtype, head_keys = DTYPES[origin.dtype], tuple(f"{path}." for path in heads)
    stored = {
        key: tensor.to("meta", dtype) if tensor.is_floating_point() else tensor.to("meta")
        for key, tensor in model.state_dict().items()
        if not key.startswith(head_keys)
    }
    learned = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in original.state_dict().items()
    }
    return SlimInfo(
        architecture=origin.architecture,
        heads=tuple(sites[path].record(head.spec) for path, head in heads.items()),
        preprocessing=dict(origin.preprocessing),
        labels=origin.labels,
        source=origin.source,
        savings=Savings.measure(
            original, list(sites.values()), learned=learned, backbone=stored, heads=heads.values()
        ).to_dict(),
        dtype=origin.dtype,
    )


def architecture_of(
    model: nn.Module, heads: Mapping[str, FixedClassifier], arch: str | Architecture | None = None
) -> Architecture:
    """Recognise the architecture of a model in memory whose classifier layers are fixed heads.

    Args:
        model: The model.
        heads: Its fixed heads by path.
        arch: The architecture, if the caller knows it; it is then only checked.

    Raises:
        ArchitectureError: See `save`.
    """
    name = arch if arch is not None else _name_in_timm(model)
    wanted = parse_architecture(name) if isinstance(name, str) else name
    # A fixed head has a bias, whether or not the layer had one.
    known = _fitting(_learned_shapes(model, heads, biases=True), wanted)
    known = known or _fitting(_learned_shapes(model, heads, biases=False), wanted)
    if not known:
        raise ArchitectureError(
            f"This {type(model).__name__} is not {wanted.spelled if wanted else 'an architecture of torchvision'}: its "
            "tensors have other names or shapes.",
            hint="Say what it is: fixify.save(model, path, arch='timm/NAME,option=value').",
        )
    differences = {}
    for each in known:
        built = build(each.architecture, num_classes=each.num_classes, meta=True)
        differences[each.architecture] = _difference(built, model, heads)
        if differences[each.architecture] is None:
            return each.architecture
    architecture, what = next(iter(differences.items()))
    raise ArchitectureError(
        f"This {type(model).__name__} has the tensors of {architecture.ref} but differs in {what}, so a reader of the "
        "file would build another network.",
        hint=f"Say how it was built: fixify.save(model, path, arch='{architecture.spelled},option=value').",
    )


def _describes(info: SlimInfo, model: nn.Module) -> bool:
    """Check that a header that the model carries still holds: the heads may have been replaced since."""
    if isinstance(model, FixedClassifier) != info.is_bare:
        return False
    heads = {path or BARE_PATH: head for path, head in model.named_modules() if isinstance(head, FixedClassifier)}
    return {record.path: record.spec for record in info.heads} == {path: head.spec for path, head in heads.items()}


def _with_learned_signs(info: SlimInfo, model: nn.Module) -> SlimInfo:
    """Take over the digests of heads whose signs were learned; see `FixedClassifier.learn_signs_`."""
    heads = {path or BARE_PATH: head.spec for path, head in model.named_modules() if isinstance(head, FixedClassifier)}
    records = []
    for record in info.heads:
        spec = heads.get(record.path, record.spec)
        is_relearned = replace(spec, digest=record.spec.digest) == record.spec
        records.append(replace(record, spec=spec) if is_relearned else record)
    return info.model_copy(update={"heads": tuple(records)})


def _name_in_timm(model: nn.Module) -> str | None:
    """Return the name under which timm built the model, or None if timm did not."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture")
    return None if name is None else f"timm/{name}"


def _fitting(shapes: Mapping[str, tuple[int, ...]], wanted: Architecture | None) -> list[Candidate]:
    """Return the architectures of torchvision that have these names and shapes, or the one that is wanted if it has."""
    if wanted is not None:
        candidate = fit(wanted, shapes)
        found = [] if candidate is None else [candidate]
    else:
        try:
            found = [each for each in identify(shapes).candidates if each.architecture.library == "torchvision"]
        except ArchitectureError:
            found = []
    return [each for each in found if each.key_map is None]


def _learned_shapes(
    model: nn.Module, heads: Mapping[str, FixedClassifier], *, biases: bool
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the state dict with learned classifiers, with or without biases, in its order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, tensor in model.state_dict().items():
        path = next((path for path in heads if key.startswith(f"{path}.")), None)
        if path is None:
            shapes[key] = tuple(tensor.shape)
        elif f"{path}.weight" not in shapes:
            head = heads[path]
            maps = (1, 1) if head.channel_dim == 1 else ()
            shapes[f"{path}.weight"] = (head.out_features, head.in_features, *maps)
            if biases and head.bias is not None:
                shapes[f"{path}.bias"] = (head.out_features,)
    return shapes


def _difference(built: nn.Module, model: nn.Module, heads: Mapping[str, FixedClassifier]) -> str | None:
    """Name the first thing that two models with the same tensors compute differently; None if there is nothing."""
    for path in heads:
        replace_module(built, path, nn.Identity())
    mine = {path: module for path, module in model.named_modules() if not _inside(path, heads)}
    theirs = {path: module for path, module in built.named_modules() if not _inside(path, heads)}
    for path in mine.keys() | theirs.keys():
        if path not in mine or path not in theirs:
            return f"the module {path}"
        ours, wanted = module_traits(mine[path]), module_traits(theirs[path])
        for name in sorted(ours.keys() | wanted.keys()):
            if ours.get(name) != wanted.get(name):
                where = f"{name.removeprefix('.')} of {path or 'the model'}"
                return f"{where} ({wanted.get(name)} there, {ours.get(name)} here)"
    return None


def _inside(path: str, heads: Mapping[str, FixedClassifier]) -> bool:
    return any(path == head or path.startswith(f"{head}.") for head in heads)


def write_slim(path: Path, tensors: Mapping[str, torch.Tensor], info: SlimInfo, *, force: bool = False) -> Path:
    """Write tensors and their description as a slim checkpoint, in one step.

    Raises:
        UsageError: The description has a value that a reader would refuse, for example too few labels.
        OutputExistsError: `path` exists and `force` is not given.
        OutputError: The file cannot be written; nothing half-written is left.
    """
    refuse_existing(path, force=force)
    text = info_as_text(info)
    try:
        info_of_text(text)
    except ValueError as error:
        raise UsageError(f"{path} would not be readable: {error}.") from error
    metadata = {
        "format": "pt",  # Hugging Face's loaders insist on it
        VERSION_KEY: FORMAT_VERSION,
        SLIM_KEY: text,
        DIGEST_KEY: digest_of(tensors),
    }
    write_safetensors(path, tensors, metadata, force=force)
    return path


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], *, force: bool = True
) -> None:
    """Write a `.safetensors` file in one step. The same tensors and metadata give the same bytes.

    Tensors are detached, moved to the CPU and made contiguous. Tied weights are written twice, since safetensors
    refuses tensors that share memory.

    Raises:
        OutputExistsError: `path` exists and `force` is False.
        OutputError: The file cannot be written; nothing half-written is left.
    """
    seen: set[int] = set()
    stored = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.data_ptr() in seen and tensor.numel():
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        stored[key] = tensor
    remove_leftovers(path)
    # safetensors writes to a temporary file of its own, and a process that is killed leaves it behind.
    with private_folder(path) as folder, atomic_path(path, force=force) as temporary:
        written = folder / path.name
        try:
            save_file(stored, written, metadata=dict(metadata))
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OutputError(f"Cannot write {path}: {error}.", hint="Nothing was changed.") from error
        _sort_metadata(written)
        written.replace(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort the keys of a safetensors file's metadata, which the library writes in random order."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def _first_problem(error: RuntimeError) -> str:
    """Return the first complaint of `load_state_dict`, without the class name and the lines that follow."""
    lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    return lines[0] if lines else str(error)

"""Export a slim checkpoint to a file that runs without fixify. Nothing is written that did not pass a check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixify._files import atomic_path, refuse_existing
from fixify._packages import require_onnx
from fixify._watch import unheard
from fixify.checkpoints.locate import find_slim, short_name
from fixify.checkpoints.onnx_file import OnnxInfo, OnnxModel, new_session
from fixify.checkpoints.open import open_bare, open_model
from fixify.checkpoints.slim import DTYPES, is_slim, read_info
from fixify.data import UnreadableImages, draw_images, make_loader, name_the_first
from fixify.data.preprocessing import normalization
from fixify.errors import CheckFailed, ExportError, UsageError, resources_explained
from fixify.exporting.check import EIGHT_BIT, EXACT, NUM_REAL, Agreement, agreement, random_images, recorded
from fixify.exporting.job import HALF, LEAST_RUNTIME, Exported, Job, metadata_of, stored_dtype
from fixify.exporting.options import OPSET, ExportOptions
from fixify.exporting.parts import HeadParts

_SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "dense": ".timm"}
_SLIM_SUFFIXES = (".fixed.safetensors", ".safetensors")
_LARGEST_ONNX = (1 << 31) - 1


def export(
    checkpoint: str | Path,
    out: str | Path | None = None,
    options: ExportOptions | None = None,
    *,
    force: bool = False,
    on_warning: Callable[[str], object] | None = None,
    **changes: Any,
) -> Exported:
    """Write a slim checkpoint in a format that runs without fixify.

    Args:
        checkpoint: A slim checkpoint.
        out: The file or folder to write; default: the checkpoint's name with another suffix, in the current folder.
        options: The format and what goes into it; default: `ExportOptions()`, an ONNX file.
        force: Replace an existing output.
        on_warning: Called with what is wrong or unusual about the images of the check.
        changes: Options by name, instead of those in `options`: `export("net.fixed.safetensors", top_k=5)`.

    Raises:
        CheckFailed: The result does not agree with PyTorch. Nothing was written.
        ExportError: The model cannot be written in that format.
        FormatError, CodebookMismatchError: The checkpoint is damaged.
        UsageError: An option is out of its range, options do not go together, the checkpoint is not a slim one, or
            packages are missing.
        DataError: The images of the check cannot be read.
        OutputExistsError, OutputError: The output exists already, or cannot be written.
    """
    options = (options or ExportOptions()).replace(**changes)
    if options.to == "onnx":
        require_onnx("An export to ONNX")
    if _is_bare(checkpoint):
        options = _of_bare(checkpoint, options)
    target = Path(out) if out is not None else default_out(checkpoint, options)
    if options.to != "dense":
        refuse_existing(target, force=force)
    job = _open(checkpoint, options)
    with resources_explained("export the model"):
        if options.to == "torch-export":
            from fixify.exporting.torch_export import write_bare_torch_export, write_torch_export

            if job.info.is_bare:
                return write_bare_torch_export(job, target, force=force)
            return write_torch_export(job, target, _batches(job, on_warning), force=force)
        if options.to == "dense":
            from fixify.exporting.dense import write_dense

            return write_dense(job, target, _batches(job, on_warning), force=force)
        if options.head_only:
            from fixify.exporting.head_only import write_head

            return write_head(job, target, force=force)
        return _write_onnx(job, target, _batches(job, on_warning), force)


def default_out(checkpoint: str | Path, options: ExportOptions) -> Path:
    """Name the output: `folder/net.fixed.safetensors` gives `net.onnx` in the current folder.

    >>> str(default_out("folder/net.fixed.safetensors", ExportOptions(head_only=True)))
    'net.head.onnx'
    """
    name = Path(short_name(checkpoint)).name
    suffix = next((suffix for suffix in _SLIM_SUFFIXES if name.endswith(suffix)), "")
    return Path(name.removesuffix(suffix) + (".head" if options.head_only else "") + _SUFFIXES[options.to])


def _is_bare(checkpoint: str | Path) -> bool:
    """Return whether a name leads to a classifier without a network."""
    found = find_slim(checkpoint)
    return found is not None and is_slim(found) and read_info(found).is_bare


def _of_bare(checkpoint: str | Path, options: ExportOptions) -> ExportOptions:
    """Return the options with which a classifier without a network is exported: its head is all there is.

    Raises:
        UsageError: The format or an option needs a network.
    """
    if options.to == "onnx":
        return options.replace(head_only=True)
    what = "--images runs one" if options.images is not None else "--to dense writes one"
    if options.to == "dense" or options.images is not None:
        raise UsageError(
            f"{checkpoint} is a classifier without a network, and {what}.",
            hint=f"Write it for ONNX Runtime and NumPy: fixify export {checkpoint} --head-only",
        )
    return options


def _open(checkpoint: str | Path, options: ExportOptions) -> Job:
    opened = open_bare(checkpoint) if _is_bare(checkpoint) else open_model(checkpoint)
    if opened.slim is None or isinstance(opened.model, OnnxModel):
        raise UsageError(
            f"{opened.name} is not a slim checkpoint.", hint=f"Make one first: fixify convert {checkpoint}"
        )
    if options.top_k is not None and options.top_k > opened.num_classes:
        raise UsageError(f"top_k is {options.top_k}, and there are {opened.num_classes} classes.")
    if options.dtype is not None:
        round_weights_(opened.model, DTYPES[options.dtype])
    modules: dict[str, Any] = {record.path: opened.model.get_submodule(record.path) for record in opened.slim.heads}
    heads = {path: HeadParts.of(module) for path, module in modules.items()}
    return Job(opened, opened.slim, heads, options)


@torch.no_grad()
def round_weights_(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the weight matrices and kernels of a model to a type; vectors and what overflows stay as they are."""
    for parameter in model.parameters():
        rounded = parameter.to(dtype).to(parameter.dtype)
        if parameter.dim() > 1 and bool(rounded.isfinite().all()):
            parameter.copy_(rounded)


def _batches(job: Job, on_warning: Callable[[str], object] | None) -> dict[str, Iterator[Tensor]]:
    """Return the images of the check by what they are."""
    sizes = [int(size) for size in job.info.data_config["input_size"]]
    fixed = job.options.batch
    noise = random_images(sizes, fixed=fixed)
    if job.options.include_preprocessing:
        noise = map(_Pixels(job).snapped, noise)
    found = {"random images": noise}
    if job.options.images is not None:
        drawn = draw_images(job.options.images, count=NUM_REAL)
        warn = on_warning if on_warning is not None else unheard
        unreadable = UnreadableImages(len(drawn), 0.01, name_the_first(warn), warn)
        loader = make_loader(
            drawn, job.opened.preprocessing, training=False, batch_size=fixed or 8, unreadable=unreadable
        )
        found[f"images of {drawn.name}"] = _images(loader)
    return found


def _images(loader: Any) -> Iterator[Tensor]:
    with loader:
        for images, _ in loader:
            yield images


class _Pixels:
    """The way from normalised images to pixels and back."""

    def __init__(self, job: Job) -> None:
        self.mean, self.std = normalization(job.opened.preprocessing)

    def snapped(self, images: Tensor) -> Tensor:
        """Round images to those that pixels of 8 bits can be."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (((images * std + mean) * 255).round().clamp(0, 255) / 255 - mean) / std


def _write_onnx(job: Job, target: Path, batches: Mapping[str, Iterator[Tensor]], force: bool) -> Exported:
    from fixify.exporting.onnx_backbone import export_backbone
    from fixify.exporting.onnx_models import add_metadata, add_outputs, add_preprocessing, store_lossless

    options = job.options
    compared = [(name, list(images)) for name, images in batches.items()]
    expected = [(name, images, _answers(job.model, images)) for name, images in compared]
    sizes = [int(size) for size in job.info.data_config["input_size"]]
    example = torch.zeros(options.batch or 2, *sizes)
    made = export_backbone(
        job.model,
        job.heads,
        example,
        opset=options.opset or OPSET,
        portable=options.portable,
        fixed_batch=options.batch is not None,
        as_stored=stored_dtype(job) in HALF,
    )
    mean, std = normalization(job.opened.preprocessing)
    if options.include_preprocessing:
        add_preprocessing(made, mean, std)
    if stored_dtype(job) in HALF:
        store_lossless(made, stored_dtype(job))
    rounded = any(parts.rounds_features(portable=options.portable) for parts in job.heads.values())
    about = OnnxInfo(
        preprocessing=options.include_preprocessing,
        mean=list(mean) if options.include_preprocessing else [],
        std=list(std) if options.include_preprocessing else [],
        softmax=options.include_softmax,
        portable=options.portable,
        batch=options.batch,
        onnxruntime=LEAST_RUNTIME if rounded else None,
    )
    if options.include_softmax:
        add_outputs(made, softmax=True, top_k=None)
    whole = _bytes(made)
    checks = [
        _compare(OnnxModel(new_session(whole), job.info, about, target.name), *each, EIGHT_BIT if rounded else EXACT)
        for each in expected
    ]
    about = about.model_copy(update={"check": [check.to_dict() for check in checks], "top_k": options.top_k})
    if options.top_k is not None:
        add_outputs(made, softmax=False, top_k=options.top_k)
    add_metadata(made, metadata_of(job.info, about))
    data = _bytes(made)
    if options.top_k is not None:
        _check_top_k(whole, data, options.top_k, about, job, expected[0][1])
    with atomic_path(target, force=force) as temporary:
        temporary.write_bytes(data)
    return Exported((target,), len(data), job.head_bytes, tuple(checks), tuple(job.notes))


def _bytes(made: Any) -> bytes:
    if made.ByteSize() > _LARGEST_ONNX:
        raise ExportError(
            f"The model takes {made.ByteSize() / 1e9:.1f} GB, and an ONNX file holds at most 2 GB.",
            hint="Store weights in half precision: --dtype float16",
        )
    data: bytes = made.SerializeToString()
    return data


def _answers(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        return [model(batch).float() for batch in batches]


def _compare(exported: OnnxModel, name: str, batches: list[Tensor], answers: list[Tensor], allowed: float) -> Agreement:
    if not exported.onnx_info.softmax:
        return agreement(name, batches, recorded(answers), exported, allowed=allowed)
    return agreement(
        name,
        batches,
        recorded(answer.log_softmax(dim=-1) for answer in answers),
        exported,
        allowed=allowed,
        minimum=_LEAST_LOGARITHM,
    )


_LEAST_LOGARITHM = -80.0  # exp(-88) underflows in float32


def _check_top_k(whole: bytes, data: bytes, top_k: int, about: OnnxInfo, job: Job, batches: list[Tensor]) -> None:
    """Check that the K largest values are those of the model that returns all.

    Raises:
        CheckFailed: They are not.
    """
    everything = OnnxModel(new_session(whole), job.info, about, "The model")
    session = new_session(data)
    for batch in batches:
        pixels = everything.prepared(batch).contiguous().numpy()
        (all_values,) = everything.session.run(None, {everything.input_name: pixels})
        values, classes = map(torch.from_numpy, session.run(None, {everything.input_name: pixels}))
        expected = torch.from_numpy(all_values)
        if not torch.equal(values, expected.topk(top_k).values) or not torch.equal(values, expected.gather(1, classes)):
            raise CheckFailed("The export failed its check: the K largest values are not those of all classes.")

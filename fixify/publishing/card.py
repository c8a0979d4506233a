"""Write the model card of a slim checkpoint: the README.md of its repository on the Hugging Face hub.

All that is known comes from the file's header, which somebody else may have written. Its texts are only shown as code
spans, in which Markdown and HTML mean nothing, and the front matter is written by PyYAML.

Importing this module needs no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

from fixify._values import counted
from fixify.checkpoints.header import SlimInfo
from fixify.description import HeadRecord
from fixify.errors import UsageError
from fixify.reporting.about import removed_line
from fixify.reporting.layout import human_bytes
from fixify.savings import Savings

_LICENCE = re.compile("[a-z0-9][a-z0-9.+-]{0,60}")
# Identifiers that the hub knows and that weights of timm have; it wants others as "other" with a name.
_KNOWN = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"),
    *("cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "openrail", "openrail++", "creativeml-openrail-m", "gpl-3.0", "agpl-3.0"),
    *("lgpl-3.0", "mpl-2.0", "unlicense", "wtfpl", "isc", "unknown", "other"),
}
_LONGEST = 200  # characters of a text from the file
_METRICS = {"top1": "top-1 (%)", "top5": "top-5 (%)", "loss": "loss", "ece": "calibration error (%)"}


def check_licence(licence: str) -> str:
    """Return the identifier of a licence in small letters.

    Raises:
        UsageError: it cannot be one.

    >>> check_licence("Apache-2.0")
    'apache-2.0'
    """
    found = licence.strip().lower()
    if not _LICENCE.fullmatch(found):
        raise UsageError(
            f"{licence[:_LONGEST]!r} is not the identifier of a licence.",
            hint="For example: --license apache-2.0, mit, cc-by-nc-4.0. https://huggingface.co/docs/hub/repositories-licenses",
        )
    return found


def model_card(info: SlimInfo, repo: str, *, base_model: str | None = None, licence: str | None = None) -> str:
    """Write the model card of a slim checkpoint.

    Args:
        info: What the checkpoint says about itself.
        repo: Its repository, "organisation/name", or a folder's name.
        base_model: The repository of the model that was converted, if it has one.
        licence: The identifier of the licence, if it is known; see `check_licence`.
    """
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(info, base_model, licence), sort_keys=False)}---",
        f"# {code(repo)}",
        _what(info),
        f"## Use\n\n{_use_of_bare(repo) if info.is_bare else _use(repo)}",
        f"## Accuracy\n\n{_accuracy(info, repo)}",
        f"## What was saved\n\n{_saved(info)}",
        f"## Origin\n\n{_origin(info, base_model, licence)}",
    ]
    return "\n\n".join(parts) + "\n"


def code(text: str) -> str:
    r"""Write any text as one code span of Markdown, with control characters as escapes.

    >>> print(code("a`b"), code("<b>\n"))
    ``a`b`` `<b>\x0a`
    """
    shown = "".join(char if char.isprintable() else _escape(char) for char in text[:_LONGEST]) or " "
    shown += "..." if len(text) > _LONGEST else ""
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    space = " " if shown[0] == "`" or shown[-1] == "`" else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _escape(char: str) -> str:
    number = ord(char)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _front_matter(info: SlimInfo, base_model: str | None, licence: str | None) -> dict[str, Any]:
    made: dict[str, Any] = {"library_name": "fixify"}
    if info.is_bare:
        made["tags"] = ["fixify"]
    else:
        made["pipeline_tag"] = "image-classification"
        timm = ["timm"] if info.architecture.library == "timm" else []
        made["tags"] = ["image-classification", "fixify", *timm]
    if base_model is not None:
        made["base_model"] = base_model
    if licence is not None and licence in _KNOWN:
        made["license"] = licence
    elif licence is not None:
        made |= {"license": "other", "license_name": licence}
    return made


def _what(info: SlimInfo) -> str:
    heads = "; ".join(_head(record) for record in info.heads)
    classes = counted(info.num_classes, "class", "classes")
    if info.is_bare:
        features = counted(info.heads[0].spec.num_features, "value")
        what = f"A classifier of {classes} without a network: it takes features of {features}. It"
    else:
        what = f"An image classifier of {classes}, architecture {code(info.architecture.spelled)}. Its classifier"
    return (
        f"{what} is fixed and rebuilt from a few bytes, after "
        '[Hoffer, Hubara & Soudry, "Fix your classifier"](https://arxiv.org/abs/1801.04540) (ICLR 2018): '
        f"{heads}. The file was written by fixify."
    )


def _head(record: HeadRecord) -> str:
    spec = record.spec
    stored = f", {spec.bytes_per_class:.3g} bytes per class" if spec.bytes_per_class else ", nothing stored per class"
    return f"{code(record.path)} has {code(spec.kind)} codes of {counted(spec.num_features, 'feature')}{stored}"


def _use(repo: str) -> str:
    name = _ref(repo)
    text = f"""\
import fixify  # pip install fixify

model = fixify.load({name!r})  # an ordinary nn.Module in eval mode
"""
    timm = f"""\
import fixify  # timm then knows slim checkpoints
import timm

model = timm.create_model({name!r}, pretrained=True)
"""
    shell = f"fixify predict {name} IMAGES\n"
    return f"```python\n{text}```\n\nWith timm:\n\n```python\n{timm}```\n\nIn a shell:\n\n```sh\n{shell}```"


def _use_of_bare(repo: str) -> str:
    name = _ref(repo)
    text = f"""\
import fixify  # pip install fixify

classifier = fixify.load({name!r})  # an nn.Module: features [..., N] to logits [..., C]
"""
    return f"```python\n{text}```\n\nFor ONNX Runtime and NumPy:\n\n```sh\nfixify export {name} --head-only\n```"


def _ref(repo: str) -> str:
    """Return the name under which fixify and timm open a repository or folder."""
    return f"hf-hub:{repo}" if "/" in repo else f"local-dir:{repo}"


def _accuracy(info: SlimInfo, repo: str) -> str:
    training = info.training or {}
    before, after = (training.get(key) for key in ("before", "after"))
    if isinstance(before, dict) and isinstance(after, dict):
        return _table_of_training(training, before, after)
    if info.calibration is not None:
        found = info.calibration
        return (
            "Not measured on labels. Without any training it agreed with the original on "
            f"{_number(found.get('agreement'))} % of {counted(int(found.get('held_out', 0)), 'image')} of "
            f"{code(str(found.get('data')))} that it was not calibrated on."
        )
    if info.is_bare:
        return "Not measured: that takes the network that makes the features."
    return f"Not measured. Measure it:\n\n```sh\nfixify eval {_ref(repo)} --data DATA\n```"


def _table_of_training(training: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    original = {"top1": training.get("original_top1")}
    rows = ["| | original | before fine-tuning | after fine-tuning |", "|---|---|---|---|"]
    for key, title in _METRICS.items():
        values = (original.get(key), before.get(key), after.get(f"val_{key}"))
        if any(isinstance(value, (int, float)) for value in values[1:]):
            rows.append(f"| {title} | {' | '.join(_number(value) for value in values)} |")
    what = "Measured on the validation split of"
    if training.get("val_labels"):
        what = "There were no labels: top-1 is the agreement with the teacher, on the validation images of"
    data, epochs = training.get("data"), training.get("epochs_done")
    done = f" Fine-tuned for {_number(epochs)} epochs." if isinstance(epochs, (int, float)) else ""
    return "\n".join(rows) + f"\n\n{what} {code(str(data))}.{done}"


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    return f"{value:.4g}"


def _saved(info: SlimInfo) -> str:
    savings = Savings.from_dict(info.savings)
    rows = [
        "| | original | this file |",
        "|---|---|---|",
        f"| parameters | {savings.parameters_before:,} | {savings.parameters_after:,} |",
        f"| size of all tensors | {human_bytes(savings.bytes_before)} | {human_bytes(savings.bytes_after)} |",
        f"| of it the classifier | {human_bytes(savings.classifier_bytes_before)} | "
        f"{human_bytes(savings.classifier_bytes_after)} |",
    ]
    return "\n".join([removed_line(savings, info.heads), "", *rows])


def _origin(info: SlimInfo, base_model: str | None, licence: str | None) -> str:
    rows = []
    if base_model is not None:
        rows.append(f"- Base model: {code(base_model)}")
    if info.source.get("name"):
        rows.append(f"- Converted from: {code(str(info.source['name']))}")
    if info.source.get("sha256"):
        rows.append(f"- SHA-256 of that file: {code(str(info.source['sha256']))}")
    rows.append(f"- Licence: {code(licence)}" if licence is not None else "- Licence: not known")
    size = "x".join(str(int(side)) for side in info.preprocessing.get("input_size", []))
    if size:
        rows.append(f"- Input: {size}, channels first; the other values are in config.json")
    if info.labels:
        rows.append(f"- Labels: {counted(len(info.labels), 'name')} in config.json, the first {code(info.labels[0])}")
    return "\n".join(rows)

"""Tables of what a slim checkpoint says about itself.

Importing this module needs no torch, so that `fixify inspect` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from rich.table import Table

from fixify._values import counted, shorten
from fixify.checkpoints.header import SlimInfo
from fixify.description import HeadRecord
from fixify.heads.base_kind import StoredTensor
from fixify.reporting.layout import human_bytes, new_table, plain, short_digest
from fixify.savings import Savings


def slim_table(path: Path, info: SlimInfo) -> Table:
    """Show what a slim checkpoint says about itself, one fact per row."""
    made = new_table("", "", title=path.name)
    made.show_header = False
    made.add_row("architecture", "none: a classifier without a network" if info.is_bare else info.architecture.ref)
    for record in info.heads:
        spec = record.spec
        made.add_row(
            f"head {record.path}",
            f"{spec.kind}, {counted(spec.num_classes, 'class', 'classes')} x {spec.num_features} features",
        )
        if spec.bytes_per_class:
            made.add_row("", spec.description)
        made.add_row("", ", ".join(part for part in (spec.construction, f"seed {spec.seed}") if part))
        made.add_row("", short_digest(spec.digest))
    if info.projection is not None:
        made.add_row("", f"behind the projection {info.projection}")
    if not info.is_bare:
        made.add_row("preprocessing", ", ".join(f"{key} {plain(value)}" for key, value in info.preprocessing.items()))
    if info.labels:
        shown = ", ".join(info.labels[:4])
        made.add_row("labels", f"{shown}, ... ({len(info.labels)})" if len(info.labels) > 4 else shown)
    source = info.source
    if source.get("name"):
        size = f", {human_bytes(source['bytes'])}" if source.get("bytes") else ""
        made.add_row("source", f"{source['name']}{size}" + (", EMA weights" if source.get("ema") else ""))
    if source.get("sha256"):
        made.add_row("", short_digest(f"sha256:{source['sha256']}"))
    classifier = source.get("classifier")
    if isinstance(classifier, dict) and not info.is_bare:
        made.add_row("classifier", str(classifier.get("name")))
    for key, title in (("applied", "applied"), ("left_out", "left out")):
        names = source.get(key)
        if isinstance(names, list) and names:
            made.add_row(title, shorten([str(name) for name in names]))
    made.add_row("saved", removed_line(Savings.from_dict(info.savings), info.heads))
    if info.calibration is not None:
        made.add_row("calibrated", calibration_line(info.calibration))
    training = info.training or {}
    if training:
        epochs, before, after = (training.get(key) for key in ("epochs_done", "before", "after"))
        done = f"{epochs} epoch{'' if epochs == 1 else 's'}"
        start = training.get("checkpoint")  # None in a run from scratch
        origin = "" if start is None else f", from {start}"
        made.add_row("fine-tuned" if origin else "trained", f"{done} on {training.get('data')}{origin}")
        if isinstance(before, dict) and isinstance(after, dict):
            what = "agreement with the teacher" if training.get("val_labels") else "top-1"
            made.add_row("", f"{what} {plain(before.get('top1'))} % before, {plain(after.get('val_top1'))} % after")
        teacher = training.get("teacher")
        if isinstance(teacher, dict):
            made.add_row("", f"teacher_logits by {teacher.get('name')}")
    return made


def removed_line(savings: Savings, heads: Sequence[HeadRecord] = ()) -> str:
    """Say in one sentence how many weights a fixed head removed, or replaced by signs."""
    share = f"{100 * savings.removed_share:.1f} % of {savings.parameters_before:,} parameters"
    signs = sum(record.spec.num_stored_signs for record in heads)
    if signs:
        rates = sorted({record.spec.bits_per_weight for record in heads if record.spec.bits_per_weight is not None})
        what = f"level of {' and '.join(f'{rate:g}' for rate in rates)} bits" if rates else "1-bit sign"
        named = counted(signs, what, what.replace("level", "levels") if rates else None)
        entries = sum(prod(stored.shape) for record in heads for stored in _projections(record))
        if entries:
            named += f" and a projection of {counted(entries, '8-bit number')}"
        return f"Replaced {counted(savings.removed, 'classifier weight')} by {named} ({share})."
    return f"Removed {counted(savings.removed, 'classifier weight')} ({share})."


def _projections(record: HeadRecord) -> tuple[StoredTensor, ...]:
    return tuple(stored for stored in record.spec.stored_tensors if stored.name == "projection")


def calibration_line(calibration: Mapping[str, Any]) -> str:
    """Say what a head was calibrated on and how often it agreed with the original, from `SlimInfo.calibration`."""
    images, held_out, data = (calibration.get(key) for key in ("num_images", "held_out", "data"))
    used = f"{images} image{'' if images == 1 else 's'}"
    others = f"{held_out} other{'' if held_out == 1 else 's'}"
    return f"on {used} of {data}; agreed with the original on {plain(calibration.get('agreement'))} % of {others}"

"""What a run keeps: how far it is, and the files that say so."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixify.confusions import Confusions
from fixify.data import Unreadable, UnreadableImages
from fixify.evaluation import Metrics
from fixify.training import distributed
from fixify.training.engine import Engine
from fixify.training.events import EpochEnded, EpochRecord, Listener, Validated, Warned
from fixify.training.files import tidy
from fixify.training.finite import check_weights
from fixify.training.logging import write_confusions, write_logs, write_unreadable
from fixify.training.loop import head_scale
from fixify.training.machine import changed, machine_facts
from fixify.training.resume import Progress, Stored, Trained, newest_state, read_state, write_state

_ROUNDING = 1e-9  # 97.8 - 97.3 is a little more than 0.5

SaveModel = Callable[[nn.Module, Path, dict[str, Any]], object]
"""Writes the model to the path, replacing what is there, with the record of its training (JSON-safe)."""


class Keeper:
    """Keeps the progress of a run, and writes its state, its checkpoints and its logs.

    Args:
        engine: What is trained.
        out: Folder of the run.
        save: Writes a checkpoint.
        suffix: Of its file.
        facts: What the run is of; in every file, and compared on resuming.
        on_event: Told of every validation.
        unreadable: Images that cannot be read, of "train" and "val"; counted and listed.
    """

    def __init__(
        self,
        engine: Engine,
        out: Path,
        save: SaveModel,
        suffix: str,
        facts: dict[str, Any],
        on_event: Listener,
        unreadable: dict[str, UnreadableImages],
    ) -> None:
        self.engine, self.options = engine, engine.options
        self.out, self.save, self.facts, self.on_event = out, save, facts, on_event
        self.best_path, self.last_path = out / f"best{suffix}", out / f"last{suffix}"
        self.progress = Progress()
        self.unreadable = unreadable
        self.has_state = False
        self.written = time.monotonic()
        self.machine = machine_facts(engine.device)

    def read_state(self) -> None:
        """Continue where the newest whole state in the folder is; raises `TrainingError` if there is none that fits."""
        stored = self._newest_state()
        self.progress = read_state(stored, self._trained(), self.options, self.facts)
        for split, messages in self.progress.unreadable.items():
            self.unreadable[split].messages.update(dict.fromkeys(messages))
        self.has_state = True
        distributed.by_first(lambda: tidy(self.out))
        if (difference := changed(stored.content.get("machine", {}), self.machine)) is not None:
            self.on_event(Warned(f"Other numbers than without the interruption are possible: {difference}."))
        if stored.damaged is not None:
            distributed.by_first(lambda: self._promote(stored))
        self.engine.schedule.step_update(self.progress.updates)

    def _newest_state(self) -> Stored:
        """The first process reads it: the folder need not be where the others are."""
        if distributed.count() == 1:
            return newest_state(self.out, self.engine.device)
        path, packed, damaged = distributed.by_first(lambda: newest_state(self.out, torch.device("cpu")).packed())
        return Stored(path, torch.load(io.BytesIO(packed), weights_only=True), damaged)

    def _promote(self, stored: Stored) -> None:
        """Make the previous state the newest: else the next one would push the good one out."""
        if stored.damaged is not None:
            what = "damaged" if stored.damaged.exists() else "missing"
            self.on_event(Warned(f"{stored.damaged} is {what}; going on from the state before it, {stored.path.name}."))
            stored.path.replace(stored.damaged)

    def write_state(self) -> None:
        """Write how far the run is.

        Raises:
            TrainingError: weights are not finite; the state before is kept.
            OutputError: the disk is full.
        """
        check_weights(self.engine.model, self.progress.updates)
        self._count_unreadable()
        write_state(self.out, self._trained(), self.progress, self.options, self.facts, self.machine)
        self.has_state = True
        self.written = time.monotonic()

    def _count_unreadable(self) -> None:
        """Tell all processes what each could not read."""
        for split, images in self.unreadable.items():
            for messages in distributed.gathered(list(images.messages)):
                for message in messages:
                    images.add(Unreadable(message))
            self.progress.unreadable[split] = list(images.messages)

    def state_is_due(self) -> bool:
        """Whether the last state is older than `options.save_minutes`, by the first process's clock."""
        if self.options.save_minutes is None:
            return False
        due = time.monotonic() - self.written >= 60 * self.options.save_minutes
        return distributed.largest(int(due and distributed.is_first())) == (1,)

    def write_logs(self) -> None:
        """Write metrics.jsonl, summary.csv and steps.jsonl; unreadable.txt if there is anything to list."""
        distributed.by_first(self._write_logs)

    def _write_logs(self) -> None:
        write_logs(self.out, self.progress.history, self.progress.steps)
        if any(self.progress.unreadable.values()):
            write_unreadable(self.out, self.progress.unreadable)

    def record(self, metrics: Metrics, confusions: Confusions, *, fraction: float, seconds: float) -> None:
        """Add a validation to the history and write everything.

        Args:
            metrics, confusions: Of `engine.evaluated`.
            fraction: Part of the epoch that was done; 1 closes it.
            seconds: That it took.
        """
        progress, evaluated, parallel = self.progress, self.engine.evaluated, self.engine.parallel
        gradient_bytes, statistics_bytes = (None, None) if parallel is None else parallel.bytes_an_update()
        self._count_unreadable()
        record = EpochRecord(
            epoch=progress.epoch,
            step=progress.updates,
            lr=progress.lr,
            train_loss=progress.loss_sum / progress.images if progress.images else None,
            train_top1=100 * progress.right / progress.images if progress.images else None,
            val_loss=metrics.loss,
            val_top1=metrics.top1,
            val_top5=metrics.top5,
            val_ece=metrics.ece,
            scale=head_scale(evaluated),
            images_per_second=progress.images / max(progress.seconds, 1e-9),
            seconds=seconds,
            fraction=fraction,
            unreadable=len(self.unreadable["train"]),
            val_unreadable=len(self.unreadable["val"]),
            gradient_bytes=gradient_bytes,
            statistics_bytes=statistics_bytes,
        )
        trained = self.engine.to_save()
        check_weights(evaluated, progress.updates)
        progress.history.append(record)
        if fraction == 1:
            progress.next_epoch()
        is_best = progress.best() is record
        # The state comes last: a crash between the files repeats the steps, and writes the same ones again.
        distributed.by_first(lambda: self._save(trained, record, is_best=is_best))
        self.write_state()
        self.write_logs()
        distributed.by_first(lambda: write_confusions(self.out, record.step, confusions))
        self.on_event(EpochEnded(record, is_best) if fraction == 1 else Validated(record, is_best))

    def _save(self, trained: nn.Module, record: EpochRecord, *, is_best: bool) -> None:
        self.save(trained, self.last_path, self._training_record(record))
        if is_best:
            self.save(trained, self.best_path, self._training_record(record))

    def original_top1(self) -> float | None:
        """The original's top-1, percent, given or measured."""
        measured = self.progress.original
        return self.options.original_top1 if measured is None else measured.top1

    def is_enough(self, top1: float) -> bool:
        """Whether this top-1 is within `options.max_drop` of the original's."""
        original, allowed = self.original_top1(), self.options.max_drop
        return original is not None and allowed is not None and original - top1 <= allowed + _ROUNDING

    def has_reached(self) -> bool:
        """Whether the last validation's top-1 is enough."""
        return bool(self.progress.history) and self.is_enough(self.progress.history[-1].val_top1)

    def _training_record(self, record: EpochRecord) -> dict[str, Any]:
        before = None if self.progress.before is None else self.progress.before.to_dict()
        return {
            **self.facts,
            "options": self.options.recipe(),
            "before": before,
            "after": {key: value for key, value in record.to_dict().items() if key.startswith("val_")},
            "epochs_done": record.epoch + 1 if record.fraction == 1 else round(record.epochs, 4) or 0,
            "updates": record.step,
            **({} if self.original_top1() is None else {"original_top1": self.original_top1()}),
        }

    def _trained(self) -> Trained:
        engine = self.engine
        average = None if engine.ema is None else engine.ema.module
        return Trained(engine.model, engine.optimiser, engine.scaler, average, sharded=engine.options.shard)

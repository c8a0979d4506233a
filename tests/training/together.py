"""What one of several processes does in a test: started by `Processes.together` in conftest.py, which sets GIVEN."""

from __future__ import annotations

import os
import pickle
import runpy
from pathlib import Path
from typing import Any

import torch

from fixify.errors import FixifyError
from fixify.heads import loss
from fixify.training import FinetuneOptions, TrainOptions, distributed, losses


def one_run(
    shared: dict[str, Any],
    out: Path,
    *,
    model: dict[str, Any] | None = None,
    val_images: int = 20,
    output: dict[str, Any] | None = None,
    blocked_from: int = losses.BLOCKED_FROM,
    block_classes: int | None = None,
    kind: str = "finetune",
    **options: Any,
) -> dict[str, Any]:
    """Do a run of the tiny network in the process group."""
    losses.BLOCKED_FROM = blocked_from
    if block_classes is not None:
        loss._LEAST_CLASSES, loss.BLOCK_LOGITS, loss.PAIR_LOGITS = block_classes, 1, 1
    events: list[str] = []
    result: Any = "done"
    options = {"workers": 0, "device": "cpu", **options}
    if kind == "train":
        options["model"] = "tiny"
    options_class = TrainOptions if kind == "train" else FinetuneOptions
    chosen = options_class.create(**options).for_this_process()
    network = shared["make_model"](**(model or {}))
    data = shared["_stripes"](44, 0, "train"), shared["_stripes"](val_images, 1, "val")
    run = shared["Runs"](None, data, shared["PREPROCESSING"], shared["save_weights_"])
    try:
        with distributed.process_group(torch.device("cpu")):
            run(out, chosen, network, on_event=lambda event: events.append(type(event).__name__), **(output or {}))
    except FixifyError as error:
        result = error
    return {"result": result, "events": events, "state": {} if chosen.shard else network.state_dict()}


def main(environment: dict[str, str], runs: dict[str, dict[str, Any]], folder: Path, answer: Path) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    shared = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
    answers = {name: one_run(shared, folder / name, **given) for name, given in runs.items()}
    answer.write_bytes(pickle.dumps(answers))


if __name__ == "__main__":
    main(**GIVEN)  # type: ignore[name-defined]  # noqa: F821

"""What one of several processes does in a test: run by `several` in conftest.py, which sets ARGUMENTS."""

from __future__ import annotations

import os
import pickle
import runpy
from pathlib import Path
from typing import Any

import torch

from fixify.errors import FixifyError
from fixify.training import FinetuneOptions, distributed, train_model


def main(arguments: dict[str, Any]) -> None:
    os.environ.update(arguments["environment"])
    torch.set_num_threads(1)
    shared = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
    events: list[str] = []
    result: Any
    options = FinetuneOptions.create(**arguments["options"]).for_this_process()
    model = shared["make_model"](**arguments["model"])
    try:
        with distributed.process_group(torch.device("cpu")):
            train_model(
                model,
                shared["_stripes"](44, 0, "train"),
                shared["_stripes"](arguments["val_images"], 1, "val"),
                shared["PREPROCESSING"],
                options,
                Path(arguments["out"]),
                save=shared["save_weights_"],
                on_event=lambda event: events.append(type(event).__name__),
                **arguments["given"],
            )
        result = "done"
    except FixifyError as error:
        result = error
    state = {} if options.shard else model.state_dict()
    answer = {"result": result, "events": events, "state": state}
    Path(arguments["answer"]).write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main(ARGUMENTS)  # type: ignore[name-defined]  # noqa: F821

"""The engine on a CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fixify.training import FinetuneOptions, Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_run_and_a_resume(run: Any, tmp_path: Path, amp: str) -> None:
    options = FinetuneOptions.create(
        epochs=3,
        batch_size=8,
        device="cuda",
        workers=2,
        amp=amp,
        channels_last=True,
        reprob=0.3,
        mixup=0.2,
        ema_decay=0.9,
    )

    class Stop(Exception):
        pass

    def stop(event: object) -> None:
        if isinstance(event, Step) and event.epoch == 2:
            raise Stop

    whole = run(tmp_path / "whole", options)
    with pytest.raises(Stop):
        run(tmp_path / "stopped", options, on_event=stop)
    resumed = run(tmp_path / "stopped", options, resume=True)
    assert resumed.history[-1].val_loss == pytest.approx(whole.history[-1].val_loss, rel=0.05)

"""torch.compile; compiling takes a minute, so most of it is slow."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fixify.errors import TrainingError
from fixify.training import FinetuneOptions, Step
from fixify.training.engine import compile_, compiling

OPTIONS = FinetuneOptions.create(
    epochs=2, batch_size=8, lr=0.02, no_aug=True, workers=0, device="cpu", ema_decay=0.9, compile=True
)


def state(folder: Path) -> dict[str, Any]:
    return torch.load(io.BytesIO((folder / "state.pt").read_bytes()), weights_only=True)


class Branching(nn.Module):
    """Cannot be one graph: what it does depends on a value."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(images)
        if self.training and logits.sum().item() > 1e9:
            logits = -logits
        return logits


def test_a_model_that_cannot_be_compiled_stops_with_a_sentence(run: Any, tmp_path: Path, new_model: Any) -> None:
    with pytest.raises(TrainingError, match=r"cannot be compiled here: \w+") as caught:
        run(tmp_path, OPTIONS, Branching(new_model()))
    assert "--compile" in str(caught.value.hint)
    assert state(tmp_path)["progress"]["updates"] == 0


@pytest.mark.slow
def test_a_missing_compiler_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    compile_(model)
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(TrainingError, match=r"cannot be compiled here: .*no-such-compiler"),
        compiling(),
    ):
        model(torch.ones(2, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_run_trains_validates_and_resumes_exactly(run: Any, tmp_path: Path, new_model: Any) -> None:
    def crash(event: Any) -> None:
        if isinstance(event, Step) and (event.epoch, event.batch) == (1, 2):
            raise KeyError

    plain = run(tmp_path / "plain", OPTIONS.replace(compile=False))
    whole = run(tmp_path / "whole", OPTIONS)
    assert whole.after.val_loss == pytest.approx(plain.after.val_loss, rel=0.05)  # other draws of dropout
    expected, found = state(tmp_path / "plain"), state(tmp_path / "whole")
    assert found["model"].keys() == expected["model"].keys()
    assert found["ema"].keys() == expected["ema"].keys()
    torch._dynamo.reset()
    with pytest.raises(KeyError):
        run(tmp_path / "parts", OPTIONS, on_event=crash)
    torch._dynamo.reset()
    run(tmp_path / "parts", OPTIONS, resume=True)
    parts = state(tmp_path / "parts")
    for key in ("model", "ema"):
        assert all(torch.equal(value, parts[key][name]) for name, value in found[key].items())

"""fixify.cli.libraries: the collector waits while torch and timm are imported."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fixify.cli import libraries
from fixify.cli.libraries import _without_collection, import_libraries


@pytest.fixture(autouse=True)
def _collected_again() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


def test_what_exists_is_left_alone() -> None:
    gc.unfreeze()
    with _without_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 10_000


def test_which_sources_need_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(libraries, "import_libraries", lambda: asked.append("imported"))
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    net, nowhere = str(tmp_path / "model.safetensors"), str(tmp_path / "nowhere.safetensors")
    libraries.import_libraries_for([net, nowhere, str(tmp_path), f"local-dir:{tmp_path}"])
    assert not asked
    slim = str(Path(__file__).parent.parent / "golden" / "v1-binary.fixed.safetensors")
    for source in (slim, "resnet18", "model.pth", str(tmp_path.parent), "hf-hub:a/b"):
        libraries.import_libraries_for([net, source])
        assert asked.pop() == "imported"


def test_nothing_is_done_where_the_libraries_are_imported() -> None:
    import fixify.models.architectures  # noqa: F401

    gc.unfreeze()
    import_libraries()
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_the_collector_runs_again_after_an_error() -> None:
    with pytest.raises(ImportError), _without_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    before = gc.get_freeze_count()
    with _without_collection():
        pass
    assert not gc.isenabled() and gc.get_freeze_count() == before

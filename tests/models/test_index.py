"""fixify.models.index: the shipped signatures."""

import json
import lzma
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torchvision

from fixify.catalogue import shipped
from fixify.catalogue.shipped import PATH, Index, dump_index, library_versions, load_index
from fixify.description import LIBRARIES
from fixify.models.index import build_index, entries_of, with_known


def test_shipped_index_is_small_and_survives_a_round_trip() -> None:
    data = PATH.read_bytes()
    assert len(data) < 300_000
    assert json.loads(lzma.decompress(dump_index(load_index()))) == json.loads(lzma.decompress(data))


def test_same_libraries_give_the_same_bytes() -> None:
    refs = ["timm/resnet10t", "torchvision/alexnet"]
    assert dump_index(build_index(refs)) == dump_index(build_index(refs))


def test_shipped_entries_are_what_the_libraries_build() -> None:
    if any(map(load_index().is_stale, LIBRARIES)):
        pytest.skip("the shipped index is of other versions of the libraries")
    shipped = {(entry.architecture.ref, repr(entry.architecture.kwargs)): entry for entry in load_index().entries}
    refs = ["timm/resnet18", "timm/vit_tiny_patch16_224", "torchvision/googlenet"]
    for entry in entries_of(refs):
        indexed = shipped[entry.architecture.ref, repr(entry.architecture.kwargs)]
        assert indexed.signature == entry.signature
        assert indexed.network == entry.network
        assert indexed.traits.items() <= entry.traits.items()


def test_traits_are_kept_where_shapes_do_not_tell() -> None:
    refs = ["timm/efficientnet_lite0", "timm/tf_efficientnet_lite0", "timm/resnet18"]
    ours, theirs, other = build_index(refs).entries
    assert {"padding", "epsilon"} <= set(ours.traits) == set(theirs.traits)
    assert "activation" not in ours.traits
    assert other.traits == {}


def test_encoders_are_left_out_and_progress_is_reported() -> None:
    calls: list = []
    assert list(entries_of(["timm/mobilenetv5_300m_enc"], calls.append)) == []
    assert calls == [1]


def test_what_makes_the_index_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    versions, digest = library_versions(), shipped.source_digest("torchvision")
    assert len(digest) == 16 and digest != shipped.source_digest("timm")
    assert not Index({"timm": [versions["timm"], "0.0.1"]}, {}, ()).is_stale("timm")
    # Another release with the same source builds the same architectures.
    assert not Index({"torchvision": ["0.0.1"]}, {"torchvision": [digest]}, ()).is_stale("torchvision")
    assert Index({"torchvision": ["0.0.1"]}, {"torchvision": ["0" * 16]}, ()).is_stale("torchvision")
    assert Index({"timm": ["0.0.1"]}, {}, ()).is_stale("timm")
    # One changed character in a model's file makes another source.
    package = Path(torchvision.__file__).parent
    copy = tmp_path / "torchvision"
    for part in ("models", "ops", "transforms"):
        shutil.copytree(package / part, copy / part, ignore=lambda _, names: [n for n in names if n == "__pycache__"])
    monkeypatch.setattr(
        shipped.importlib.util, "find_spec", lambda _: SimpleNamespace(origin=str(copy / "__init__.py"))
    )
    assert shipped.source_digest.__wrapped__("torchvision") == digest
    resnet = copy / "models" / "resnet.py"
    resnet.write_bytes(resnet.read_bytes().replace(b"width_per_group", b"width_per_Group", 1))
    assert shipped.source_digest.__wrapped__("torchvision") != digest


@pytest.mark.slow
def test_versions_that_gave_the_same_entries_stay_known() -> None:
    now = build_index(["timm/resnet18", "torchvision/resnet18"])
    before = replace(now, versions={"timm": ["0.1"], "torchvision": ["0.2"]}, sources={"timm": ["a"]})
    merged = with_known(now, replace(before, entries=(now.entries[1], build_index(["timm/resnet10t"]).entries[0])))
    assert merged.versions == {"timm": now.versions["timm"], "torchvision": ["0.2", *now.versions["torchvision"]]}
    assert merged.sources == now.sources
    assert with_known(now, before).sources["timm"] == sorted(["a", *now.sources["timm"]])

"""fixify.zoo.index: the shipped signatures."""

import json
import lzma

import pytest

from fixify.zoo.architectures import library_versions
from fixify.zoo.index import PATH, Index, build_index, dump_index, entries_of, load_index


def test_shipped_index_is_small_and_written_the_way_it_says() -> None:
    data = PATH.read_bytes()
    assert len(data) < 300_000
    assert json.loads(lzma.decompress(dump_index(load_index()))) == json.loads(lzma.decompress(data))


def test_same_libraries_give_the_same_bytes() -> None:
    refs = ["timm/resnet18", "torchvision/resnet18", "torchvision/googlenet"]
    assert dump_index(build_index(refs)) == dump_index(build_index(refs))


def test_shipped_entries_are_what_the_libraries_build() -> None:
    if load_index().versions != library_versions():
        pytest.skip("the shipped index is of other versions of the libraries")
    shipped = {(entry.architecture.ref, repr(entry.architecture.kwargs)): entry for entry in load_index().entries}
    refs = ["timm/resnet18", "timm/vit_tiny_patch16_224", "timm/levit_128s", "torchvision/inception_v3"]
    for entry in entries_of(refs):
        indexed = shipped[entry.architecture.ref, repr(entry.architecture.kwargs)]
        assert indexed.signature == entry.signature
        assert indexed.traits.items() <= entry.traits.items()


def test_traits_are_kept_where_shapes_do_not_tell() -> None:
    refs = ["timm/efficientnet_lite0", "timm/tf_efficientnet_lite0", "timm/resnet18"]
    ours, theirs, other = build_index(refs).entries
    assert {"padding", "epsilon"} <= set(ours.traits) == set(theirs.traits)
    assert "activation" not in ours.traits
    assert other.traits == {}


def test_encoders_are_left_out_and_progress_is_told() -> None:
    calls: list = []
    assert list(entries_of(["timm/mobilenetv5_300m_enc"], calls.append)) == []
    assert calls == [1]


def test_stale() -> None:
    assert not Index(library_versions(), ()).is_stale("timm")
    assert Index({"timm": "0.0.1"}, ()).is_stale("timm")
    assert Index({"timm": "0.0.1"}, ()).is_stale("torchvision")

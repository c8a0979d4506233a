import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixify.errors import CodebookMismatchError, HeadSpecError
from fixify.heads import REFERENCE_CONSTRUCTION, FixedClassifier, HeadSpec, choose_kind
from fixify.heads.codes import same_digest
from fixify.heads.spec import MAX_CLASSES, MAX_FEATURES

DIFFERENT_SIGNS = np.arange(30, dtype=np.uint8).reshape(10, 3)  # of 10 classes, 24 each
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())

VALID = {"kind": "hadamard", "num_features": 64, "num_classes": 10}


@pytest.mark.parametrize(
    "spec",
    [
        HeadSpec("hadamard", 1280, 1000, seed=2**64 - 1, standardize=True),
        HeadSpec("orthogonal", 386, 1000, bias=False, fixed_scale=True),
        HeadSpec("simplex", 64, 65, normalize=False),
        HeadSpec("simplex", 64, 65, standardize="center"),
        HeadSpec("binary", 64, 10, bits_per_class=24, gains=True),
        HeadSpec("hadamard", 64, 10, matched=True, blocks=3),
        HeadSpec("hadamard", 48, 60, construction=REFERENCE_CONSTRUCTION),
        HeadSpec("identity", 64, 10),
    ],
    ids=lambda spec: spec.kind,
)
def test_json_round_trip(spec):
    resolved = spec.resolve()
    again = HeadSpec.from_dict(json.loads(json.dumps(resolved.to_dict())))
    assert again == resolved
    assert again.resolve() == resolved
    assert hash(again) == hash(resolved)
    assert pickle.loads(pickle.dumps(resolved)) == resolved


def test_json_keys_are_those_of_version_1():
    """Readers of the first release know these keys and no others; `gains` is left out where they need not know it."""
    entries = HeadSpec("binary", 64, 10, bits_per_class=24, gains=True).resolve(DIFFERENT_SIGNS).to_dict()
    assert list(entries) == [
        "kind", "num_features", "num_classes", "seed", "normalize", "bias", "standardize", "fixed_scale", "matched",
        "bits_per_class", "gains", "version", "construction", "digest",
    ]  # fmt: skip
    assert "gains" not in HeadSpec("hadamard", 64, 10).to_dict()
    assert list(HeadSpec("hadamard", 64, 10).resolve().to_dict())[-4:] == [
        "blocks",
        "version",
        "construction",
        "digest",
    ]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_digests(name):
    """Codebooks must never change: existing files are rebuilt from these."""
    kind, n, c, seed = name.split("-")
    golden = GOLDEN[name]
    spec = HeadSpec(kind, int(n), int(c), seed=int(seed), digest=golden).resolve()
    assert spec.digest == golden
    again = dataclasses.replace(spec, digest=None, construction=None).resolve()
    assert same_digest(again.digest, golden, int(c))
    assert dataclasses.replace(again, digest=golden) == spec
    other = next(digest for digest in GOLDEN.values() if digest != golden and digest[0] == golden[0])
    with pytest.raises(CodebookMismatchError):
        dataclasses.replace(spec, digest=other).resolve()


@pytest.mark.parametrize(
    "spec",
    [
        HeadSpec("hadamard", 64, 10, matched=True, blocks=3, standardize=True),
        HeadSpec("hadamard", 64, 10, standardize="center", bias=False, fixed_scale=True, gains=True),
        HeadSpec("binary", 64, 10, bits_per_class=20, gains=True),
        HeadSpec("orthogonal", 64, 10),
    ],
    ids=lambda spec: spec.kind,
)
def test_stored_tensors_are_those_of_the_state_dict(spec):
    state = FixedClassifier(spec).state_dict()
    expected = {
        tensor.name: (tensor.dtype or "float32", tensor.shape, tensor.num_bytes()) for tensor in spec.stored_tensors
    }
    assert {
        name: (str(tensor.dtype).split(".")[1], tuple(tensor.shape), tensor.nbytes) for name, tensor in state.items()
    } == expected
    stored = sum(size for name, (*_, size) in expected.items() if name in ("codes", "gains"))
    assert stored == spec.bytes_per_class * spec.num_classes
    assert spec.stores_codes == ("codes" in state) and spec.row_scales == ("gains" in state)


def test_resolve_fills_in_and_verifies():
    spec = HeadSpec("hadamard", 20, 100)
    resolved = spec.resolve()
    assert (resolved.construction, resolved.blocks) == ("paley1-20", 3)
    assert resolved.digest.startswith("sha256:")
    with pytest.raises(CodebookMismatchError) as error:
        dataclasses.replace(resolved, seed=1).resolve()
    assert resolved.digest[:30] in error.value.message
    assert error.value.hint
    orthogonal = HeadSpec("orthogonal", 20, 100).resolve()
    with pytest.raises(CodebookMismatchError):
        dataclasses.replace(orthogonal, seed=1).resolve()
    with pytest.raises(CodebookMismatchError):
        dataclasses.replace(orthogonal, digest=resolved.digest).resolve()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "hadamrad"}, "Did you mean 'hadamard'"),
        ({"kind": 3}, "Unknown kind"),
        ({"kind": ["hadamard"]}, "Unknown kind"),
        ({"num_features": 0}, "num_features must be an integer from 1"),
        ({"num_features": True}, "num_features must be an integer"),
        ({"num_features": 64.0}, "num_features must be an integer"),
        ({"num_features": "64"}, "num_features must be an integer"),
        ({"num_features": MAX_FEATURES * 2}, "num_features must be an integer"),
        ({"num_classes": -1}, "num_classes must be an integer"),
        ({"num_classes": MAX_CLASSES + 1}, "num_classes must be an integer"),
        ({"num_features": 65_536, "num_classes": MAX_CLASSES}, "beyond the limit"),
        ({"kind": "orthogonal", "num_features": 65_536, "num_classes": 65_536}, "beyond the limit"),
        ({"seed": -1}, "seed must be an integer"),
        ({"seed": 2**64}, "seed must be an integer"),
        ({"seed": True}, "seed must be an integer"),
        ({"blocks": 0}, "blocks must be an integer"),
        ({"blocks": 2}, "has 1 block"),
        ({"bias": 1}, "bias must be true or false"),
        ({"normalize": None}, "normalize must be true or false"),
        ({"matched": True}, "needs blocks >= 1"),
        ({"matched": True, "num_features": 65_536, "blocks": 65_536}, "more than 2\\^32 codes"),
        ({"matched": True, "kind": "orthogonal"}, "belongs to kind 'hadamard'"),
        ({"construction": "sylvester-64", "kind": "simplex"}, "belongs to a head that multiplies"),
        ({"blocks": 1, "kind": "binary", "bits_per_class": 8}, "belongs to kind 'hadamard'"),
        ({"bits_per_class": 8}, "belongs to kind 'binary'"),
        ({"bits_per_class": 0, "kind": "orthogonal"}, "belongs to kind 'binary'"),
        ({"matched": True, "blocks": 1, "construction": REFERENCE_CONSTRUCTION}, "class order"),
        ({"blocks": 1, "construction": REFERENCE_CONSTRUCTION}, "class order"),
        ({"kind": "orthogonal", "construction": REFERENCE_CONSTRUCTION}, "construction belongs"),
        ({"kind": "identity", "num_classes": 65}, "at most 64 classes, got 65"),
        ({"kind": "binary"}, "bits_per_class must be an integer from 1 to the 64"),
        ({"kind": "binary", "bits_per_class": 65}, "bits_per_class must be an integer"),
        ({"kind": "binary", "bits_per_class": 3}, "only 8 different codes of 3 signs"),
        ({"kind": "binary", "bits_per_class": 16, "num_features": 386}, "No Hadamard matrix of order 386"),
        ({"gains": 1}, "gains must be true or false"),
        ({"construction": 64}, "construction must be a string"),
        ({"construction": "sylvester-32"}, "not of order 64"),
        ({"construction": "paley1-64"}, "no paley1 matrix of order 64"),
        ({"digest": "sha256:00"}, "Not a codebook digest"),
        ({"digest": "md5"}, "Not a codebook digest"),
        ({"digest": "sketch:nan"}, "Not a codebook digest"),
        ({"digest": 5}, "Not a codebook digest"),
        ({"version": 0}, "positive integer"),
        ({"version": True}, "positive integer"),
        ({"version": "1"}, "positive integer"),
        ({"num_features": 386}, "No Hadamard matrix of order 386"),
        ({"kind": "simplex", "num_classes": 66}, "at most 65 corners"),
        ({"num_feature": 5}, "Did you mean 'num_features'"),
        ({5: 5}, "Unknown entry"),
    ],
)
def test_bad_specs_are_refused(change, message):
    with pytest.raises(HeadSpecError, match=message):
        HeadSpec.from_dict(VALID | change)


def test_missing_entries_and_wrong_containers():
    with pytest.raises(HeadSpecError, match="needs num_classes"):
        HeadSpec.from_dict({"kind": "hadamard", "num_features": 64})
    for data in ([], "hadamard", None, 3):
        with pytest.raises(HeadSpecError, match="JSON object"):
            HeadSpec.from_dict(data)


def test_a_newer_version_says_upgrade_whatever_else_is_new():
    with pytest.raises(HeadSpecError) as error:
        HeadSpec.from_dict(VALID | {"version": 2, "rotation": "new"})
    assert "upgrade" in error.value.hint


text = st.text("hadmrsylvet-0164*:é", max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(text, children, max_size=3),
    max_leaves=5,
)
FIELDS = [field.name for field in dataclasses.fields(HeadSpec)]


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, "x"]), json_values), st.booleans())
def test_any_json_gives_a_spec_or_a_head_spec_error(data, complete):
    try:
        spec = HeadSpec.from_dict(VALID | data if complete else data)
    except HeadSpecError:
        return
    assert HeadSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_choose_kind():
    assert choose_kind(1280, 1000)[0] == "hadamard"
    assert choose_kind(386, 1000)[0] == "orthogonal"
    assert choose_kind(4, 1000)[0] == "orthogonal"
    assert choose_kind(12, 241)[0] == "orthogonal"
    assert choose_kind(12, 24)[0] == choose_kind(4, 16)[0] == choose_kind(16, 256)[0] == "hadamard"
    assert choose_kind(32, 1000)[0] == choose_kind(4096, 10**6)[0] == choose_kind(1280, 10**6)[0] == "hadamard"
    assert "3 Hadamard matrices" in choose_kind(256, 1500)[1]
    for n, c in ((386, 10), (4, 1000), (64, 10), (64, 100), (64, 500), (4, 16), (12, 24), (1, 2)):
        kind, reason = choose_kind(n, c)
        assert HeadSpec(kind, n, c).resolve().kind == kind
        assert reason

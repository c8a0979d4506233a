"""fixify.surgery: what a model can still do after its classifier was replaced."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from fixify.errors import FixifyError, FormatError, HeadSpecError, NoClassifierError, UsageError
from fixify.heads import KINDS, FixedClassifier, HeadSpec
from fixify.models import build, find_classifiers, list_architectures, parse_architecture, preprocessing
from fixify.surgery import HeadConfig, HeadRecord, apply_heads_, fix_classifier_, replace_module

NUM_CLASSES = 12
# The smallest model of each way to build a classifier, and the size of image that it takes.
TIMM: dict[str, int] = {
    "resnet10t": 64,
    "mobilenetv3_small_050": 64,  # a hidden layer and the classifier
    "dla46_c": 64,  # 1x1 convolution
    "convnext_atto": 64,
    "vit_tiny_patch16_224": 224,
    "deit_tiny_distilled_patch16_224": 224,
    "levit_128s": 224,
    "levit_256d": 224,
    "repvit_m0_9": 64,
    "iformer_t": 224,
    "crossvit_9_240": 240,
    "cpubone_nano": 64,
    "poolformerv2_s12": 64,
    "caformer_s18": 64,  # MlpHead
    "efficientvim_m1": 224,
    "efficientvim_m1_dist": 224,
    "volo_d1_224": 224,  # an auxiliary head for each token
}
LARGER = {
    "sequencer2d_s": 224,  # get_classifier() is the whole ClassifierHead
    "samvit_base_patch16_224": 224,
    "vitamin_small_224": 224,
    "mvitv2_tiny": 224,
}
TORCHVISION = {
    "mobilenet_v3_small": 64,
    "squeezenet1_1": 64,
    "googlenet": 224,  # two auxiliary classifiers
    "swin_t": 64,
    "regnet_y_400mf": 64,
}


def _small(ref: str, size: int) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = build(parse_architecture(ref), num_classes=NUM_CLASSES)
        return model, torch.randn(2, 3, size, size)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of an output: some models return several, or lists of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _same(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_tensors(first), _tensors(second), strict=True))


@pytest.mark.parametrize("name", [*TIMM, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER)])
@torch.no_grad()
def test_timm_models_keep_working(name: str) -> None:
    model, x = _small(f"timm/{name}", (TIMM | LARGER)[name])
    model.eval()
    sites = find_classifiers(model)
    features = model.forward_features(x)
    pre_logits = model.forward_head(features, pre_logits=True)
    parameters = {id(parameter) for parameter in model.parameters()}

    assert fix_classifier_(model, "auto") is model

    fixed = {path: module for path, module in model.named_modules() if isinstance(module, FixedClassifier)}
    assert list(fixed) == [site.path for site in sites]
    for site in sites:
        head = fixed[site.path]
        assert (head.in_features, head.out_features) == (site.num_features, site.num_classes)
        assert not head.training
        assert (head.bias is not None) == site.has_bias
    new = sum(parameter.numel() for path in fixed for parameter in fixed[path].parameters())
    assert new <= sum(site.num_classes + 1 for site in sites)
    assert sum(id(parameter) in parameters for parameter in model.parameters()) == len(parameters) - sum(
        1 + site.has_bias for site in sites
    )

    classifier = model.get_classifier()
    inside = [m for part in _parts(classifier) for m in part.modules() if isinstance(m, FixedClassifier)]
    assert inside and set(inside) <= set(fixed.values())

    # The backbone, and what it hands to the classifier, are untouched.
    assert _same(model.forward_features(x), features)
    assert _same(model.forward_head(features, pre_logits=True), pre_logits)
    seen: list[Any] = []
    hooks = [head.register_forward_hook(lambda module, args, out: seen.append(out)) for head in inside]
    logits = model(x)
    assert logits.shape == (2, NUM_CLASSES)
    assert logits.isfinite().all()
    assert len(seen) >= len(inside)
    for hook in hooks:
        hook.remove()

    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert not any(isinstance(m, FixedClassifier) for part in _parts(model.get_classifier()) for m in part.modules())


def _parts(classifier: Any) -> tuple[nn.Module, ...]:
    return classifier if isinstance(classifier, tuple) else (classifier,)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models_keep_working(name: str) -> None:
    model, x = _small(f"torchvision/{name}", TORCHVISION[name])
    sites = find_classifiers(model)
    fix_classifier_(model, "auto")
    for site in sites:
        assert isinstance(model.get_submodule(site.path), FixedClassifier)
    assert model.eval()(x).shape == (2, NUM_CLASSES)
    outputs = list(_tensors(model.train()(x)))
    assert [output.shape for output in outputs] == [(2, NUM_CLASSES)] * len(sites)


@pytest.mark.parametrize("name", ["resnet10t", "dla46_c", "levit_128s", "crossvit_9_240"])
def test_gradients_reach_the_backbone_and_every_head(name: str) -> None:
    model, x = _small(f"timm/{name}", TIMM[name])
    fix_classifier_(model, "auto", standardize=True)
    model.train()
    outputs = [output for output in _tensors(model(x)) if output.is_floating_point()]
    sum(output.square().mean() for output in outputs).backward()
    for path, module in model.named_modules():
        if isinstance(module, FixedClassifier):
            assert module.scale.grad is not None, path
            assert module.bias is not None and module.bias.grad is not None, path
            assert module.num_batches_tracked == 1, path
    stem = next(model.parameters())
    assert stem.grad is not None and stem.grad.isfinite().all()


def test_feature_extraction_and_parameter_groups_keep_working() -> None:
    model, x = _small("timm/resnet10t", 64)
    before = model.eval().forward_intermediates(x, intermediates_only=True)
    fix_classifier_(model)
    assert _same(model.forward_intermediates(x, intermediates_only=True), before)
    groups = param_groups_layer_decay(model, weight_decay=0.05)
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal", "auto"])
def test_heads_of_one_width_share_a_codebook(kind: str) -> None:
    model, _ = _small("timm/deit_tiny_distilled_patch16_224", 224)
    fix_classifier_(model, kind, seed=3, match=False)
    assert model.head.spec == model.head_dist.spec
    assert model.head.spec.seed == 3
    assert torch.equal(model.head.codebook(), model.head_dist.codebook())


def test_auto_chooses_for_each_head() -> None:
    model = nn.Module()
    model.fc = nn.Linear(386, 10)  # no Hadamard matrix of this order is known here
    assert fix_classifier_(model, "auto").fc.spec.kind == "orthogonal"
    model.fc = nn.Linear(384, 10)
    assert fix_classifier_(model, "auto").fc.spec.kind == "hadamard"


def test_head_follows_the_layer_it_replaces() -> None:
    model = timm.create_model("resnet10t", num_classes=7).to(torch.bfloat16)
    fix_classifier_(model)
    assert {parameter.dtype for parameter in model.fc.parameters()} == {torch.bfloat16}
    model = build(parse_architecture("resnet10t"), num_classes=7, meta=True)
    assert all(parameter.is_meta for parameter in fix_classifier_(model).fc.parameters())
    assert fix_classifier_(_classifier(8, 4, bias=False), bias=None).fc.bias is None
    assert fix_classifier_(_classifier(8, 4, bias=True), bias=None).fc.bias is not None
    head = fix_classifier_(_classifier(8, 4, bias=False).eval(), alpha=3.5).fc
    assert head.bias is not None
    assert head.scale.item() == 3.5
    assert not head.training


def test_the_bias_of_a_trained_classifier_is_kept_with_its_codes() -> None:
    model = _classifier(64, 7)
    bias = model.fc.bias.detach().clone()
    assert torch.equal(fix_classifier_(model, "hadamard").fc.bias, bias)
    assert not fix_classifier_(_classifier(64, 7), "hadamard", match=False).fc.bias.any()
    assert not fix_classifier_(_classifier(64, 7), "orthogonal").fc.bias.any()


def test_config_and_head_spec() -> None:
    config = HeadConfig(head="binary", bits_per_class=20)
    assert fix_classifier_(_classifier(64, 30), config).fc.spec.bits_per_class == 20
    assert fix_classifier_(_classifier(64, 30), config, seed=5).fc.spec.seed == 5
    assert fix_classifier_(_classifier(64, 30), config).fc.gains is not None
    assert fix_classifier_(_classifier(64, 30), config, gains=False).fc.gains is None
    assert fix_classifier_(_classifier(64, 30), "hadamard", gains=False).fc.gains is None
    model = timm.create_model("resnet10t", num_classes=7)
    spec = HeadSpec("orthogonal", model.num_features, 7, seed=9, standardize=True)
    fix_classifier_(model, spec)
    assert model.get_classifier().spec == spec.resolve()
    with pytest.raises(HeadSpecError, match="seed"):
        fix_classifier_(timm.create_model("resnet10t", num_classes=7), spec, seed=1)


def test_every_kind_is_a_head_of_the_config() -> None:
    assert set(get_args(HeadConfig.model_fields["head"].annotation)) == {"auto", *KINDS}


def test_refusals_leave_the_model_alone() -> None:
    model, _ = _small("timm/crossvit_9_240", 240)
    before = list(model.head)
    with pytest.raises(HeadSpecError, match="128"):
        fix_classifier_(model, HeadSpec("hadamard", 128, NUM_CLASSES))  # fits the first head only
    with pytest.raises(UsageError, match=r"standardise.*standardize"):
        fix_classifier_(model, standardise=True)
    assert list(model.head) == before
    with pytest.raises(NoClassifierError, match="encoder"):
        fix_classifier_(timm.create_model("resnet10t", num_classes=0))
    fix_classifier_(model)
    with pytest.raises(NoClassifierError, match="fixed already"):
        fix_classifier_(model)


def test_replace_module_at_any_depth() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Linear(3, 4))
    new = nn.Identity()
    replace_module(model, "0.1", new)
    assert model[0][1] is new
    replace_module(model, "1", new)
    assert model[1] is new


def _records(model: nn.Module) -> list[HeadRecord]:
    return [
        HeadRecord(site.path, site.layer_type, site.channel_dim, HeadSpec("hadamard", site.num_features, NUM_CLASSES))
        for site in find_classifiers(model)
    ]


@pytest.mark.parametrize("ref", ["timm/crossvit_9_240", "timm/dla46_c", "torchvision/googlenet"])
def test_apply_recorded_heads(ref: str) -> None:
    arch = parse_architecture(ref)
    records = [HeadRecord.from_dict(record.to_dict()) for record in _records(build(arch, num_classes=12, meta=True))]
    model = apply_heads_(build(arch, num_classes=NUM_CLASSES, meta=True), records)
    other = fix_classifier_(build(arch, num_classes=NUM_CLASSES, meta=True), standardize=False)
    assert model.state_dict().keys() == other.state_dict().keys()
    assert [model.get_submodule(r.path).channel_dim for r in records] == [r.channel_dim for r in records]


def test_apply_refuses_what_does_not_fit() -> None:
    model, _ = _small("timm/crossvit_9_240", 240)
    first, second = _records(model)
    before = list(model.head)
    moved = HeadRecord("blocks.0", first.layer_type, first.channel_dim, first.spec)
    with pytest.raises(FormatError, match=r"no classifier at blocks\.0; this model's: head\.0, head\.1"):
        apply_heads_(model, [first, moved])
    swapped = HeadRecord(second.path, first.layer_type, first.channel_dim, first.spec)
    with pytest.raises(FormatError, match=r"recorded for head\.1 does not have the size"):
        apply_heads_(model, [first, swapped])
    turned = HeadRecord(first.path, "Conv2d", 1, first.spec)
    with pytest.raises(FormatError, match="does not have the size"):
        apply_heads_(model, [turned])
    assert list(model.head) == before


@pytest.mark.parametrize(
    "change", [{"path": 1}, {"channel_dim": "1"}, {"spec": []}, {"extra": 1}, {"layer_type": None}]
)
def test_head_record_from_outside(change: dict) -> None:
    values = HeadRecord("fc", "Linear", -1, HeadSpec("hadamard", 8, 4)).to_dict()
    with pytest.raises(FormatError, match="Not a head record"):
        HeadRecord.from_dict(values | change)


@pytest.mark.slow
def test_every_architecture_gives_logits_after_surgery() -> None:
    """On the meta device, where running a network costs only its bookkeeping."""
    failed = []
    for ref in list_architectures():
        arch = parse_architecture(ref)
        try:
            model = build(arch, num_classes=NUM_CLASSES, meta=True).eval()
            sites = find_classifiers(model, arch)
        except (NoClassifierError, TypeError, ValueError, AssertionError, RuntimeError):
            continue  # takes no number of classes: fixify.models.classifiers counts those
        before = sum(parameter.numel() for parameter in model.parameters())
        fix_classifier_(model, "auto")
        after = sum(parameter.numel() for parameter in model.parameters())
        saved = sum(site.num_features * site.num_classes - 1 for site in sites)
        x = torch.empty(1, *preprocessing(arch)["input_size"], device="meta")
        try:
            shape = tuple(model(x).shape)
        except (RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
            shape = (type(error).__name__, str(error)[:80])
        if before - after != saved or shape != (1, NUM_CLASSES):
            failed.append((ref, before - after, saved, shape))
    assert not failed, "\n".join(map(str, failed))


@pytest.mark.parametrize(
    ("ref", "size"),
    [("timm/resnet10t", 64), ("timm/dla46_c", 64), ("timm/deit_tiny_distilled_patch16_224", 224)],
)
@torch.no_grad()
def test_binary_heads_answer_nearly_as_the_old_ones(ref: str, size: int) -> None:
    """A linear layer, a 1x1 convolution, two heads: signs of its own weights, old biases, nothing normalised."""
    model, x = _small(ref, size)
    for site in find_classifiers(model):
        torch.nn.init.normal_(model.get_submodule(site.path).weight, generator=torch.Generator().manual_seed(0))
        model.get_submodule(site.path).bias.normal_(generator=torch.Generator().manual_seed(1))
    old = {site.path: model.get_submodule(site.path) for site in find_classifiers(model)}
    before = model.eval()(x)
    seen = [module.register_forward_pre_hook(lambda module, args: inputs.append(args[0])) for module in old.values()]
    inputs: list[Tensor] = []
    model(x)
    for hook in seen:
        hook.remove()
    fix_classifier_(model, "binary")
    for (path, layer), given in zip(old.items(), inputs, strict=True):
        head = model.get_submodule(path)
        assert head.spec.bits_per_class == head.in_features
        assert not head.spec.normalize and not head.spec.standardize and head.spec.gains
        assert torch.equal(head.bias, layer.bias)
        # Signs of random vectors are at cosine sqrt(2 / pi) = 0.80 with them, and a little less where they heed the
        # direction of the features' mean; N is large enough to be near.
        vectors = layer.weight.reshape(NUM_CLASSES, -1)
        cosines = nn.functional.cosine_similarity(head.codebook(), vectors - vectors.mean(dim=0))
        assert 0.74 < cosines.mean() < 0.81
        some = torch.randn(given.shape, generator=torch.Generator().manual_seed(2))
        difference = (head(some) - layer(some)).transpose(1, -1)  # the mean over classes is free
        assert (difference - difference.mean(dim=-1, keepdim=True)).std() < 0.8 * layer(some).std()
    assert model(x).shape == before.shape
    # What is loaded needs no old weights: codes and gains come with the state dict.
    records = [
        HeadRecord(path, "", model.get_submodule(path).channel_dim, model.get_submodule(path).spec) for path in old
    ]
    again = apply_heads_(_small(ref, size)[0], [HeadRecord.from_dict(record.to_dict()) for record in records])
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model(x))


def _classifier(num_features: int, num_classes: int, **options: Any) -> nn.Module:
    model = nn.Module()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.fc = nn.Linear(num_features, num_classes, **options)
    return model


def _centered(logits: Tensor) -> Tensor:
    return logits - logits.mean(dim=1, keepdim=True)


@torch.no_grad()
def test_features_make_codes_nearer() -> None:
    """More classes than features; features that vary in few directions, away from 0."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator) * torch.logspace(0, -2, 64)[:, None]
    x = torch.randn(500, 64, generator=generator) @ mix + 3
    errors = {}
    for name, kind, options in (
        ("binary", "binary", {}),
        ("seen", "binary", {"features": {"fc": x[:400]}}),
        ("few bits", "binary", {"features": {"fc": x[:400]}, "bits_per_class": 12}),
        ("2 bits", "binary", {"features": {"fc": x[:400]}, "bits_per_weight": 2}),
        ("4 bits", "binary", {"features": {"fc": x[:400]}, "bits_per_weight": 4}),
        ("matched", "hadamard", {"standardize": False, "features": {"fc": x[:400]}}),
        ("in order", "hadamard", {"standardize": False, "match": False}),
    ):
        model = _classifier(64, 100)
        wanted = _centered(model.fc(x[400:]))
        head = fix_classifier_(model, kind, **options).eval().fc
        assert head.spec.standardize == ("center" if name == "seen" or name.endswith("bits") else False), name
        got = _centered(head(x[400:]))
        errors[name] = float(1 - nn.functional.cosine_similarity(got.flatten(), wanted.flatten(), dim=0))
    assert errors["4 bits"] < errors["2 bits"] < errors["seen"] < errors["few bits"] < errors["in order"]
    assert errors["seen"] < 0.5 * errors["binary"]
    assert errors["matched"] < 0.8 * errors["in order"]


def test_matched_by_surgery() -> None:
    model = _classifier(64, 30)
    weight, bias = model.fc.weight.detach(), model.fc.bias.detach()
    head = fix_classifier_(model, "hadamard").fc
    assert head.spec.matched and torch.equal(head.bias, bias)
    cosines = nn.functional.cosine_similarity(head.codebook(), weight - weight.mean(dim=0))
    assert cosines.mean() > 0.2  # in order: 0
    spec = HeadSpec("binary", 64, 30, bits_per_class=20)
    assert fix_classifier_(_classifier(64, 30), spec).fc.codes.shape == (30, 3)


def test_dtype_mode_and_scale_of_binary_heads() -> None:
    model = _classifier(64, 30).to(torch.bfloat16).eval()
    head = fix_classifier_(model, "binary", bits_per_class=20, alpha=2.5).fc
    assert not head.training
    assert {parameter.dtype for parameter in head.parameters()} == {torch.bfloat16}
    assert head.scale.item() == 2.5
    assert head(torch.ones(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert fix_classifier_(_classifier(64, 30, bias=False), "binary", bias=None).fc.bias is None
    with torch.device("meta"):
        empty = fix_classifier_(_classifier(64, 30), "binary")
    filled = empty.to_empty(device="cpu")
    full = fix_classifier_(_classifier(64, 30), "binary")
    filled.load_state_dict(full.state_dict())
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(filled.fc(x), full.fc(x))


@pytest.mark.parametrize(
    ("kind", "options", "error", "said"),
    [
        ("binary", {"bits_per_class": 65}, HeadSpecError, "64.*65"),
        ("binary", {"bits_per_class": 0}, UsageError, "bits_per_class.*1.*0"),
        ("binary", {"bits_per_class": 4}, HeadSpecError, "16.*4.*30"),
        ("hadamard", {"bits_per_class": 8}, UsageError, "bits_per_class.*binary.*hadamard"),
        ("binary", {"match": False}, UsageError, "binary"),
        ("binary", {"features": {"head": torch.ones(9, 64)}}, HeadSpecError, "head.*fc"),
        ("binary", {"features": {"fc": torch.ones(9, 63)}}, HeadSpecError, r"64.*\[9, 63\]"),
        ("identity", {}, HeadSpecError, "30"),
    ],
)
def test_what_surgery_refuses(kind: str, options: dict[str, Any], error: type[FixifyError], said: str) -> None:
    model = _classifier(29 if kind == "identity" else 64, 30)
    with pytest.raises(error, match=said):
        fix_classifier_(model, kind, **options)
    assert isinstance(model.fc, nn.Linear)


def test_features_without_matching_set_mean_and_std_only() -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) + 3
    head = fix_classifier_(_classifier(64, 30), "orthogonal", features={"fc": x}).fc
    assert torch.allclose(head.mean, x.mean(dim=0), atol=1e-5)
    assert not head.bias.any()


def test_refusals_name_the_head() -> None:
    model, _ = _small("timm/crossvit_9_240", 240)
    with pytest.raises(HeadSpecError, match=r"^head\.0: .*128"):
        fix_classifier_(model, "binary", bits_per_class=200)
    torch.nn.init.zeros_(model.head[1].weight)
    with pytest.raises(HeadSpecError, match=r"^head\.1: "):
        fix_classifier_(model, "binary")
    assert all(isinstance(head, nn.Linear) for head in model.head)


def test_the_wide_search_is_nearer_and_gives_up_the_fast_product():
    """With more classes than features, a few blocks keep it."""
    means = []
    for wide_search in (False, True):
        model = nn.Sequential(OrderedDict(fc=nn.Linear(64, 1100)))
        with torch.no_grad():
            model.fc.weight.copy_(torch.randn(1100, 64, generator=torch.Generator().manual_seed(0)))
        weight = model.fc.weight.detach() - model.fc.weight.detach().mean(0)
        fix_classifier_(model, HeadConfig(wide_search=wide_search))
        assert (model.fc.product.table is None) == (not wide_search)
        means.append(float(nn.functional.cosine_similarity(model.fc.codebook(), weight).mean()))
    assert means[1] > 1.1 * means[0] > 0
    for wrong in ({"head": "orthogonal"}, {"match": False}):
        with pytest.raises(UsageError):
            HeadConfig.create(wide_search=True, **wrong)

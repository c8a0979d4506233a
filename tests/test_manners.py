"""A loaded model is an ordinary module: copies, types, averages, several processes, compilation, quantisation."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import ModelEmaV2, ModelEmaV3
from tools.processes import run_together
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fixify
from fixify.checkpoints.slim import write_slim
from fixify.errors import ArchitectureError, CodebookMismatchError, HeadSpecError
from fixify.heads import FixedClassifier, HeadSpec

# More classes than features, so that codes are stored; a network without dropout and batch norm where it trains.
HEADS: dict[str, dict[str, Any]] = {
    "hadamard": {"head": "hadamard"},
    "binary": {"head": "binary"},
    "levels": {"head": "binary", "bits_per_weight": 3},
    "orthogonal": {"head": "orthogonal"},
}
IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def slims(small_pth: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A slim checkpoint of test_efficientnet, 300 classes, for each head."""
    folder = tmp_path_factory.mktemp("manners")
    return {
        name: fixify.convert(small_pth, folder / f"{name}.fixed.safetensors", arch="test_efficientnet", **options).path
        for name, options in HEADS.items()
    }


@pytest.fixture(params=HEADS)
def model(request: pytest.FixtureRequest, slims: dict[str, Path]) -> Any:
    """A loaded model."""
    return fixify.load(slims[request.param])


def answers(model: Any, images: torch.Tensor = IMAGES) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(images)
    return found


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def by_state_dict(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    made.load_state_dict(model.state_dict())
    return made


def by_meta(model: nn.Module) -> nn.Module:
    """What a loader does that builds on the meta device."""
    made = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    made.load_state_dict(model.state_dict())
    return made


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
    "state_dict": by_state_dict,
    "meta": by_meta,
    "share_memory": lambda model: copy.deepcopy(model).share_memory(),
    "exported": lambda model: torch.export.export(copy.deepcopy(model), (IMAGES,)).module(),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_give_the_same_logits(model: Any, how: str) -> None:
    expected = answers(model)  # first, so that what was prepared for evaluation is there to be copied
    made = COPIES[how](model)
    torch.testing.assert_close(answers(made), expected, rtol=1e-5, atol=1e-5)
    if how in ("deepcopy", "pickle", "torch.save"):
        with torch.no_grad():
            made.get_classifier().scale.mul_(2)
        assert not torch.equal(answers(made), expected)
        assert torch.equal(answers(model), expected)
        assert made.fixify_info == model.fixify_info


def test_types_and_back(model: Any) -> None:
    expected = answers(model)
    spread = float(expected.std())
    for dtype, allowed in ((torch.float16, 0.02), (torch.bfloat16, 0.2), (torch.float64, 1e-4)):
        made = copy.deepcopy(model).to(dtype)
        found = answers(made, IMAGES.to(dtype))
        assert found.dtype == dtype
        assert float((found.float() - expected).abs().max()) < allowed * spread
        assert float((answers(made.float()) - expected).abs().max()) < allowed * spread  # the codes lose nothing
        codes = made.get_classifier().codes
        assert codes is None or torch.equal(codes, model.get_classifier().codes)


def test_averages(model: Any) -> None:
    expected = answers(model)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    for foreach in (True, False):
        ema = ModelEmaV3(model, decay=0.5, foreach=foreach)
        assert torch.equal(answers(ema.module), expected)
        ema.update(trained)
        wanted = model.get_classifier().scale + 0.005
        torch.testing.assert_close(ema.module.get_classifier().scale, wanted)
        assert not torch.equal(answers(ema.module), expected)
    for options in ({}, {"use_buffers": True}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}):
        average = AveragedModel(model, **options)
        for _ in range(3):
            average.update_parameters(model)
        torch.testing.assert_close(answers(average.module), expected)
        assert average.module.get_classifier().spec == model.get_classifier().spec


def test_an_average_can_be_saved(model: Any, tmp_path: Path) -> None:
    average = AveragedModel(model)
    average.update_parameters(model)
    fixify.save(average.module, tmp_path / "average.safetensors")
    assert torch.equal(answers(fixify.load(tmp_path / "average.safetensors")), answers(model))


def by_averaged_model(model: Any) -> tuple[Any, Callable[[Any], Any]]:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    return average.module, average.update_parameters


def by_model_ema_v2(model: Any) -> tuple[Any, Callable[[Any], Any]]:
    average = ModelEmaV2(model, decay=0.9)
    return average.module, average.update


AVERAGES = {"AveragedModel": by_averaged_model, "ModelEmaV2": by_model_ema_v2}


@pytest.mark.parametrize("head", ["hadamard", "binary", "levels"])
@pytest.mark.parametrize("how", AVERAGES)
def test_an_average_of_codes_is_noticed(slims: dict[str, Path], tmp_path: Path, head: str, how: str) -> None:
    """Such averages truncate the whole numbers in which codes are stored."""
    model: Any = fixify.load(slims[head])
    expected = answers(model)
    average, update = AVERAGES[how](model)
    for _ in range(5):
        update(model)
    target = tmp_path / "average.safetensors"
    if torch.equal(average.get_classifier().codes, model.get_classifier().codes):
        assert (head, how) == ("hadamard", "ModelEmaV2")  # it averages a copy of the code indices
        fixify.save(average, target)
        torch.testing.assert_close(answers(fixify.load(target)), expected)
        return
    state = average.state_dict()
    average.eval()
    for use in (lambda: fixify.save(average, target), lambda: answers(average)):
        with pytest.raises(CodebookMismatchError) as refused:
            use()
        assert "use_buffers=False" in (refused.value.hint or "") and "ModelEmaV3" in (refused.value.hint or "")
    assert not target.exists()
    # Another program may write it.
    info = fixify.inspect(slims[head])
    write_slim(target, state, info)
    other: Any = fixify.load(slims[head])
    for read in (lambda: fixify.load(target), lambda: other.load_state_dict(state)):
        with pytest.raises(fixify.FixifyError) as refused:
            read()
        assert "use_buffers=False" in (refused.value.hint or "")
    # What the hint says mends it.
    whole = {key: tensor for key, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    average.load_state_dict(whole, strict=False)
    torch.testing.assert_close(answers(average), expected, rtol=1e-4, atol=1e-4)
    fixify.save(average, target, force=True)
    torch.testing.assert_close(answers(fixify.load(target)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["hadamard", "binary", "levels"])
@pytest.mark.parametrize("strict", [True, False])
def test_codes_of_another_head_are_refused_before_they_are_loaded(
    slims: dict[str, Path], name: str, strict: bool
) -> None:
    model: Any = fixify.load(slims[name])
    head = model.get_classifier()
    expected = answers(model)
    state = head.state_dict()
    state["codes"] = torch.from_numpy(state["codes"].numpy()[::-1].copy())
    with pytest.raises(CodebookMismatchError):
        head.load_state_dict(state, strict=strict)
    assert torch.equal(answers(model), expected)
    head.check_codes()


@pytest.mark.slow
def test_compiled(model: Any) -> None:
    torch.compiler.reset()
    expected = answers(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(answers(compiled), expected, rtol=1e-4, atol=1e-4)
    model.train()
    compiled(IMAGES).square().mean().backward()
    assert model.get_classifier().scale.grad.item() != 0
    torch.compiler.reset()


@pytest.mark.filterwarnings(
    "ignore:.*torch.ao.quantization.*:DeprecationWarning",
    "ignore:.*quant:UserWarning",
    "ignore:.*reduce_range:UserWarning",
)
def test_a_quantised_backbone(tmp_path: Path) -> None:
    from torch.ao.quantization import quantize_dynamic

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = timm.create_model("test_vit", num_classes=30)
    fixify.fix_classifier_(model, "binary").eval()
    images = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    expected = answers(model, images)
    small: Any = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kinds = {type(module).__module__ for module in small.blocks.modules()}
    assert any("quantized" in kind for kind in kinds)
    assert isinstance(small.get_classifier(), FixedClassifier)
    found = answers(small, images)
    assert not torch.equal(found, expected)
    assert float((found - expected).abs().max()) < 0.2 * float(expected.std())
    with pytest.raises(ArchitectureError, match="quantised"):
        fixify.save(small, tmp_path / "small.safetensors")
    # Loaded, then quantised.
    again: Any = quantize_dynamic(
        fixify.load(fixify.save(model, tmp_path / "net.safetensors")), {nn.Linear}, dtype=torch.qint8
    )
    torch.testing.assert_close(answers(again, images), found)
    with pytest.raises(ArchitectureError, match="quantised"):
        fixify.save(again, tmp_path / "small.safetensors")


def test_back_to_a_learned_head(model: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        features = model.forward_features(IMAGES)
    model.reset_classifier(7)
    assert type(model.get_classifier()) is nn.Linear
    assert model(IMAGES).shape == (4, 7) and model.num_classes == 7
    assert torch.equal(model.forward_features(IMAGES), features)
    with pytest.raises(fixify.FixifyError, match="no fixed head"):
        fixify.save(model, tmp_path / "learned.safetensors")
    fixify.fix_classifier_(model, "hadamard")
    fixify.save(model, tmp_path / "fixed.safetensors")
    assert answers(fixify.load(tmp_path / "fixed.safetensors")).shape == (4, 7)


# Several processes.


def small(head: str) -> Any:
    """A network without batch norm and dropout, with more classes than features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Any = timm.create_model("test_vit", num_classes=100, img_size=32, patch_size=8)
    spec: Any = head
    if head == "levels":
        spec = HeadSpec("binary", made.num_features, 100, bits_per_weight=3, gains=True)
    fixify.fix_classifier_(made, spec)
    return made.train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 32, 32, generator=drawn), torch.randint(100, (8,), generator=drawn)


def train(model: Any, whole: Any, part: slice) -> list[torch.Tensor]:
    """Two steps of SGD, then the logits of all images in eval mode."""
    optimiser = torch.optim.SGD(whole.parameters(), lr=0.1)
    images, labels = batch()
    for _ in range(2):
        optimiser.zero_grad()
        F.cross_entropy(model(images[part]), labels[part]).backward()
        optimiser.step()
    whole.eval()
    found = [answers(model, images)]
    optimiser.zero_grad()
    F.cross_entropy(model(images[part]), labels[part]).backward()
    optimiser.step()  # in eval mode: what was prepared before must not be used again
    return [*found, answers(model, images)]


def one_process(rank: int, size: int, folder: Path, how: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    part = slice(rank * 8 // size, (rank + 1) * 8 // size)
    found = {}
    for head in HEADS:
        whole = small(head)
        whole.get_classifier().synchronized = True  # so that the running statistics are those of one process
        if how == "ddp":
            outputs = train(DistributedDataParallel(whole), whole, part)
            state = whole.state_dict()
        else:
            whole.get_classifier().shardable_()
            for block in whole.blocks:
                fully_shard(block)
            fully_shard(whole)
            outputs = train(whole, whole, part)
            state = get_model_state_dict(whole, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        found[head] = (outputs, state)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_processes_do_what_one_does(tmp_path: Path, how: str) -> None:
    run_together(__file__, [(rank, 2, tmp_path, how) for rank in range(2)])
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for head in HEADS:
        alone = small(head)
        expected = train(alone, alone, slice(None))
        for outputs, wanted in zip(first[head][0], expected, strict=True):
            torch.testing.assert_close(outputs, wanted, rtol=1e-3, atol=1e-4)
        for one, other in zip(first[head][0], second[head][0], strict=True):
            assert torch.equal(one, other)
        again = small(head).eval()
        again.load_state_dict(first[head][1])  # the weights of all processes, in a whole model
        torch.testing.assert_close(answers(again, batch()[0]), expected[1], rtol=1e-3, atol=1e-4)


def test_a_shardable_head() -> None:
    head, plain = (FixedClassifier(HeadSpec("hadamard", 32, 20, standardize=True)) for _ in range(2))
    assert head.shardable_().scale.shape == (1,)
    x, y = torch.randn(5, 32), torch.arange(5)
    for made in (head, plain):
        made.loss(x, y).backward()
    torch.testing.assert_close(head.scale.grad, plain.scale.grad.reshape(1))
    assert head.state_dict()["scale"].shape == ()
    with torch.no_grad():
        plain.scale.fill_(3.0)
    head.load_state_dict(plain.state_dict())
    plain.load_state_dict({**head.state_dict(), "scale": torch.tensor([3.0])})
    torch.testing.assert_close(answers(head.eval(), x), answers(plain.eval(), x))
    assert head.scale.item() == 3.0
    fixed = FixedClassifier(HeadSpec("hadamard", 32, 20, fixed_scale=True)).shardable_()
    assert fixed.scale.shape == () and isinstance(pickle.loads(pickle.dumps(head)), FixedClassifier)


def test_a_head_of_the_published_code_is_not_shardable() -> None:
    from fixify.heads import REFERENCE_CONSTRUCTION

    spec = HeadSpec("hadamard", 32, 20, construction=REFERENCE_CONSTRUCTION)
    with pytest.raises(HeadSpecError):
        FixedClassifier(spec).shardable_()


if __name__ == "__main__":  # a process of `test_processes_do_what_one_does`
    one_process(*globals()["GIVEN"])

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from fixify.errors import UsageError
from fixify.heads import FixedClassifier
from fixify.surgery import fix_classifier_
from fixify.training import FinetuneOptions
from fixify.training.optimisers import base_rate, clip_gradients, make_optimiser, make_schedule, parameter_groups


def rates(options: FinetuneOptions, updates_per_epoch: int) -> list[float]:
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=options.lr)
    schedule = make_schedule(optimiser, options, updates_per_epoch)
    found = []
    for update in range(options.epochs * updates_per_epoch):
        found.append(optimiser.param_groups[0]["lr"])
        schedule.step_update(update + 1)
    return found


class TestGroups:
    def test_every_parameter_once_and_vectors_without_decay(self, new_model: Callable[..., nn.Module]) -> None:
        model = new_model()
        decayed, plain, head = parameter_groups(model, FinetuneOptions.create(weight_decay=0.1, head_lr_scale=3))
        assert (decayed["weight_decay"], plain["weight_decay"], head["weight_decay"]) == (0.1, 0, 0)
        assert all(parameter.ndim > 1 for parameter in decayed["params"])
        assert all(parameter.ndim <= 1 for parameter in plain["params"])
        everything = [id(p) for group in (decayed, plain, head) for p in group["params"]]
        assert sorted(everything) == sorted(id(p) for p in model.parameters())

    def test_the_fixed_heads_scale_and_bias_have_their_own_rate(self, new_model: Callable[..., nn.Module]) -> None:
        model = new_model()
        head = next(m for m in model.modules() if isinstance(m, FixedClassifier))
        options = FinetuneOptions.create(head_lr_scale=3, lr=0.5, warmup_epochs=0)
        optimiser = make_optimiser(model, options)
        make_schedule(optimiser, options, 10)
        *others, last = optimiser.param_groups
        assert {id(p) for p in last["params"]} == {id(head.scale), id(head.bias)}
        assert last["lr"] == pytest.approx(1.5)
        assert [group["lr"] for group in others] == [0.5, 0.5]

    def test_frozen_parameters_are_left_out(self, new_model: Callable[..., nn.Module]) -> None:
        model = new_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("fc.")
        (only,) = parameter_groups(model, FinetuneOptions.create())
        assert len(only["params"]) == 2

    def test_layer_decay_is_timms_and_the_fixed_head_keeps_its_multiple(self) -> None:
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=32, num_heads=2)
        theirs = {
            id(parameter): (group["lr_scale"], group["weight_decay"])
            for group in param_groups_layer_decay(
                model, weight_decay=0.1, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()
            )
            for parameter in group["params"]
        }
        options = FinetuneOptions.create(layer_decay=0.5, weight_decay=0.1, head_lr_scale=3, lr=0.8, warmup_epochs=0)
        ours = {
            id(parameter): (group["lr_scale"], group["weight_decay"])
            for group in parameter_groups(model, options)
            for parameter in group["params"]
        }
        assert ours == theirs
        assert len({scale for scale, _ in ours.values()}) == 5  # stem, three blocks, head
        fix_classifier_(model, "hadamard")
        optimiser = make_optimiser(model, options)
        make_schedule(optimiser, options, 10)
        rates = {id(parameter): group["lr"] for group in optimiser.param_groups for parameter in group["params"]}
        assert rates[id(model.head.scale)] == rates[id(model.head.bias)] == pytest.approx(3 * 0.8)
        assert rates[id(model.blocks[2].mlp.fc1.weight)] == pytest.approx(0.5 * 0.8)
        assert rates[id(model.patch_embed.proj.weight)] == pytest.approx(0.5**4 * 0.8)
        assert base_rate(optimiser) == pytest.approx(0.8)

    def test_a_model_without_layers_cannot_decay_them(self, new_model: Callable[..., nn.Module]) -> None:
        with pytest.raises(UsageError, match=r"Small .*group_matcher"):
            make_optimiser(new_model(), FinetuneOptions.create(layer_decay=0.7))

    def test_part_of_a_model_has_the_rates_that_it_has_in_the_whole(self) -> None:
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=32, num_heads=2)
        options = FinetuneOptions.create(layer_decay=0.5)
        groups = parameter_groups(model, options, part=model.blocks[1])
        assert {group["lr_scale"] for group in groups} == {0.25}
        own = {id(parameter) for parameter in model.blocks[1].parameters()}
        assert {id(parameter) for group in groups for parameter in group["params"]} == own

    def test_sgd_is_nesterov_and_other_optimisers_are_timms(self, new_model: Callable[..., nn.Module]) -> None:
        sgd = make_optimiser(new_model(), FinetuneOptions.create(momentum=0.8))
        assert (sgd.defaults["nesterov"], sgd.defaults["momentum"]) == (True, 0.8)
        adamw = make_optimiser(new_model(), FinetuneOptions.create(opt="adamw", lr=1e-3))
        assert isinstance(adamw, torch.optim.AdamW)


class TestClipping:
    def gradients(self, model: nn.Module, **given: object) -> dict[str, torch.Tensor]:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 2.0)
        clip_gradients(model, FinetuneOptions.create(**given))
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]

    def test_modes(self, new_model: Callable[..., nn.Module]) -> None:
        model = new_model()
        assert all((grad == 2).all() for grad in self.gradients(model).values())
        norm = self.gradients(model, clip_grad=1.0)
        assert torch.cat([grad.flatten() for grad in norm.values()]).norm() == pytest.approx(1, abs=1e-4)
        assert all((grad == 0.5).all() for grad in self.gradients(model, clip_grad=0.5, clip_mode="value").values())
        adaptive = self.gradients(model, clip_grad=0.1, clip_mode="agc")
        weights = dict(model.named_parameters())
        for name, grad in adaptive.items():
            if name.startswith("fc."):
                assert (grad == 2).all()
            elif grad.ndim > 1:
                norms, limits = (t.flatten(1).norm(dim=1) for t in (grad, weights[name]))
                assert (norms <= 0.1 * limits + 1e-4).all()


class TestSchedule:
    def test_warmup_then_cosine_to_the_end(self) -> None:
        options = FinetuneOptions.create(epochs=4, lr=0.1, warmup_epochs=0.5, warmup_lr=0.0, min_lr=0.001)
        found = rates(options, 10)
        assert found[:6] == pytest.approx([0, 0.02, 0.04, 0.06, 0.08, 0.099 * (1 + math.cos(math.pi / 8)) / 2 + 0.001])
        assert found[20] == pytest.approx((0.1 + 0.001) / 2)
        assert 0.001 < found[-1] < 0.002

    def test_linear_step_and_constant(self) -> None:
        plain = {"epochs": 4, "lr": 1.0, "warmup_epochs": 0.0}
        assert rates(FinetuneOptions.create(sched="linear", **plain), 2) == pytest.approx([1 - i / 8 for i in range(8)])
        step = rates(FinetuneOptions.create(sched="step", decay_epochs=2, decay_rate=0.1, **plain), 2)
        assert step == pytest.approx([1.0] * 4 + [0.1] * 4)
        assert rates(FinetuneOptions.create(sched="constant", **plain), 2) == [1.0] * 8

    def test_milestones_are_epochs_after_which_the_rate_decays(self) -> None:
        plain = {"epochs": 4, "lr": 1.0, "warmup_epochs": 0.0, "sched": "multistep"}
        found = rates(FinetuneOptions.create(decay_milestones=(1, 2.5), **plain), 4)
        assert found == pytest.approx([1.0] * 4 + [0.1] * 6 + [0.01] * 6)
        warm = FinetuneOptions.create(**{**plain, "warmup_epochs": 0.5, "warmup_lr": 0.0}, decay_milestones=(1,))
        assert rates(warm, 4) == pytest.approx([0, 0.5, 1.0, 1.0] + [0.1] * 12)
        # He et al. (2016): 64,000 updates of 128 images, decays after 32,000 and 48,000, to the next whole epoch.
        he = FinetuneOptions.create(**{**plain, "epochs": 164, "lr": 0.1}, decay_milestones=(82, 123))
        found = rates(he, 390)
        assert [update for update in range(1, len(found)) if found[update] < found[update - 1]] == [31_980, 47_970]
        with pytest.raises(UsageError, match="decay_milestones"):
            FinetuneOptions.create(sched="multistep")
        with pytest.raises(UsageError, match=r"decay_milestones .*3 2"):
            FinetuneOptions.create(sched="multistep", decay_milestones=(3, 2))

    def test_part_of_a_short_epoch_is_at_least_one_step(self) -> None:
        found = rates(FinetuneOptions.create(epochs=2, lr=1.0, warmup_epochs=0.1, warmup_lr=0.0), 3)
        assert found[0] == 0 and found[1] > 0.9

"""Learning rates, parameter groups, optimizers and the average."""

import math
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from deitkit.errors import RecipeError
from deitkit.models.classifier import Classifier
from deitkit.models.vit import DeiT
from deitkit.recipe.schema import BaselineRecipe, OptimizerRecipe, TrainRecipe
from deitkit.training.optim import (
    ExponentialMovingAverage,
    adopt_layout,
    build_optimizers,
    learning_rate,
    parameter_groups,
)


def small_deit(**more: Any) -> DeiT:
    tokens = ("class", "distillation")
    return DeiT(image_px=8, patch_px=4, channels=1, classes=3, width=16, depth=2, heads=2, tokens=tokens, **more)


def test_learning_rate_warms_up_then_falls_as_a_cosine_to_its_floor() -> None:
    train = TrainRecipe(epochs=10, learning_rate=1.0, warmup_epochs=2, warmup_learning_rate=0.1, min_learning_rate=0.05)
    rates = [learning_rate(step, 5, train, train) for step in range(51)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(1.0)
    assert rates[30] == pytest.approx(0.05 + 0.95 * 0.5)
    assert rates[50] == pytest.approx(0.05)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_learning_rate_is_torchs_cosine() -> None:
    train = TrainRecipe(epochs=3, learning_rate=0.3, min_learning_rate=0.01)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12, eta_min=0.01)
    for step in range(12):
        assert learning_rate(step, 4, train, train) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("batch_size", "peak"), [(256, 2.5e-4), (512, 5e-4), (1024, 1e-3)])
def test_the_papers_rate_follows_the_batch_and_its_floors_do_not(batch_size: int, peak: float) -> None:
    floors = {"warmup_epochs": 5, "warmup_learning_rate": 1e-6, "min_learning_rate": 1e-5}
    train = TrainRecipe(epochs=300, batch_size=batch_size, learning_rate=5e-4, learning_rate_per=512, **floors)
    rates = [learning_rate(step, 10, train, train) for step in (0, 25, 50, 3000)]
    assert rates == pytest.approx([1e-6, (peak + 1e-6) / 2, peak, 1e-5])
    # A baseline has a rate of its own, for the images of the same step.
    baseline = BaselineRecipe(learning_rate=0.1, learning_rate_per=128, warmup_epochs=0)
    assert learning_rate(0, 10, baseline, train) == pytest.approx(0.1 * batch_size / 128)


def test_a_schedule_laid_out_for_more_epochs_is_cut_off() -> None:
    train = TrainRecipe(epochs=20, schedule_epochs=50, learning_rate=1.0)
    assert learning_rate(20, 1, train, train) == pytest.approx((1 + math.cos(math.pi * 0.4)) / 2)


def test_no_decay_on_biases_norms_tokens_and_positions() -> None:
    model = small_deit()
    decayed, kept = parameter_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    exempt = {names[id(parameter)] for parameter in kept["params"]}
    assert {"cls_token", "dist_token", "pos_embed", "norm.weight", "head.bias", "blocks.0.attn.qkv.bias"} <= exempt
    assert {names[id(parameter)] for parameter in decayed["params"]} == {
        name for name in names.values() if name.endswith("weight") and "norm" not in name
    }


@pytest.mark.parametrize(
    "name",
    ["timm/deit_tiny_distilled_patch16_224", "timm/swin_tiny_patch4_window7_224", "timm/convnext_tiny",
     "torchvision/vit_b_16", "torchvision/swin_t", "torchvision/convnext_tiny"],
)  # fmt: skip
def test_of_other_libraries_too_only_matrices_and_kernels_decay(name: str) -> None:
    library, _, architecture = name.partition("/")
    with torch.device("meta"):
        model = timm.create_model(architecture) if library == "timm" else torchvision.models.get_model(architecture)
    decayed, _ = parameter_groups(model, 0.05)
    found = [place for place, one in model.named_parameters() if any(one is other for other in decayed["params"])]
    assert len(found) > 40
    assert all(place.endswith("weight") for place in found)


def test_layer_scales_do_not_decay_and_a_stem_of_convolutions_is_not_for_muon() -> None:
    model = small_deit(layer_scale=0.1, stem="conv")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = build_optimizers(model, OptimizerRecipe(optimizer="muon", weight_decay=0.05))
    decays = {
        names[id(parameter)]: group["weight_decay"] for group in adamw.param_groups for parameter in group["params"]
    }
    gammas = {f"blocks.{block}.{scale}.gamma" for block in range(2) for scale in ("ls1", "ls2")}
    assert {name for name, decay in decays.items() if decay == 0} >= gammas
    kernels = {name for name in names.values() if name.startswith("patch_embed") and model.get_parameter(name).ndim > 1}
    assert len(kernels) == 3
    assert {name for name, decay in decays.items() if decay == 0.05} == kernels | {"head.weight", "head_dist.weight"}
    assert len(muon.param_groups[0]["params"]) == 2 * 4


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "lamb"])
@pytest.mark.parametrize("more", [{}, {"layer_scale": 0.1, "stem": "conv"}])
def test_every_parameter_is_updated_once(optimizer: str, more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = small_deit(**more)
    optimizers = build_optimizers(model, OptimizerRecipe(optimizer=optimizer, learning_rate=0.01))
    held = [id(p) for opt in optimizers for group in opt.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    output = model(torch.randn(4, 1, 8, 8))
    (output.class_logits.square().sum() + output.distillation_logits.square().sum()).backward()
    for opt in optimizers:
        opt.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert all(moved)


def test_lamb_is_the_published_algorithm() -> None:
    torch.manual_seed(0)
    model = small_deit().double()
    trained, _ = parameter_groups(model, 0.1)
    decayed = {id(parameter) for parameter in trained["params"]}
    parameters = list(model.parameters())
    recipe = OptimizerRecipe(optimizer="lamb", learning_rate=0.02, weight_decay=0.1)
    (optimizer,) = build_optimizers(model, recipe)
    expected = [parameter.detach().clone() for parameter in parameters]
    first, second = ([torch.zeros_like(value) for value in expected] for _ in range(2))
    for step in range(1, 4):
        for index, parameter in enumerate(parameters):
            parameter.grad = gradient = torch.randn_like(parameter) * 10
            # You et al. 2020, algorithm 2; a layer without weight decay is not scaled, as in NVIDIA's variant.
            first[index] = 0.9 * first[index] + 0.1 * gradient
            second[index] = 0.999 * second[index] + 0.001 * gradient**2
            update = first[index] / (1 - 0.9**step) / ((second[index] / (1 - 0.999**step)).sqrt() + 1e-6)
            if id(parameter) in decayed:
                update += 0.1 * expected[index]
                update *= expected[index].norm() / update.norm()
            expected[index] = expected[index] - 0.02 * update
        optimizer.step()
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_muon_is_refused_for_a_cnn() -> None:
    with pytest.raises(RecipeError, match="muon trains the students only"):
        build_optimizers(nn.Conv2d(1, 1, 1), OptimizerRecipe(optimizer="muon"))


def test_average_follows_by_its_decay_and_copies_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    classifier = Classifier(model, mean=(0.0,), std=(1.0,))
    average = ExponentialMovingAverage(classifier, 0.5)
    expected = model[0].weight.detach().clone()
    for update in range(5):
        with torch.no_grad():
            model[0].weight += 1.0
            model[1].running_mean += 2.0
        average.update(classifier)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    assert torch.allclose(average.classifier.model[0].weight, expected)
    assert torch.equal(average.classifier.model[1].running_mean, model[1].running_mean)


def test_a_state_that_comes_from_a_file_is_laid_out_as_the_weights() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    momentum = optimizer.state[weight]["momentum_buffer"].clone()
    optimizer.state[weight]["momentum_buffer"] = momentum.contiguous()
    adopt_layout(optimizer)
    loaded = optimizer.state[weight]["momentum_buffer"]
    assert torch.equal(loaded, momentum)
    assert loaded.stride() == weight.stride()


def test_a_warm_up_never_begins_above_the_peak() -> None:
    """A teacher's begins at 1e-3, which is ten times the usual peak of fine-tuning."""
    train = TrainRecipe(epochs=10, learning_rate=1e-4, warmup_epochs=2, warmup_learning_rate=1e-3)
    rates = [learning_rate(step, 5, train, train) for step in range(50)]
    assert max(rates) == pytest.approx(1e-4)
    assert rates[:11] == pytest.approx([1e-4] * 11)


def test_average_is_that_of_a_walk_through_the_modules_to_the_bit() -> None:
    """Also when a module puts another tensor in its buffer's place, or another module takes its place."""
    torch.manual_seed(0)

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sum", torch.zeros(2))
            self.register_buffer("nothing", None)

    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), Counter())
    classifier = Classifier(model, mean=(0.0,), std=(1.0,))
    average, walked = (ExponentialMovingAverage(classifier, 0.9) for _ in range(2))
    for update in range(6):
        if update == 4:
            model[1] = nn.BatchNorm1d(2)  # as SyncBatchNorm for BatchNorm
            average.forget()
        with torch.no_grad():
            for parameter in classifier.parameters():
                parameter += torch.randn_like(parameter)
        model[1](torch.randn(5, 2))
        model[2].sum = model[2].sum + 1.0
        average.update(classifier)
        decay = min(0.9, (1 + update) / (10 + update))
        with torch.no_grad():
            for shadow, weight in zip(walked.classifier.parameters(), classifier.parameters(), strict=True):
                shadow.lerp_(weight, 1 - decay)
            for shadow, buffer in zip(walked.classifier.buffers(), classifier.buffers(), strict=True):
                shadow.copy_(buffer)
        expected, found = walked.classifier.state_dict(), average.classifier.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert int(average.classifier.model[1].num_batches_tracked) == 2
    assert torch.equal(average.classifier.model[2].sum, torch.full((2,), 6.0))

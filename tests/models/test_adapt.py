"""Weights made to fit another resolution, patch, channel count, token layout and class count."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from deitkit.errors import CheckpointError
from deitkit.models.vit import DeiT
from deitkit.models.weights.adapt import adapt, renormalise
from deitkit.models.weights.formats import Architecture

LAYOUTS = [("class",), ("distillation",), ("class", "distillation"), ()]
BASE = Architecture(
    image_px=(16, 16), patch_px=4, channels=3, classes=5, width=16, depth=2, heads=2, tokens=("class", "distillation")
)


def model(**changes: Any) -> DeiT:
    """Build a model with random values everywhere, always the same."""
    torch.manual_seed(0)
    built = replace(BASE, **changes).build().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.3)
    return built


def fitted(source: DeiT, **changes: Any) -> tuple[DeiT, list[str]]:
    target = replace(Architecture.of(source), **changes)
    state, lines = adapt(source.state_dict(), to=target)
    built = target.build().eval()
    built.load_state_dict(state, strict=True)
    return built, lines


def smooth_positions(rows: int, columns: int, width: int) -> Tensor:
    """Return position embeddings as trained ones are: smooth over the grid, longer than their differences."""
    y, x = torch.meshgrid(torch.linspace(0, 1, rows), torch.linspace(0, 1, columns), indexing="ij")
    waves = torch.arange(1, width + 1).view(1, 1, -1) / width
    return (torch.cos(3 * waves * x[..., None]) + torch.sin(4 * waves * y[..., None])).view(1, rows * columns, width)


def test_weights_that_fit_stay_as_they_are() -> None:
    state = model().state_dict()
    same, lines = adapt(state, to=BASE)
    assert lines == []
    assert same.keys() == state.keys()
    assert all(torch.equal(same[name], state[name]) for name in state)


@pytest.mark.parametrize("tokens", [("class",), ("class", "distillation")])
@pytest.mark.parametrize(("image_px", "patch_px"), [(24, 4), (8, 4), (32, 8), (40, 8), (16, 2)])
def test_resolution_and_patch_equal_what_timm_makes_of_a_checkpoint(
    tokens: tuple[str, ...], image_px: int, patch_px: int
) -> None:
    source = model(tokens=tokens)
    ours, _ = fitted(source, image_px=(image_px, image_px), patch_px=patch_px)
    name = "deit_tiny_distilled_patch16_224" if len(tokens) == 2 else "vit_tiny_patch16_224"
    theirs = timm.create_model(
        name, img_size=image_px, patch_size=patch_px, num_classes=5, embed_dim=16, depth=2, num_heads=2
    ).eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(source.state_dict()), theirs), strict=True)
    images = torch.randn(3, 3, image_px, image_px)
    output = ours(images)
    heads = [head for head in (output.class_logits, output.distillation_logits) if head is not None]
    torch.testing.assert_close(torch.stack(heads).mean(dim=0), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(6, 6), (3, 3), (4, 4)])
def test_positions_of_patches_are_resampled_and_those_of_tokens_stay(grid: tuple[int, int]) -> None:
    state = model(image_px=(16, 16)).state_dict()
    prefix, rows = state["pos_embed"][:, :2], smooth_positions(4, 6, 16)  # of images of 16 x 24 px
    state["pos_embed"] = torch.cat([prefix, rows], dim=1)
    to = replace(BASE, image_px=(4 * grid[0], 4 * grid[1]))
    positions = adapt(state, to=to, image_px=(16, 24))[0]["pos_embed"]
    assert torch.equal(positions[:, :2], prefix)
    plane = rows.view(4, 6, 16).permute(2, 0, 1)[None]
    expected = F.interpolate(plane, size=grid, mode="bicubic", antialias=True)[0].permute(1, 2, 0).reshape(1, -1, 16)
    torch.testing.assert_close(positions[:, 2:], expected)


def test_the_norm_of_positions_is_kept_and_told() -> None:
    source = model(image_px=(56, 56))
    rows = smooth_positions(14, 14, 16)
    with torch.no_grad():
        source.pos_embed[:, 2:] = rows
    larger, lines = fitted(source, image_px=(96, 96))
    norm = larger.pos_embed[:, 2:].norm(dim=-1).mean()
    torch.testing.assert_close(norm, rows.norm(dim=-1).mean(), rtol=0.01, atol=0)
    (line,) = lines
    assert line.startswith("resolution: 56 x 56 -> 96 x 96 px; position embeddings 14 x 14 -> 24 x 24, bicubic")
    assert line.endswith(f"mean norm {rows.norm(dim=-1).mean():.3g} -> {norm:.3g}")


def test_a_larger_kernel_answers_to_larger_patches_as_before() -> None:
    source = model()
    larger, lines = fitted(source, image_px=(32, 32), patch_px=8)
    patch = torch.randn(7, 3, 4, 4)
    resized = F.interpolate(patch, size=(8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(larger.patch_embed(resized), source.patch_embed(patch), rtol=1e-4, atol=1e-4)
    assert lines == [
        "patch: 4 -> 8 px; the kernel is resized by the pseudo-inverse (FlexiViT)",
        "resolution: 16 x 16 -> 32 x 32 px; 4 x 4 patches as before",
    ]
    assert torch.equal(larger.pos_embed, source.pos_embed)


def test_a_grey_image_is_seen_as_before_with_other_channels() -> None:
    grey = torch.randn(3, 1, 16, 16)
    colour, single = model(), model(channels=1)
    fewer, lines = fitted(colour, channels=1)
    assert lines == ["channels: 3 -> 1; the patch kernel is summed over colours"]
    torch.testing.assert_close(fewer.patch_embed(grey), colour.patch_embed(grey.expand(-1, 3, -1, -1)))
    assert torch.equal(fewer.patch_embed.proj.weight, timm.models.adapt_input_conv(1, colour.patch_embed.proj.weight))
    more, lines = fitted(single, channels=3)
    assert lines == ["channels: 1 -> 3; the patch kernel is shared among colours"]
    torch.testing.assert_close(more.patch_embed(grey.expand(-1, 3, -1, -1)), single.patch_embed(grey))


@pytest.mark.parametrize(("old", "new"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_every_token_layout_can_start_from_every_other(old: tuple[str, ...], new: tuple[str, ...]) -> None:
    source = model(tokens=old)
    built, lines = fitted(source, tokens=new)
    assert len(lines) == (old != new)
    assert torch.equal(built.pos_embed[:, len(new) :], source.pos_embed[:, len(old) :])
    names = {"class": ("cls_token", "head"), "distillation": ("dist_token", "head_dist")}
    for index, token in enumerate(new):
        donor = token if token in old else (*old, None)[0]
        value, position = getattr(built, names[token][0]), built.pos_embed[:, index]
        if donor is None:
            assert not value.any()
            assert not position.any()
            continue
        assert torch.equal(value, getattr(source, names[donor][0]))
        assert torch.equal(position, source.pos_embed[:, old.index(donor)])
        assert torch.equal(getattr(built, names[token][1]).weight, getattr(source, names[donor][1]).weight)


def test_a_plain_checkpoint_seeds_both_heads_of_a_distilled_student() -> None:
    built, lines = fitted(model(tokens=("class",)), tokens=("class", "distillation"))
    output = built(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(output.class_logits, output.distillation_logits)
    assert lines == [
        "tokens: class -> class+distillation; distillation token and head start as copies of the class token's"
    ]


def test_a_distilled_checkpoint_gives_up_its_distillation_token() -> None:
    _, lines = fitted(model(), tokens=("class",))
    assert lines == ["tokens: class+distillation -> class; the distillation token is dropped"]


def test_a_classifier_of_other_classes_starts_at_zero() -> None:
    built, lines = fitted(model(), classes=7)
    output = built(torch.randn(2, 3, 16, 16))
    assert not output.class_logits.any()
    assert output.distillation_logits.shape == (2, 7)
    assert lines == ["classes: 5 -> 7; the classifier starts at zero"]


def test_a_backbone_without_classifier_gets_one() -> None:
    state = {name: value for name, value in model().state_dict().items() if not name.startswith("head")}
    changed, lines = adapt(state, to=BASE)
    BASE.build().load_state_dict(changed, strict=True)
    assert lines == ["classes: no classifier -> 5; the classifier starts at zero"]


def test_all_at_once_each_in_a_line() -> None:
    built, lines = fitted(
        model(tokens=("class",)), image_px=(24, 24), patch_px=2, channels=1, classes=3, tokens=("class", "distillation")
    )
    assert [line.partition(":")[0] for line in lines] == ["channels", "patch", "resolution", "tokens", "classes"]
    assert built(torch.randn(1, 1, 24, 24)).class_logits.shape == (1, 3)


@pytest.mark.parametrize(("channels", "new"), [(3, 3), (3, 1), (1, 3), (1, 1)])
def test_another_normalisation_is_taken_up_by_the_patch_embedding(channels: int, new: int) -> None:
    source = model(channels=channels)
    old_stats = ((0.5, 0.4, 0.3)[:channels], (0.2, 0.25, 0.3)[:channels])
    new_stats = ((0.1, 0.2, 0.6)[:new], (0.5, 0.4, 0.35)[:new])
    state, lines = renormalise(source.state_dict(), old_stats, new_stats)
    state, _ = adapt(state, to=replace(Architecture.of(source), channels=new))
    built = replace(Architecture.of(source), channels=new).build().eval()
    built.load_state_dict(state)
    view = torch.rand(3, 3 if channels == new == 3 else 1, 16, 16)

    def normalised(stats: Any, count: int) -> Tensor:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in stats)
        return (view.expand(-1, count, -1, -1) - mean) / std

    expected = source(normalised(old_stats, channels)).class_logits
    torch.testing.assert_close(built(normalised(new_stats, new)).class_logits, expected, rtol=1e-4, atol=1e-4)
    assert len(lines) == 1
    assert renormalise(state, new_stats, new_stats)[1] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 32}, "is 16 wide and has 2 blocks, the student 32 and 2: set model.width=16 model.depth=2"),
        ({"depth": 3}, "is 16 wide and has 2 blocks, the student 16 and 3"),
        ({"channels": 2}, "3 channels cannot be adapted to 2"),
    ],
)
def test_other_sizes_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        adapt(model().state_dict(), to=replace(BASE, **change))


def test_positions_that_make_no_square_need_the_image() -> None:
    state = model().state_dict()
    state["pos_embed"] = torch.zeros(1, 2 + 24, 16)
    with pytest.raises(CheckpointError, match=r"position embeddings for 24 patches of 4 px, .* a square image"):
        adapt(state, to=BASE)


@pytest.mark.parametrize("given", [2, 4])
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_channels_that_cannot_be_adapted_have_no_normalisation_either(given: int, stem: str) -> None:
    state = model(channels=given, stem=stem).state_dict()
    with pytest.raises(CheckpointError, match=rf"for {given} channels cannot be adapted to 3: one of them must be 1"):
        renormalise(state, ((0.5,), (0.5,)), ((0.4,) * 3, (0.2,) * 3))


@pytest.mark.parametrize("tokens", LAYOUTS)
def test_layer_scale_comes_and_goes_without_changing_an_answer(tokens: tuple[str, ...]) -> None:
    images = torch.randn(3, 3, 16, 16)
    for given, wanted, line in (
        (True, False, "layer scale: its factors are folded into the preceding layers"),
        (False, True, "layer scale: absent in the file, its factors start at 1"),
    ):
        source = model(tokens=tokens, layer_scale=given)
        ours, lines = fitted(source, layer_scale=wanted)
        assert lines == [line]
        torch.testing.assert_close(vars(ours(images)), vars(source(images)), rtol=1e-4, atol=1e-5)


def test_a_stem_of_convolutions_goes_on_at_another_resolution_with_other_tokens_classes_and_channels() -> None:
    source = model(stem="conv", layer_scale=True, tokens=("class",))
    for name, value in source.named_buffers():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    changes = {"image_px": (24, 24), "tokens": ("class", "distillation"), "channels": 1, "classes": 3}
    ours, lines = fitted(source, **changes)
    assert [line.partition(":")[0] for line in lines] == ["channels", "resolution", "tokens", "classes"]
    grey = torch.randn(2, 1, 24, 24)
    torch.testing.assert_close(ours.patch_embed(grey), source.patch_embed(grey.expand(-1, 3, -1, -1)))
    assert Architecture.of(ours) == replace(Architecture.of(source), **changes)


@pytest.mark.parametrize(
    ("given", "wanted", "words"),
    [
        ({"stem": "conv"}, {"stem": "patch"}, "has model.stem=conv and the student patch: set model.stem=conv"),
        ({}, {"stem": "conv"}, "has model.stem=patch and the student conv: set model.stem=patch"),
        ({"stem": "conv"}, {"patch_px": 8}, "for patches of 4 px, which cannot be resized: set model.patch_px=4"),
    ],
)
def test_a_stem_that_does_not_fit_is_refused(given: dict[str, Any], wanted: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        fitted(model(**given), **wanted)


def test_a_stem_of_convolutions_keeps_its_normalisation_and_says_so() -> None:
    state = model(stem="conv").state_dict()
    same, (line,) = renormalise(state, ((0.5,) * 3, (0.5,) * 3), ((0.4,) * 3, (0.5,) * 3))
    assert line.endswith("a stem of convolutions is unchanged")
    assert all(torch.equal(same[name], value) for name, value in state.items())

"""The student against timm's, and what makes methods comparable: equal starts, one type of output."""

import json
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from deitkit.errors import RecipeError
from deitkit.models import vit
from deitkit.models.vit import SIZES, Attention, DeiT, DropPath, create_student, plain_attention
from deitkit.recipe.schema import ModelRecipe

LAYOUTS = [("class",), ("distillation",), ("class", "distillation"), ()]


def tiny(tokens: tuple[str, ...] = ("class",), **changes: Any) -> DeiT:
    config: dict[str, Any] = {"image_px": 8, "patch_px": 2, "channels": 3, "classes": 5}
    config |= {"width": 16, "depth": 2, "heads": 2, "tokens": tokens}
    return DeiT(**{**config, **changes})


def student(tokens: tuple[str, ...], seed: int = 0, **fields: Any) -> DeiT:
    recipe = ModelRecipe(**{"name": "micro", "patch_px": 2, **fields})
    return create_student(recipe, image_px=(8, 8), channels=3, classes=5, tokens=tokens, seed=seed)


def matched_pair(name: str, *, tokens: tuple[str, ...], depth: int, **timm_options: Any) -> tuple[DeiT, Any]:
    """Build a named size at its real width and resolution, here and in timm, with random values everywhere."""
    recipe = ModelRecipe(name=name, depth=depth)
    ours = create_student(recipe, image_px=(224, 224), channels=3, classes=11, tokens=tokens, seed=3)
    suffix = "_distilled_patch16_224" if "distillation" in tokens else "_patch16_224"
    theirs = timm.create_model(name + suffix, num_classes=11, depth=depth, **timm_options)
    with torch.no_grad():
        for parameter in [*ours.parameters(), *theirs.parameters()]:
            parameter.normal_(std=0.05)
    return ours, theirs


@pytest.mark.parametrize(("name", "depth"), [("deit_tiny", 6), ("deit_small", 2), ("deit_base", 1), ("vit_large", 1)])
def test_class_token_student_equals_timm(name: str, depth: int) -> None:
    ours, theirs = matched_pair(name, tokens=("class",), depth=depth)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(1, 3, 224, 224)
    for mode in (True, False):
        logits = ours.train(mode)(images).class_logits
        torch.testing.assert_close(logits, theirs.train(mode)(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "depth"), [("deit_tiny", 2), ("deit_small", 4), ("deit_base", 1)])
def test_distilled_student_equals_timm(name: str, depth: int) -> None:
    ours, theirs = matched_pair(name, tokens=("class", "distillation"), depth=depth)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(1, 3, 224, 224)
    theirs.set_distilled_training(True)
    output = ours.train()(images)
    for mine, other in zip((output.class_logits, output.distillation_logits), theirs.train()(images), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    output = ours.eval()(images)
    mean = (output.class_logits + output.distillation_logits) / 2
    torch.testing.assert_close(mean, theirs.eval()(images), rtol=1e-5, atol=1e-5)


def test_mean_pooling_equals_timm() -> None:
    options = {"global_pool": "avg", "class_token": False, "fc_norm": False}
    ours, theirs = matched_pair("deit_tiny", tokens=(), depth=4, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 224, 224)
    for mode in (True, False):
        torch.testing.assert_close(
            ours.train(mode)(images).class_logits, theirs.train(mode)(images), rtol=1e-5, atol=1e-5
        )


def test_layer_scale_equals_timm() -> None:
    recipe = ModelRecipe(name="deit_tiny", depth=3, layer_scale=0.1)
    ours = create_student(recipe, image_px=(224, 224), channels=3, classes=11, tokens=("class",), seed=3)
    theirs = timm.create_model("deit_tiny_patch16_224", num_classes=11, depth=3, init_values=0.1)
    gammas = {name: value for name, value in ours.state_dict().items() if "gamma" in name}
    assert len(gammas) == 6
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in gammas.items())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(ours(images).class_logits, theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("patch_px", "sizes"), [(1, []), (2, [16]), (4, [8, 16]), (8, [4, 8, 16])])
def test_the_convolutional_stem_by_hand(patch_px: int, sizes: list[int]) -> None:
    model = tiny(patch_px=patch_px, stem="conv")
    stem = model.patch_embed
    state = {name: value + 0.1 * torch.randn_like(value) for name, value in stem.state_dict().items() if value.ndim}
    stem.load_state_dict(state, strict=False)
    images = torch.randn(4, 3, 8, 8)
    x = images
    for layer, size in enumerate(sizes):
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), state[f"layers.{3 * layer}.weight"])[:, :, ::2, ::2]
        assert x.shape[1] == size
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        std = ((x - mean).square().mean(dim=(0, 2, 3), keepdim=True) + 1e-5).sqrt()
        gain, shift = (state[f"layers.{3 * layer + 1}.{name}"].view(1, -1, 1, 1) for name in ("weight", "bias"))
        x = ((x - mean) / std * gain + shift).clamp(min=0)
    pixels = x.permute(0, 2, 3, 1).reshape(4, (8 // patch_px) ** 2, -1)
    expected = pixels @ state["proj.weight"][:, :, 0, 0].T + state["proj.bias"]
    torch.testing.assert_close(stem.train()(images), expected, rtol=1e-4, atol=1e-5)
    assert len([name for name in state if name.startswith("layers")]) == 5 * len(sizes)


def test_the_stem_of_deit_tiny_has_the_channels_of_its_paper() -> None:
    recipe = ModelRecipe(name="deit_tiny", patch_px=16, depth=1, stem="conv")
    model = create_student(recipe, image_px=(32, 32), channels=3, classes=2, tokens=("class",), seed=0)
    convolutions = [*model.patch_embed.layers[::3], model.patch_embed.proj]
    assert [layer.out_channels for layer in convolutions] == [24, 48, 96, 192, 192]
    assert [layer.kernel_size[0] for layer in convolutions] == [3, 3, 3, 3, 1]
    assert model(torch.randn(2, 3, 32, 32)).class_logits.shape == (2, 2)


def test_a_stem_of_convolutions_is_initialised_whole_and_the_same_for_a_seed() -> None:
    model = student(("class",), stem="conv", patch_px=4, layer_scale=1e-4)
    for name, value in model.state_dict().items():
        assert torch.isfinite(value).all(), name
        if "running_var" in name or ("norm" in name and name.endswith("weight")):
            assert torch.equal(value, torch.ones_like(value)), name
        if "gamma" in name:
            assert torch.equal(value, torch.full_like(value, 1e-4)), name
    kernel = model.patch_embed.layers[3].weight  # 32 channels to 64
    assert kernel.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    again = student(("class",), stem="conv", patch_px=4, layer_scale=1e-4).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_a_patch_of_two_pixels_at_32_px() -> None:
    recipe = ModelRecipe(name="micro", depth=2, patch_px=2)
    model = create_student(recipe, image_px=(32, 32), channels=3, classes=5, tokens=("class",), seed=0)
    theirs = timm.create_model(
        "deit_tiny_patch16_224", img_size=32, patch_size=2, embed_dim=64, depth=2, num_heads=2, num_classes=5
    )
    theirs.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert model.pos_embed.shape == (1, 257, 64)
    torch.testing.assert_close(model(images).class_logits, theirs(images), rtol=1e-4, atol=1e-5)


def test_distillation_only_student_is_a_class_token_student_by_other_names() -> None:
    plain, renamed = tiny(("class",)), tiny(("distillation",))
    names = {"cls_token": "dist_token", "head.weight": "head_dist.weight", "head.bias": "head_dist.bias"}
    renamed.load_state_dict({names.get(name, name): value for name, value in plain.state_dict().items()}, strict=True)
    images = torch.randn(4, 3, 8, 8)
    output = renamed(images)
    assert output.class_logits is None
    assert torch.equal(output.distillation_logits, plain(images).class_logits)


@pytest.mark.parametrize("tokens", LAYOUTS)
def test_output_is_the_same_in_both_modes(tokens: tuple[str, ...]) -> None:
    model, images = tiny(tokens), torch.randn(3, 3, 8, 8)
    trained, evaluated = model.train()(images), model.eval()(images)
    assert (trained.class_logits is None) == ("class" not in tokens and bool(tokens))
    assert (trained.distillation_logits is None) == ("distillation" not in tokens)
    for name in ("class_logits", "distillation_logits"):
        torch.testing.assert_close(getattr(trained, name), getattr(evaluated, name))


@pytest.mark.parametrize("name", ["deit_tiny", "deit_small", "deit_base"])
@pytest.mark.parametrize("distilled", [False, True])
def test_published_sizes_have_as_many_parameters_as_timm(name: str, distilled: bool) -> None:
    tokens = ("class", "distillation") if distilled else ("class",)
    size = SIZES[name]
    with torch.device("meta"):
        ours = DeiT(
            image_px=224, patch_px=16, channels=3, classes=1000, width=size.width, depth=size.depth, heads=size.heads,
            tokens=tokens,
        )  # fmt: skip
        theirs = timm.create_model(name + ("_distilled" if distilled else "") + "_patch16_224")
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }


@pytest.mark.parametrize("tokens", LAYOUTS)
def test_layouts_start_from_equal_shared_parameters(tokens: tuple[str, ...]) -> None:
    full, other = student(("class", "distillation")).state_dict(), student(tokens).state_dict()
    for name, value in other.items():
        if name == "pos_embed":
            assert torch.equal(value[:, len(tokens) :], full[name][:, 2:])
        elif "token" not in name and "head" not in name:
            assert torch.equal(value, full[name]), name
    assert not torch.equal(
        student(tokens, seed=1).state_dict()["blocks.0.attn.qkv.weight"], full["blocks.0.attn.qkv.weight"]
    )


def test_every_value_is_initialised_and_torchs_random_numbers_are_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = student(("class", "distillation"), width=96, heads=3)
    assert torch.equal(before, torch.get_rng_state())
    for name, value in model.state_dict().items():
        if name.endswith("bias"):
            assert torch.equal(value, torch.zeros_like(value)), name
        elif "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        elif name == "patch_embed.proj.weight":
            assert value.abs().max() <= 12**-0.5
            assert value.std() == pytest.approx((3 * 12) ** -0.5, rel=0.1)
        else:
            assert value.abs().max() <= 0.06, name
            assert value.std() == pytest.approx(0.02, rel=0.35), name


@pytest.mark.parametrize("tokens", LAYOUTS)
def test_config_survives_json_and_rebuilds_the_student(tokens: tuple[str, ...]) -> None:
    model = tiny(tokens, drop_path=0.1, dropout=0.2, layer_scale=0.1, stem="conv")
    rebuilt = DeiT(**json.loads(json.dumps(model.config)))
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 8, 8)
    assert rebuilt.config == model.config
    torch.testing.assert_close(vars(rebuilt.eval()(images)), vars(model.eval()(images)))


def test_recipe_overrides_its_size() -> None:
    config = student(("class",), width=24, depth=3, heads=4, drop_path=0.3, dropout=0.1).config
    assert (config["width"], config["depth"], config["heads"]) == (24, 3, 4)
    assert (config["drop_path"], config["dropout"]) == (0.3, 0.1)


@pytest.mark.parametrize("tokens", [1, 65, 256, 257])
def test_attention_is_the_same_by_products_and_by_the_fused_kernel(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, x = Attention(32, 4, 0.0), torch.randn(2, tokens, 32)
    answers = []
    for limit in (0, 10**6):
        monkeypatch.setattr(vit, "SHORT_SEQUENCE", limit)
        leaf = x.clone().requires_grad_()
        answer = attention(leaf)
        answers.append((answer, *torch.autograd.grad(answer.square().sum(), [leaf, attention.qkv.weight])))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)


def test_plain_attention_equals_torchs() -> None:
    query, key, value = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(plain_attention(query, key, value), expected)


def test_drop_path_drops_whole_images_and_keeps_the_expectation() -> None:
    dropped = DropPath(0.25)(torch.ones(4000, 2, 3))
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0, 4 / 3])
    assert torch.equal(dropped.amin(dim=(1, 2)), dropped.amax(dim=(1, 2)))
    assert dropped.mean() == pytest.approx(1, abs=0.05)
    assert torch.equal(DropPath(0.25).eval()(torch.ones(9, 2, 3)), torch.ones(9, 2, 3))


def test_stochastic_depth_grows_linearly_and_draws_from_torchs_random_numbers() -> None:
    model = tiny(depth=4, drop_path=0.3, dropout=0.1)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert tiny(depth=1, drop_path=0.3).blocks[0].drop_path.rate == 0
    images, answers = torch.randn(16, 3, 8, 8), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(model(images).class_logits)
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


def test_images_do_not_influence_one_another() -> None:
    model, images = tiny(("class", "distillation")).eval(), torch.randn(4, 3, 8, 8)
    alone = torch.cat([model(image[None]).distillation_logits for image in images])
    torch.testing.assert_close(alone, model(images).distillation_logits)


@pytest.mark.parametrize("tokens", LAYOUTS)
@pytest.mark.parametrize("more", [{}, {"layer_scale": 0.1, "stem": "conv"}])
def test_every_parameter_learns(more: dict[str, Any], tokens: tuple[str, ...]) -> None:
    model = tiny(tokens, **more)
    output = model(torch.randn(3, 3, 8, 8))
    heads = [logits for logits in (output.class_logits, output.distillation_logits) if logits is not None]
    sum(logits.square().sum() for logits in heads).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_block_matrices_and_parameters_without_decay() -> None:
    model = tiny(("class", "distillation"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert [names[id(matrix)] for matrix in model.block_matrices()] == [
        f"blocks.{index}.{layer}.weight" for index in range(2) for layer in layers
    ]
    assert model.no_decay() == {"cls_token", "dist_token", "pos_embed"}
    more = tiny(("class", "distillation"), layer_scale=0.1, stem="conv")
    assert [matrix.shape for matrix in more.block_matrices()] == [matrix.shape for matrix in model.block_matrices()]
    assert tiny(()).no_decay() == {"pos_embed"}


def test_bfloat16_autocast_is_close_to_float32() -> None:
    model, images = tiny(("class", "distillation")), torch.randn(3, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images).class_logits
    torch.testing.assert_close(low.float(), model(images).class_logits, rtol=0.1, atol=0.02)


@pytest.mark.parametrize(
    ("image_px", "fields", "sentence"),
    [
        ((8, 12), {}, "the images are 8 x 12 px, but a DeiT needs square ones: set data.image_px=8"),
        ((8, 8), {"patch_px": 16}, "model.patch_px=16 is larger than the images of 8 px: choose from 1, 2, 4, 8"),
        ((28, 28), {"patch_px": 16}, "model.patch_px=16 does not divide the images of 28 px: choose from 1, 2, 4, 7"),
        (
            (24, 24),
            {"patch_px": 6, "stem": "conv"},
            "model.stem=conv halves the image with each layer, so model.patch_px=6 is impossible: "
            "choose from 2, 4, 8, or model.stem=patch",
        ),
        ((8, 8), {"width": 10, "heads": 3}, "model.width=10 is not divisible by model.heads=3: choose heads from 1, 2"),
    ],
)
def test_a_student_that_cannot_be_is_refused(image_px: tuple[int, int], fields: dict[str, Any], sentence: str) -> None:
    recipe = ModelRecipe(**{"name": "micro", "patch_px": 2, **fields})
    with pytest.raises(RecipeError) as caught:
        create_student(recipe, image_px=image_px, channels=1, classes=2, tokens=(), seed=0)
    assert str(caught.value).startswith(sentence)

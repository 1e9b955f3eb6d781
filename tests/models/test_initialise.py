"""Students beside timm's and transformers' own implementations on the same weights, in both directions; and reading."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import save_file
from torch import Tensor

from deitkit.errors import CheckpointError
from deitkit.models.classifier import Classifier
from deitkit.models.saved import load_classifier, save_classifier, save_tensors
from deitkit.models.vit import SIZES, DeiT, Output
from deitkit.models.weights.export import Changes, prepare_export
from deitkit.models.weights.export_layouts import LAYOUTS as LAYOUTS_OF_FILES
from deitkit.models.weights.export_layouts import largest_difference
from deitkit.models.weights.formats import (
    Architecture,
    describe,
    from_any,
    to_timm,
    to_transformers,
    with_distillation_head,
)
from deitkit.models.weights.initialise import load_initial_weights, read_weights

# The released sizes, whole but for the resolution, which only decides how many patches there are.
RELEASED = ["deit_tiny", "deit_small", "deit_base"]
LAYOUTS = [("class",), ("class", "distillation")]
PX, CLASSES = 32, 11
TEACHER = transformers.DeiTForImageClassificationWithTeacher


def student(tokens: tuple[str, ...], size: str = "deit_tiny", **changes: Any) -> DeiT:
    """Build a student of 32 px with random values everywhere, none of them zero or one by convention."""
    dimensions = SIZES[size]
    config = {"image_px": PX, "patch_px": 16, "channels": 3, "classes": CLASSES, "width": dimensions.width,
              "depth": dimensions.depth, "heads": dimensions.heads, "tokens": tokens} | changes  # fmt: skip
    torch.manual_seed(1)
    with torch.device("meta"):  # draw once, not twice: a base has 86 million values
        model = DeiT(**config)
    return scrambled(model.to_empty(device="cpu")).eval()


def scrambled(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name and "weight" in name), std=0.05)
    return model


def timm_model(tokens: tuple[str, ...], size: str, state: dict[str, Tensor]) -> Any:
    """Build timm's model of that name around a state dict."""
    suffix = "_distilled_patch16_224" if len(tokens) == 2 else "_patch16_224"
    with torch.device("meta"):
        model = timm.create_model(size + suffix, img_size=PX, num_classes=CLASSES)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def config_of(kind: Any, size: str, **changes: Any) -> Any:
    """Return transformers' configuration of that size; all that departs from its defaults."""
    dimensions = SIZES[size]
    config = {"hidden_size": dimensions.width, "num_hidden_layers": dimensions.depth,
              "num_attention_heads": dimensions.heads, "intermediate_size": 4 * dimensions.width, "image_size": PX,
              "num_labels": CLASSES, "layer_norm_eps": 1e-6}  # fmt: skip
    return kind.config_class(**config | changes)


def transformers_model(kind: Any, **changes: Any) -> Any:
    return scrambled(kind(config_of(kind, "deit_tiny", **changes))).eval()


def mean_logits(output: Output) -> Tensor:
    """Return what timm and transformers answer with: the mean of the heads' logits."""
    heads = [head for head in (output.class_logits, output.distillation_logits) if head is not None]
    return torch.stack(heads).mean(dim=0)


def equal(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.1  # logits that could not differ would prove nothing
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tokens", LAYOUTS)
@pytest.mark.parametrize("size", RELEASED)
def test_logits_equal_timms_and_transformers(size: str, tokens: tuple[str, ...], tmp_path: Path) -> None:
    ours, images = student(tokens, size), torch.randn(2, 3, PX, PX)
    output = ours(images)
    equal(mean_logits(output), timm_model(tokens, size, to_timm(ours.state_dict()))(images))
    kind = TEACHER if len(tokens) == 2 else transformers.ViTForImageClassification
    theirs = opened(to_transformers(ours.state_dict()), kind, config_of(kind, size), tmp_path)(images)
    equal(mean_logits(output), theirs.logits)
    if len(tokens) == 2:
        equal(output.class_logits, theirs.cls_logits)
        equal(output.distillation_logits, theirs.distillation_logits)


def opened(state: dict[str, Tensor], kind: Any, config: Any, folder: Path) -> Any:
    """Let transformers' own loader read a file with these names; it reports what was absent, unknown or of no use."""
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors")
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("kind", [TEACHER, transformers.ViTForImageClassification])
def test_transformers_models_are_read_from_memory_and_from_their_files(kind: Any, tmp_path: Path) -> None:
    theirs = transformers_model(kind)
    theirs.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    state, lines = from_any(theirs.state_dict(), "memory")
    assert lines == []
    same(state, weights.state)
    ours = weights.architecture.build().eval()
    ours.load_state_dict(weights.state, strict=True)
    images = torch.randn(2, 3, PX, PX)
    equal(mean_logits(ours(images)), theirs(images).logits)
    assert weights.class_names == tuple(f"LABEL_{number}" for number in range(CLASSES))
    assert weights.remarks == ()


def test_a_deit_of_transformers_without_a_distillation_head_starts_from_a_copy() -> None:
    theirs = transformers_model(transformers.DeiTForImageClassification)
    state, lines = with_distillation_head(from_any(theirs.state_dict(), "memory")[0])
    ours = describe(state, source="memory").build().eval()
    ours.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, PX, PX)
    equal(ours(images).class_logits, theirs(images).logits)
    assert torch.equal(ours.head.weight, ours.head_dist.weight)
    assert lines[0].startswith("distillation head: absent in the file; the class head alone answers")


@pytest.mark.parametrize("to", ["ours", "transformers"])
def test_only_the_trained_head_of_a_deit_of_transformers_answers(to: str, tmp_path: Path) -> None:
    theirs = transformers_model(transformers.DeiTForImageClassification)
    theirs.save_pretrained(tmp_path / "theirs")
    exported = prepare_export(tmp_path / "theirs", Changes(), mean=(0.5,) * 3, std=(0.5,) * 3)
    LAYOUTS_OF_FILES[to].write(exported, tmp_path / "out")
    assert largest_difference(exported, LAYOUTS_OF_FILES[to], tmp_path / "out") <= 1e-4
    images = torch.rand(2, 3, PX, PX)
    if to == "ours":
        classifier, _ = load_classifier(tmp_path / "out", torch.device("cpu"))
        output = classifier(images)
        assert output.distillation_logits is None
        equal(output.class_logits, theirs((images - 0.5) / 0.5).logits)
        weights = read_weights(tmp_path / "out")
        assert weights.only_readout == "class"
    else:
        again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
        assert type(again) is transformers.DeiTForImageClassification
        equal(again(images).logits, theirs(images).logits)
    for layout in ("timm", "released"):
        with pytest.raises(CheckpointError, match="only the class head of this one was trained"):
            LAYOUTS_OF_FILES[layout].write(exported, tmp_path / f"{layout}.pth")


def test_our_own_file_in_the_released_layout_says_what_a_card_would(tmp_path: Path) -> None:
    card = {"class_names": ["a", "b", "c"], "channels": 3, "input_px": [PX, PX]}
    sizes = {"width": 48, "depth": 1, "heads": 3, "channels": 3, "classes": 3}
    model = scrambled(DeiT(image_px=PX, patch_px=8, tokens=("class", "distillation"), **sizes))
    save_classifier(tmp_path / "mine", Classifier(model, mean=(0.1,) * 3, std=(0.2,) * 3), card)
    LAYOUTS_OF_FILES["released"].write(prepare_export(tmp_path / "mine", Changes()), tmp_path / "mine.pth")
    weights = read_weights(tmp_path / "mine.pth")
    assert weights.architecture.heads == 3
    assert weights.class_names == ("a", "b", "c")
    assert (weights.mean, weights.std) == (pytest.approx((0.1,) * 3), pytest.approx((0.2,) * 3))
    assert not [line for line in weights.remarks if "heads" in line]
    opened = timm.create_model(
        "deit_tiny_distilled_patch16_224", checkpoint_path=str(tmp_path / "mine.pth"), num_classes=3, img_size=PX,
        patch_size=8, embed_dim=48, depth=1, num_heads=3,
    ).eval()  # fmt: skip
    images = 3 * torch.randn(8, 3, PX, PX)
    equal(opened(images), mean_logits(model.eval()(images)))


def timm_folder(folder: Path, name: str, **arguments: Any) -> Any:
    """Write a model of timm's as on the Hub, and return it."""
    model = scrambled(timm.create_model(name, num_classes=CLASSES, img_size=PX, **arguments)).eval()
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    card = {"architecture": name, "num_classes": CLASSES, "model_args": {"img_size": PX, **arguments}}
    (folder / "config.json").write_text(json.dumps(card))
    return model


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"global_pool": "avg", "fc_norm": False}, "answers by the 'avg' pooling of its patches"),
        ({"act_layer": "relu"}, "has the activation ReLU"),
        ({"act_layer": "quick_gelu"}, "has the activation QuickGELU"),
    ],
)
def test_what_a_configuration_alone_tells_is_not_guessed(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    timm_folder(tmp_path / "model", "vit_tiny_patch16_224", depth=1, **arguments)
    with pytest.raises(CheckpointError, match=words):
        read_weights(tmp_path / "model")


def test_the_heads_of_a_named_model_of_timm_are_timms(tmp_path: Path) -> None:
    theirs = timm_folder(tmp_path / "model", "vit_tiny_patch16_224", embed_dim=96, depth=1)  # 3 heads of 32
    weights = read_weights(tmp_path / "model")
    assert weights.architecture.heads == 3
    ours = weights.architecture.build().eval()
    ours.load_state_dict(weights.state)
    images = torch.randn(2, 3, PX, PX)
    equal(ours(images).class_logits, theirs(images))


def test_a_configuration_that_timm_refuses_is_one_sentence(tmp_path: Path) -> None:
    timm_folder(tmp_path / "model", "vit_tiny_patch16_224", depth=1)
    card = json.loads((tmp_path / "model" / "config.json").read_text())
    card["model_args"]["no_such_argument"] = 1
    (tmp_path / "model" / "config.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"does not describe a model of timm's .*no_such_argument"):
        read_weights(tmp_path / "model")


def test_a_pooler_is_left_out() -> None:
    theirs = transformers.ViTModel(config_of(transformers.ViTModel, "deit_tiny"))
    state, lines = from_any(theirs.state_dict(), "memory")
    assert lines == ["pooler: left out, since no classifier uses it"]
    assert describe(state, source="memory").classes == 0


@pytest.mark.parametrize("tokens", [*LAYOUTS, ("distillation",)])
@pytest.mark.parametrize("there", [to_timm, to_transformers])
def test_there_and_back_is_the_same_bit_for_bit(
    tokens: tuple[str, ...], there: Callable[..., dict[str, Tensor]]
) -> None:
    state = dict(student(tokens, depth=2).state_dict())
    back = from_any(there(state), "x")[0]
    same(back, to_timm(state))  # by another name where a distillation token was alone
    same(there(back), there(state))


def test_averaged_patches_go_to_timm_only() -> None:
    state = dict(student((), depth=1).state_dict())
    same(to_timm(state), state)
    with pytest.raises(CheckpointError, match="averages its patches: convert to timm"):
        to_transformers(state)


@pytest.mark.parametrize("tokens", [*LAYOUTS, ("distillation",), ()])
@pytest.mark.parametrize("size", ["micro", *RELEASED])
def test_shapes_tell_the_architecture(size: str, tokens: tuple[str, ...]) -> None:
    with torch.device("meta"):
        ours = DeiT(image_px=24, patch_px=8, channels=1, classes=3, width=SIZES[size].width, depth=2,
                    heads=SIZES[size].heads, tokens=tokens)  # fmt: skip
    told = describe(ours.state_dict(), source="x", heads=None if size != "micro" else 2)
    assert told == Architecture.of(ours)


HEADS = "attention heads: absent in the file, 3 assumed, one per 64 of the width (set --heads or model.heads)"
RELEASES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "model, as the released DeiT": lambda state: {"model": state},
    "model with arguments, as a DeiT run": lambda state: {
        "model": {name: value + 1 for name, value in state.items()},
        "model_ema": state, "args": argparse.Namespace(lr=1), "epoch": 299,
    },
    "state_dict": lambda state: {"state_dict": state},
    "bare": lambda state: state,
}  # fmt: skip


@pytest.mark.parametrize("tokens", LAYOUTS)
@pytest.mark.parametrize("wrapping", RELEASES)
def test_released_files_are_read(wrapping: str, tokens: tuple[str, ...], tmp_path: Path) -> None:
    state = dict(student(tokens).state_dict())
    assert timm_model(tokens, "deit_tiny", state).state_dict().keys() == state.keys()
    torch.save(RELEASES[wrapping](state), tmp_path / "deit.pth")
    weights = read_weights(tmp_path / "deit.pth")
    same(weights.state, state)
    assert weights.architecture == Architecture(
        image_px=(PX, PX), patch_px=16, channels=3, classes=CLASSES, width=192, depth=12, heads=3, tokens=tokens
    )
    chosen = ("of its parts model_ema, model, 'model_ema' is read",) if "DeiT run" in wrapping else ()
    assert (weights.class_names, weights.mean, weights.remarks) == (None, None, (*chosen, HEADS))


def saved(folder: Path, model: DeiT, **card: Any) -> Path:
    classifier = Classifier(model, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
    names = [f"class {number}" for number in range(model.config["classes"])]
    save_classifier(folder, classifier, {"channels": 3, "class_names": names, "input_px": [PX, PX], **card})
    return folder


@pytest.mark.parametrize("path", ["run", "run/winner", "run/winner/model.safetensors"])
def test_our_own_folders_are_read_with_their_cards(path: str, tmp_path: Path) -> None:
    model = student(("class", "distillation"), "micro")
    saved(tmp_path / "run" / "winner", model, method="token-hard")
    weights = read_weights(tmp_path / path)
    same(weights.state, dict(model.state_dict()))
    assert weights.architecture == Architecture.of(model)  # two heads of 32, which no shape tells
    assert weights.class_names == tuple(f"class {number}" for number in range(CLASSES))
    assert (weights.mean, weights.std) == (pytest.approx((0.5, 0.4, 0.3)), pytest.approx((0.2, 0.2, 0.3)))
    assert weights.card is not None
    assert weights.card.method == "token-hard"


def test_half_precision_becomes_float32_and_is_told(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in student(("class",), depth=1).state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    weights = read_weights(tmp_path / "weights.safetensors")
    assert weights.remarks == ("precision: float16 in the file, converted to float32", HEADS)
    same(weights.state, {name: value.float() for name, value in state.items()})


def test_config_json_tells_what_shapes_do_not(tmp_path: Path) -> None:
    kind = transformers.ViTForImageClassification
    theirs = transformers_model(
        kind, num_attention_heads=6, image_size=(32, 64), layer_norm_eps=1e-12, num_hidden_layers=1
    )
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})
    )
    weights = read_weights(tmp_path)
    assert (weights.architecture.heads, weights.architecture.image_px) == (6, (32, 64))
    assert (weights.mean, weights.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert weights.remarks == ("layer_norm_eps: 1e-12 in config.json, 1e-06 here; logits differ slightly",)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"size": 256, "crop_size": 224, "do_center_crop": True}, (0.875, "squash")),  # facebook/deit-*
        ({"size": 224}, (1.0, "squash")),  # google/vit-*
        ({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True}, (0.875, "crop")),
        ({"size": "large"}, (None, None)),
    ],
)
def test_preprocessors_of_older_versions_are_read(
    told: dict[str, Any], expected: tuple[float | None, str | None], tmp_path: Path
) -> None:
    transformers_model(transformers.ViTForImageClassification, num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    weights = read_weights(tmp_path)
    assert (weights.eval_crop, weights.fit) == expected


def test_timms_config_json_tells_the_normalisation(tmp_path: Path) -> None:
    save_file(student(("class",), depth=1).state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "deit_tiny_patch16_224", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_weights(tmp_path).mean == (0.1, 0.2, 0.3)


def test_a_student_starts_from_weights_as_they_are(tmp_path: Path) -> None:
    source, target = student(("class",), depth=2), student(("class",), depth=2)
    scrambled(target)
    folder = saved(tmp_path, source)
    names = [f"class {number}" for number in range(CLASSES)]
    assert load_initial_weights(target, folder, class_names=names, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3)) == []
    same(dict(target.state_dict()), dict(source.state_dict()))


def test_a_student_starts_from_weights_of_another_kind(tmp_path: Path) -> None:
    source = student(("class",), depth=2)
    target = student(("class", "distillation"), depth=2, image_px=24, patch_px=8, classes=4)
    lines = load_initial_weights(target, saved(tmp_path, source), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    told = [line.partition(":")[0] for line in lines]
    assert told == ["normalisation", "patch", "resolution", "tokens", "classes"]
    assert torch.equal(target.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert torch.equal(target.dist_token, source.cls_token)


def test_other_classes_of_the_same_number_get_a_new_classifier(tmp_path: Path) -> None:
    source, target = student(("class",), depth=1), student(("class",), depth=1)
    lines = load_initial_weights(
        target, saved(tmp_path, source), class_names=[str(number) for number in range(CLASSES)]
    )
    assert not target.head.weight.any()
    assert lines == [
        "classes: other names in the file, its classifier is left out",
        "classes: no classifier -> 11; the classifier starts at zero",
    ]


def test_weights_that_do_not_fit_leave_the_student_untouched(tmp_path: Path) -> None:
    target = student(("class",), depth=2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"set model.width=64 model.depth=4, or the model.name"):
        load_initial_weights(target, saved(tmp_path / "a", student(("class",), "micro")))
    with pytest.raises(CheckpointError, match=r"has 6 attention heads, the student 3: set model.heads=6"):
        load_initial_weights(target, saved(tmp_path / "b", student(("class",), depth=2, heads=6)))
    same(dict(target.state_dict()), before)


def test_what_is_no_vision_transformer_is_refused_in_one_sentence(tmp_path: Path) -> None:
    def refusal(state: dict[str, Tensor]) -> str:
        save_file(state, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError) as caught:
            read_weights(tmp_path / "a.safetensors")
        return str(caught.value)

    state = dict(student(("class",), depth=2).state_dict())
    assert "is not a vision transformer" in refusal({"conv1.weight": torch.zeros(1)})
    assert "is not a vision transformer" in refusal({**state, "patch_embed.proj.weight": torch.zeros(192, 48)})
    lacking = {name: value for name, value in state.items() if name != "blocks.1.attn.qkv.bias"}
    assert "1 of its tensors do not fit (first: blocks.1.attn.qkv.bias, absent in the file" in refusal(lacking)
    assert "first: blocks.0.ls2.gamma" in refusal({**state, "blocks.0.ls1.gamma": torch.zeros(192)})
    normed = {**state, "blocks.0.attn.q_norm.weight": torch.zeros(64)}
    assert "first: blocks.0.attn.q_norm.weight" in refusal(normed)
    narrow = {**state, "blocks.0.mlp.fc1.bias": torch.zeros(300)}
    assert "first: blocks.0.mlp.fc1.bias, (300,) in the file, (768,) in a student of deitkit" in refusal(narrow)


def test_folders_without_weights_and_broken_cards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"contains no model.safetensors or pytorch_model.bin"):
        read_weights(tmp_path)
    saved(tmp_path, student(("class",), depth=1))
    card = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(card | {"kind": "cnn", "config": None}))
    with pytest.raises(CheckpointError, match="contains a model of kind 'cnn', not a vision transformer"):
        read_weights(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model.json is damaged"):
        read_weights(tmp_path)


def test_layer_scale_is_timms_and_is_folded_for_transformers() -> None:
    model = student(("class",), "micro", layer_scale=0.3)
    state = dict(model.state_dict())
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=PX, embed_dim=64, depth=4, num_heads=2, num_classes=CLASSES, init_values=1.0
    )
    theirs.load_state_dict(to_timm(state), strict=True)
    images = torch.randn(2, 3, PX, PX)
    logits = model(images).class_logits
    torch.testing.assert_close(theirs.eval()(images), logits, rtol=1e-4, atol=1e-5)
    back, _ = from_any(to_transformers(state), "test")
    plain = student(("class",), "micro")
    plain.load_state_dict(back, strict=True)
    torch.testing.assert_close(plain(images).class_logits, logits, rtol=1e-4, atol=1e-5)


def test_a_stem_of_convolutions_is_read_from_our_folders_and_not_converted(tmp_path: Path) -> None:
    model = student(("class", "distillation"), "micro", stem="conv", layer_scale=0.1)
    weights = read_weights(saved(tmp_path, model))
    assert weights.architecture == Architecture.of(model)
    assert weights.remarks == ()
    other = student(("class", "distillation"), "micro", stem="conv", layer_scale=0.1, image_px=2 * PX)
    (line,) = load_initial_weights(other, tmp_path)
    assert line.startswith("resolution: 32 x 32 -> 64 x 64 px")
    for convert in (to_timm, to_transformers):
        with pytest.raises(CheckpointError, match="no vision transformer with a stem of convolutions"):
            convert(dict(model.state_dict()))


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("head", ["heads.head.", "heads."])
def test_a_vision_transformer_of_torchvision_gives_its_logits(tmp_path: Path, prefix: str, head: str) -> None:
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 48, "mlp_dim": 192, "num_classes": CLASSES}
    theirs = torchvision.models.VisionTransformer(image_size=PX, patch_size=8, **sizes).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    state = {prefix + name.replace("heads.head.", head): value for name, value in theirs.state_dict().items()}
    torch.save({"state_dict": state | {"criterion.weight": torch.ones(2)}}, tmp_path / "vit.pth")
    weights = read_weights(tmp_path / "vit.pth", heads=2)
    assert weights.remarks == ()
    ours = weights.architecture.build().eval()
    ours.load_state_dict(weights.state, strict=True)
    images = torch.randn(4, 3, PX, PX)
    equal(ours(images).class_logits, theirs(images))


PREFIXES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "an unlisted prefix": lambda state: {f"lit.backbone.{name}": value for name, value in state.items()},
    "beside weights of classes": lambda state: {f"model.{n}": v for n, v in state.items()} | {"w": torch.ones(2)},
    "blocks compiled": lambda state: {re.sub(r"^(blocks\.\d+)", r"\1._orig_mod", n): v for n, v in state.items()},
    "an average": lambda state: (
        {f"model.{n}": v + 1 for n, v in state.items()} | {f"ema.module.{n}": v for n, v in state.items()}
    ),
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("names", [to_timm, to_transformers])
def test_what_training_tools_put_before_names_is_taken_off(
    names: Callable[..., dict[str, Tensor]], prefix: str, tmp_path: Path
) -> None:
    state = dict(student(("class",), depth=2).state_dict())
    torch.save(PREFIXES[prefix](names(state)), tmp_path / "weights.pth")
    weights = read_weights(tmp_path / "weights.pth", heads=3)
    same(weights.state, state)
    expected = {
        "beside weights of classes": ("its tensors outside of 'model' are left out (w)",),
        "an average": ("of its parts ema.module, model, 'ema.module' is read",),
    }
    assert weights.remarks == expected.get(prefix, ())


def test_a_name_that_claims_a_deep_model_is_refused_before_it_is_built(tmp_path: Path) -> None:
    state = dict(student(("class",), depth=1).state_dict())
    for claimed in ("blocks.99999999.norm1.bias", "blocks.999999.norm1.bias", "blocks.x.norm1.bias"):
        save_file(state | {claimed: torch.zeros(192)}, tmp_path / "deep.safetensors")
        with pytest.raises(CheckpointError, match="is a vision transformer that deitkit does not have"):
            read_weights(tmp_path / "deep.safetensors", heads=3)


@pytest.mark.parametrize(
    ("channels", "told", "expected"),
    [
        (3, {"do_normalize": True, "image_mean": 0.4, "image_std": 0.2}, ((0.4,) * 3, (0.2,) * 3)),
        (1, {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, ((0.5,), (0.5,))),
        (3, {"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, ((0.0,) * 3, (1.0,) * 3)),
        (1, {"do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.5] * 3}, None),
    ],
)
def test_a_preprocessor_tells_one_value_for_each_channel(
    channels: int, told: dict[str, Any], expected: tuple[tuple[float, ...], tuple[float, ...]] | None, tmp_path: Path
) -> None:
    kind = transformers.ViTForImageClassification
    transformers_model(kind, num_hidden_layers=1, num_channels=channels).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    if expected is None:
        with pytest.raises(CheckpointError, match="has a normalisation of 3 channels, but weights for 1"):
            read_weights(tmp_path)
    else:
        weights = read_weights(tmp_path)
        assert (weights.mean, weights.std) == expected


@pytest.mark.parametrize("released", [False, True], ids=["timm's names", "the released names"])
def test_deit_iii_without_a_position_of_its_class_token_gives_timms_logits(tmp_path: Path, released: bool) -> None:
    torch.manual_seed(0)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=5,
        no_embed_class=True,
        init_values=0.1,
    ).eval()
    torch.nn.init.normal_(theirs.pos_embed)
    state = theirs.state_dict()
    if released:
        state = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for name, v in state.items()}
    torch.save({"model": state}, tmp_path / "deit3.pth")
    weights = read_weights(tmp_path / "deit3.pth", heads=3)
    assert weights.remarks == ("position embeddings: absent in the file for the class token, and zero",)
    assert weights.architecture.image_px == (32, 32)
    ours = weights.architecture.build()
    ours.load_state_dict(weights.state)
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(images).class_logits, theirs(images), rtol=1e-5, atol=1e-6)


def test_an_assumed_normalisation_is_told(tmp_path: Path) -> None:
    sizes = {"width": 48, "depth": 1, "heads": 3, "channels": 3, "classes": 3}
    model = scrambled(DeiT(image_px=PX, patch_px=8, tokens=("class",), **sizes))
    save_tensors(tmp_path / "bare.safetensors", dict(model.state_dict()))
    given = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    lines = load_initial_weights(model, tmp_path / "bare.safetensors", **given)
    assert "normalisation: absent in the file, ImageNet's assumed (else convert it with --mean and --std)" in lines
    card = {"class_names": ["a", "b", "c"], "channels": 3, "input_px": [PX, PX]}
    save_classifier(tmp_path / "mine", Classifier(model, mean=(0.1,) * 3, std=(0.2,) * 3), card)
    assert not [line for line in load_initial_weights(model, tmp_path / "mine", **given) if "assumed" in line]

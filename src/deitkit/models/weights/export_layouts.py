"""Vision transformers in the layouts of other libraries: their files, and how to open them.

Of these libraries, writing needs only timm; ``--check`` opens the files with the library itself.
"""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor

from deitkit.data.pixels import evaluation_frame
from deitkit.errors import CheckpointError, RecipeError, is_out_of_memory, reason_of
from deitkit.models.classifier import Classifier
from deitkit.models.saved import load_classifier, save_classifier, save_tensors
from deitkit.models.vit import INIT_STD, MLP_RATIO, NORM_EPS, SIZES
from deitkit.models.weights.export import ExportedModel
from deitkit.models.weights.formats import TIMM_CROP_MODES, to_timm, to_transformers
from deitkit.models.weights.read import FACTS
from deitkit.system.files import write_bytes, write_json

TOLERANCE = 1e-3  # of logits; a hundred times the rounding error of float32 over twelve blocks
Logits = Callable[[Float[Tensor, "batch channels height width"]], Float[Tensor, "batch classes"]]


@dataclass(frozen=True)
class Layout:
    """The file layout of a library.

    Attributes:
        holds: Description of the content of --out.
        suffix: Required suffix of --out; empty for a folder.
        write: Writes a model to a path; returns lines of Python that open the files.
        open: Returns the function from normalised images to logits, by the library's own implementation.
        package: The one that ``open`` needs and deitkit does not.
    """

    holds: str
    suffix: str
    write: Callable[[ExportedModel, Path], list[str]]
    open: Callable[[ExportedModel, Path], Logits]
    package: str | None = None

    def require_package(self) -> None:
        """Raise RecipeError if ``open`` would lack its library."""
        if self.package is not None and find_spec(self.package) is None:
            raise RecipeError(
                f"--check needs {self.package}, which is not installed: pip install {self.package}, or drop --check"
            )


@contextmanager
def removed_on_failure(out: Path) -> Iterator[None]:
    """Remove what the block writes to ``out``, a new file or a new or empty folder, if it fails or is interrupted."""
    was_there = out.is_dir()
    try:
        yield
    except BaseException:  # Ctrl-C too
        for path in out.iterdir() if out.is_dir() else ():  # ``out`` may be a link
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if out.is_dir() and not was_there:
            out.rmdir()
        elif out.is_file():
            out.unlink()
        raise


def largest_difference(exported: ExportedModel, layout: Layout, out: Path) -> float | None:
    """Return the largest difference between the student's logits and those of the written files, opened by the library.

    The eight images are drawn from a normal distribution under a fixed seed. Return None if the classifier is new: its
    logits are all zero, so equality would prove nothing.
    """
    config = exported.architecture
    shape = (8, config.channels, *config.image_px)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs, ours = layout.open(exported, out)(images), exported.logits(exported.build()(images))
    return float((theirs - ours).abs().max()) if ours.any() else None


def require_same_logits(difference: float | None, source: Path, out: Path) -> None:
    """Raise CheckpointError if the ``largest_difference`` of written files is more than rounding explains."""
    if difference is not None and not difference <= TOLERANCE:
        raise CheckpointError(
            f"{out} does not reproduce {source}: its logits differ by up to {difference:.2g}; "
            "another version of the library may read it differently, so do not use it"
        )


def _write_ours(exported: ExportedModel, out: Path) -> list[str]:
    card = {
        "channels": exported.architecture.channels,
        "class_names": list(exported.class_names),
        "input_px": list(exported.architecture.image_px),
        "eval_crop": exported.eval_crop,
        "fit": exported.fit,
        **({"only_readout": exported.only_readout} if exported.only_readout else {}),
        **exported.about,
    }
    save_classifier(out, Classifier(exported.build(), mean=exported.mean, std=exported.std), card)
    return [
        "from pathlib import Path",
        "import torch",
        "from deitkit.models.saved import load_classifier",
        f"classifier, card = load_classifier(Path({str(out)!r}), torch.device('cpu'))  # takes values in [0, 1]",
    ]


def _open_ours(exported: ExportedModel, out: Path) -> Logits:
    classifier, _ = load_classifier(out, torch.device("cpu"))
    return lambda images: exported.logits(classifier.model(images))


def timm_arguments(exported: ExportedModel) -> tuple[str, dict[str, Any]]:
    """Return timm's name of a model, and the arguments of ``timm.create_model`` that differ from its defaults."""
    config = exported.architecture
    distilled = "_distilled" if len(config.tokens) == 2 else ""
    names = {f"{size}{distilled}_patch16_224": value for size, value in SIZES.items()}
    named = {name: value for name, value in names.items() if timm.is_model(name)}
    size = (config.width, config.depth, config.heads)
    fitting = [name for name, value in named.items() if (value.width, value.depth, value.heads) == size]
    name = (fitting or list(named))[0]
    standard = named[name]
    wanted: dict[str, tuple[Any, Any]] = {
        "img_size": (config.image_px[0], 224),
        "patch_size": (config.patch_px, 16),
        "in_chans": (config.channels, 3),
        "embed_dim": (config.width, standard.width),
        "depth": (config.depth, standard.depth),
        "num_heads": (config.heads, standard.heads),
    }
    arguments: dict[str, Any] = {key: value for key, (value, usual) in wanted.items() if value != usual}
    if config.layer_scale:
        arguments["init_values"] = 1.0  # any value creates the layers, whose weights are then loaded
    if not config.tokens:
        arguments |= {"global_pool": "avg", "class_token": False, "fc_norm": False}  # fc_norm would replace norm
    return name, {"num_classes": config.classes, **arguments}


def _timm_line(exported: ExportedModel, file: Path) -> str:
    name, arguments = timm_arguments(exported)
    keywords = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"model = timm.create_model({name!r}, checkpoint_path={str(file)!r}, {keywords}).eval()"


def _normalisation_line(exported: ExportedModel) -> str:
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (exported.mean, exported.std))
    return f"# takes values in [0, 1] less mean ({mean}), divided by std ({std})"


def _write_timm(exported: ExportedModel, out: Path) -> list[str]:
    _require_all_heads(exported)
    name, arguments = timm_arguments(exported)
    config = exported.architecture
    heads = ["head", "head_dist"] if len(config.tokens) == 2 else ["head"]
    card = {
        "architecture": name,
        "num_classes": config.classes,
        "num_features": config.width,
        "global_pool": "token" if config.tokens else "avg",
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "label_names": list(exported.class_names),
        "pretrained_cfg": {
            "tag": "deitkit",
            "input_size": [config.channels, *config.image_px],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": exported.eval_crop,
            "crop_mode": TIMM_CROP_MODES[exported.fit],
            "mean": list(exported.mean),
            "std": list(exported.std),
            "num_classes": config.classes,
            "first_conv": "patch_embed.proj",
            "classifier": heads if len(heads) > 1 else heads[0],
        },
    }
    save_tensors(out / "model.safetensors", to_timm(exported.state))
    write_json(out / "config.json", card)
    return [
        "import timm",
        _timm_line(exported, out / "model.safetensors"),
        f"model = timm.create_model({f'local-dir:{out}'!r}, pretrained=True).eval()  # the same, by its config.json",
        _normalisation_line(exported),
        *(["# its transforms pad with the mean colour, deitkit with black"] * (exported.fit == "pad")),
    ]


def _require_all_heads(exported: ExportedModel) -> None:
    if exported.only_readout:
        raise CheckpointError(
            "timm's distilled models answer by the mean of two heads, but only the class head of this one was trained: "
            "use --to transformers or ours"
        )


def _open_timm(exported: ExportedModel, out: Path) -> Logits:
    name, arguments = timm_arguments(exported)
    if not out.is_dir():
        model: Logits = timm.create_model(name, checkpoint_path=str(out), **arguments).eval()
        return model
    try:
        return timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    except Exception as error:  # timm raises many types; its older versions read # and ? in a path as parts of a URL
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"timm {timm.__version__} cannot open local-dir:{out} ({reason_of(error)}): update timm, or name a folder "
            "without # and ?"
        ) from None


def _write_released(exported: ExportedModel, out: Path) -> list[str]:
    _require_all_heads(exported)
    facts = {
        "heads": exported.architecture.heads,
        "image_px": list(exported.architecture.image_px),
        "class_names": list(exported.class_names),
        "mean": list(exported.mean),
        "std": list(exported.std),
        "eval_crop": exported.eval_crop,
        "fit": exported.fit,
    }
    buffer = io.BytesIO()
    torch.save({"model": to_timm(exported.state), FACTS: facts}, buffer)
    write_bytes(out, buffer.getvalue())
    return ["import timm", _timm_line(exported, out), _normalisation_line(exported)]


def _write_transformers(exported: ExportedModel, out: Path) -> list[str]:
    tensors = to_transformers(exported.state, class_head_only=exported.only_readout is not None)
    config = exported.architecture
    distilled = len(config.tokens) == 2
    kind = "DeiTForImageClassification" if distilled else "ViTForImageClassification"
    card = {
        "architectures": [f"{kind}WithTeacher" if distilled and not exported.only_readout else kind],
        "model_type": "deit" if distilled else "vit",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": MLP_RATIO * config.width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": INIT_STD,
        "layer_norm_eps": NORM_EPS,
        "image_size": config.image_px[0],
        "patch_size": config.patch_px,
        "num_channels": config.channels,
        "qkv_bias": True,
        "id2label": {str(number): name for number, name in enumerate(exported.class_names)},
        "label2id": {name: number for number, name in enumerate(exported.class_names)},
        "torch_dtype": "float32",
    }
    side = config.image_px[0]
    # As deitkit reads files: resize the shorter side (bicubic), then crop the centre; ViT's processor would distort.
    resized = evaluation_frame(side, exported.eval_crop)[0]
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": config.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": resized} if exported.fit != "squash" else {"height": resized, "width": resized},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(exported.mean),
        "image_std": list(exported.std),
    }
    save_tensors(out / "model.safetensors", tensors)
    write_json(out / "config.json", card)
    write_json(out / "preprocessor_config.json", processor)
    return [
        "from PIL import Image" + ", ImageOps" * (exported.fit == "pad"),
        "from transformers import AutoImageProcessor, AutoModelForImageClassification",
        f"processor = AutoImageProcessor.from_pretrained({str(out)!r})  # normalises, and resizes if necessary",
        f"model = AutoModelForImageClassification.from_pretrained({str(out)!r}).eval()",
        f"image = Image.open('photo.jpg').convert({'L' if config.channels == 1 else 'RGB'!r})",
        *(
            ["image = ImageOps.pad(image, (max(image.size),) * 2)  # on black; no processor pads"]
            * (exported.fit == "pad")
        ),
        "logits = model(**processor(image, return_tensors='pt')).logits",
    ]


def _open_transformers(exported: ExportedModel, out: Path) -> Logits:
    from transformers import AutoModelForImageClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForImageClassification.from_pretrained(out).eval()
    return lambda images: model(images).logits


LAYOUTS: dict[str, Layout] = {
    "ours": Layout("model.json and model.safetensors of deitkit", "", _write_ours, _open_ours),
    "timm": Layout("config.json and model.safetensors of timm", "", _write_timm, _open_timm),
    "released": Layout("a file as Facebook released DeiT", ".pth", _write_released, _open_timm),
    "transformers": Layout(
        "config.json, preprocessor_config.json and model.safetensors of transformers",
        "",
        _write_transformers,
        _open_transformers,
        "transformers",
    ),
}

"""Using a saved model: measuring it on a data set, and classifying files."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from deitkit.data.dataset import Split, load_dataset
from deitkit.data.decode import SUFFIXES, decode_image, strict_pillow
from deitkit.data.duplicates import share_in_sketch
from deitkit.data.listing import writable
from deitkit.data.sources.folders import image_files
from deitkit.errors import DataError, RecipeError
from deitkit.evaluation.predict import predict
from deitkit.evaluation.readouts import (
    default_readout,
    readout_scores,
    top_k_accuracy,
    top_k_hits,
)
from deitkit.evaluation.statistics import wilson_interval
from deitkit.models.saved import load_classifier
from deitkit.recipe.schema import DataRecipe
from deitkit.system.device import Precision, choose_device


def _input_px(card: dict[str, Any]) -> int:
    """Return the side of a model's training images."""
    return int(min(card["input_px"]))


def _eval_crop(card: dict[str, Any]) -> float:
    """Return the divisor of an image's side before its centre is cropped."""
    return float(card.get("eval_crop", 1.0))


def evaluate_model(folder: Path, data: str, root: Path | None = None) -> dict[str, Any]:
    """Measure a saved model on the test images of a data set.

    Returns:
        ``model``, ``dataset``, ``n``, ``trained_on`` (the estimated share of test images that the model was trained on)
        and ``readouts``, each with its accuracies as fractions.

    Raises:
        DataError: The classes of the data set differ from the model's.
    """
    device = choose_device("auto")
    classifier, card = load_classifier(folder, device)
    # Use the split of the model's training, so that no training image is a test image.
    prepared = {"channels": card["channels"], "image_px": _input_px(card), "eval_crop": _eval_crop(card)}
    recipe = DataRecipe(name=data, root=root, **prepared, **card.get("split", {}))
    dataset = load_dataset(recipe)
    if list(dataset.class_names) != card["class_names"]:
        raise DataError(
            f"data {data} has the classes {_some(list(dataset.class_names))}, "
            f"but the model has {_some(card['class_names'])}: evaluate it on data with the model's classes"
        )
    scores = readout_scores(predict(classifier, dataset.test, Precision.choose("auto", device)))
    labels, n = dataset.test.labels, len(dataset.test)
    rows = []
    for readout, values in scores.items():
        hits = int(top_k_hits(values, labels).sum())
        top5 = top_k_accuracy(values, labels, 5) if dataset.classes > 5 else None
        rows.append({"readout": readout, "top1": hits / n, "top1_ci95": wilson_interval(hits, n), "top5": top5})
    seen = share_in_sketch(dataset.test_hashes, str(card.get("trained_on", "")))
    return {"model": str(folder), "dataset": dataset.name, "n": n, "trained_on": seen, "readouts": rows}


def predict_files(folder: Path, paths: list[Path], *, readout: str | None = None, top: int = 3) -> list[dict[str, Any]]:
    """Classify image files.

    Args:
        folder: Of the model.
        paths: Image files, or folders of them.
        readout: The readout to use; by default that of the model's card, else the default one.
        top: Number of classes to return for each image, with their probabilities.

    Raises:
        DataError: A file cannot be read.
        RecipeError: The model does not have the readout.
    """
    classifier, card = load_classifier(folder, choose_device("auto"))
    files = [file for path in paths for file in _image_files(path)]
    with strict_pillow():
        images = torch.stack([_read(file, card["channels"], _input_px(card), _eval_crop(card)) for file in files])
    split = Split(images, torch.zeros(len(images), dtype=torch.int64))
    scores = readout_scores(predict(classifier, split, Precision.choose("auto", classifier.mean.device)))
    chosen = readout or card.get("readout") or default_readout(list(scores))
    if chosen not in scores:
        raise RecipeError(f"--readout {chosen}: this model has {', '.join(scores)}")
    probabilities = scores[chosen].softmax(dim=-1)
    best = probabilities.topk(min(top, probabilities.shape[-1]), dim=-1)
    names = card["class_names"]
    return [
        {
            "image": writable(str(file)),
            "readout": chosen,
            "classes": [(names[index], value) for index, value in zip(indices.tolist(), shares.tolist(), strict=True)],
        }
        for file, indices, shares in zip(files, best.indices, best.values, strict=True)
    ]


def _image_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = image_files(path)
    if not files:
        raise DataError(
            f"{path} contains no image ({', '.join(sorted(SUFFIXES))}): name image files, or folders of them"
        )
    return files


def _read(file: Path, channels: int, image_px: int, eval_crop: float) -> UInt8[Tensor, "channels height width"]:
    try:
        return torch.from_numpy(decode_image(file, channels, image_px, eval_crop).copy())
    except FileNotFoundError:
        raise DataError(f"image {file} does not exist: check its name") from None
    except Exception as error:  # Pillow raises many types
        raise DataError(f"image {file} cannot be decoded ({error}): convert it to PNG or leave it out") from None


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

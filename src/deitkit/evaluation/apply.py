"""Using a saved model: measuring it on a data set, and classifying files."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deitkit.data.dataset import Split, load_dataset
from deitkit.data.decode import SUFFIXES, decode_image, strict_pillow
from deitkit.data.duplicates import share_in_sketch
from deitkit.data.listing import writable
from deitkit.data.sources.folders import files_below
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
from deitkit.system.words import counted


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
        paths: Image files, or folders of them, with their subfolders.
        readout: The readout to use; by default that of the model's card, else the default one.
        top: Number of classes to return for each image, with their probabilities.

    Returns:
        For each image ``image``, ``readout`` and ``classes``; one in a folder that cannot be decoded has no classes,
        and ``error``.

    Raises:
        DataError: A named file cannot be read, or none of the images can.
        RecipeError: The model does not have the readout.
    """
    classifier, card = load_classifier(folder, choose_device("auto"))
    pixels, errors = _read_all(paths, card)
    files = [file for file in pixels if file not in errors]
    if not files:
        first = next(iter(errors))
        raise DataError(
            f"none of {counted(len(errors), 'image')} can be decoded, first {first} ({errors[first]}): convert them"
        )
    split = Split(torch.stack([pixels[file] for file in files]), torch.zeros(len(files), dtype=torch.int64))
    scores = readout_scores(predict(classifier, split, Precision.choose("auto", classifier.mean.device)))
    chosen = readout or card.get("readout") or default_readout(list(scores))
    if chosen not in scores:
        raise RecipeError(f"--readout {chosen}: this model has {', '.join(scores)}")
    probabilities = scores[chosen].softmax(dim=-1)
    best = probabilities.topk(min(top, probabilities.shape[-1]), dim=-1)
    names = card["class_names"]
    answers = {
        file: [(names[index], value) for index, value in zip(indices.tolist(), shares.tolist(), strict=True)]
        for file, indices, shares in zip(files, best.indices, best.values, strict=True)
    }
    return [
        {"image": writable(str(file)), "readout": chosen, "classes": answers.get(file, [])}
        | ({"error": errors[file]} if file in errors else {})
        for file in pixels
    ]


def _read_all(paths: list[Path], card: dict[str, Any]) -> tuple[dict[Path, Tensor], dict[Path, str]]:
    """Return the pixels of image files, and why some have none; a file that was named itself must be readable."""
    pixels: dict[Path, Tensor] = {}
    errors: dict[Path, str] = {}
    with strict_pillow():
        for named, file in ((path, file) for path in paths for file in _image_files(path)):
            try:
                image = decode_image(file, card["channels"], _input_px(card), _eval_crop(card))
            except Exception as error:  # Pillow raises many types
                if file == named and isinstance(error, FileNotFoundError):
                    raise DataError(f"image {file} does not exist: check its name") from None
                if file == named:
                    told = f"image {file} cannot be decoded ({error}): convert it to PNG or leave it out"
                    raise DataError(told) from None
                pixels[file], errors[file] = torch.empty(0), str(error)
            else:
                pixels[file] = torch.from_numpy(image.copy())
    return pixels, errors


def _image_files(path: Path) -> list[Path]:
    """Return the path itself, or the images in a folder and its subfolders."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in files_below(path) if file.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(
            f"{path} contains no image ({', '.join(sorted(SUFFIXES))}): name image files, or folders of them"
        )
    return files


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

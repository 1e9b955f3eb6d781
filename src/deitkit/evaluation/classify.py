"""Classifying any number of image files: decoded ahead by worker processes, in batches, in bounded memory."""

import itertools
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from deitkit.data.decode import SUFFIXES, decode_image, strict_pillow, too_many_pixels
from deitkit.data.sources.folders import files_below
from deitkit.errors import DataError, RecipeError
from deitkit.evaluation.predict import precision_of
from deitkit.evaluation.readouts import choose_readout, named_scores
from deitkit.models.accelerate import uncompiled
from deitkit.models.built import head_name
from deitkit.models.card import ModelCard
from deitkit.models.classifier import Classifier
from deitkit.models.onnx_file import OnnxGraph
from deitkit.models.saved import load_classifier
from deitkit.models.vit import DeiT, Output
from deitkit.system.device import Precision, choose_device
from deitkit.system.process import usable_cores
from deitkit.system.words import counted, display_name

BATCH_SIZE = 64
FEWEST_FOR_WORKERS = 256  # files; starting processes takes seconds


class Answer(TypedDict):
    """What a model says of an image.

    Attributes:
        readout: By which it answers; None where it did not.
        classes: Names with probabilities, the likeliest first.
        embedding: The input of its head, float32; only where that was asked for.
    """

    readout: str | None
    classes: list[tuple[str, float]]
    embedding: NotRequired[np.ndarray]


class Prediction(Answer):
    """What a model says of one of several images.

    Attributes:
        image: Its file; of an image in memory its place.
        error: Why it cannot be decoded; only where that is so, and then ``classes`` is empty.
    """

    image: str
    error: NotRequired[str]


class ImageFiles(torch.utils.data.Dataset[tuple[int, Tensor | str]]):
    """Image files as a model takes them; a file that cannot be decoded is its error, as text."""

    def __init__(self, files: Sequence[Path], card: ModelCard) -> None:
        self.files, self.card = files, card

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> tuple[int, Tensor | str]:
        """Return a file's place, and its pixels or its error."""
        try:
            with strict_pillow():
                pixels = decode_for(self.card, self.files[place])
        except Exception as error:  # Pillow raises many types
            return place, str(error)
        return place, torch.from_numpy(pixels.copy())


def decode_for(card: ModelCard, image: Path | Image.Image) -> UInt8[np.ndarray, "channels height width"]:
    """Decode an image as a model takes it; Pillow raises many types if it cannot be decoded."""
    return decode_image(image, card.channels, card.side, card.eval_crop, card.fit)


def forks() -> bool:
    """Return whether a new process is a copy of this one; else it runs the user's script again, without a main guard.

    Asking does not settle it, so that the user may still choose.
    """
    chosen = multiprocessing.get_start_method(allow_none=True)
    return (chosen or multiprocessing.get_all_start_methods()[0]) == "fork"


def image_files(path: Path) -> list[Path]:
    """Return a named file, or the images in a named folder and its subfolders.

    Raises:
        DataError: It does not exist, or is a folder without an image.
    """
    if not path.exists():
        raise DataError(f"image {path} does not exist: check its name")
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"image {path} is neither a file nor a folder: name image files, or folders of them")
    files = [path] if not path.is_dir() else sorted(_images_below(path))
    if not files:
        raise DataError(
            f"{path} contains no image ({', '.join(sorted(SUFFIXES))}): name image files, or folders of them"
        )
    return files


def _images_below(folder: Path) -> Iterator[Path]:
    return (file for file in files_below(folder) if file.suffix.lower() in SUFFIXES and file.is_file())


class Classification(Iterable[Prediction]):
    """What a model says of each image, in order and each once; the next images are decoded meanwhile.

    Its length is the number of images, ``files`` their paths, and ``named`` those that each path stands for;
    ``remarks`` are on how they are classified, as sentences without a full stop.

    Args:
        model: Its folder, or what ``load_classifier`` returned for it.
        paths: Image files, or folders of them, with their subfolders.
        readout: The readout to use; by default that of the model's card, else the default one.
        top: Number of classes for each image, with their probabilities.
        embed: Add ``embedding``, the input of the model's head (of both heads, one after the other), float32.
        workers: Processes that decode; by default none for few files, else one for each core.

    Yields:
        ``image``, ``readout`` and ``classes``; one that cannot be decoded has no classes, and ``error``.

    Raises:
        DataError: A named file does not exist, or none of the images can be decoded.
        RecipeError: As ``classify_pixels``.
    """

    def __init__(
        self,
        model: Path | tuple[Classifier, ModelCard],
        paths: Sequence[Path],
        *,
        readout: str | None = None,
        top: int = 3,
        embed: bool = False,
        workers: int | None = None,
    ) -> None:
        device = choose_device("auto")
        self.classifier, self.card = load_classifier(model, device) if isinstance(model, Path) else model
        self.precision, self.remarks = precision_of(self.card, device)
        self.named = {path: image_files(path) for path in paths}
        self.files = list(dict.fromkeys(itertools.chain.from_iterable(self.named.values())))
        self.card.require_side()  # here, and not with each image
        self.readout, self.top, self.embed = readout, top, embed
        if workers is None:
            workers = usable_cores() if len(self.files) >= FEWEST_FOR_WORKERS else 0
        self.workers = workers

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Prediction]:
        loader = DataLoader(
            ImageFiles(self.files, self.card),
            BATCH_SIZE,
            collate_fn=list,
            num_workers=self.workers,
            prefetch_factor=2 if self.workers else None,
            generator=torch.Generator(),  # else it draws from the caller's
        )
        answered = 0
        failed: dict[int, str] = {}  # the first batch of them
        for batch in loader:
            errors = {place: found for place, found in batch if isinstance(found, str)}
            failed = failed or errors
            answers = self._answers({place: found for place, found in batch if isinstance(found, Tensor)})
            answered += len(answers)
            for place, _ in batch:
                image = display_name(str(self.files[place]))
                if place in answers:
                    yield Prediction(image=image, **answers[place])
                else:
                    readout = self.readout or self.card.readout
                    yield Prediction(image=image, readout=readout, classes=[], error=errors[place])
        if not answered:
            raise DataError(self._none_decoded(*next(iter(failed.items()))))

    def _none_decoded(self, place: int, reason: str) -> str:
        """Say that no image can be decoded, from the first of them and its reason."""
        remedy = "resize it" if too_many_pixels() in reason else "convert it to PNG"
        if len(self) == 1:
            return f"image {self.files[place]} cannot be decoded ({reason}): {remedy} or leave it out"
        images = counted(len(self), "image")
        return f"none of {images} can be decoded, first {self.files[place]} ({reason}): {remedy}, and the others"

    def _answers(self, pixels: dict[int, UInt8[Tensor, "channels height width"]]) -> dict[int, Answer]:
        if not pixels:
            return {}
        images = list(pixels.values())
        answers = classify_pixels(
            self.classifier, self.card, self.precision, images, self.readout, self.top, self.embed
        )
        return dict(zip(pixels, answers, strict=True))


@torch.inference_mode()
def classify_pixels(
    classifier: Classifier,
    card: ModelCard,
    precision: Precision,
    pixels: list[UInt8[Tensor, "channels height width"]],
    readout: str | None = None,
    top: int = 3,
    embed: bool = False,
) -> list[Answer]:
    """Return what a model says of images that were decoded as its card says: ``readout`` and ``classes`` of each.

    Args:
        classifier: With its card, as ``load_classifier`` returns both.
        card: Of the classifier.
        precision: Of the forward pass.
        pixels: Images of one size.
        readout: As in ``Classification``, like the next two.
        top: Number of classes for each image.
        embed: Add ``embedding``.

    Raises:
        RecipeError: The model does not have the readout, or ``top`` is not a positive number.
    """
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise RecipeError(f"top is {top!r}: give the number of classes to return, at least 1")
    view = torch.stack(pixels).to(precision.device).float() / 255
    heads = _heads(classifier.model, len(card.class_names)) if embed else []
    with uncompiled(), precision.autocast(), _recorded_inputs(heads) as features:
        output = classifier.eval()(view)
    logits = (output.class_logits, output.distillation_logits)
    scores = named_scores(Output(*(None if head is None else head.float() for head in logits)), card)
    chosen = choose_readout(readout, card, scores)
    probabilities = scores[chosen].softmax(dim=-1).cpu()
    best = probabilities.sort(dim=-1, descending=True, stable=True)  # of equals the first, as in an evaluation
    answers = []
    for indices, shares in zip(best.indices[:, :top].tolist(), best.values[:, :top].tolist(), strict=True):
        classes = [(card.class_names[index], share) for index, share in zip(indices, shares, strict=True)]
        answers.append(Answer(readout=chosen, classes=classes))
    if embed:
        for answer, embedding in zip(answers, torch.cat(features, dim=1).float().cpu().numpy(), strict=True):
            answer["embedding"] = embedding
    return answers


def _heads(model: nn.Module, classes: int) -> list[nn.Module]:
    if isinstance(model, OnnxGraph):
        raise RecipeError("--embeddings: an ONNX file gives only its probabilities; use the model folder it came from")
    is_student = isinstance(model, DeiT)
    heads = [model.head, model.head_dist] if is_student else [model.get_submodule(head_name(model, classes))]
    return [head for head in heads if isinstance(head, nn.Module)]


@contextmanager
def _recorded_inputs(heads: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Record what enters heads inside the block, as vectors."""
    seen: list[Tensor] = []

    def keep(head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].flatten(2).mean(dim=2) if inputs[0].ndim > 2 else inputs[0])

    with ExitStack() as stack:
        for head in heads:
            stack.enter_context(head.register_forward_pre_hook(keep))
        yield seen

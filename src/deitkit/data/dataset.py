"""Loading the data set of a recipe: listing, splitting, decoding, statistics.

The layout of each kind of source belongs in ``sources``; batches and augmentation have their own modules.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from deitkit.data.cache import sha256
from deitkit.data.duplicates import (
    LEAST_NEAR_PX,
    MOST_EXAMPLES,
    MOST_PAIRS,
    Duplicates,
    find_duplicates,
    find_near_duplicates,
)
from deitkit.data.listing import EncodedImages, Listing, ProgressCallback
from deitkit.data.originals import decodable_images, original_images
from deitkit.data.pixels import mean_and_std, mean_and_std_of_counts
from deitkit.data.selection import crop_source_of, crop_source_px, read_selection
from deitkit.data.sources.choose import folder_within, list_images_of
from deitkit.data.sources.folders import list_images
from deitkit.data.split import Split, SplitIndices, plan_splits
from deitkit.data.survey import Survey
from deitkit.errors import DataError
from deitkit.recipe.schema import DataRecipe
from deitkit.recipe.section import from_home
from deitkit.system.seeding import fixed_shuffle
from deitkit.system.words import counted, display_name


@dataclass(frozen=True)
class Dataset:
    """A data set with its splits and its description.

    Attributes:
        name: As in the recipe.
        train: Images to train on.
        validation: Images held out from the training images, to check the teacher and draw curves.
        test: Images for the final figures only.
        class_names: Names of the classes, by label.
        mean: Of each channel of the training images, as values in [0, 1].
        std: Of each channel of the training images, as values in [0, 1]; at least 1/255.
        skipped: Names of images that could not be decoded.
        fingerprint: SHA-256 over images, labels and class names of all splits, in hexadecimal; for streamed images over
            the names, sizes and times of their files instead.
        duplicates: Test images that are also training images.
        remarks: What was assumed or left out while the data set was listed, as sentences without a full stop.
        fit: How images became square, as ``data.fit``.
        unlabelled: Images to train on without labels, all labelled -1; None without any.
        names: Returns the name of an image by its split and place, for messages.
        test_places: Position of each test image among all images of the data set.
        hashed_as: Channels and side of the pixels that are hashed, of a named set that is kept as pixels; None for
            files, which are hashed as they are decoded.
        divided: Whether the test images were drawn from all, since the data set has no test split of its own.
        has_own_validation: Whether it has a validation split of its own.
        eval_crop: Share of a side that validation and test images keep.
        originals: Returns training images by their positions as they were before they were resized to a square; None if
            nothing was resized.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: tuple[str, ...]
    fingerprint: str
    duplicates: Duplicates = field(default_factory=Duplicates)
    remarks: tuple[str, ...] = ()
    originals: Callable[[Int64[Tensor, " m"]], list[np.ndarray]] | None = None
    fit: str = "crop"
    unlabelled: Split | None = None
    names: Callable[[str, int], str] | None = None
    test_places: Int64[Tensor, " test"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    hashed_as: tuple[int, int] | None = None
    divided: bool = False
    has_own_validation: bool = False
    eval_crop: float = 1.0

    @cached_property
    def near_duplicates(self) -> Duplicates:
        """Test images that look like a training image; not looked for among tiny, streamed or very many images."""
        train, test = self.train.images, self.test.images
        if not isinstance(train, Tensor) or not isinstance(test, Tensor) or self.names is None:
            return Duplicates()
        if min(self.image_px) < LEAST_NEAR_PX or len(train) * len(test) > MOST_PAIRS:
            return Duplicates()
        fresh = (~torch.isin(self.test.hashes, self.train.hashes)).nonzero().flatten()
        top, left = (round(side * (1 - self.eval_crop) / 2) for side in self.image_px)
        height, width = self.image_px
        centres = train[:, :, top : height - top, left : width - left]  # the part that test images are
        pairs = find_near_duplicates(centres, test[fresh]).tolist()
        few = [
            (self.names("test", int(fresh[one])), self.names("train", other)) for one, other in pairs[:MOST_EXAMPLES]
        ]
        return Duplicates(len(pairs), tuple(few), near=True)

    @property
    def streamed(self) -> bool | Literal["unlabelled"]:
        """Whether its images are streamed, as ``data.streaming``: all, none, or only those without labels."""
        if not isinstance(self.train.images, Tensor):
            return True
        return "unlabelled" if self.unlabelled and not isinstance(self.unlabelled.images, Tensor) else False

    def unlabelled_in_step(self, wanted: int) -> int:
        """Return how many images without labels a step has: those that are wanted, or all there are."""
        return 0 if self.unlabelled is None else min(wanted, len(self.unlabelled))

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return self.train.images.shape[1]

    @property
    def image_px(self) -> tuple[int, int]:
        """Height and width."""
        return self.train.images.shape[2], self.train.images.shape[3]


def load_labelled(
    recipe: DataRecipe, progress: ProgressCallback | None = None, *, random_crops: bool = False
) -> Dataset:
    """Load the images with labels of a recipe, as uint8 images in memory or as streamed files.

    Labels are read and split first (see ``plan_splits``); only images that belong to a split are decoded. An image
    that cannot be decoded is therefore missing from its split, and does not move others between splits.

    Args:
        recipe: The data set and its splits.
        progress: Called with the stage, the number of images done, and their total number.
        random_crops: Whether training cuts random crops from the images, for which ``train_px`` keeps them larger.

    Raises:
        DataError: The data set is missing or malformed, does not fit the recipe, or does not fit in memory.
    """
    listing, indices = _plan(recipe, progress)
    parts = (indices.train, indices.validation, indices.test)
    selection = torch.cat(parts)
    train_px = crop_source_px(recipe) if random_crops else None
    found = read_selection(listing, selection, len(indices.train), recipe, progress, train_px)
    sizes = [int(kept.sum()) for kept in found.kept.split([len(part) for part in parts])]
    places, hashes = selection[found.kept].split(sizes), found.hashes[found.kept].split(sizes)
    labels = [listing.labels[some] for some in places]
    images = found.images.split(sizes)
    splits = [Split(pixels, classes, hashes=own) for pixels, classes, own in zip(images, labels, hashes, strict=True)]
    _require_all_classes(dict(zip(("train", "validation", "test"), splits, strict=True)), listing, recipe)
    train, validation, test = splits
    train = replace(train, crop_source=crop_source_of(found, len(indices.train), train_px))
    names = partial(_name_in_split, listing, {"train": places[0], "validation": places[1], "test": places[2]})
    mean, std = (
        mean_and_std_of_counts(found.counts) if isinstance(found, Survey) else mean_and_std(found.images[: sizes[0]])
    )
    return Dataset(
        name=recipe.name,
        train=train,
        validation=validation,
        test=test,
        class_names=listing.class_names,
        mean=mean,
        std=std,
        skipped=listing.skipped + found.skipped,
        fingerprint=_fingerprint(splits, listing.class_names, found.key if isinstance(found, Survey) else None),
        duplicates=_duplicates(names, find_duplicates(train.hashes, test.hashes)),
        remarks=listing.remarks,
        originals=partial(original_images, listing, places[0]) if recipe.image_px is not None else None,
        fit=recipe.fit,
        names=names,
        test_places=places[2],
        hashed_as=None if isinstance(listing.images, EncodedImages) else (*listing.images.shape[1:3],),
        divided=listing.official_test is None,
        has_own_validation=listing.official_validation is not None,
        eval_crop=recipe.eval_crop if recipe.image_px is not None else 1.0,
    )


def load_dataset(
    recipe: DataRecipe, progress: ProgressCallback | None = None, *, random_crops: bool = False
) -> Dataset:
    """Load the data set of a recipe: the images of ``load_labelled``, and those without labels if it has some."""
    dataset = load_labelled(recipe, progress, random_crops=random_crops)
    return dataset if recipe.unlabelled is None else add_unlabelled(dataset, recipe, progress)


def as_read(recipe: DataRecipe, dataset: Dataset) -> DataRecipe:
    """Return a recipe that streams its images as this data set does, on machines with other free memory too."""
    return recipe.model_copy(update={"streaming": dataset.streamed})


def add_unlabelled(dataset: Dataset, recipe: DataRecipe, progress: ProgressCallback | None = None) -> Dataset:
    """Add the images of ``recipe.unlabelled``, in the size and channels of the labelled ones, without their labels.

    Images that are also validation or test images are left out, by their pixels.

    Raises:
        DataError: They are missing, or none can be read.
    """
    source = recipe.unlabelled
    assert source is not None
    if source == "rest":
        listing, indices = _plan(recipe, None)
        selection = indices.rest
        if not len(selection):
            raise DataError(
                f"data.unlabelled=rest is empty, since data.train_images={recipe.train_images} are all there are: "
                "lower it, or drop data.unlabelled"
            )
    else:
        listing = _list_unlabelled(source)
        selection = torch.arange(len(listing.labels))
    height, width = dataset.image_px
    if height != width and recipe.image_px is None:
        raise DataError(
            f"data.unlabelled={source} needs square images, but these have {height} x {width} px: set data.image_px"
        )
    if recipe.streaming == "unlabelled" and isinstance(listing.images, Tensor):
        raise DataError(
            f"data.streaming=unlabelled, but data.name={recipe.name} fits in memory and is kept there: drop it"
        )
    # Those of a data set that is streamed are streamed too, so that a resumed run cuts its crops from the same pixels.
    streaming = dataset.streamed or recipe.streaming == "unlabelled" or recipe.streaming
    sized = recipe.model_copy(
        update={"image_px": recipe.image_px or width, "channels": dataset.channels, "streaming": streaming}
    )
    train_px = None if dataset.train.crop_source is None else crop_source_px(sized)
    found = read_selection(listing, selection, len(selection), sized, progress, train_px)
    held_out = torch.cat([dataset.validation.hashes, dataset.test.hashes])
    hashed = found
    if dataset.hashed_as is not None and isinstance(listing.images, EncodedImages):  # as the held-out images are
        native = sized.model_copy(update=dict(zip(("channels", "image_px"), dataset.hashed_as, strict=True)))
        hashed = read_selection(listing, selection, len(selection), native, progress)
    fresh = ~torch.isin(hashed.hashes[found.kept], held_out)
    if not bool(fresh.any()):
        raise DataError(
            f"data.unlabelled={source} has no image that can be read and is not a validation or test image: add some"
        )
    remarks = [f"{remark} (unlabelled)" for remark in listing.remarks if source != "rest"]
    remarks += _left_out(found.skipped, int((~fresh).sum()))
    images, crop_source = found.images, crop_source_of(found, len(selection), train_px)
    if not bool(fresh.all()):  # otherwise a copy would take as much memory again
        images, crop_source = images[fresh], None if crop_source is None else crop_source[fresh]
    hashes = found.hashes[found.kept][fresh]
    unlabelled = Split(images, torch.full((len(hashes),), -1), hashes=hashes, crop_source=crop_source)
    return replace(dataset, unlabelled=unlabelled, remarks=(*dataset.remarks, *remarks))


def _left_out(skipped: Sequence[str], held_out: int) -> Iterator[str]:
    """Yield remarks on the images without labels that are not used."""
    if skipped:
        files = counted(len(skipped), "unlabelled file")
        yield f"left out: {files} that cannot be decoded, first {skipped[0]}"
    if held_out:
        yield f"left out: {counted(held_out, 'unlabelled image')} that are also validation or test images"


def _list_unlabelled(source: str) -> Listing:
    kind, _, path = source.partition(":")
    if kind != "folder" or not path:
        raise DataError(f"data.unlabelled={source} is not a source of images: write rest or folder:PATH")
    return list_images(from_home(Path(path)))


def load_test(
    recipe: DataRecipe, progress: ProgressCallback | None = None, *, everything: bool = False
) -> tuple[Split, tuple[str, ...], int | None]:
    """Load only the test images of ``load_labelled``, or with ``everything`` all images with labels, undivided.

    Returns:
        The images, the names of the classes, and of how many images the test images were drawn; None for a test split.
    """
    listing = _listed(recipe, progress)
    places = torch.arange(len(listing.labels)) if everything else plan_listing(listing, recipe).test
    found = read_selection(listing, places, 0, recipe, progress)
    split = Split(found.images, listing.labels[places[found.kept]], hashes=found.hashes[found.kept])
    _require_all_classes({"test": split}, listing, recipe)
    return split, listing.class_names, len(listing.labels) if listing.official_test is None else None


def load_validation_at(recipe: DataRecipe, sizes: Sequence[int], count: int) -> list[Split]:
    """Load the same ``count`` validation images, drawn at random but always the same, at several resolutions.

    Args:
        recipe: The data set and its splits.
        sizes: Sides in px, instead of ``recipe.image_px``.
        count: At most this many images.
    """
    listing, indices = _plan(recipe, None)
    shuffled = fixed_shuffle(len(indices.validation))
    some = indices.validation[shuffled[:count].sort().values]
    splits = []
    for image_px in sizes:
        found = read_selection(listing, some, 0, recipe.model_copy(update={"image_px": image_px}), None)
        splits.append(Split(found.images, listing.labels[some[found.kept]]))
    return splits


def load_test_examples(recipe: DataRecipe, count: int) -> list[tuple[UInt8[np.ndarray, "height width 3"], str]]:
    """Return some test images as they are, with their classes: as many of every class as can be, always the same.

    Args:
        recipe: The data set and its splits.
        count: At most this many images.

    Raises:
        DataError: The data set cannot be listed.
    """
    listing, indices = _plan(recipe, None)
    shuffled = indices.test[fixed_shuffle(len(indices.test))]
    classes = [shuffled[listing.labels[shuffled] == label] for label in range(len(listing.class_names))]
    queues = [decodable_images(listing, places) for places in classes]
    rounds = zip_longest(*queues)
    in_turn = (pair for images in rounds for pair in zip(images, listing.class_names) if pair[0] is not None)
    return list(islice(in_turn, count))


def _plan(recipe: DataRecipe, progress: ProgressCallback | None) -> tuple[Listing, SplitIndices]:
    """List the data set and assign its images to splits."""
    listing = _listed(recipe, progress)
    return listing, plan_listing(listing, recipe)


def _listed(recipe: DataRecipe, progress: ProgressCallback | None) -> Listing:
    try:
        listing = list_images_of(recipe, progress)
    except OSError as error:
        raise DataError(
            f"data.name={recipe.name} cannot be read ({error}): check the path and its permissions"
        ) from None
    return replace(listing, class_names=tuple(display_name(name) for name in listing.class_names))


def plan_listing(listing: Listing, recipe: DataRecipe) -> SplitIndices:
    """Assign the images of a listing to splits, see ``plan_splits``; raise DataError for fewer than two classes."""
    if len(listing.class_names) < 2:
        raise DataError(
            f"data.name={recipe.name} has {counted(len(listing.class_names), 'class')}, but at least 2 are needed: "
            f"{folder_within(recipe.name) or 'add another'}"
        )
    return plan_splits(
        listing.labels,
        listing.official_test,
        listing.class_names,
        recipe,
        listing.groups,
        listing.official_validation,
    )


def _require_all_classes(splits: dict[str, Split], listing: Listing, recipe: DataRecipe) -> None:
    """Raise DataError if a split lacks a class because images could not be decoded."""
    classes = len(listing.class_names)
    listed = torch.bincount(listing.labels, minlength=classes) > 0
    for name, split in splits.items():
        lacking = (listed & (torch.bincount(split.labels, minlength=classes) == 0)).nonzero().flatten().tolist()
        if lacking:
            raise DataError(
                f"class '{listing.class_names[lacking[0]]}' of data.name={recipe.name} has no decodable image in the "
                f"{name} split: repair or replace its files"
            )


def _duplicates(names: Callable[[str, int], str], pairs: Int64[Tensor, "pairs 2"]) -> Duplicates:
    """Describe duplicates, with the names of some of them."""
    few = pairs[:MOST_EXAMPLES].tolist()
    return Duplicates(len(pairs), tuple((names("test", one), names("train", other)) for one, other in few))


def _name_in_split(listing: Listing, places: dict[str, Tensor], split: str, place: int) -> str:
    return listing.name_of(int(places[split][place]))


def _fingerprint(splits: list[Split], class_names: tuple[str, ...], streamed_key: str | None) -> str:
    contents = [
        sha256(split.images, split.labels) if isinstance(split.images, Tensor) else sha256(split.labels)
        for split in splits
    ]
    if streamed_key is not None:
        contents.append(streamed_key)
    return hashlib.sha256(json.dumps([contents, class_names]).encode()).hexdigest()

"""Labelled images, and the split of a data set into train, validation and test.

Pure functions of labels and the recipe: nothing here reads a file or decodes an image.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64, UInt8
from torch import Tensor

from deitkit.data.augment.crop import draw_crops, resized_crop
from deitkit.data.stream import StreamedImages
from deitkit.errors import DataError, HasTestSplit
from deitkit.recipe.schema import AugmentRecipe, DataRecipe
from deitkit.system.device import to_device
from deitkit.system.words import counted

MOST_GPU_MEMORY = 0.5  # share of the free memory, for the images of a split
# A share of groups is one of 1 / share folds if that is this near, else some of at most this many.
NEAR_SHARE, MOST_FOLDS = 0.1, 20


@dataclass(frozen=True)
class CropSource:
    """Whole images, of which random crops are cut, instead of from the images that were resized before.

    Attributes:
        images: Stretched or padded to squares, of named sets as they are; None for the files of streamed images.
        sizes: Height and width of each, by which crops are drawn; on the CPU.
    """

    images: UInt8[Tensor, "n channels rows columns"] | None
    sizes: Int64[Tensor, "n 2"]

    def __getitem__(self, some: Bool[Tensor, " n"]) -> "CropSource":
        """Return some of them."""
        return CropSource(None if self.images is None else self.images[some], self.sizes[some])

    def to(self, device: torch.device) -> "CropSource":
        """Return them on a device, if there is room."""
        images = self.images
        if images is not None and _has_room(device, images.nbytes):
            images = images.to(device)
        return CropSource(images, self.sizes)


@dataclass(frozen=True)
class Split:
    """Images of a data set, to train on or to measure with.

    Attributes:
        images: Values 0 to 255.
        labels: Index of the class of each.
        hashes: Pixel hash of each; empty for images that no data set holds.
        crop_source: What random crops are cut from, if not from the images.
    """

    images: UInt8[Tensor, "n channels height width"] | StreamedImages
    labels: Int64[Tensor, " n"]
    hashes: Int64[Tensor, " hashed"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), kw_only=True)
    crop_source: CropSource | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, some: slice) -> "Split":
        """Return some of the images, to predict."""
        return Split(self.images[some], self.labels[some])

    def to(self, device: torch.device) -> "Split":
        """Return the split on a device, without a copy if it is already there.

        Encoded images, and images that would take more than half of the GPU's free memory, stay where they are.
        """
        images = self.images
        if isinstance(images, Tensor) and _has_room(device, images.nbytes):
            images = images.to(device)
        crop_source = None if self.crop_source is None else self.crop_source.to(device)
        return replace(self, images=images, labels=self.labels.to(device), crop_source=crop_source)

    def pixels(self, indices: Int64[Tensor, " m"]) -> UInt8[Tensor, "m channels height width"]:
        """Return the images at these positions, in this order."""
        return self.images[indices] if isinstance(self.images, Tensor) else self.images.decode(indices)

    def scale_of_crops(self, augment: AugmentRecipe) -> float | None:
        """Return the smallest share of a random crop that is cut from a whole image; None if none is."""
        cut = augment.crop == "random-resized" and self.crop_source is not None
        return augment.scale_min if cut else None

    def draw_crops(
        self, indices: Int64[Tensor, " m"], scale_min: float, generator: torch.Generator
    ) -> Float64[Tensor, "4 m"]:
        """Draw a random crop of each whole image: top, left, height and width, as shares of the image's.

        Args:
            indices: Of the images, on the CPU.
            scale_min: Smallest share of the area.
            generator: On the CPU.
        """
        assert self.crop_source is not None
        size = self.crop_source.sizes[indices].T
        return draw_crops(len(indices), size, scale_min, generator).double() / size.repeat(2, 1)

    def crops(
        self, indices: Int64[Tensor, " m"], shares: Float64[Tensor, "4 m"]
    ) -> UInt8[Tensor, "m channels height width"]:
        """Cut a crop from each whole image, at the size of the split's images; indices and shares are on the CPU."""
        assert self.crop_source is not None
        if not isinstance(self.images, Tensor):
            return self.images.crops(indices, shares)
        whole = self.crop_source.images
        assert whole is not None
        device = self.labels.device
        if whole.device == device:
            some = whole[to_device(indices, device)]
        else:
            some = to_device(whole[indices].pin_memory(), device)
        height, width = whole.shape[2:]
        boxes = shares * torch.tensor([height, width], dtype=torch.float64).repeat(2)[:, None]
        return resized_crop(some, boxes, (self.images.shape[2], self.images.shape[3]))

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        """Yield all images in order, ``size`` at a time."""
        if isinstance(self.images, Tensor):
            return iter(self.images.split(size))
        return self.images.batches(torch.arange(len(self)).split(size))


def _has_room(device: torch.device, size: int) -> bool:
    if device.type != "cuda":
        return True
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # what torch keeps for itself
    return size < MOST_GPU_MEMORY * (torch.cuda.mem_get_info(device)[0] + unused)


@dataclass(frozen=True)
class SplitIndices:
    """Positions of the images of each split in the whole data set, ascending; ``rest`` trains nothing with labels."""

    train: Int64[Tensor, " train"]
    validation: Int64[Tensor, " validation"]
    test: Int64[Tensor, " test"]
    rest: Int64[Tensor, " rest"]


def plan_splits(
    labels: Int64[Tensor, " n"],
    official_test: Bool[Tensor, " n"] | None,
    class_names: Sequence[str],
    recipe: DataRecipe,
    groups: Int64[Tensor, " n"] | None = None,
    official_validation: Bool[Tensor, " n"] | None = None,
) -> SplitIndices:
    """Split a data set, stratified by class, as a function of ``recipe.split_seed`` alone.

    The test split is the official one if there is one, else one of ``folds``, or ``test_fraction`` of all images. The
    validation split is the official one, else ``validation_fraction`` of the remainder. Only then are ``train_images``
    drawn from the rest, so that the validation split stays large with few training images. Every split has every
    class. Under the same seed the validation and test splits are the same for any number of training images, and a
    smaller training split is a subset of a larger one, but for a rounding of the classes' shares.

    Args:
        labels: Class of every image, 0 to ``len(class_names) - 1``.
        official_test: Which images belong to the data set's own test split; None if it has none.
        class_names: Names of the classes, for messages.
        recipe: Fractions, numbers of images and the seed.
        groups: The group of every image; a group is in one split. None if every image may be in any.
        official_validation: Which images belong to its own validation split; None if it has none.

    Raises:
        DataError: A class has too few images for every split or fold, or the recipe sets a number of images that
            exceeds those available or is less than the number of classes, or folds of a data set that has a test split.
    """
    draws = _Draws(labels, class_names, recipe) if groups is None else _GroupDraws(labels, class_names, recipe, groups)
    pool, test = _hold_out_test(draws, official_test)
    if official_validation is None:
        train, validation = draws.carve(pool, recipe.validation_fraction, leave=1)
    else:
        train, validation = pool[~official_validation[pool]], pool[official_validation[pool]]
        draws.require(validation, 1, "for validation")
        draws.require(train, 1, "to train on")
    rest = train[:0]
    if recipe.train_images is not None:
        rest, train = draws.subset(train, recipe.train_images, "train")
    elif recipe.test_images is not None:
        draws.skip(train)
    if recipe.test_images is not None:
        _, test = draws.subset(test, recipe.test_images, "test")
    return SplitIndices(train, validation, test, rest)


def _hold_out_test(draws: "_Draws", official_test: Bool[Tensor, " n"] | None) -> tuple[Tensor, Tensor]:
    """Return the images to train and validate on, and those to test on."""
    recipe = draws.recipe
    if official_test is None:
        everything = torch.arange(len(draws.labels))
        draws.require(everything, 3, "for train, validation and test")
        if recipe.folds is not None:
            return draws.fold(everything)
        return draws.carve(everything, recipe.test_fraction, leave=2)
    if recipe.folds is not None:
        raise HasTestSplit(
            f"data.folds={recipe.folds} divides all images, but data.name={recipe.name} has a test split of "
            f"{counted(int(official_test.sum()), 'image')}: drop data.folds, or put all images into one folder"
        )
    pool, test = (~official_test).nonzero().flatten(), official_test.nonzero().flatten()
    draws.require(test, 1, "for test")
    draws.require(pool, 2, "for train and validation")
    return pool, test


class _Draws:
    """Stratified draws from one seed, in the order of the calls."""

    def __init__(self, labels: Tensor, class_names: Sequence[str], recipe: DataRecipe) -> None:
        self.labels, self.class_names, self.recipe = labels, class_names, recipe
        self.generator = torch.Generator().manual_seed(recipe.split_seed)

    def require(self, pool: Tensor, least: int, where: str, remedy: str = "add images or remove the class") -> None:
        """Raise DataError if a class has fewer than ``least`` images in the pool."""
        counts = self._counts(pool)
        if int(counts.min()) < least:
            rare = int(counts.argmin())
            raise DataError(
                f"class '{self.class_names[rare]}' of data.name={self.recipe.name} has "
                f"{counted(int(counts[rare]), 'image')} {where}, but needs at least {least}: {remedy}"
            )

    def carve(self, pool: Tensor, fraction: float, leave: int) -> tuple[Tensor, Tensor]:
        """Return the rest, with at least ``leave`` images per class, and the drawn share, with at least one."""
        classes = len(self.class_names)
        count = min(max(round(fraction * len(pool)), classes), len(pool) - leave * classes)
        return self._draw(pool, count, leave)

    def fold(self, pool: Tensor) -> tuple[Tensor, Tensor]:
        """Return the other folds, and the fold of the recipe, by scikit-learn's stratified folds.

        Raises:
            DataError: A fold, not necessarily this one, lacks a class.
        """
        folds = self.recipe.folds
        assert folds is not None
        divided = self._folds(pool, folds)
        for number, (rest, drawn) in enumerate(divided, start=1):
            for part, least, name in ((drawn, 1, f"fold {number}"), (rest, 2, f"the folds beside fold {number}")):
                self.require(part, least, f"in {name} of {folds}", "lower data.folds, or add images")
        return divided[(self.recipe.fold or 1) - 1]

    def _folds(self, pool: Tensor, folds: int) -> list[tuple[Tensor, Tensor]]:
        self.require(pool, folds, f"for {counted(folds, 'fold')}")
        from sklearn.model_selection import StratifiedKFold  # here, since it takes a second to import

        return self._divide(StratifiedKFold, pool, folds)

    def _divide(
        self, splitter: Any, pool: Tensor, folds: int, groups: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the rest and the test part of every fold of one of scikit-learn's splitters."""
        own = None if groups is None else groups.numpy()
        division = splitter(folds, shuffle=True, random_state=self.recipe.split_seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of classes with fewer images than folds
            found = list(division.split(pool.numpy(), self.labels[pool].numpy(), own))
        return [(pool[torch.from_numpy(rest)], pool[torch.from_numpy(drawn)]) for rest, drawn in found]

    def subset(self, pool: Tensor, count: int, split: str) -> tuple[Tensor, Tensor]:
        """Return the rest, and the drawn number of images of the recipe."""
        field = f"data.{split}_images={count}"
        if count > len(pool):
            raise DataError(f"{field} exceeds the {len(pool)} images available to {split} on: lower it or drop it")
        if count < len(self.class_names):
            raise DataError(f"{field} is less than one image for each of {len(self.class_names)} classes: raise it")
        return self._draw(pool, count, leave=0)

    def skip(self, pool: Tensor) -> None:
        """Use up the random numbers of a subset, so that the next draw is the same with and without one."""
        torch.randperm(len(pool), generator=self.generator)

    def _draw(self, pool: Tensor, count: int, leave: int) -> tuple[Tensor, Tensor]:
        counts = self._counts(pool)
        quota = _apportion(counts, count, leave)
        shuffled = pool[torch.randperm(len(pool), generator=self.generator)]
        shuffled = shuffled[torch.argsort(self.labels[shuffled], stable=True)]
        label = self.labels[shuffled]
        rank_in_class = torch.arange(len(pool)) - (counts.cumsum(0) - counts)[label]
        drawn = rank_in_class < quota[label]
        return shuffled[~drawn].sort().values, shuffled[drawn].sort().values

    def _counts(self, pool: Tensor) -> Tensor:
        return torch.bincount(self.labels[pool], minlength=len(self.class_names))


class _GroupDraws(_Draws):
    """Draws of whole groups, by scikit-learn's folds that are stratified as well as groups allow."""

    def __init__(self, labels: Tensor, class_names: Sequence[str], recipe: DataRecipe, groups: Tensor) -> None:
        super().__init__(labels, class_names, recipe)
        self.groups = groups

    def carve(self, pool: Tensor, fraction: float, leave: int) -> tuple[Tensor, Tensor]:
        """Return the rest, and a share of about ``fraction`` of the images in whole groups, both with every class."""
        joined, folds = _share_as_folds(fraction, len(self.groups[pool].unique()))
        remedy = f"a share of {fraction:g} needs {folds}: raise data.validation_fraction and data.test_fraction"
        self._require_groups(pool, folds, remedy)
        parts = [drawn for _, drawn in self._group_folds(pool, folds)]
        for first in range(folds):
            drawn = torch.cat([parts[(first + number) % folds] for number in range(joined)]).sort().values
            rest = pool[~torch.isin(pool, drawn)]
            if int(self._counts(rest).min()) >= leave and int(self._counts(drawn).min()) >= 1:
                return rest, drawn
        raise DataError(
            f"the groups of data.name={self.recipe.name} cannot be divided so that every split has every class: try "
            "another data.split_seed, a larger data.validation_fraction or data.test_fraction, or more groups"
        )

    def _folds(self, pool: Tensor, folds: int) -> list[tuple[Tensor, Tensor]]:
        self._require_groups(pool, folds, f"data.folds={folds} needs {folds}: lower it")
        return self._group_folds(pool, folds)

    def _group_folds(self, pool: Tensor, folds: int) -> list[tuple[Tensor, Tensor]]:
        from sklearn.model_selection import StratifiedGroupKFold  # here, since it takes a second to import

        return self._divide(StratifiedGroupKFold, pool, folds, self.groups[pool])

    def _require_groups(self, pool: Tensor, folds: int, remedy: str) -> None:
        count = len(self.groups[pool].unique())
        if count < folds:
            raise DataError(
                f"data.name={self.recipe.name} has {counted(count, 'group')} to divide, but {remedy}, or add groups"
            )
        most = int(self._counts(pool).max())
        if most < folds:
            raise DataError(
                f"data.name={self.recipe.name} has at most {counted(most, 'image')} of a class to divide, but "
                f"{remedy}, or add images"
            )


def _share_as_folds(fraction: float, groups: int) -> tuple[int, int]:
    """Return how many folds of how many are a share: one of 1 / share if that is near, else some of finer ones."""
    folds = round(1 / fraction)
    if abs(1 / folds - fraction) <= NEAR_SHARE * fraction:
        return 1, folds
    finer = Fraction(fraction).limit_denominator(max(2, min(MOST_FOLDS, groups)))
    return (finer.numerator, finer.denominator) if 0 < finer < 1 else (1, folds)


def _apportion(counts: Tensor, total: int, leave: int) -> Tensor:
    """Apportion a total to classes in proportion to their counts: at least 1, at most all but ``leave`` of each."""
    exact = counts.double() * total / counts.sum()
    quota = exact.floor().long().clamp(min=1).minimum(counts - leave)
    while (missing := total - int(quota.sum())) != 0:
        step = 1 if missing > 0 else -1
        movable = quota < counts - leave if step > 0 else quota > 1
        owed = torch.where(movable, step * (exact - quota), -torch.inf)
        quota[owed.argmax()] += step
    return quota

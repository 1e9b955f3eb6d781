"""The result of every kind of source: a data set before it is split and its images are read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EncodedImages:
    """Images that are still files, or bytes inside a file.

    Attributes:
        names: Name of each image in messages.
        read: Yields the file or the bytes of each image at ascending positions; b"" for a missing image.
        key: Changes whenever the images may have changed, and is that of the same files at another time.
        files: The file of each image; None if images are not separate files.
        cache_key: Of what is cached of them: also changes when other files of the same size and date take their
            places, and more often than needed; by default ``key``.
    """

    names: Sequence[str]
    read: Callable[[list[int]], Iterator[Path | bytes]]
    key: str
    files: Sequence[Path] | None = None
    cache_key: str = ""

    def __post_init__(self) -> None:
        if not self.cache_key:
            object.__setattr__(self, "cache_key", self.key)


@dataclass(frozen=True)
class Listing:
    """All images of a data set with their labels.

    Attributes:
        images: Pixels, or encoded images.
        labels: The class of every image, an index into ``class_names``.
        official_test: Which images belong to the data set's own test split; None if it has none.
        official_validation: Which belong to its own validation split, beside a test split; None if it has none.
        class_names: Names of the classes.
        skipped: Names of images that were omitted because they could not be decoded.
        remarks: What was assumed or left out, as sentences without a full stop.
        groups: The group of every image, such as a patient; no group is divided between two splits. None without any.
    """

    images: UInt8[Tensor, "n channels height width"] | EncodedImages
    labels: Int64[Tensor, " n"]
    official_test: Bool[Tensor, " n"] | None
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    groups: Int64[Tensor, " n"] | None = None
    official_validation: Bool[Tensor, " n"] | None = None

    def name_of(self, position: int) -> str:
        """Return the name of an image in messages: its file, or its place in its split if images have no names."""
        if isinstance(self.images, EncodedImages):
            return self.images.names[position]
        if self.official_test is None:
            return f"image {position}"
        is_test = bool(self.official_test[position])
        place = int((self.official_test[:position] == is_test).sum())
        return f"{'test' if is_test else 'training'} image {place}"


def below_here(path: Path) -> str:
    """Say where a relative path was looked for; nothing of an absolute one."""
    return "" if path.is_absolute() else f" in {Path.cwd()}"

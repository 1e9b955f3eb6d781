"""What every kind of source hands over: a data set as it lies, before it is divided and its images are read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

Progress = Callable[[str, int, int], None]


def writable(name: str) -> str:
    """Return a name as UTF-8 can hold it: odd bytes, such as an old archive's, are spelt out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class EncodedImages:
    """Images that are still files, or bytes inside of one.

    Attributes:
        names: What a message calls each image.
        read: Yields the file or the bytes of each image at ascending positions; b"" where there is none.
        key: Changes whenever the images may have changed.
        files: The file of each image; None where images are no files of their own.
    """

    names: Sequence[str]
    read: Callable[[list[int]], Iterator[Path | bytes]]
    key: str
    files: Sequence[Path] | None = None


@dataclass(frozen=True)
class Listing:
    """All images of a data set: their labels, and their pixels if it comes decoded.

    Attributes:
        images: Pixels, or what has yet to be decoded.
        labels: The class of every image, an index into ``class_names``.
        official_test: Which images belong to the data set's own test split; None if it has none.
        class_names: Names of the classes.
        skipped: Names of images that were left out because they could not be decoded.
    """

    images: UInt8[Tensor, "n channels height width"] | EncodedImages
    labels: Int64[Tensor, " n"]
    official_test: Bool[Tensor, " n"] | None
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = ()

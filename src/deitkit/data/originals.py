"""Images as they are in their files, before they become a model's square: to look at, not to train on."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from deitkit.data.decode import decode_image
from deitkit.data.listing import Listing


def decodable_images(
    listing: Listing, places: Int64[Tensor, " places"]
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Yield the images that can be decoded, as they are."""
    for place in range(len(places)):
        try:
            (image,) = original_images(listing, places, torch.tensor([place]))
        except Exception:  # noqa: S112 - Pillow raises many types; the comparison has named what cannot be decoded
            continue
        yield image


def original_images(
    listing: Listing, places: Int64[Tensor, " places"], some: Int64[Tensor, " m"]
) -> list[UInt8[np.ndarray, "height width 3"]]:
    """Return some images as they were before they were resized; ``some`` are positions in ``places``."""
    positions = places[some].tolist()
    if isinstance(listing.images, Tensor):
        return [image.expand(3, -1, -1).permute(1, 2, 0).numpy() for image in listing.images[positions]]
    ascending = sorted(positions)
    decoded = [decode_image(encoded, 3).transpose(1, 2, 0) for encoded in listing.images.read(ascending)]
    return [decoded[ascending.index(position)] for position in positions]

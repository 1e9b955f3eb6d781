"""Reading a selection of the images of a listing in the size of a recipe: as they are, decoded, or to be streamed."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from deitkit.data.decode_many import DecodedImages, decode_images
from deitkit.data.duplicates import pixel_hashes
from deitkit.data.listing import EncodedImages, Listing, ProgressCallback
from deitkit.data.pixels import require_memory, resize, to_channels
from deitkit.data.split import CropSource
from deitkit.data.survey import Survey, survey, wants_streaming
from deitkit.recipe.schema import DataRecipe

_CHUNK = 1024  # images copied at a time for hashing


def read_selection(
    listing: Listing,
    selection: Int64[Tensor, " selected"],
    train_count: int,
    recipe: DataRecipe,
    progress: ProgressCallback | None,
    train_px: int | None = None,
) -> DecodedImages | Survey:
    """Decode the selected images, or survey them if they are streamed; the first ones are training images."""
    # The same decision with and without random crops, so that a finished run is checked on the images that it saw.
    larger = (train_count, crop_source_px(recipe) or 0)
    if wants_streaming(listing.images, len(selection), recipe, larger):
        assert isinstance(listing.images, EncodedImages)
        return survey(listing.images, selection, train_count, recipe, progress)
    return _pixels(listing, selection, train_count, recipe, progress, train_px)


def crop_source_px(recipe: DataRecipe) -> int | None:
    """Return the side at which images are kept for random crops; None if these are cut from what was resized."""
    if recipe.image_px is None or recipe.train_px == recipe.image_px:
        return None
    return recipe.train_px or 2 * recipe.image_px


def crop_source_of(found: DecodedImages | Survey, train_count: int, train_px: int | None) -> CropSource | None:
    """Return what random crops of the training images are cut from; None for what was resized."""
    if train_px is None or found.sizes is None:
        return None
    sizes = found.sizes[:train_count][found.kept[:train_count]]
    return CropSource(None if isinstance(found, Survey) else found.larger, sizes)


def _pixels(
    listing: Listing,
    selection: Int64[Tensor, " selected"],
    train_count: int,
    recipe: DataRecipe,
    progress: ProgressCallback | None,
    train_px: int | None,
) -> DecodedImages:
    """Return the selected images in the size and channels of the recipe; the first ones are training images."""
    if isinstance(listing.images, EncodedImages):
        return decode_images(listing.images, selection, recipe, progress, train_count=train_count, train_px=train_px)
    native = listing.images.shape[1:]
    image_px, channels = recipe.image_px or native[1], recipe.channels or native[0]
    require_memory((len(selection), channels, image_px, image_px))
    eval_crop = recipe.eval_crop if recipe.image_px is not None else 1.0
    images = resize(listing.images[selection], image_px, train_count=train_count, eval_crop=eval_crop)
    images = to_channels(images, channels)
    hashes = [pixel_hashes(listing.images[some].numpy()) for some in selection.split(_CHUNK)]
    kept = torch.ones(len(selection), dtype=torch.bool)
    decoded = DecodedImages(images, kept, (), torch.from_numpy(np.concatenate(hashes)))
    if train_px is None or native[1] == image_px:
        return decoded
    whole = to_channels(listing.images[selection[:train_count]], channels)
    return replace(decoded, larger=whole, sizes=torch.tensor(native[1:]).repeat(len(selection), 1))

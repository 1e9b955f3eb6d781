import io
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as reference

from deitkit.data import cache
from deitkit.data.decode import decode_image
from deitkit.data.decode_many import close_gaps, decode_images
from deitkit.data.listing import EncodedImages
from deitkit.data.pixels import is_grey, mean_and_std, require_memory, resize, to_channels
from deitkit.errors import DataError
from deitkit.recipe.schema import DataRecipe


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEITKIT_CACHE", str(tmp_path / "cache"))


def colours(height=6, width=9, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image, kind="PNG", **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def in_memory(contents):
    names = [f"image {index}" for index in range(len(contents))]
    return EncodedImages(
        names, lambda positions: (contents[position] for position in positions), str(hash(tuple(contents)))
    )


def decode_selected(contents, selection=None, **fields):
    selection = torch.arange(len(contents)) if selection is None else torch.tensor(selection)
    return decode_images(in_memory(contents), selection, DataRecipe(**fields))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_give_back_the_pixels(kind):
    pixels = colours()
    decoded = decode_image(encode(pixels, kind, **({"lossless": True} if kind == "WEBP" else {})), 3)
    np.testing.assert_array_equal(decoded, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["JPEG", "GIF"])
def test_lossy_formats_give_about_the_pixels(kind):
    pixels = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    assert abs(decode_image(encode(pixels, kind), 3).mean(axis=(1, 2)) - (200, 100, 50)).max() < 3


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    decoded = decode_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), 3)
    assert decoded[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    values = np.array([[0, 257, 32896], [1000, 65278, 65535]], np.uint16)
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(decode_image(encode(values, kind), 1)[0], expected)
    np.testing.assert_array_equal(decode_image(encode(values, kind), 3), np.stack([expected] * 3))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L-key"])
def test_transparency_is_composited_on_white(mode):
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, 100, 100, 100])
        image.putpixel((1, 0), 1)
        content = encode(image, transparency=bytes([0, 255]))
    elif mode == "L-key":
        content = encode(np.array([[0, 100]], np.uint8), transparency=0)
    else:
        image = Image.new(mode, (2, 1))
        image.putpixel((1, 0), (100, 100, 100, 255) if mode == "RGBA" else (100, 255))
        content = encode(image)
    np.testing.assert_array_equal(decode_image(content, 3), np.array([[[255, 100]]] * 3, np.uint8))
    np.testing.assert_array_equal(decode_image(content, 1), np.array([[[255, 100]]], np.uint8))


def test_half_transparent_black_on_white_is_mid_grey():
    assert decode_image(encode(Image.new("RGBA", (1, 1), (0, 0, 0, 128))), 3).flatten().tolist() == [127] * 3


def test_cmyk_and_palette_and_bilevel_are_handled():
    red = decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95), 3)
    assert red[0].min() > 240
    assert red[1:].max() < 15
    pixels = np.repeat(colours(2, 2), 2, axis=1)
    palette = Image.fromarray(pixels).quantize(4)
    np.testing.assert_array_equal(
        decode_image(encode(palette), 3), np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    )
    assert decode_image(encode(Image.new("1", (1, 1), 1)), 3).flatten().tolist() == [255] * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(kind):
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 16))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: left becomes top
    decoded = decode_image(encode(image, kind, exif=exif), 1)
    assert decoded.shape == (1, 32, 16)
    assert decoded[0, :14].min() > 230
    assert decoded[0, 18:].max() < 25


@pytest.mark.parametrize("size", [(20, 40), (40, 20), (20, 20), (10, 30), (8, 8)])
def test_resizing_is_torchvisions_shorter_side_and_centre_crop(size):
    image = Image.fromarray(colours(size[1], size[0]))
    bicubic = reference.InterpolationMode.BICUBIC
    expected = reference.center_crop(reference.resize(image, [10], interpolation=bicubic, antialias=True), [10])
    difference = decode_image(encode(image), 3, 10).astype(int) - np.asarray(expected).transpose(2, 0, 1)
    assert abs(difference).max() <= 1  # Pillow rounds between its two passes, whose order depends on the shape


def test_a_sliver_does_not_take_the_memory_of_a_mural():
    assert decode_image(encode(Image.new("RGB", (40_000, 1))), 3, 512).shape == (3, 512, 512)


def test_a_file_that_only_pretends_to_be_an_image_is_not_handed_to_ghostscript(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n%%EndComments\n")
    with pytest.raises(OSError, match="cannot identify"):
        decode_image(path, 3)


def test_damaged_images_are_named_and_the_others_keep_their_order():
    good = [encode(np.full((5, 5, 3), (10 * index, 1, 2), np.uint8)) for index in range(6)]
    noise = encode(colours(64, 64))
    contents = [good[0], b"", good[2], noise[: len(noise) // 2], good[4], b"no image"]
    decoded = decode_selected(contents, [4, 3, 2, 1, 0, 5])
    assert decoded.images[:, 0, 0, 0].tolist() == [40, 20, 0]
    assert decoded.kept.tolist() == [True, False, True, False, True, False]
    assert decoded.skipped == ("image 1", "image 3", "image 5")
    with pytest.raises(DataError, match=r"'image 1' cannot be decoded .*corrupt=skip"):
        decode_selected(contents, corrupt="error")
    with pytest.raises(DataError, match=r"none of the 1 images .*'image 0'"):
        decode_selected([b"no image"])


def test_a_decompression_bomb_is_a_damaged_image_without_a_warning(monkeypatch):
    contents = [encode(colours(4, 4)), encode(np.zeros((20, 20), np.uint8)), encode(np.zeros((40, 40), np.uint8))]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # Pillow warns beyond it, and raises beyond twice as many
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decoded = decode_selected(contents)
    assert decoded.skipped == ("image 1", "image 2")
    assert not caught


def test_channels_are_as_the_images_are_unless_asked_for():
    grey = np.full((4, 4), 7, np.uint8)
    grey_as_colour = np.full((4, 4, 3), 9, np.uint8)
    assert decode_selected([encode(grey), encode(grey_as_colour)]).images[:, :, 0, 0].tolist() == [[7], [9]]
    assert decode_selected([encode(grey), encode(grey)], channels=3).images.shape == (2, 3, 4, 4)
    mixed = [encode(grey), encode(colours(4, 4))]
    assert decode_selected(mixed).images.shape == (2, 3, 4, 4)
    luma = np.asarray(Image.fromarray(colours(4, 4)).convert("L"))
    np.testing.assert_array_equal(decode_selected(mixed, channels=1).images[1, 0].numpy(), luma)


def test_different_sizes_name_an_example_and_the_remedy():
    contents = [encode(colours(4, 6)), encode(colours(5, 6))]
    with pytest.raises(DataError, match=r"'image 0' \(6x4\) and 'image 1' \(6x5\): set data.image_px"):
        decode_selected(contents)
    assert decode_selected(contents, image_px=4).images.shape == (2, 3, 4, 4)


def test_images_are_decoded_once_and_again_when_something_changed(monkeypatch):
    contents = [encode(colours(4, 4, seed)) for seed in range(3)] + [b""]
    recipe, everything, reads = DataRecipe(), torch.arange(4), []
    encoded = in_memory(contents)
    counted = EncodedImages(encoded.names, lambda wanted: reads.append(wanted) or encoded.read(wanted), "k")
    first = decode_images(counted, everything, recipe)
    second = decode_images(counted, everything, recipe)
    assert len(reads) == 1
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.kept, second.kept)
    assert first.skipped == second.skipped == ("image 3",)
    decode_images(counted, everything[:2], recipe)
    decode_images(counted, everything, recipe.model_copy(update={"image_px": 2}))
    decode_images(EncodedImages(counted.names, counted.read, "other"), everything, recipe)
    assert len(reads) == 4
    assert not list(cache.cache_folder().glob("*.tmp"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "garbage"])
def test_a_damaged_cache_is_rebuilt(damage):
    contents = [encode(colours(16, 16))]
    first = decode_selected(contents)
    (path,) = cache.cache_folder().glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes({"truncate": content[:-30], "flip": content, "garbage": b"\xff" * 100}[damage])
    assert torch.equal(decode_selected(contents).images, first.images)
    assert cache.load_cached(path.stem) is not None


def test_an_unwritable_cache_is_not_needed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEITKIT_CACHE", str(tmp_path / "file" / "below"))
    assert len(decode_selected([encode(colours())]).images) == 1


def test_progress_counts_to_the_end():
    seen = []
    contents = [encode(np.zeros((1, 1), np.uint8))] * 300
    decode_images(in_memory(contents), torch.arange(300), DataRecipe(), lambda *told: seen.append(told))
    assert seen == [("decoding images", 256, 300), ("decoding images", 300, 300)]


def test_a_data_set_beyond_the_memory_is_refused_before_it_is_read():
    with pytest.raises(DataError, match=r"GiB.*data.image_px or data.train_images"):
        require_memory((10**9, 3, 224, 224))
    require_memory((10, 3, 32, 32))


def test_batched_pixels_agree_with_pillow_and_numpy():
    mild = [96 + colours(12, 12, seed) // 4 for seed in range(3)]
    pixels = torch.from_numpy(np.stack(mild)).permute(0, 3, 1, 2).contiguous()
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    for image_px in (5, 24):
        expected = torch.from_numpy(
            np.stack([np.asarray(image.resize((image_px,) * 2, Image.Resampling.BICUBIC)) for image in images])
        )  # far from 0 and 255, since Pillow clamps between its two passes and torch does not
        difference = resize(pixels, image_px).permute(0, 2, 3, 1).int() - expected.int()
        assert difference.abs().max() <= 1
    luma = np.stack([np.asarray(image.convert("L")) for image in images])[:, None]
    np.testing.assert_array_equal(to_channels(pixels, 1).numpy(), luma)
    assert is_grey(to_channels(torch.from_numpy(luma), 3))
    assert not is_grey(pixels)
    mean, std = mean_and_std(pixels)
    values = pixels.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, values.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, values.std(axis=(0, 2, 3)), rtol=1e-12)
    assert mean_and_std(torch.zeros(2, 1, 3, 3, dtype=torch.uint8)) == ((0.0,), (1 / 255,))


def test_a_far_too_large_jpeg_is_about_the_same_as_one_resized_in_full():
    ramp = np.broadcast_to(np.linspace(0, 255, 256, dtype=np.uint8)[None, :, None], (256, 256, 3))
    content = encode(np.ascontiguousarray(ramp), "JPEG", quality=95)
    full = Image.open(io.BytesIO(content)).resize((16, 16), Image.Resampling.BICUBIC)
    difference = decode_image(content, 3, 16).astype(int) - np.asarray(full).transpose(2, 0, 1).astype(int)
    assert abs(difference).max() <= 3


@pytest.mark.parametrize("size", [(1001, 777), (1000, 1001), (513, 1030), (999, 333)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_decoded_at_a_fraction_shows_the_same_part(size, orientation):
    """Its last column and row go beyond the image, on the side where its orientation puts them."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95, exif=exif)
    whole = ImageOps.exif_transpose(Image.open(io.BytesIO(stream.getvalue()))).convert("RGB")
    difference = decode_image(stream.getvalue(), 3, 16).astype(int) - decode_image(encode(np.asarray(whole)), 3, 16)
    assert abs(difference).max() <= 2


def test_a_file_and_its_bytes_decode_alike(tmp_path: Path):
    path = tmp_path / "image.png"
    path.write_bytes(encode(colours()))
    np.testing.assert_array_equal(decode_image(path, 3), decode_image(path.read_bytes(), 3))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 1.0])
def test_gaps_are_closed_in_place(share: float) -> None:
    draw = np.random.default_rng(0)
    rows, kept = draw.integers(0, 256, (1000, 3), np.uint8), draw.random(1000) < share
    expected, address = rows[kept].copy(), rows.ctypes.data
    closed = close_gaps(rows, kept)
    assert np.array_equal(closed, expected)
    assert closed.ctypes.data == address


def test_what_cannot_be_copied_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEITKIT_CACHE", str(tmp_path))
    tensors = {"images": torch.zeros(1000, dtype=torch.uint8)}
    for free, stored in ((1000, False), (2000, True)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        cache.store("key", tensors, [])
        assert (cache.load_cached("key") is not None) == stored

"""Small data sets on the disk, and what every test of a source asks of them."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deitkit.data.dataset import load_dataset
from deitkit.errors import DataError
from deitkit.recipe.schema import DataRecipe


def png(value, size=(6, 6)):
    """An image whose pixels tell which one it is."""
    stream = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256, 200)).save(stream, "PNG")
    return stream.getvalue()


def values(split):
    """What ``png`` was given for each image."""
    return (split.images[:, 0, 0, 0].long() + 256 * split.images[:, 1, 0, 0].long()).tolist()


def all_values(data):
    return values(data.train) + values(data.validation) + values(data.test)


def write_classes(folder, counts, start=0):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index:03}.png").write_bytes(png(start + index))
        start += count
    return folder


def write_parquet(path, labels, names=None, image="img", label="label", start=0, row_group_size=7, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(start + index), "path": None} for index in range(len(labels))]
    table = pa.table({image: pa.array(images), label: pa.array(labels, kind)})
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=row_group_size)


def load(name, progress=None, **fields):
    return load_dataset(DataRecipe(name=str(name), **fields), progress)


def refused(name, *told, **fields):
    with pytest.raises(DataError) as caught:
        load(name, **fields)
    message = str(caught.value)
    assert "\n" not in message
    for part in told:
        assert part in message
    return message

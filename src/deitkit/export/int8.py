"""Static quantisation to 8-bit integers by ONNX Runtime's own tools, calibrated on images."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from deitkit.data.split import Split
from deitkit.export.graph import finish, import_onnx
from deitkit.models.onnx_file import INPUT
from deitkit.system.seeding import fixed_shuffle

CALIBRATION_BATCH = 16
WITH_WEIGHTS = ("Conv", "Gemm", "MatMul")


def quantise(content: bytes, card: dict[str, Any], split: Split, count: int) -> bytes:
    """Return an ONNX file whose weights and the activations before them are 8-bit integers.

    Products of two activations, as in attention, norms, GELU and softmax stay in float32: they cost accuracy, and gain
    little time.

    Args:
        content: Of a float32 file of ours.
        card: Of the new file.
        split: Images to calibrate on.
        count: At most this many of them, drawn at random but always the same.
    """
    onnx = import_onnx()
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = _batches(split, count, takes_bytes=card["input"].startswith("uint8"))

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            images = next(batches, None)
            return None if images is None else {INPUT: images}

    with tempfile.TemporaryDirectory(prefix="deitkit-int8-") as name:
        given, prepared, quantised = (Path(name) / f"{step}.onnx" for step in ("given", "prepared", "quantised"))
        given.write_bytes(content)
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantised,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,  # 7 bits of a weight: without VNNI, sums of 8-bit products overflow 16 bits
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(WITH_WEIGHTS),
            nodes_to_exclude=_products_of_activations(onnx.load(prepared).graph),
        )
        return finish(onnx.load(quantised), card | {"int8": {"calibration_images": min(count, len(split))}})


def _products_of_activations(graph: Any) -> list[str]:
    """Return the names of the nodes whose second input is not a weight."""
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type in WITH_WEIGHTS and node.input[1] not in weights]


def _batches(split: Split, count: int, *, takes_bytes: bool) -> Iterator[np.ndarray]:
    shuffled = fixed_shuffle(len(split))[:count]
    for some in shuffled.split(CALIBRATION_BATCH):
        images: Tensor = split.pixels(some)
        yield images.numpy() if takes_bytes else (images / 255).numpy()

"""Reading the ONNX files that `deitkit export` writes: a classifier that runs in ONNX Runtime, and its card.

A file carries a SHA-256 of itself, so that one that was cut, altered or written by another program does not reach ONNX
Runtime. That guards against damage, not against forgery.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deitkit.errors import CheckpointError, RecipeError, reason_of
from deitkit.models.card import ModelCard, checked_card
from deitkit.models.classifier import Classifier

FORMAT = 1
CARD_KEY, SEAL_KEY = "deitkit", "deitkit_sha256"
INPUT, OUTPUT = "images", "probabilities"
INSTALL = "pip install 'deitkit[export]'"
_UNSEALED = b"0" * 64
_LEAST = 1e-30  # probability whose logarithm is finite in float32


def is_onnx(path: Path) -> bool:
    """Return whether a path names an ONNX file."""
    return path.suffix.lower() == ".onnx"


def seal(content: bytes) -> bytes:
    """Return the content of an ONNX file with its hash in place of the zeros under ``SEAL_KEY``."""
    start, end = _seal_position(content) or (0, 0)
    assert content[start:end] == _UNSEALED
    return content[:start] + hashlib.sha256(content).hexdigest().encode() + content[end:]


def read_sealed(path: Path) -> bytes:
    """Return the content of an ONNX file; raise CheckpointError unless it is as `deitkit export` wrote it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check its name") from None
    found = _seal_position(content)
    if found is None:
        raise CheckpointError(f"{path} was not written by deitkit: export a model with deitkit export MODEL --to onnx")
    start, end = found
    unsealed = content[:start] + _UNSEALED + content[end:]
    if hashlib.sha256(unsealed).hexdigest().encode() != content[start:end]:
        raise CheckpointError(
            f"{path} is damaged or was changed since deitkit wrote it: copy it again, or export it again"
        )
    return content


def _seal_position(content: bytes) -> tuple[int, int] | None:
    """Return where the hash is: behind its key, as protobuf writes a string of 64 bytes in field 2."""
    matches = list(re.finditer(SEAL_KEY.encode() + rb"\x12\x40([0-9a-f]{64})", content))
    return matches[0].span(1) if len(matches) == 1 else None


def open_session(content: bytes) -> Any:
    """Return an ONNX Runtime session on the CPU, with as many threads as torch."""
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def import_onnxruntime() -> Any:
    """Return the module; raise RecipeError if it is not installed."""
    try:
        import onnxruntime  # an extra
    except ImportError:
        raise RecipeError(f"an ONNX file needs ONNX Runtime: {INSTALL}") from None
    return onnxruntime


class OnnxGraph(nn.Module):
    """An ONNX file as a module: from views in [0, 1] to logits whose softmax are its probabilities."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        self.takes_bytes = session.get_inputs()[0].type == "tensor(uint8)"

    def forward(self, view: Tensor) -> Tensor:
        """Return the logarithms of the file's probabilities, on the view's device."""
        images = (view * 255).round().to(torch.uint8) if self.takes_bytes else view.float()
        (probabilities,) = self.session.run([OUTPUT], {INPUT: images.cpu().numpy()})
        return torch.from_numpy(probabilities).clamp(min=_LEAST).log().to(view.device)


def read_onnx(path: Path) -> tuple[Classifier, ModelCard]:
    """Return the classifier of an ONNX file, in evaluation mode, and its card.

    Raises:
        CheckpointError: The file is missing, damaged or not of deitkit.
        RecipeError: ONNX Runtime is not installed.
    """
    content = read_sealed(path)
    try:
        session = open_session(content)
        content = json.loads(session.get_modelmeta().custom_metadata_map[CARD_KEY])
        found = content.get("onnx_format")
    except RecipeError:
        raise
    except Exception as error:  # ONNX Runtime's own types
        reason = reason_of(error)
        raise CheckpointError(f"{path} cannot be opened ({reason}): update onnxruntime, or export it again") from None
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found}; this deitkit reads format {FORMAT}")
    required = ("channels", "class_names", "input_px", "exported_readout")
    card = checked_card(
        content,
        required,
        lambda wrong: CheckpointError(f"{path} has an incomplete card (see {', '.join(wrong)}): export it again"),
    )
    classifier = Classifier(OnnxGraph(session), mean=(0.0,) * card.channels, std=(1.0,) * card.channels)
    return classifier.eval(), card

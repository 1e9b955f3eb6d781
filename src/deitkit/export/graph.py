"""A trained classifier as the bytes of an ONNX file: normalisation, the model, and the readout's softmax."""

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from deitkit import __version__
from deitkit.errors import CheckpointError, RecipeError, is_out_of_memory, reason_of
from deitkit.evaluation.readouts import choose_readout, readout_scores
from deitkit.models.card import ModelCard
from deitkit.models.classifier import Classifier
from deitkit.models.onnx_file import CARD_KEY, FORMAT, INPUT, INSTALL, OUTPUT, SEAL_KEY, seal
from deitkit.models.saved import load_classifier
from deitkit.models.weights.read import file_sha256

OPSET = 20
MOST_IMAGES = 2**16  # in a batch
# Fields of a card that no longer apply to a graph with one output.
_DROPPED = ("format", "kind", "config", "readout", "only_readout")


class Deployed(nn.Module):
    """From images to probabilities, as one module.

    Args:
        classifier: In evaluation mode.
        readout: One of its readouts.
        takes_bytes: Whether images are uint8 from 0 to 255, else float32 from 0 to 1.
    """

    def __init__(self, classifier: Classifier, readout: str, takes_bytes: bool) -> None:
        super().__init__()
        self.classifier, self.readout, self.takes_bytes = classifier, readout, takes_bytes

    def forward(
        self, images: UInt8[Tensor, "n channels px px"] | Float[Tensor, "n channels px px"]
    ) -> Float[Tensor, "n classes"]:
        """Return the readout's probabilities."""
        view = images.float() / 255 if self.takes_bytes else images
        return readout_scores(self.classifier(view))[self.readout].softmax(dim=-1)


def load_for_export(folder: Path, readout: str | None) -> tuple[Classifier, ModelCard, str]:
    """Return a saved classifier on the CPU, its card, and the readout to export.

    Raises:
        CheckpointError: The folder has no model of deitkit.
        RecipeError: The model does not have the readout.
    """
    classifier, card = load_classifier(folder, torch.device("cpu"))
    with torch.inference_mode():
        scores = readout_scores(classifier(_example(card, takes_bytes=True) / 255))
    return classifier, card, choose_readout(readout, card, scores)


def build_onnx(deployed: Deployed, card: ModelCard, source: Path) -> bytes:
    """Return the content of an ONNX file whose metadata are the model's card.

    Args:
        deployed: In evaluation mode, on the CPU.
        card: Of its model.
        source: The folder of its model.

    Raises:
        RecipeError: The packages of the extra ``export`` are not installed, or too old for torch.
        CheckpointError: torch's exporter does not know a part of the model.
    """
    import_onnx()
    example = _example(card, deployed.takes_bytes)
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    try:
        with _quiet():
            program = torch.onnx.export(
                deployed.eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={"images": {0: batch}},
                verbose=False,
            )
    except Exception as error:  # the exporter's own types
        if is_out_of_memory(error):
            raise
        _require_recent_onnxscript(error)
        reason = reason_of(error)
        raise CheckpointError(f"torch cannot write {source} as ONNX ({reason}): another version of torch may") from None
    assert program is not None
    return finish(program.model_proto, onnx_card(deployed, card, source))


def _require_recent_onnxscript(error: BaseException) -> None:
    """Raise RecipeError if the exporter failed since onnxscript lacks what this torch needs of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError) and (cause.name or "").startswith(("onnxscript", "onnx_ir")):
            raise RecipeError(
                f"the installed onnxscript is too old for torch {torch.__version__}: pip install --upgrade onnxscript"
            ) from None
        cause = cause.__cause__ or cause.__context__


def onnx_card(deployed: Deployed, card: ModelCard, source: Path) -> dict[str, Any]:
    """Return the card of an ONNX file."""
    origin = {
        "onnx_format": FORMAT,
        "exported_by": {"deitkit": __version__, "torch": torch.__version__},
        "weights_sha256": file_sha256(source / "model.safetensors"),
        "exported_readout": deployed.readout,
        "input": "uint8, 0 to 255" if deployed.takes_bytes else "float32, 0 to 1",
        "mean": deployed.classifier.mean.flatten().tolist(),
        "std": deployed.classifier.std.flatten().tolist(),
        "eval_crop": card.eval_crop,
        "fit": card.fit,
    }
    return {name: value for name, value in card.written().items() if name not in _DROPPED} | origin


def finish(model: Any, card: dict[str, Any]) -> bytes:
    """Return the bytes of an ONNX model with a card, without the exporter's traces of this machine, sealed."""
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for part in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")
    plain = {"class_names": card["class_names"], "mean": card["mean"], "std": card["std"], "fit": card["fit"]}
    entries = {CARD_KEY: json.dumps(card, ensure_ascii=False)}
    entries |= {name: json.dumps(value, ensure_ascii=False) for name, value in plain.items()}
    for name, value in entries.items():
        model.metadata_props.add(key=name, value=value)
    model.metadata_props.add(key=SEAL_KEY, value="0" * 64)
    content: bytes = model.SerializeToString()
    return seal(content)


def import_onnx() -> Any:
    """Return the package ``onnx``; raise RecipeError if it, its runtime or the exporter's package is missing."""
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RecipeError(f"deitkit export needs the package {error.name}: {INSTALL}") from None
    return onnx


def _example(card: ModelCard, takes_bytes: bool) -> Tensor:
    shape = (2, card.channels, card.side, card.side)
    images = torch.randint(256, shape, generator=torch.Generator().manual_seed(0))
    return images.to(torch.uint8) if takes_bytes else images / 255


@contextlib.contextmanager
def _quiet() -> Any:
    """Silence the exporter, which tells its progress by prints, warnings and logs."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)

"""A student's tokens after each block, and their attention.

Everything is recorded by hooks during an ordinary forward pass, at no cost to the student's own code.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deitkit.models.classifier import Classifier
from deitkit.models.vit import TOKENS, Attention, DeiT


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Record what modules return inside the block, in the order in which they run."""
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_hook(lambda _, __, output: outputs.append(output)))
        yield outputs


@contextmanager
def recorded_similarity(classifier: Classifier) -> Iterator[list[list[Float[Tensor, " batch"]]]]:
    """Record the cosine of a student's class and distillation token during the forward passes inside the block.

    The tokens are those of the residual stream: not normalised, and before the first block with their position
    embeddings. Touvron et al. 2020, section 4, give its mean over images.

    Args:
        classifier: Around a DeiT with both tokens.

    Yields:
        For each layer (before the first block, and after each block) one tensor for each batch.
    """
    student = student_of(classifier)
    assert student.config["tokens"] == list(TOKENS)
    layers = [student.pos_drop, *student.blocks]
    found: list[list[Tensor]] = [[] for _ in layers]

    def keep(layer: list[Tensor], x: Tensor) -> None:
        layer.append(F.cosine_similarity(x[:, 0].float(), x[:, 1].float(), dim=-1))

    with ExitStack() as stack:
        for module, layer in zip(layers, found, strict=True):
            stack.enter_context(module.register_forward_hook(lambda _, __, x, layer=layer: keep(layer, x)))
        yield found


def learned_similarity(classifier: Classifier) -> float:
    """Return the cosine of the two learned vectors that enter every image's sequence, without their positions."""
    student = student_of(classifier)
    assert student.cls_token is not None
    assert student.dist_token is not None
    return F.cosine_similarity(student.cls_token.flatten(), student.dist_token.flatten(), dim=0).item()


@torch.inference_mode()
def attention_by_block(
    classifier: Classifier, view: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "blocks batch heads tokens tokens"]:
    """Return softmax(query key^T / sqrt(head width)) of every block, in float32; each row sums to 1.

    The last block of a student computes it for the tokens that heads read; here it is whole.

    Args:
        classifier: Around a DeiT.
        view: Images in [0, 1].
    """
    blocks = student_of(classifier).blocks
    with recorded([block.get_submodule("norm1") for block in blocks]) as inputs:
        classifier(view)
    layers = [block.get_submodule("attn") for block in blocks]
    return torch.stack([_attention(layer, x) for layer, x in zip(layers, inputs, strict=True)])


def _attention(layer: nn.Module, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch heads tokens tokens"]:
    assert isinstance(layer, Attention)
    query, key, _ = layer.qkv(x).unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
    return (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(dim=-1)


def rollout(
    attention: Float[Tensor, "blocks batch heads tokens tokens"],
) -> Float[Tensor, "batch tokens tokens"]:
    """Return how much of each input token reaches each output token, if values were only averaged; rows sum to 1.

    Heads are averaged, and the residual branch counts as much as attention: the product of (A + I) / 2 over the blocks.
    Source: Abnar and Zuidema 2020 (arXiv 2005.00928), section 3.
    """
    identity = torch.eye(attention.shape[-1], device=attention.device)
    reached = identity.expand(attention.shape[1], -1, -1)
    for block in attention.mean(dim=2):
        reached = (block + identity) / 2 @ reached
    return reached


def attention_maps(
    classifier: Classifier, view: Float[Tensor, "1 channels height width"]
) -> dict[str, Float[Tensor, "rows columns"]]:
    """Return what a student's tokens see of an image, on the grid of its patches: ``last block`` and ``rollout``.

    ``TOKEN, last block`` is that token's attention in the last block, the mean of the heads; what it pays to the tokens
    themselves is left out. One image at a time, since attention of all blocks is as large as a training batch's.

    Args:
        classifier: Around a DeiT; without tokens it has no map.
        view: One image in [0, 1].
    """
    attention = attention_by_block(classifier, view)
    kinds = {"last block": attention[-1].mean(dim=1), "rollout": rollout(attention)}
    maps = {kind: patch_maps(rows, classifier) for kind, rows in kinds.items()}
    tokens = student_of(classifier).config["tokens"]
    return {f"{token}, {kind}": maps[kind][token][0].cpu() for token in tokens for kind in kinds}


def patch_maps(
    rows: Float[Tensor, "batch tokens tokens"], classifier: Classifier
) -> dict[str, Float[Tensor, "batch height width"]]:
    """Return what of each patch a student's tokens attend to, by token, on the grid of patches.

    Args:
        rows: Attention of one block (a mean of heads), or rollout.
        classifier: Whose rows they are.
    """
    student = student_of(classifier)
    names = student.config["tokens"]
    side = student.config["image_px"] // student.config["patch_px"]
    return {name: rows[:, place, len(names) :].unflatten(-1, (side, side)) for place, name in enumerate(names)}


def student_of(classifier: Classifier) -> DeiT:
    """Return the DeiT in a classifier that has one."""
    assert isinstance(classifier.model, DeiT)
    return classifier.model

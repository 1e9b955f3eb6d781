"""The student: a vision transformer with the tokens and heads of its method.

Parameter names and values are interchangeable with timm's ``deit_*`` and ``vit_*``. Losses are in ``distillation``, and
the combination of heads at evaluation is in ``evaluation``.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deitkit.errors import RecipeError
from deitkit.models.patch_embed import STEMS
from deitkit.recipe.schema import ModelRecipe

TOKENS = ("class", "distillation")
NORM_EPS = 1e-6
INIT_STD = 0.02
MLP_RATIO = 4
SHORT_ROW = 64  # length up to which a softmax is faster in float32 than in bf16, casts included
SHORT_SEQUENCE = 640  # tokens up to which a CPU uses two plain products: measured up to 578 in docs/benchmarks.md


@dataclass(frozen=True)
class Size:
    """Width, number of blocks and number of attention heads of a named size."""

    width: int
    depth: int
    heads: int


SIZES: dict[str, Size] = {
    "micro": Size(width=64, depth=4, heads=2),
    "deit_tiny": Size(width=192, depth=12, heads=3),
    "deit_small": Size(width=384, depth=12, heads=6),
    "deit_base": Size(width=768, depth=12, heads=12),
    "vit_base": Size(width=768, depth=12, heads=12),
    "vit_large": Size(width=1024, depth=24, heads=16),
}


def size_in_words(recipe: ModelRecipe) -> str:
    """Return the name of a student's size, with the dimensions that differ from it: ``micro with width 128``."""
    size = asdict(SIZES[recipe.name])
    other = {name: getattr(recipe, name) for name in size if getattr(recipe, name) not in (None, size[name])}
    return recipe.name + (f" with {', '.join(f'{key} {value}' for key, value in other.items())}" if other else "")


@dataclass(frozen=True)
class Output:
    """Logits of a classifier's heads, before any softmax, in training and in evaluation mode."""

    class_logits: Float[Tensor, "batch classes"] | None
    distillation_logits: Float[Tensor, "batch classes"] | None = None


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)
        self.kernel = "auto"  # | plain | fused

    def forward(
        self, x: Float[Tensor, "batch tokens width"], readout: int | None = None
    ) -> Float[Tensor, "batch readout width"]:
        """Attend over the tokens of each image, by plain products for few tokens on a CPU, else by the fused kernel.

        Return the first ``readout`` tokens only; None returns all.
        """
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        short = x.device.type == "cpu" and tokens <= SHORT_SEQUENCE
        if self.kernel == "plain" or (self.kernel == "auto" and short):
            query, key, value = qkv.contiguous().unbind(0)  # one copy here instead of one in each product
            mixed = plain_attention(query[:, :, :readout], key, value)
        else:
            query, key, value = qkv.unbind(0)
            mixed = F.scaled_dot_product_attention(query[:, :, :readout], key, value)
        projected: Tensor = self.drop(self.proj(mixed.transpose(1, 2).reshape(batch, -1, width)))
        return projected


def plain_attention(
    query: Float[Tensor, "batch heads readout head_width"],
    key: Float[Tensor, "batch heads tokens head_width"],
    value: Float[Tensor, "batch heads tokens head_width"],
) -> Float[Tensor, "batch heads readout head_width"]:
    """Return softmax(query key^T / sqrt(head_width)) value, as ``F.scaled_dot_product_attention`` does."""
    # Scale the query, which has fewer elements than the attention matrix.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    # A CPU processes short rows of bf16 one number at a time.
    dtype = torch.promote_types(scores.dtype, torch.float32) if scores.shape[-1] < SHORT_ROW else scores.dtype
    return scores.softmax(dim=-1, dtype=dtype).to(value.dtype) @ value


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Transform each token separately."""
        transformed: Tensor = self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))
        return transformed


class DropPath(nn.Module):
    """Stochastic depth, per image: drop a residual branch at random, scale it up otherwise (Huang et al. 2016).

    The rate is a tensor, so that the blocks of a student share compiled code although their rates differ.
    """

    kept: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.drops = rate > 0
        self.register_buffer("kept", torch.tensor(1 - rate), persistent=False)

    def forward(self, branch: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Zero the branch of each image with probability ``rate``; the expectation over draws is the branch."""
        if not self.training or not self.drops:
            return branch
        stays = torch.rand(len(branch), 1, 1, device=branch.device) < self.kept
        return branch * (stays / self.kept).to(branch.dtype)


class LayerScale(nn.Module):
    """A learnt factor for each channel of a residual branch (Touvron et al. 2021, "Going deeper", section 2)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, branch: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Scale the branch."""
        return branch * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block, with LayerScale unless ``layer_scale``, its initial value, is None."""

    def __init__(
        self, width: int, heads: int, dropout: float, drop_path: float, layer_scale: float | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads, dropout)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, dropout)
        self.ls2 = LayerScale(width, layer_scale) if layer_scale is not None else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Float[Tensor, "batch tokens width"], readout: int | None = None
    ) -> Float[Tensor, "batch readout width"]:
        """Add attention and MLP to the first ``readout`` tokens (None: to all)."""
        x = x[:, :readout] + self.drop_path(self.ls1(self.attn(self.norm1(x), readout)))
        added: Tensor = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return added


class DeiT(nn.Module):
    """A data-efficient image transformer (Touvron et al. 2021), with the tokens of its method.

    The sequence is: class token, distillation token, patches. Each token has its own head; without any token the class
    head takes the mean of the normalised patches.

    Args:
        image_px: Side of the square images.
        patch_px: Side of a patch; divides ``image_px``.
        channels: Channels of the images.
        classes: Number of classes.
        width: Width of a token; divisible by ``heads``.
        depth: Number of blocks.
        heads: Attention heads of a block.
        tokens: A subset of ``TOKENS``, in that order; empty for mean pooling.
        drop_path: Stochastic depth of the last block, growing linearly from 0.
        dropout: Dropout on embeddings, attention output and MLP.
        layer_scale: Initial factor of each block's branches; None for none.
        stem: A name of ``STEMS``.
    """

    def __init__(
        self,
        *,
        image_px: int,
        patch_px: int,
        channels: int,
        classes: int,
        width: int,
        depth: int,
        heads: int,
        tokens: Sequence[str],
        drop_path: float = 0.0,
        dropout: float = 0.0,
        layer_scale: float | None = None,
        stem: str = "patch",
    ) -> None:
        super().__init__()
        assert image_px % patch_px == 0
        assert width % heads == 0
        assert tuple(tokens) == tuple(name for name in TOKENS if name in tokens)
        self.config: dict[str, Any] = {
            "image_px": image_px, "patch_px": patch_px, "channels": channels, "classes": classes, "width": width,
            "depth": depth, "heads": heads, "tokens": list(tokens), "drop_path": drop_path, "dropout": dropout,
            "layer_scale": layer_scale, "stem": stem,
        }  # fmt: skip
        self.patch_embed = STEMS[stem](patch_px, channels, width)
        self.cls_token = _token(width) if "class" in tokens else None
        self.dist_token = _token(width) if "distillation" in tokens else None
        self.pos_embed = nn.Parameter(torch.empty(1, len(tokens) + (image_px // patch_px) ** 2, width))
        self.pos_drop = nn.Dropout(dropout)
        rates = [drop_path * index / max(depth - 1, 1) for index in range(depth)]
        self.blocks = nn.Sequential(*(Block(width, heads, dropout, rate, layer_scale) for rate in rates))
        self.checkpoint_activations = False
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, classes) if "class" in tokens or not tokens else None
        self.head_dist = nn.Linear(width, classes) if "distillation" in tokens else None
        self.initialise(None)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None) -> None:
        """Draw every parameter from a CPU generator (None: torch's own), parameters common to all token layouts first.

        Matrices, tokens and positions are truncated normals of standard deviation 0.02, biases 0, norms the identity;
        the stem draws its own parameters before them.
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm | nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, module.initial)
            if isinstance(module, DropPath):
                module.kept.fill_(1 - module.rate)  # not a parameter, but it has no value on the meta device either
        self.patch_embed.initialise(generator)
        prefix = len(self.config["tokens"])
        shared = [*self.block_matrices(), self.pos_embed[:, prefix:]]
        own = [self.pos_embed[:, :prefix], self.cls_token, self.dist_token]
        own += [layer.weight for layer in (self.head, self.head_dist) if layer is not None]
        for values in shared + own:
            if values is not None and values.numel():
                # Truncate at three standard deviations; the +-2 of the released code never truncates anything.
                nn.init.trunc_normal_(values, std=INIT_STD, a=-3 * INIT_STD, b=3 * INIT_STD, generator=generator)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Output:
        """Return the logits of each head for normalised images, in training and in evaluation mode."""
        x = self.patch_embed(images)
        tokens = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.dist_token) if token is not None]
        x = torch.cat([*tokens, x], dim=1) if tokens else x
        x = self.norm(self._run_blocks(self.pos_drop(x + self.pos_embed)))
        readout = x[:, 0] if tokens else x.mean(dim=1)
        return Output(
            class_logits=self.head(readout) if self.head is not None else None,
            distillation_logits=self.head_dist(x[:, len(tokens) - 1]) if self.head_dist is not None else None,
        )

    def _run_blocks(self, x: Tensor) -> Tensor:
        recompute = self.checkpoint_activations and self.training
        readout = len(self.config["tokens"]) or None
        for block in self.blocks:
            # Heads use the tokens only, so the last block skips the patches.
            kept = readout if block is self.blocks[-1] else None
            x = checkpoint(block, x, kept, use_reentrant=False) if recompute else block(x, kept)
        return x

    def block_matrices(self) -> list[nn.Parameter]:
        """Return the two-dimensional weights inside the blocks, in order."""
        return [parameter for parameter in self.blocks.parameters() if parameter.ndim == 2]

    def no_decay(self) -> set[str]:
        """Return the names of tokens and position embeddings, which are exempt from weight decay."""
        return {name for name, _ in self.named_parameters() if name in {"cls_token", "dist_token", "pos_embed"}}


def create_student(
    recipe: ModelRecipe,
    *,
    image_px: tuple[int, int],
    channels: int,
    classes: int,
    tokens: Sequence[str],
    seed: int,
) -> DeiT:
    """Build a student on the CPU, without changing torch's global random state.

    Under the same seed, parameters that all token layouts have (the stem, the blocks, the position embeddings of
    patches) have equal initial values, so that methods are compared from the same start.

    Args:
        recipe: The size and its overrides.
        image_px: Height and width of the images.
        channels: Channels of the images.
        classes: Number of classes.
        tokens: A subset of ``TOKENS``, in that order.
        seed: Determines all initial values.

    Raises:
        RecipeError: The images are not square or not divisible into patches, the width is not divisible by the heads,
            or the stem does not support the patch size.
    """
    size = SIZES[recipe.name]
    width, heads = recipe.width or size.width, recipe.heads or size.heads
    _check_patches(image_px, recipe.patch_px, recipe.stem)
    if width % heads:
        fitting = ", ".join(str(count) for count in range(1, 17) if width % count == 0)
        raise RecipeError(f"model.width={width} is not divisible by model.heads={heads}: choose heads from {fitting}")
    with torch.device("meta"):  # draws nothing; initialise sets every value
        student = DeiT(
            image_px=image_px[0],
            patch_px=recipe.patch_px,
            channels=channels,
            classes=classes,
            width=width,
            depth=recipe.depth or size.depth,
            heads=heads,
            tokens=tokens,
            drop_path=recipe.drop_path,
            dropout=recipe.dropout,
            layer_scale=recipe.layer_scale,
            stem=recipe.stem,
        )
    student.to_empty(device="cpu")
    student.initialise(torch.Generator().manual_seed(seed))
    return student


def _check_patches(image_px: tuple[int, int], patch_px: int, stem: str) -> None:
    height, width = image_px
    if height != width:
        raise RecipeError(
            f"the images are {height} x {width} px, but a DeiT needs square ones: set data.image_px={min(image_px)}"
        )
    if height % patch_px:
        fitting = ", ".join(str(side) for side in range(1, height + 1) if height % side == 0)
        problem = "is larger than" if patch_px > height else "does not divide"
        raise RecipeError(f"model.patch_px={patch_px} {problem} the images of {height} px: choose from {fitting}")
    if stem == "conv" and patch_px & (patch_px - 1):
        fitting = ", ".join(str(2**power) for power in range(1, 7) if height % 2**power == 0)
        raise RecipeError(
            f"model.stem=conv halves the image with each layer, so model.patch_px={patch_px} is impossible: "
            f"choose from {fitting or '1'}, or model.stem=patch"
        )


def _token(width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, width))

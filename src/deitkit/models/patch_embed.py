"""The patch embeddings of a DeiT, from images to tokens, by the names of ``model.stem``."""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """A linear map of every patch, as a convolution whose kernels do not overlap."""

    def __init__(self, patch_px: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_px, stride=patch_px)

    def initialise(self, generator: torch.Generator | None) -> None:
        """Draw the map uniformly in +-1/sqrt(fan in), as in the released code; small patches keep their variance."""
        bound = 1 / math.sqrt(self.proj.weight[0].numel())
        nn.init.uniform_(self.proj.weight, -bound, bound, generator=generator)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patches features"]:
        """Return the patches row by row."""
        embedded: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return embedded


class ConvStem(PatchEmbedding):
    """Convolutions that halve the image until a pixel represents a patch, then a linear map (Xiao et al. 2021).

    Each is 3x3 with stride 2, BatchNorm and ReLU; channels double up to the student's width: for patch 16 the four
    layers of section 4 (24, 48, 96 and 192 channels for DeiT-Ti). Unlike there, no transformer block is removed in
    return.

    Args:
        patch_px: A power of two.
        channels: Channels of the images.
        width: Width of a token.
    """

    def __init__(self, patch_px: int, channels: int, width: int) -> None:
        assert patch_px & (patch_px - 1) == 0
        halvings = patch_px.bit_length() - 1
        sizes = [channels, *(max(1, width >> (halvings - 1 - layer)) for layer in range(halvings))]
        super().__init__(1, sizes[-1], width)
        self.layers = nn.Sequential()
        for inputs, outputs in itertools.pairwise(sizes):
            self.layers.extend(
                [nn.Conv2d(inputs, outputs, 3, 2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            )

    def initialise(self, generator: torch.Generator | None) -> None:
        """Draw the convolutions as usual before a ReLU (He et al. 2015), and the map as in ``PatchEmbedding``."""
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            elif isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()
        super().initialise(generator)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patches features"]:
        """Return the tokens row by row."""
        return super().forward(self.layers(images))


STEMS: dict[str, type[PatchEmbedding]] = {"patch": PatchEmbedding, "conv": ConvStem}

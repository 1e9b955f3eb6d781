"""AutoAugment, 3-Augment and colour jitter: the draws of operations. The operations are in ``operations.py``."""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from deitkit.data.augment.operations import OPERATIONS, AugmentPolicy
from deitkit.data.augment.randaugment import find_arguments, no_argument, torchvision_space

AUTO_BINS = 10  # levels of AutoAugment's magnitudes
BLUR_RADIUS_PX = (0.1, 2.0)
SOLARIZE_FROM = 128  # grey level


class AutoAugment(AugmentPolicy):
    """AutoAugment (Cubuk et al., 2019): each image draws one of 25 pairs of operations that were found by search.

    Policies, magnitudes and interpolation (nearest, black outside) are those of torchvision's ``AutoAugment``.
    """

    space = torchvision_space(AUTO_BINS) | {"Invert": no_argument}

    def __init__(self, policy: str) -> None:
        """Read a policy: ``imagenet``, ``cifar10`` or ``svhn``."""
        from torchvision import transforms  # here, since it takes a second to import

        pairs = transforms.AutoAugment(transforms.AutoAugmentPolicy(policy)).policies
        names, probabilities, levels = zip(*(zip(*pair) for pair in pairs))
        known = list(self.space)
        self.choices = torch.tensor([[known.index(name) for name in pair] for pair in names]).T
        self.probabilities = torch.tensor(probabilities, dtype=torch.float64).T
        self.levels = torch.tensor([[level or 0 for level in pair] for pair in levels], dtype=torch.float64).T

    def draw(
        self, batch: int, height: int, width: int, generator: torch.Generator
    ) -> tuple[Int64[Tensor, "layers batch"], Float64[Tensor, "layers batch"]]:
        """Draw operations (indices into ``OPERATIONS``) and their arguments for every image."""
        pairs = torch.randint(self.choices.shape[1], (batch,), generator=generator)
        shape = (len(self.choices), batch)
        applied = torch.rand(shape, generator=generator, dtype=torch.float64) < self.probabilities[:, pairs]
        signs = torch.randint(2, shape, generator=generator).double() * 2 - 1
        operations, arguments = find_arguments(
            self.space, self.choices[:, pairs], self.levels[:, pairs], signs, height, width
        )
        return torch.where(applied, operations, OPERATIONS.index("Identity")), arguments


class ThreeAugment(AugmentPolicy):
    """3-Augment (Touvron et al. 2022, "DeiT III", section 3.2) without its colour jitter, which is a separate field.

    Each image is made grey, solarized or blurred, with equal probability. As in the released code, grey levels from 128
    on are inverted and the radius of the blur is uniform from 0.1 to 2 pixels.
    """

    def draw(
        self, batch: int, height: int, width: int, generator: torch.Generator
    ) -> tuple[Int64[Tensor, "layers batch"], Float64[Tensor, "layers batch"]]:
        """Draw operations (indices into ``OPERATIONS``) and their arguments for every image."""
        choices = torch.randint(3, (1, batch), generator=generator)
        least, most = BLUR_RADIUS_PX
        radii = least + (most - least) * torch.rand((1, batch), generator=generator, dtype=torch.float64)
        named = torch.tensor([OPERATIONS.index(name) for name in ("Color", "Solarize", "GaussianBlur")])
        arguments = torch.stack([torch.zeros_like(radii), torch.full_like(radii, SOLARIZE_FROM), radii])
        return named[choices], arguments.gather(0, choices[None])[0]


class ColourJitter(AugmentPolicy):
    """Brightness, contrast and saturation in a random order, each by a factor that is uniform around 1.

    Equal to torchvision's ``ColorJitter(strength, strength, strength)``, which timm uses for one number.
    """

    def __init__(self, strength: float) -> None:
        """Prepare factors from ``max(0, 1 - strength)`` to ``1 + strength``."""
        self.range = max(0.0, 1 - strength), 1 + strength

    def draw(
        self, batch: int, height: int, width: int, generator: torch.Generator
    ) -> tuple[Int64[Tensor, "layers batch"], Float64[Tensor, "layers batch"]]:
        """Draw operations (indices into ``OPERATIONS``) and their arguments for every image."""
        order = torch.rand((3, batch), generator=generator).argsort(dim=0)
        least, most = self.range
        factors = least + (most - least) * torch.rand((3, batch), generator=generator, dtype=torch.float64)
        named = torch.tensor([OPERATIONS.index(name) for name in ("Brightness", "Contrast", "Color")])
        return named[order], factors

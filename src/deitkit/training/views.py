"""The images of a training step and their view: drawn, augmented, mixed; and the targets of their labels."""

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from deitkit.data.augment.augment import Augment
from deitkit.data.augment.mix import Mix, balanced_weights, weigh_images
from deitkit.data.batches import Batches
from deitkit.data.dataset import Dataset
from deitkit.recipe.schema import AugmentRecipe, TrainRecipe
from deitkit.system.ranks import Ranks
from deitkit.system.seeding import derived_generator, derived_seed


class Views:
    """The views of a training, each a function of seed and step alone.

    Args:
        dataset: Its training images, and those without labels.
        augment: How an image becomes a view.
        train: Size and order of the batches, label smoothing, weights of classes.
        seed: Of the order and the views.
        device: Of the views.
        unlabelled_in_step: Images without labels in a step, at most as many as there are; 0 for none.
        balanced: Whether an epoch has as many images of every class.
        ranks: Processes that share every step; each makes the part of the view that it trains on.
    """

    def __init__(
        self,
        dataset: Dataset,
        augment: AugmentRecipe,
        train: TrainRecipe,
        seed: int,
        device: torch.device,
        *,
        unlabelled_in_step: int,
        balanced: bool,
        ranks: Ranks,
    ) -> None:
        self.seed, self.ranks = seed, ranks
        scale_min = dataset.train.scale_of_crops(augment)
        self.batches = Batches(
            dataset.train,
            train.batch_size,
            seed,
            device,
            repeats=train.repeats,
            epoch_repeats=train.epoch_repeats,
            balanced=balanced,
            scale_min=scale_min,
            places=ranks.places(train.batch_size),
        )
        self.unlabelled: Batches | None = None
        count = dataset.unlabelled_in_step(unlabelled_in_step)
        if count and dataset.unlabelled is not None:
            order = derived_seed(seed, "unlabelled")
            self.unlabelled = Batches(
                dataset.unlabelled, count, order, device, scale_min=scale_min, places=ranks.places(count)
            )
        self.augment = Augment(augment, dataset.mean, dataset.std, is_cropped=scale_min is not None)
        self.label_smoothing = train.label_smoothing
        self.mix = Mix(augment, dataset.classes, self.label_smoothing)
        self.class_weights: Tensor | None = None
        weights = balanced_weights(dataset.train.labels, dataset.classes)
        if train.class_weight == "balanced" and not bool((weights == 1).all()):
            self.class_weights = weights.to(device)

    @property
    def unlabelled_in_step(self) -> int:
        """Images without labels in a step."""
        return 0 if self.unlabelled is None else self.unlabelled.batch_size

    def unlabelled_images(self, step: int) -> UInt8[Tensor, "unlabelled channels height width"] | None:
        """Return the images without labels of a step of the run; their epochs are independent of those with labels."""
        if self.unlabelled is None:
            return None
        return self.unlabelled.batch(*divmod(step, self.unlabelled.steps_per_epoch))[0]

    def make(
        self,
        images: UInt8[Tensor, "batch channels height width"],
        labels: Int64[Tensor, " batch"],
        step: int,
        unlabelled: UInt8[Tensor, "unlabelled channels height width"] | None = None,
    ) -> tuple[Float[Tensor, "all channels height width"], Float[Tensor, "batch classes"]]:
        """Return the view of a step of the run, and the targets of its images with labels, which come first."""
        view, targets = self._make_part(images, labels, self.batches, derived_generator(self.seed, "view", step))
        if unlabelled is not None:
            assert self.unlabelled is not None
            generator = derived_generator(self.seed, "unlabelled view", step)
            nothing = labels.new_zeros(len(unlabelled))
            view = torch.cat([view, self._make_part(unlabelled, nothing, self.unlabelled, generator)[0]])
        return view, targets

    def _make_part(
        self,
        images: UInt8[Tensor, "part channels height width"],
        labels: Int64[Tensor, " part"],
        batches: Batches,
        generator: torch.Generator,
    ) -> tuple[Float[Tensor, "part channels height width"], Float[Tensor, "part classes"]]:
        """Draw for a whole batch, and return the view and the targets of this process's images."""
        height, width = images.shape[-2:]
        draws = self.augment.draw(batches.batch_size, (height, width), generator)
        if self.ranks.count > 1:
            draws = draws[batches.places]
        return self.mix(self.augment.apply(images, draws), labels, generator)

    def weigh(self, targets: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"] | None:
        """Return the targets of the labels' term, of images that are weighted by their class; None if they are not."""
        if self.class_weights is None:
            return None
        return weigh_images(targets, self.class_weights, self.label_smoothing)

    def close(self) -> None:
        """End the processes that decode ahead, if any; training on starts others."""
        for batches in filter(None, (self.batches, self.unlabelled)):
            batches.close()

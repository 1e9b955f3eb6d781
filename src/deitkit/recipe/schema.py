"""The schema of a recipe; reading one from a file is in ``load``.

Every number that influences a result is a field. Nothing in this file builds a model or touches data.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from deitkit.recipe.contradictions import contradictions
from deitkit.recipe.distillation import DistillationRecipe
from deitkit.recipe.section import (
    Colour,
    Fraction,
    NameOrPath,
    NonNegativeFloat,
    NonNegativeInt,
    OptimizerName,
    Probability,
    Section,
    UserPath,
)
from deitkit.recipe.speed import SpeedRecipe


class DataRecipe(Section):
    """The images, and how they are split."""

    name: str = Field("digits", description="A named data set, folder:PATH, parquet:PATH or csv:FILE.")
    root: Path | None = Field(None, description="Folder of data sets; by default $DEITKIT_DATA, else ~/.cache/deitkit.")
    download: bool = Field(True, description="Download a named data set that is not on the disk (by torchvision).")
    image_px: PositiveInt | None = Field(None, description="Resize images to this; required if their sizes differ.")
    train_px: PositiveInt | None = Field(
        None,
        description="Keep training images at this side, and cut random-resized crops from them; by default twice "
        "image_px, or the files' own pixels if they are streamed; image_px: crop what was resized.",
    )
    channels: Literal[1, 3] | None = Field(
        None, description="1 for grey, 3 for colour; by default that of the data set."
    )
    train_images: PositiveInt | None = Field(None, description="Train on this many images only (stratified).")
    test_images: PositiveInt | None = Field(None, description="Test on this many images only (stratified).")
    validation_fraction: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.1, description="Share of the training images held out for curves, gate and winner, without a split for it."
    )
    test_fraction: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.2, description="Share held out as test set, if the data set has none."
    )
    folds: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="k-fold cross-validation: divide the images into this many test sets, one comparison for each.",
    )
    fold: PositiveInt | None = Field(None, description="Only this fold, from 1; by default all of them, in one table.")
    split_seed: NonNegativeInt = Field(0, lt=2**32, description="Seed of every split, the same for all training seeds.")
    streaming: Literal["auto", "unlabelled"] | bool = Field(
        "auto",
        description="Decode images when they are needed instead of once; unlabelled: only those; auto: if they do not "
        "fit in memory.",
    )
    workers: NonNegativeInt | None = Field(
        None, description="Processes that decode streamed images; by default one for each core."
    )
    corrupt: Literal["skip", "error"] = Field("skip", description="What to do with a file that cannot be decoded.")
    sampling: Literal["all", "balanced"] = Field(
        "all",
        description="all: every training image once an epoch; balanced: as many of each class, rare images repeatedly.",
    )
    unlabelled: str | None = Field(
        None,
        description="Where students learn from the teacher alone: 'rest' (what train_images leaves out), folder:PATH.",
    )
    fit: Literal["crop", "pad", "squash"] = Field(
        "crop", description="Images that are not square: keep the centre, pad with black, or squash them."
    )
    eval_crop: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Resize validation and test images to image_px divided by this, and keep their centre "
        "(the DeiT code: 0.875).",
    )


class AugmentRecipe(Section):
    """Augmentation of a batch of images into the view that the teacher and all students see."""

    flip: Probability = Field(0.5, description="Probability of a mirror image; 0 for digits and text.")
    crop: Literal["none", "pad", "random-resized", "simple"] = Field(
        "pad",
        description="pad: with black by pad_px, then crop; random-resized: an area of at least scale_min; simple: pad "
        "with reflections, then crop (DeiT III).",
    )
    pad_px: NonNegativeInt = Field(4, description="Padding on each side before the crop (crop: pad or simple).")
    scale_min: Annotated[float, Field(gt=0, le=1)] = Field(
        0.08, description="Smallest share of the area that a crop keeps (crop: random-resized)."
    )
    randaugment: str | None = Field(
        None, description="'N,M' as torchvision's RandAugment, or a timm string such as 'rand-m9-mstd0.5-inc1'."
    )
    erase: Probability = Field(0.0, description="Probability of random erasing.")
    erase_mode: Literal["constant", "pixel"] = Field(
        "constant", description="Fill with the mean colour, or with noise per pixel."
    )
    mixup: NonNegativeFloat = Field(0.0, description="Alpha of Mixup's Beta distribution; 0 switches it off.")
    cutmix: NonNegativeFloat = Field(0.0, description="Alpha of CutMix's Beta distribution; 0 switches it off.")
    mix_probability: Probability = Field(1.0, description="Share of the batches that are mixed.")
    mix_switch: Probability = Field(0.5, description="Share of the mixed batches that use CutMix, if both are on.")
    autoaugment: Literal["imagenet", "cifar10", "svhn"] | None = Field(
        None, description="AutoAugment with the policy found on this data set, instead of RandAugment."
    )
    three_augment: bool = Field(
        False,
        description="3-Augment instead of RandAugment: grey, solarize or blur (DeiT III, with colour_jitter: 0.3).",
    )
    colour_jitter: NonNegativeFloat = Field(
        0.0,
        description="Range of brightness, contrast and saturation factors, beside RandAugment too (timm then ignores "
        "it): 1 - this to 1 + this; 0 switches it off.",
    )


class ModelRecipe(Section):
    """The student: a DeiT."""

    name: Literal["micro", "deit_tiny", "deit_small", "deit_base", "vit_base", "vit_large"] = Field(
        "deit_tiny",
        description="Width, blocks, heads: micro 64, 4, 2; deit_tiny 192, 12, 3; deit_small 384, 12, 6; deit_base, "
        "vit_base 768, 12, 12; vit_large 1024, 24, 16.",
    )
    patch_px: PositiveInt = Field(
        16, description="Side of a patch; must divide the image. 4 for 32 px; 2 takes more than four times as long."
    )
    width: PositiveInt | None = Field(None, description="Overrides the size's width.")
    depth: PositiveInt | None = Field(None, description="Overrides the size's number of blocks.")
    heads: PositiveInt | None = Field(None, description="Overrides the size's number of attention heads.")
    drop_path: Fraction = Field(0.0, description="Stochastic depth of the last block, growing linearly from 0.")
    dropout: Fraction = Field(0.0, description="Dropout on embeddings, attention output and MLP.")
    checkpoint: UserPath | None = Field(
        None, description="Initial weights of every student, from deitkit, timm, a released DeiT or transformers."
    )
    pretrained: str | None = Field(
        None, description="Initial weights by name: timm/NAME of a DeiT or ViT, downloaded once; its size counts."
    )
    layer_scale: PositiveFloat | None = Field(
        None, description="Learn a factor for each channel of every branch, from this on (DeiT III: 1e-4; CaiT: 0.1)."
    )
    stem: Literal["patch", "conv"] = Field(
        "patch",
        description="patch: a linear map of each; conv: 3x3 convolutions of stride 2 with BatchNorm (Xiao et al. 2021, "
        "who omit a block in return); patch_px must be a power of two, and batches are not split.",
    )


class OptimizerRecipe(Section):
    """Optimizer and learning rate of a model, as a function of the step."""

    optimizer: OptimizerName = Field(
        "adamw",
        description="muon: Muon for the matrices of the blocks, AdamW for the rest, not for CNNs; lamb: for DeiT III, "
        "with clip_norm: 1.0.",
    )
    learning_rate: PositiveFloat = Field(1e-3, description="Peak learning rate, after the warm-up.")
    weight_decay: NonNegativeFloat = Field(
        0.05, description="On matrices only, not on biases, norms, tokens and positions."
    )
    momentum: Fraction = Field(0.9, description="Momentum (Nesterov) of sgd.")
    warmup_epochs: NonNegativeFloat = Field(0.0, description="Linear warm-up, in epochs.")
    warmup_learning_rate: NonNegativeFloat = Field(
        1e-6, description="Learning rate of the first step of the warm-up; at most the peak."
    )
    min_learning_rate: NonNegativeFloat = Field(
        0.0, description="Learning rate at the end of the cosine, which moves every step."
    )
    clip_norm: PositiveFloat | None = Field(None, description="Clip the gradient's global norm to this.")
    learning_rate_per: PositiveInt | None = Field(
        None, description="Scale learning_rate by train.batch_size divided by this (paper: 512)."
    )


class TrainRecipe(OptimizerRecipe):
    """Length of a training, and its batches."""

    epochs: PositiveInt = Field(20, description="Passes over the training images (times epoch_repeats).")
    schedule_epochs: PositiveInt | None = Field(
        None,
        description="Length of the cosine in epochs, if longer than the run (the reproduction: 50, and it ran 20).",
    )
    batch_size: PositiveInt = Field(
        128, description="Images in a step; the last, smaller batch of an epoch is left out."
    )
    label_smoothing: Fraction = Field(0.1, description="On true labels only, never on the teacher's decision.")
    class_weight: Literal["balanced"] | None = Field(
        None, description="balanced: weight each image's loss on its label by the inverse frequency of its class."
    )
    repeats: PositiveInt = Field(
        1,
        description="Repeated augmentation: views of an image in a step (the paper: 3); an epoch keeps its number of "
        "steps and uses 1/repeats of the images.",
    )
    epoch_repeats: PositiveInt = Field(
        1, description="Passes over the training images that make an epoch (timm: --epoch-repeats); for few images."
    )

    def steps_per_epoch(self, images: int) -> int:
        """Steps of an epoch of so many training images."""
        return images * self.epoch_repeats // self.batch_size


class StudentTrainRecipe(TrainRecipe):
    """Training of the students, and the precision of everything."""

    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Keep an average of the weights, in rows of its own, which may win."
    )
    unlabelled_batch_size: PositiveInt | None = Field(
        None, description="Images of data.unlabelled in a step, beside batch_size; by default as many."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Of forward passes; weights and losses are fp32. auto: bf16 if the processor has it (GPUs; CPUs "
        "with AVX512-BF16 or AMX).",
    )


class TeacherTrainRecipe(TrainRecipe):
    """Training of a teacher: the usual settings of a CNN."""

    optimizer: OptimizerName = "sgd"
    learning_rate: PositiveFloat = 0.1
    weight_decay: NonNegativeFloat = 5e-4
    warmup_epochs: NonNegativeFloat = 1.0
    warmup_learning_rate: NonNegativeFloat = 1e-3
    label_smoothing: Fraction = 0.0
    epochs: PositiveInt = 30


class TeacherRecipe(Section):
    """A frozen teacher, and its preparation."""

    name: NameOrPath = Field(
        "cifar/resnet20",
        description="timm/NAME, torchvision/NAME, cifar/resnetN, small/NAME, own/NAME, or a model's folder.",
    )
    checkpoint: UserPath | None = Field(None, description="Weights: .safetensors, .pth or .th.")
    pretrained: bool = Field(False, description="Download the library's pretrained weights, without a checkpoint.")
    fit: Literal["auto", "none", "head", "full"] = Field(
        "auto", description="Layers to train; auto: the head if only that is new, all if no weights were loaded."
    )
    reset_head: bool = Field(False, description="Replace the classifier by a new one, as in the reproduction.")
    image_px: PositiveInt | None = Field(
        None, description="Resolution of the teacher; by default its library's, else the view's."
    )
    mean: Colour | None = Field(None, description="Mean by which the teacher's images are normalised, in [0, 1].")
    std: Colour | None = Field(None, description="Standard deviation of that normalisation, per channel.")
    channel_order: Literal["rgb", "bgr"] = Field("rgb", description="Of the images its weights were trained on.")
    train: TeacherTrainRecipe = TeacherTrainRecipe()
    augment: AugmentRecipe = AugmentRecipe()
    all_images: bool = Field(
        False, description="Train it on all training images, including those that data.train_images leaves out."
    )
    min_top1: Probability | None = Field(None, description="Refuse a teacher below this validation accuracy.")
    allow_weak: bool = Field(False, description="Use a teacher that the gate refuses, marked as weak.")
    cache: bool = Field(False, description="Cache the logits on the disk, for other comparisons on the same views.")
    cache_top: PositiveInt | None = Field(
        None,
        description="Cache only this many largest logits of each view, for many classes; the other classes share the "
        "rest of the probability evenly.",
    )


class CompareRecipe(Section):
    """How students are compared."""

    by: Literal["accuracy", "balanced"] = Field(
        "accuracy",
        description="What decides on the validation images which student wins; balanced: mean recall of the classes.",
    )


class BaselineRecipe(OptimizerRecipe):
    """The CNN baseline: trained on labels alone, on the students' views, for the same number of epochs."""

    name: str = Field(
        "teacher",
        description="'teacher' for the teacher's architecture, or a name; setting any field of baseline adds the row.",
    )
    pretrained: bool = Field(False, description="Start from the library's pretrained weights, with a new classifier.")
    checkpoint: UserPath | None = Field(None, description="Start from these weights: .safetensors, .pth or .th.")
    image_px: PositiveInt | None = Field(
        None, description="Resolution of the CNN; by default that of its pretrained weights, else the view's."
    )
    optimizer: OptimizerName = "sgd"
    learning_rate: PositiveFloat = 0.1
    weight_decay: NonNegativeFloat = 5e-4
    warmup_learning_rate: NonNegativeFloat = 1e-3

    @property
    def is_pretrained(self) -> bool:
        """Whether it starts from weights, instead of random ones."""
        return self.pretrained or self.checkpoint is not None


class Recipe(Section):
    """A complete comparison."""

    name: str = Field("custom", description="A short name, for titles and folders.")
    data: DataRecipe = DataRecipe()
    augment: AugmentRecipe = AugmentRecipe()
    model: ModelRecipe = ModelRecipe()
    methods: tuple[str, ...] = Field(
        ("none", "soft", "hard", "token-hard"), min_length=1, description="Names of methods: see `deitkit methods`."
    )
    teacher: TeacherRecipe = TeacherRecipe()
    teachers: tuple[TeacherRecipe, ...] = Field(
        (),
        description="Several teachers instead of 'teacher', each with its fields; they teach by their mean softmax.",
    )
    distillation: DistillationRecipe = DistillationRecipe()
    baseline: BaselineRecipe | None = None
    train: StudentTrainRecipe = StudentTrainRecipe()
    speed: SpeedRecipe = SpeedRecipe()
    compare: CompareRecipe = CompareRecipe()
    seeds: tuple[NonNegativeInt, ...] = Field((0,), min_length=1, description="One cohort is trained per seed.")
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = Field(
        "auto", description="auto: cuda if available, else cpu. mps (Apple) and xpu (Intel) were never tried."
    )
    published: tuple[Literal["reproduction", "paper"], ...] = Field(
        (), description="Published tables to print next to ours."
    )
    variants: dict[str, dict[str, Any]] = Field(
        {}, description="An ablation in one table: by name, the fields that a further comparison changes."
    )

    @property
    def all_teachers(self) -> tuple[TeacherRecipe, ...]:
        """The teachers: at least one."""
        return self.teachers or (self.teacher,)

    @property
    def named_teachers(self) -> dict[str, TeacherRecipe]:
        """The teachers by the names of their fields: ``teacher``, or ``teachers.0``, ``teachers.1``, ..."""
        return {f"teachers.{number}": one for number, one in enumerate(self.teachers)} or {"teacher": self.teacher}

    def with_teacher(self, teacher: TeacherRecipe) -> "Recipe":
        """Return this recipe with one teacher, as its only one."""
        return self.model_copy(update={"teacher": teacher, "teachers": ()})

    @property
    def has_random_crops(self) -> bool:
        """Whether students or a teacher train on random-resized crops."""
        augments = [self.augment, *(teacher.augment for teacher in self.all_teachers)]
        return any(augment.crop == "random-resized" for augment in augments)

    @property
    def is_cross_validation(self) -> bool:
        """Whether it stands for a comparison for each fold."""
        return self.data.folds is not None and self.data.fold is None

    @property
    def unlabelled_in_step(self) -> int:
        """Images of ``data.unlabelled`` in a step, if there are as many."""
        if self.data.unlabelled is None or self.distillation.unlabelled_weight == 0:
            return 0
        return self.train.unlabelled_batch_size or self.train.batch_size

    @field_validator("variants", mode="before")
    @classmethod
    def _by_dotted_field(cls, variants: Any) -> Any:
        """Flatten nested mappings to dotted fields; the later of two values counts; null drops a variant."""
        if not isinstance(variants, dict):
            return {} if variants is None else variants
        return {
            name: dict(_flat(changes)) if isinstance(changes, dict) else changes
            for name, changes in variants.items()
            if changes is not None
        }

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        problems = list(contradictions(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _flat(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[Any, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

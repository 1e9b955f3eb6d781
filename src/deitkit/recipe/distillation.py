"""The sections of a recipe that set the losses of distillation."""

from typing import Literal

from pydantic import Field, PositiveFloat

from deitkit.recipe.section import NonNegativeFloat, Probability, Section


class DkdRecipe(Section):
    """Weights and temperature of 'dkd' and 'token-dkd'."""

    target_weight: NonNegativeFloat = Field(1.0, description="Of the target class against the rest (Zhao et al.: 1).")
    others_weight: NonNegativeFloat = Field(8.0, description="Of the other classes (Zhao et al., CIFAR-100: 8).")
    temperature: PositiveFloat = Field(4.0, description="Temperature (Zhao et al., CIFAR-100: 4).")


class DistRecipe(Section):
    """Weights of the correlations, and temperature, of 'dist' and 'token-dist'."""

    inter_weight: NonNegativeFloat = Field(2.0, description="Over the classes of an image (Huang et al.: 2).")
    intra_weight: NonNegativeFloat = Field(2.0, description="Over the images of a class (Huang et al.: 2).")
    temperature: PositiveFloat = Field(1.0, description="Temperature (Huang et al., ImageNet: 1; CIFAR-100: 4).")


class StandardisedRecipe(Section):
    """Settings of 'standardised' and 'token-standardised'."""

    label_weight: NonNegativeFloat = Field(0.1, description="Weight of the labels (Sun et al.: 0.1).")
    teacher_weight: NonNegativeFloat = Field(9.0, description="Weight of the teacher (Sun et al.: 9).")
    temperature: PositiveFloat = Field(
        2.0, description="Temperature, in standard deviations of the logits (Sun et al.: 2)."
    )


class ConsistentRecipe(Section):
    """Settings of 'consistent'."""

    temperature: PositiveFloat = Field(1.0, description="Temperature (Beyer et al., ImageNet: 1).")


class DistillationRecipe(Section):
    """Weights and temperatures of the distillation losses."""

    temperature: PositiveFloat = Field(3.0, description="Of the soft methods (paper: 3.0).")
    soft_weight: Probability = Field(0.1, description="Share of the teacher in 'soft' (paper: lambda = 0.1).")
    hard_weight: Probability = Field(0.5, description="Share of the teacher in 'hard' (paper: one half).")
    token_weight: Probability = Field(0.5, description="Share of the distillation head in the token methods.")
    soft_scale: Literal["batch-mean", "legacy"] = Field(
        "batch-mean", description="legacy: also divide by the number of classes, as the released code does."
    )
    unlabelled_weight: NonNegativeFloat = Field(
        1.0, description="Weight of an image of data.unlabelled in the teacher's term, beside 1 for one with a label."
    )
    dkd: DkdRecipe = DkdRecipe()
    dist: DistRecipe = DistRecipe()
    standardised: StandardisedRecipe = StandardisedRecipe()
    consistent: ConsistentRecipe = ConsistentRecipe()

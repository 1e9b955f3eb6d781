"""The section of a recipe that sets speed and memory."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from deitkit.recipe.section import Section


class SpeedRecipe(Section):
    """Speed and memory. Results change by rounding only, but micro_batch_size changes the draws of dropout."""

    compile: Literal["auto"] | bool = Field(
        "auto",
        description="Compile the students' blocks (torch.compile); auto: on a GPU, where it was measured faster.",
    )
    cuda_graphs: bool = Field(True, description="On a GPU, record a student's step once and replay it.")
    attention: Literal["auto", "plain", "fused"] = Field(
        "auto", description="plain: two matrix products; fused: one kernel; auto: plain on a CPU up to 640 tokens."
    )
    channels_last: bool = Field(True, description="Use the channels-last memory layout for CNNs.")
    micro_batch_size: Literal["auto"] | PositiveInt | None = Field(
        "auto",
        description="Split a student's batch and accumulate its gradient: less memory, the same step. auto: on a CPU, "
        "into parts that fit its cache; null: never. CNNs (for their BatchNorm) and 'dist' always use whole batches. "
        "A number divides what the teacher sees, too.",
    )
    save_seconds: PositiveFloat = Field(
        300.0,
        description="Most seconds between two saved states, all that a killed run loses; at the end of an epoch "
        "a fifth is enough.",
    )
    checkpoint_activations: bool = Field(
        False, description="Recompute the inside of each block in the backward pass: less memory, a third more time."
    )

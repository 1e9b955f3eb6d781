"""What to run: the schema of a recipe, and how a file plus ``key=value`` overrides becomes one.

Every number that influences a result is a field here. Nothing in this file builds a model or touches data.
"""

import difflib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from deitkit.errors import RecipeError

Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Colour = tuple[float, ...]


class Section(BaseModel):
    """A part of a recipe: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataRecipe(Section):
    """Which images, and how they are split."""

    name: str = Field("digits", description="A named data set, folder:PATH or parquet:PATH.")
    root: Path | None = Field(None, description="Where data sets lie; by default $DEITKIT_DATA, then ~/.cache/deitkit.")
    download: bool = Field(True, description="Let torchvision download a named data set that is not on the disk.")
    image_px: PositiveInt | None = Field(None, description="Resize images to this; needed where their sizes differ.")
    channels: Literal[1, 3] | None = Field(
        None, description="1 for grey, 3 for colour; by default as the data set has."
    )
    train_images: PositiveInt | None = Field(None, description="Train on this many images only (stratified).")
    test_images: PositiveInt | None = Field(None, description="Test on this many images only (stratified).")
    validation_fraction: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.1, description="Share of the training images held out to check the teacher and draw curves (stratified)."
    )
    test_fraction: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.2, description="Share held out as test set, where the data set comes without one."
    )
    split_seed: NonNegativeInt = Field(0, description="Seed of every split, the same for all training seeds.")
    streaming: Literal["auto"] | bool = Field(
        "auto", description="Decode images whenever they are needed instead of once: where they do not fit in memory."
    )
    workers: NonNegativeInt | None = Field(
        None, description="Processes that decode streamed images; by default one for each core."
    )
    corrupt: Literal["skip", "error"] = Field("skip", description="What to do with a file that cannot be decoded.")


class AugmentRecipe(Section):
    """How a batch of images becomes the view that the teacher and all students see."""

    flip: Probability = Field(0.5, description="Probability of a horizontal flip.")
    crop: Literal["none", "pad", "random-resized"] = Field("pad", description="Pad and crop, or crop and resize.")
    pad_px: NonNegativeInt = Field(4, description="Zero padding on each side before the crop (crop: pad).")
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
    mix_probability: Probability = Field(1.0, description="Share of the batches that are mixed at all.")
    mix_switch: Probability = Field(0.5, description="Share of the mixed batches that use CutMix, if both are on.")


class ModelRecipe(Section):
    """The student: a DeiT."""

    name: Literal["micro", "deit_tiny", "deit_small", "deit_base"] = Field("deit_tiny", description="A named size.")
    patch_px: PositiveInt = Field(16, description="Side of a patch; must divide the image.")
    width: PositiveInt | None = Field(None, description="Overrides the size's width.")
    depth: PositiveInt | None = Field(None, description="Overrides the size's number of blocks.")
    heads: PositiveInt | None = Field(None, description="Overrides the size's number of attention heads.")
    drop_path: Fraction = Field(0.0, description="Stochastic depth of the last block, growing linearly from 0.")
    dropout: Fraction = Field(0.0, description="Dropout on embeddings, attention output and MLP.")


class OptimizerRecipe(Section):
    """How one model is updated, as a function of the step."""

    optimizer: Literal["adamw", "sgd", "muon"] = Field(
        "adamw", description="muon: Muon for the matrices of the blocks, AdamW for everything else."
    )
    learning_rate: PositiveFloat = Field(1e-3, description="Peak learning rate, after the warm-up.")
    weight_decay: NonNegativeFloat = Field(0.05, description="On matrices only: no biases, norms, tokens, positions.")
    momentum: Fraction = Field(0.9, description="Momentum (Nesterov) of sgd.")
    warmup_epochs: NonNegativeFloat = Field(0.0, description="Linear warm-up, in epochs.")
    warmup_learning_rate: NonNegativeFloat = Field(1e-6, description="Learning rate of the first step of the warm-up.")
    min_learning_rate: NonNegativeFloat = Field(0.0, description="Where the cosine ends.")
    clip_norm: PositiveFloat | None = Field(None, description="Clip the gradient's global norm to this.")


class TrainRecipe(OptimizerRecipe):
    """How long, and in what batches."""

    epochs: PositiveInt = Field(20, description="Passes over the training images.")
    schedule_epochs: PositiveInt | None = Field(
        None, description="Lay the cosine out for this many epochs, if the run is to end before it (as the seed's did)."
    )
    batch_size: PositiveInt = Field(
        128, description="Images in a step; the last, smaller batch of an epoch is left out."
    )
    label_smoothing: Fraction = Field(0.1, description="On true labels only, never on the teacher's.")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Keep an exponential moving average of the weights, reported as rows of its own."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the processor has it.")


class SpeedRecipe(Section):
    """How fast, never what: nothing here changes a result by more than rounding; a run may go on with other values."""

    compile: Literal["auto"] | bool = Field(
        "auto",
        description="Compile the students' blocks (torch.compile); auto: on a GPU, where it was measured to pay.",
    )
    cuda_graphs: bool = Field(True, description="On a GPU, record a student's step once and replay it.")
    attention: Literal["auto", "plain", "fused"] = Field(
        "auto", description="Two matrix products, or the fused kernel; auto: plain on a CPU for short sequences."
    )
    channels_last: bool = Field(True, description="Lay CNNs out with the channels last in memory.")
    micro_batch_size: Literal["auto"] | PositiveInt | None = Field(
        "auto",
        description="Split a student's batch and accumulate its gradient: less memory, the same step. auto: on a CPU, "
        "into parts that fit its cache; null: never. CNNs see whole batches, which their BatchNorm needs.",
    )
    side_by_side: bool = Field(
        True, description="On a CPU, compute parts of a student's batch at the same time, a core each."
    )
    checkpoint_activations: bool = Field(
        False, description="Keep only the input of each block and compute the rest again in the backward pass."
    )


class TeacherTrainRecipe(TrainRecipe):
    """How a teacher is trained here: a CNN's usual recipe."""

    optimizer: Literal["adamw", "sgd", "muon"] = "sgd"
    learning_rate: PositiveFloat = 0.1
    weight_decay: NonNegativeFloat = 5e-4
    warmup_epochs: NonNegativeFloat = 1.0
    warmup_learning_rate: NonNegativeFloat = 1e-3
    label_smoothing: Fraction = 0.0
    epochs: PositiveInt = 30


class TeacherRecipe(Section):
    """The frozen classifier that teaches, and what is done before it may."""

    name: str = Field(
        "cifar/resnet20", description="timm/NAME, torchvision/NAME, cifar/resnetN, small/NAME, or a file."
    )
    checkpoint: Path | None = Field(None, description="Weights: .safetensors, .pth or .th.")
    pretrained: bool = Field(False, description="Download the library's pretrained weights.")
    fit: Literal["auto", "none", "head", "full"] = Field(
        "auto", description="What is trained here: auto is the new head if only that is new, all if nothing was loaded."
    )
    reset_head: bool = Field(False, description="Replace the classifier by a fresh one, as the seed did.")
    image_px: PositiveInt | None = Field(
        None, description="The teacher's own resolution; by default its library's, else the view's."
    )
    mean: Colour | None = Field(None, description="The teacher's own normalisation, per channel, of values in [0, 1].")
    std: Colour | None = Field(None, description="The teacher's own normalisation, per channel, of values in [0, 1].")
    train: TeacherTrainRecipe = TeacherTrainRecipe()
    augment: AugmentRecipe = AugmentRecipe()
    all_images: bool = Field(
        False, description="Train it on all training images, also those that data.train_images keeps from the students."
    )
    min_top1: Probability | None = Field(None, description="Refuse a teacher below this validation accuracy.")
    cache: bool = Field(
        False, description="Keep its answers on the disk, so that another comparison on the same views asks it nothing."
    )
    allow_weak: bool = Field(False, description="Let a teacher that the gate refused teach all the same.")


class DistillationRecipe(Section):
    """How much the teacher counts, and how its answer is compared with the student's."""

    temperature: PositiveFloat = Field(3.0, description="Of the soft methods (paper: 3.0).")
    soft_weight: Probability = Field(0.1, description="Share of the teacher in 'soft' (paper: lambda = 0.1).")
    hard_weight: Probability = Field(0.5, description="Share of the teacher in 'hard' (paper: one half).")
    token_weight: Probability = Field(0.5, description="Share of the distillation head in the token methods.")
    soft_scale: Literal["batch-mean", "legacy"] = Field(
        "batch-mean", description="legacy: also divide by the number of classes, as the released code does."
    )


class BaselineRecipe(OptimizerRecipe):
    """The CNN baseline: trained on labels alone, on the students' views, for as many epochs."""

    name: str = Field(
        "teacher",
        description="'teacher' for the teacher's own architecture, or a name; giving any field of baseline adds it.",
    )
    optimizer: Literal["adamw", "sgd", "muon"] = "sgd"
    learning_rate: PositiveFloat = 0.1
    weight_decay: NonNegativeFloat = 5e-4
    warmup_learning_rate: NonNegativeFloat = 1e-3


class Recipe(Section):
    """One comparison, whole."""

    name: str = Field("custom", description="A short name, for titles and folders.")
    data: DataRecipe = DataRecipe()
    augment: AugmentRecipe = AugmentRecipe()
    model: ModelRecipe = ModelRecipe()
    methods: tuple[str, ...] = Field(
        ("none", "soft", "hard", "token-hard"), min_length=1, description="Names of methods: see `deitkit methods`."
    )
    teacher: TeacherRecipe = TeacherRecipe()
    distillation: DistillationRecipe = DistillationRecipe()
    baseline: BaselineRecipe | None = None
    train: TrainRecipe = TrainRecipe()
    speed: SpeedRecipe = SpeedRecipe()
    seeds: tuple[NonNegativeInt, ...] = Field((0,), min_length=1, description="A cohort is trained for each.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one.")
    published: tuple[Literal["seed", "paper"], ...] = Field((), description="Published tables to print beside ours.")

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        problems = list(_contradictions(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _contradictions(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong between fields that are each right."""
    if len(set(recipe.seeds)) != len(recipe.seeds):
        yield f"seeds={list(recipe.seeds)} holds a seed twice: give each once"
    if len(set(recipe.methods)) != len(recipe.methods):
        yield f"methods={list(recipe.methods)} holds a method twice: give each once"
    schedule = recipe.train.schedule_epochs
    if schedule is not None and schedule < recipe.train.epochs:
        yield f"train.schedule_epochs={schedule} is less than train.epochs={recipe.train.epochs}: raise it or drop it"
    if (recipe.teacher.mean is None) != (recipe.teacher.std is None):
        yield "teacher.mean and teacher.std belong together: give both or neither"
    for std in recipe.teacher.std or ():
        if std <= 0:
            yield f"teacher.std={list(recipe.teacher.std or ())} must be positive"
    for name in ("train", "teacher.train"):
        section = recipe.train if name == "train" else recipe.teacher.train
        if section.warmup_epochs > section.epochs:
            yield f"{name}.warmup_epochs={section.warmup_epochs:g} exceeds {name}.epochs={section.epochs}: lower it"


def shipped_recipes() -> dict[str, str]:
    """Return the text of every shipped recipe by its name."""
    folder = resources.files("deitkit") / "recipes"
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name)
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in files}


def load_recipe(source: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and validate it.

    Args:
        source: The name of a shipped recipe, or a path to a YAML file; None for the defaults.
        overrides: ``key=value`` with dotted keys; values are YAML. A section that has a name may be named in short:
            ``data=cifar10`` is ``data.name=cifar10``.

    Raises:
        RecipeError: All problems of the recipe at once; an unknown key names its nearest neighbours.
    """
    tree = _read_tree(source) if source is not None else {}
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree)


def parse_recipe(tree: dict[str, Any]) -> Recipe:
    """Validate a tree of plain values; raises RecipeError with all problems at once."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = [_sentence(dict(problem)) for problem in error.errors()]
        raise RecipeError("; ".join(problems)) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that loads to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def field_names(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Return every dotted key that a recipe knows."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        inner = _section_of(field.annotation)
        if inner is not None:
            names += field_names(inner, f"{prefix}{name}.")
    return names


def describe_fields(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield every field that holds a value: its dotted key, its default and its meaning."""
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from describe_fields(inner, f"{prefix}{name}.")
        else:
            default = field.get_default()
            shown = yaml.safe_dump(_plain_value(default)).removesuffix("...\n").strip()
            yield prefix + name, shown, _meaning(section, name)


def _meaning(section: type[BaseModel], name: str) -> str:
    """Return a field's description, from the section that it was first described in."""
    fields = [base.model_fields.get(name) for base in section.__mro__ if issubclass(base, BaseModel)]
    return next((field.description for field in fields if field is not None and field.description), "")


def _plain_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _section_of(annotation: Any) -> type[BaseModel] | None:
    options = get_args(annotation) or (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _read_tree(source: str) -> dict[str, Any]:
    shipped = shipped_recipes()
    if source in shipped:
        text = shipped[source]
    elif Path(source).is_file():
        text = Path(source).read_text(encoding="utf-8", errors="replace")
    else:
        near = _nearest(source, shipped) or f"shipped are {', '.join(shipped)}."
        raise RecipeError(f"recipe '{source}' is neither a shipped recipe nor a file: {near} See `deitkit recipes`")
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where is not None else ""
        raise RecipeError(f"recipe '{source}' is no valid YAML{line}: mend the file and run again") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise RecipeError(
            f"recipe '{source}' must be a mapping of field names to values, such as 'train: {{epochs: 20}}'"
        )
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"'{override}' is no override: write key=value, such as train.epochs=20")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise RecipeError(f"the value of '{override}' is no valid YAML: quote it") from None
    if isinstance(value, str) and "name" in getattr(_section_of(_field_type(key)), "model_fields", ()):
        key += ".name"
    *parents, last = key.split(".")
    place = tree
    for parent in parents:
        if not isinstance(place.get(parent), dict):
            place[parent] = {}
        place = place[parent]
    place[last] = value


def _field_type(key: str) -> Any:
    field = Recipe.model_fields.get(key)
    return field.annotation if field is not None else None


def _sentence(problem: dict[str, Any]) -> str:
    """Turn one of pydantic's problems into: field, value, what is allowed."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = field_names()
        near = _nearest(where, known) or "see `deitkit recipes --fields`"
        return f"unknown key '{where}': {near}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not where:
        return message
    value = problem["input"]
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return f"{where}={shown}: {message[0].lower()}{message[1:]}"


def _nearest(name: str, known: Sequence[str] | dict[str, str]) -> str:
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    near += [key for key in known if key.rpartition(".")[2] == last and key not in near]
    return f"did you mean {' or '.join(near[:3])}?" if near else ""

"""The models of the paper's tables and of the reproduction's second table, as data, with their published figures.

No figure here was measured by us. ``deitkit models`` lists them, ``deitkit bench infer --table`` times them.
"""

from dataclasses import asdict, dataclass

from torch import nn

from deitkit.models.vit import SIZES, DeiT
from deitkit.models.zoo import create_classifier

CLASSES = 1000

SOURCES = {
    "DeiT": "Touvron et al. 2020, arXiv 2012.12877v2, Tables 1, 2, 3, 5 and 7 (ImageNet, 300 epochs; V100 with 16 GB)",
    "EfficientNet": "Tan and Le 2019, arXiv 1905.11946, Table 2",
    "Grafit": "Touvron et al. 2020, arXiv 2011.12982; as DeiT's Table 7 quotes it",
    "RegNet": "Radosavovic et al. 2020, arXiv 2003.13678; as the model zoo of its authors (pycls) has it",
    "ResNet": "He et al. 2016; as DeiT's Table 5 quotes it",
    "ViT": "Dosovitskiy et al. 2020, arXiv 2010.11929, Tables 1 and 5 (ImageNet alone)",
}


@dataclass(frozen=True)
class CatalogueModel:
    """A model with published figures.

    Attributes:
        row: Its name.
        image_px: The resolution of the figures.
        student: The value of ``model.name``; None for a model that can only be a teacher.
        patch_px: Of the student.
        tokens: Of the student.
        method: By which the student was trained.
        teacher: The value of ``teacher.name``, without timm's tag of weights: which are those of the figures is in
            ``docs/models.md``. None if no library has it with a single classifier.
        millions: Parameters in millions, with the digits of the publication.
        top1: On ImageNet, in per cent.
        images_per_second: On one V100 with 16 GB, with batches as large as fit.
        sources: Keys of ``SOURCES``: first for accuracy and speed, last for the parameters.
    """

    row: str
    image_px: int
    student: str | None = None
    patch_px: int = 16
    tokens: tuple[str, ...] = ("class",)
    method: str = "none"
    teacher: str | None = None
    millions: str | None = None
    top1: float | None = None
    images_per_second: float | None = None
    sources: tuple[str, ...] = ("DeiT",)

    def build(self) -> nn.Module:
        """Build it for ImageNet's classes, with random weights; the student if there is one, else the teacher."""
        if self.student is None:
            assert self.teacher is not None
            return create_classifier(self.teacher, classes=CLASSES, channels=3).model
        return DeiT(
            image_px=self.image_px,
            patch_px=self.patch_px,
            channels=3,
            classes=CLASSES,
            tokens=self.tokens,
            **asdict(SIZES[self.student]),
        )

    def recipe_fields(self) -> dict[str, str | int]:
        """Return the fields of a recipe that select it, as overrides."""
        if self.student is None:
            return {"teacher.name": self.teacher or ""}
        return {
            "model.name": self.student,
            "model.patch_px": self.patch_px,
            "data.image_px": self.image_px,
            "methods": f"[{self.method}]",
        }


def _deit(
    name: str,
    student: str,
    px: int,
    millions: str | None,
    top1: float | None,
    images_per_second: float | None,
    teacher: str | None = None,
) -> CatalogueModel:
    distilled = "distilled" in name
    return CatalogueModel(
        name,
        px,
        student,
        tokens=("class", "distillation") if distilled else ("class",),
        method="token-hard" if distilled else "none",
        teacher=teacher,
        millions=millions,
        top1=top1,
        images_per_second=images_per_second,
    )


def _vit(row: str, student: str, patch_px: int, millions: str, top1: float, speed: float) -> CatalogueModel:
    teacher = f"timm/{student}_patch{patch_px}_384"
    return CatalogueModel(
        row,
        384,
        student,
        patch_px,
        teacher=teacher,
        millions=millions,
        top1=top1,
        images_per_second=speed,
        sources=("DeiT", "ViT"),
    )


def _cnn(
    row: str, teacher: str, millions: str, top1: float, speed: float | None, sources: tuple[str, ...], px: int = 224
) -> CatalogueModel:
    return CatalogueModel(
        row, px, teacher=f"timm/{teacher}", millions=millions, top1=top1, images_per_second=speed, sources=sources
    )


# DeiT-Ti and DeiT-S were published at 224 px only. The accuracy of a distilled model is that of its joint readout.
CATALOGUE = (
    _deit("DeiT-Ti", "deit_tiny", 224, "5", 72.2, 2536.5, "timm/deit_tiny_patch16_224"),
    _deit("DeiT-S", "deit_small", 224, "22", 79.8, 940.4, "timm/deit_small_patch16_224"),
    _deit("DeiT-B", "deit_base", 224, "86", 81.8, 292.3, "timm/deit_base_patch16_224"),
    _deit("DeiT-Ti distilled", "deit_tiny", 224, "6", 74.5, 2529.5),
    _deit("DeiT-S distilled", "deit_small", 224, "22", 81.2, 936.2),
    _deit("DeiT-B distilled", "deit_base", 224, "87", 83.4, 290.9),
    _deit("DeiT-Ti 384", "deit_tiny", 384, None, None, None),
    _deit("DeiT-S 384", "deit_small", 384, None, None, None),
    _deit("DeiT-B 384", "deit_base", 384, "86", 83.1, 85.9, "timm/deit_base_patch16_384"),
    _deit("DeiT-Ti distilled 384", "deit_tiny", 384, None, None, None),
    _deit("DeiT-S distilled 384", "deit_small", 384, None, None, None),
    _deit("DeiT-B distilled 384", "deit_base", 384, "87", 84.5, 85.9),
    _vit("ViT-B/32", "vit_base", 32, "86", 73.4, 394.5),
    _vit("ViT-B/16", "vit_base", 16, "86", 77.9, 85.9),
    _vit("ViT-L/32", "vit_large", 32, "307", 71.2, 124.1),
    _vit("ViT-L/16", "vit_large", 16, "307", 76.5, 27.3),
    _cnn("ResNet-50", "resnet50", "25", 79.6, 1226.1, ("Grafit", "DeiT")),
    _cnn("ResNet-152", "resnet152", "60", 78.3, 526.3, ("ResNet", "DeiT")),
    _cnn("RegNetY-4GF", "regnety_040", "20.6", 80.0, None, ("DeiT", "RegNet")),
    _cnn("RegNetY-8GF", "regnety_080", "39.2", 81.7, 591.6, ("DeiT", "RegNet")),
    _cnn("RegNetY-12GF", "regnety_120", "51.8", 82.4, None, ("DeiT", "RegNet")),
    _cnn("RegNetY-16GF", "regnety_160.deit_in1k", "83.6", 82.9, 334.7, ("DeiT", "RegNet")),
    _cnn("EfficientNet-B7", "tf_efficientnet_b7", "66", 84.3, 55.1, ("EfficientNet", "DeiT"), px=600),
    _cnn("RegNetX-400MF", "regnetx_004", "5.2", 72.6, None, ("RegNet",)),
)

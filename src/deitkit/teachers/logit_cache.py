"""A disk cache of the teacher's logits: one comparison computes them, later ones on the same views read them.

A view follows from the seed and the step (see ``seeding``), so its logits belong to an epoch and a step. The cache may
be deleted at any time.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deitkit.data.cache import cache_folder, sha256
from deitkit.data.dataset import Dataset
from deitkit.data.split import Split
from deitkit.errors import RecipeError, TeacherError
from deitkit.models.classifier import Classifier
from deitkit.recipe.schema import Recipe
from deitkit.system.device import Precision
from deitkit.system.files import write_bytes
from deitkit.teachers.frozen import Teachers

FORMAT = 1  # of the files and of the views: raise it when either changes
# Largest mean difference between computed and cached logits, as a share of their standard deviation. Rounding and other
# kernels give less than 0.02; other views, or another teacher, give about 1.
TOLERANCE = 0.1


class LogitCache:
    """The teachers' logits for the views of one seed, epoch by epoch, on the disk.

    Logits are rounded to float16, newly computed ones too, so that a second run trains on the same values as the first.
    With ``top`` only the largest are kept, with the share of the probability that they leave to all others.

    Args:
        described: All that decides the logits, as JSON: the key of their folder.
        steps: Steps of an epoch.
        batch: Images in a step, those without labels too.
        classes: Of the data set.
        device: Of the logits.
        top: Number of logits to keep of each view; None for all.
        root: Folder of all caches; by default deitkit's cache folder.
    """

    def __init__(
        self,
        described: dict[str, Any],
        *,
        steps: int,
        batch: int,
        classes: int,
        device: torch.device,
        top: int | None = None,
        root: Path | None = None,
    ) -> None:
        described = described | {"format": FORMAT} | ({} if top is None else {"top": top})
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = (root or cache_folder()) / "answers" / key
        self.steps, self.batch, self.classes, self.device, self.top = steps, batch, classes, device, top
        self._epoch = -1
        self._recorded: dict[str, Tensor] | None = None
        self._new: dict[str, Tensor] | None = None
        self._kept = 0

    def get(self, epoch: int, step: int, compute: Callable[[], Tensor]) -> Float[Tensor, "batch classes"]:
        """Return the logits for the view of a step, from the disk or newly computed; check a sample of the former.

        Raises:
            TeacherError: Cached logits differ from those that the teachers compute now, or the disk is full.
        """
        kept = self.find(epoch, step)
        if kept is None:
            return self.keep(epoch, step, compute())
        if step == 0:
            self.check(kept, self._unpacked(self._packed(compute())))
        return kept

    def find(self, epoch: int, step: int) -> Float[Tensor, "batch classes"] | None:
        """Return the cached logits of a step (epoch and step from 0), or None."""
        if epoch != self._epoch:
            self._open(epoch)
        if self._recorded is None:
            return None
        return self._unpacked({name: tensor[step] for name, tensor in self._recorded.items()})

    def keep(self, epoch: int, step: int, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """Keep logits and return them as rounded for the cache; write an epoch when it is complete."""
        if self._new is None:
            self._require_space()
            self._new = {
                name: torch.empty(shape, dtype=dtype, device=self.device)
                for name, (shape, dtype) in self._kinds.items()
            }
        packed = self._packed(logits)
        for name, tensor in packed.items():
            self._new[name][step] = tensor
        self._kept += 1
        if self._kept == self.steps:
            self._write(epoch)
        return self._unpacked(packed)

    @property
    def _kinds(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of the tensors of an epoch."""
        if self.top is None:
            return {"answers": ((self.steps, self.batch, self.classes), torch.float16)}
        return {
            "largest": ((self.steps, self.batch, self.top), torch.float16),
            "classes": ((self.steps, self.batch, self.top), self._index_type),
            "others": ((self.steps, self.batch, 1), torch.float16),
        }

    @property
    def _index_type(self) -> torch.dtype:
        return torch.int16 if self.classes <= torch.iinfo(torch.int16).max else torch.int32

    def _packed(self, logits: Float[Tensor, "batch classes"]) -> dict[str, Tensor]:
        """Return what is kept of logits: all, or the largest and the logit that all others share."""
        if self.top is None:
            return {"answers": logits.half()}
        largest, classes = logits.float().topk(self.top, dim=-1)
        others = logits.float().scatter(-1, classes, -torch.inf).logsumexp(dim=-1, keepdim=True)
        others -= math.log(self.classes - self.top)
        return {"largest": largest.half(), "classes": classes.to(self._index_type), "others": others.half()}

    def _unpacked(self, packed: dict[str, Tensor]) -> Float[Tensor, "batch classes"]:
        """Return logits from what was kept of them."""
        if self.top is None:
            return packed["answers"].float()
        all_of_them = packed["others"].float().repeat(1, self.classes)
        return all_of_them.scatter_(-1, packed["classes"].long(), packed["largest"].float())

    def check(self, kept: Float[Tensor, "batch classes"], logits: Float[Tensor, "batch classes"]) -> None:
        """Raise TeacherError if cached logits differ from those that the teachers compute now; wait for the device."""
        difference = (kept - logits).abs().mean() / logits.float().std().clamp(min=1e-6)
        if not float(difference) <= TOLERANCE:
            raise TeacherError(
                f"the teacher's cached logits in {self.folder} are stale (they differ from its current ones by "
                f"{float(difference):.2f} standard deviations): delete that folder, or set teacher.cache=false"
            )

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch + 1:05d}.safetensors"

    def _open(self, epoch: int) -> None:
        self._epoch, self._recorded, self._new, self._kept = epoch, None, None, 0
        try:
            with safe_open(self._path(epoch), framework="pt") as file:
                recorded = {name: file.get_tensor(name) for name in self._kinds}
        except (OSError, SafetensorError):
            return  # missing or damaged: the logits are computed
        if all((tuple(recorded[name].shape), recorded[name].dtype) == kind for name, kind in self._kinds.items()):
            self._recorded = {name: tensor.to(self.device) for name, tensor in recorded.items()}

    def _require_space(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self._kinds.values())
        free = shutil.disk_usage(self.folder).free
        if needed > 0.9 * free:
            raise TeacherError(
                f"teacher.cache needs {needed / 2**30:.1f} GiB for each epoch, but {free / 2**30:.1f} GiB are free in "
                f"{self.folder.parent}: set DEITKIT_CACHE to a folder on a larger disk, teacher.cache_top=10 to keep "
                "only the largest logits of each view, or teacher.cache=false"
            )

    def _write(self, epoch: int) -> None:
        assert self._new is not None
        write_bytes(self._path(epoch), save({name: tensor.cpu() for name, tensor in self._new.items()}))


def _fingerprint(teacher: Classifier) -> str:
    tensors = [teacher.mean, teacher.std, *teacher.model.state_dict().values()]
    described = f"{sha256(*(tensor.detach().cpu() for tensor in tensors))} at {teacher.image_px} px"
    return described if teacher.readout is None else f"{described} by {teacher.readout}"


def kept_logits(recipe: Recipe, classes: int) -> int | None:
    """Return how many logits of each view are cached; None for all.

    Raises:
        RecipeError: ``teacher.cache_top`` is not below the number of classes, or several teachers differ in it.
    """
    tops = {name: teacher.cache_top for name, teacher in recipe.named_teachers.items() if teacher.cache}
    name, top = next(iter(tops.items()), ("", None))
    if len(set(tops.values())) > 1:
        given = ", ".join(f"{each}.cache_top={'null' if one is None else one}" for each, one in tops.items())
        raise RecipeError(f"{given} differ, but the mean of the teachers is cached: set the same for each")
    if top is not None and top >= classes:
        raise RecipeError(f"{name}.cache_top={top} is not below the {classes} classes: drop it to cache all logits")
    return top


def _crops(split: Split, recipe: Recipe) -> str | None:
    """Return what random crops of a split are cut from, in words; None without such."""
    source = split.crop_source
    if source is None or split.scale_of_crops(recipe.augment) is None:
        return None
    return "files" if source.images is None else "{} x {}".format(*source.images.shape[2:])


def open_logit_cache(
    recipe: Recipe, dataset: Dataset, teachers: Teachers, seed: int, precision: Precision, root: Path | None = None
) -> LogitCache:
    """Open the cache of the teachers' logits for the views of one seed; by default in deitkit's cache folder."""
    described = {
        "teacher": " and ".join(_fingerprint(teacher) for teacher in teachers.classifiers),
        "data": dataset.fingerprint,
        "augment": recipe.augment.model_dump(mode="json"),
        "batch_size": recipe.train.batch_size,
        "repeats": recipe.train.repeats,
        "seed": seed,
        "precision": precision.name,
        "device": precision.device.type,  # which draws the noise of erasing
    }
    if (crops := _crops(dataset.train, recipe)) is not None:
        described["crops"] = crops
    if recipe.train.epoch_repeats > 1:
        described["epoch_repeats"] = recipe.train.epoch_repeats
    if recipe.data.sampling == "balanced":
        described["sampling"] = "balanced"
    batch = recipe.train.batch_size
    count = dataset.unlabelled_in_step(recipe.unlabelled_in_step)
    if count and dataset.unlabelled is not None:
        described["unlabelled"] = [count, sha256(dataset.unlabelled.hashes), _crops(dataset.unlabelled, recipe)]
        batch += count
    return LogitCache(
        described,
        steps=recipe.train.steps_per_epoch(len(dataset.train)),
        batch=batch,
        classes=dataset.classes,
        device=precision.device,
        top=kept_logits(recipe, dataset.classes),
        root=root,
    )

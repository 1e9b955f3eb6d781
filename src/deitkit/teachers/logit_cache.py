"""A disk cache of the teacher's logits: one comparison computes them, later ones on the same views read them.

A view follows from the seed and the step (see ``seeding``), so its logits belong to an epoch and a step. The cache may
be deleted at any time.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deitkit.data.cache import cache_folder, sha256
from deitkit.data.dataset import Dataset
from deitkit.errors import TeacherError
from deitkit.models.classifier import Classifier
from deitkit.recipe.schema import AugmentRecipe, Recipe
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

    Args:
        teachers: The classifiers of the logits; their weights are part of the key.
        fingerprint: Of the data set.
        augment: Augmentation of the views.
        batch_size: Images in a step.
        repeats: Copies of an image in it.
        crops: What random crops are cut from: "files", or the height and width of kept images; None for resized ones.
        balanced: Whether an epoch has as many images of every class.
        unlabelled: Number of images without labels that follow them, and a hash of all such images; None for none.
        steps: Steps of an epoch.
        classes: Of the data set.
        seed: Of the views.
        precision: Of the teachers' forward pass.
        root: Folder of all caches; by default deitkit's cache folder.
    """

    def __init__(
        self,
        teachers: Sequence[Classifier],
        *,
        fingerprint: str,
        augment: AugmentRecipe,
        batch_size: int,
        repeats: int,
        crops: str | None = None,
        epoch_repeats: int = 1,
        balanced: bool = False,
        unlabelled: tuple[int, str] | None = None,
        steps: int,
        classes: int,
        seed: int,
        precision: Precision,
        root: Path | None = None,
    ) -> None:
        described = {
            "format": FORMAT,
            "teacher": " and ".join(_fingerprint(teacher) for teacher in teachers),
            "data": fingerprint,
            "augment": augment.model_dump(mode="json"),
            "batch_size": batch_size,
            "repeats": repeats,
            "seed": seed,
            "precision": precision.name,
            "device": precision.device.type,  # which draws the noise of erasing
        }
        if crops is not None:
            described["crops"] = crops
        if epoch_repeats > 1:
            described["epoch_repeats"] = epoch_repeats
        if balanced:
            described["sampling"] = "balanced"
        if unlabelled is not None:
            described["unlabelled"] = list(unlabelled)
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = (root or cache_folder()) / "answers" / key
        self.shape = (steps, batch_size + (unlabelled[0] if unlabelled is not None else 0), classes)
        self.device = precision.device
        self.read = 0  # steps without a forward pass of the teacher
        self._epoch = -1
        self._recorded: Tensor | None = None
        self._new: Tensor | None = None
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
            self.check(kept, compute())
        return kept

    def find(self, epoch: int, step: int) -> Float[Tensor, "batch classes"] | None:
        """Return the cached logits of a step (epoch and step from 0), or None."""
        if epoch != self._epoch:
            self._open(epoch)
        if self._recorded is None:
            return None
        self.read += 1
        return self._recorded[step].float()

    def keep(self, epoch: int, step: int, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """Keep logits and return them as rounded for the cache; write an epoch when it is complete."""
        if self._new is None:
            self._require_space()
            self._new = torch.empty(self.shape, dtype=torch.float16, device=self.device)
        self._new[step] = logits
        self._kept += 1
        rounded = self._new[step].float()
        if self._kept == len(self._new):
            self._write(epoch)
        return rounded

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
                recorded = file.get_tensor("answers")
        except (OSError, SafetensorError):
            return  # missing or damaged: the logits are computed
        if tuple(recorded.shape) == self.shape and recorded.dtype == torch.float16:
            self._recorded = recorded.to(self.device)

    def _require_space(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = 2 * torch.Size(self.shape).numel()
        free = shutil.disk_usage(self.folder).free
        if needed > 0.9 * free:
            raise TeacherError(
                f"teacher.cache needs {needed / 2**30:.1f} GiB for each epoch, but {free / 2**30:.1f} GiB are free in "
                f"{self.folder.parent}: set DEITKIT_CACHE to a folder on a larger disk, or teacher.cache=false"
            )

    def _write(self, epoch: int) -> None:
        assert self._new is not None
        write_bytes(self._path(epoch), save({"answers": self._new.cpu()}))


def _fingerprint(teacher: Classifier) -> str:
    tensors = [teacher.mean, teacher.std, *teacher.model.state_dict().values()]
    described = f"{sha256(*(tensor.detach().cpu() for tensor in tensors))} at {teacher.image_px} px"
    return described if teacher.readout is None else f"{described} by {teacher.readout}"


def open_logit_cache(
    recipe: Recipe, dataset: Dataset, teachers: Teachers, seed: int, precision: Precision, root: Path | None = None
) -> LogitCache:
    """Open the cache of the teachers' logits for the views of one seed; by default in deitkit's cache folder."""
    unlabelled = None
    if recipe.unlabelled_in_step and dataset.unlabelled is not None:
        count = min(recipe.unlabelled_in_step, len(dataset.unlabelled))
        unlabelled = count, sha256(dataset.unlabelled_hashes)
    crops = None
    if (source := dataset.train.crop_source) is not None and dataset.train.scale_of_crops(recipe.augment) is not None:
        crops = "files" if source.images is None else f"{source.images.shape[2]} x {source.images.shape[3]}"
    return LogitCache(
        teachers.classifiers,
        fingerprint=dataset.fingerprint,
        augment=recipe.augment,
        batch_size=recipe.train.batch_size,
        repeats=recipe.train.repeats,
        crops=crops,
        epoch_repeats=recipe.train.epoch_repeats,
        balanced=recipe.data.sampling == "balanced",
        unlabelled=unlabelled,
        steps=recipe.train.steps_per_epoch(len(dataset.train)),
        classes=dataset.classes,
        seed=seed,
        precision=precision,
        root=root,
    )

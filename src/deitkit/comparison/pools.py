"""Where the units of a comparison run, each as a process of its own: on this machine, or on a Ray cluster."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from deitkit.errors import RecipeError, reason_of
from deitkit.system.process import (
    ENDS_WITH_PARENT,
    TORCHRUN,
    TORCHRUN_VARIABLES,
    UNITS_HERE,
    usable_cores,
    were_started,
    without_own_threads,
)
from deitkit.system.words import counted

USES_GPUS = ("auto", "cuda")  # devices of a recipe that are GPUs where there are any
LOST = -1  # the exit code of a process whose machine or supervisor is gone
PASSED_ON = ("DEITKIT_", "OMP_", "GOMP_", "PYTHON")  # beginnings of the variables that another machine needs
ANSWER_SECONDS = 10.0  # for a cluster to answer
CANCEL_SECONDS = 0.5  # between two looks whether a task was cancelled
PATIENCE_SECONDS = 60.0  # for a process to save its state


@runtime_checkable
class Pool(Protocol):
    """Devices or machines that run commands side by side."""

    size: int

    def start(self, command: Sequence[str], log: Path, share: int) -> Any:
        """Start a command, with a ``share``-th of the pool, whose output is appended to a log; return its handle."""

    def exit_code(self, handle: Any) -> int | None:
        """Return the exit code of a command, ``LOST`` if that cannot be known, None while it runs."""

    def stop(self, handle: Any) -> None:
        """Ask a command to save its state and to end."""

    def close(self) -> None:
        """Give the devices back."""


def open_pool(place: str, devices: int, device: str = "auto") -> Pool:
    """Open the pool of ``--on``: ``local``, ``local:4``, ``ray`` or ``ray:ADDRESS``.

    Args:
        place: As on the command line.
        devices: Of each unit.
        device: Of the recipe; the GPUs are divided among the units if it uses them.

    Raises:
        RecipeError: There is no such pool, or Ray is missing or does not answer.
    """
    if were_started():
        raise RecipeError(
            f"--on {place} starts processes of its own: run it without torchrun, with --devices for each unit"
        )
    kind, _, where = place.partition(":")
    if kind == "local" and (not where or (where.isdecimal() and int(where) > 0)):
        return LocalPool(int(where) if where else None, devices, device)
    if kind == "ray":
        return RayPool(where or None, devices, device)
    named = place or "''"
    raise RecipeError(f"--on {named} is not a place to run on: write local, local:4, ray or ray:ADDRESS")


def _environment(given: Mapping[str, str], cores: int) -> dict[str, str]:
    """Return the environment of a unit with some cores; threads that the user has set stay."""
    own = {"PYTHONUNBUFFERED": "1", ENDS_WITH_PARENT: str(os.getpid())}
    given = {
        name: value
        for name, value in without_own_threads(given).items()
        if name not in TORCHRUN_VARIABLES and not name.startswith(TORCHRUN)
    }
    return given | own | ({} if "OMP_NUM_THREADS" in given else {"OMP_NUM_THREADS": str(cores)})


def _hidden_gpus(device: str) -> dict[str, str]:
    """Return the variable that hides GPUs from units on the CPU, whose processes would each want one."""
    return {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}


class LocalPool:
    """Processes on this machine, each with a share of its GPUs, or of its cores where there are none.

    Args:
        size: How many run side by side; by default one on each GPU, or on each core.
        devices: GPUs, or processes on cores, of each.
        device: Of the recipe.
    """

    def __init__(self, size: int | None, devices: int, device: str = "auto") -> None:
        import torch  # here, since it takes seconds to import

        self.gpus = torch.cuda.device_count() if device in USES_GPUS else 0
        self.devices, self.device = devices, device
        _require_gpus(self.gpus, devices, "this machine")
        most = max(1, (self.gpus or usable_cores()) // devices)
        self.size = most if size is None else size
        if self.gpus and self.size * devices > self.gpus:
            raise RecipeError(
                f"--on local:{self.size} with {devices} GPUs each exceeds the {self.gpus} of this machine: use "
                f"local:{most} at most"
            )
        self._slots: dict[int, Any] = {}

    def start(self, command: Sequence[str], log: Path, share: int) -> subprocess.Popen[bytes]:
        """Start a command on free devices."""
        slot = next(number for number in range(self.size) if self._is_free(number))
        environment = _environment(os.environ, max(1, usable_cores() // (share * self.devices)))
        environment[UNITS_HERE] = str(share)
        if self.gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else [str(number) for number in range(self.gpus)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[slot * self.devices : (slot + 1) * self.devices])
        environment |= _hidden_gpus(self.device)
        self._slots[slot] = _start(command, log, environment)
        return self._slots[slot]

    def _is_free(self, slot: int) -> bool:
        return slot not in self._slots or self._slots[slot].poll() is not None

    def exit_code(self, handle: subprocess.Popen[bytes]) -> int | None:
        """Return the exit code of a command, None while it runs."""
        return handle.poll()

    def stop(self, handle: subprocess.Popen[bytes]) -> None:
        """Ask a command to save its state and to end."""
        handle.terminate()

    def close(self) -> None:
        """Wait for commands that were asked to end; then end them."""
        for process in self._slots.values():
            try:
                process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _require_gpus(gpus: int, devices: int, machine: str) -> None:
    """Raise RecipeError if a unit wants more GPUs than a machine that has any."""
    if 0 < gpus < devices:
        raise RecipeError(f"--devices {devices} exceeds the {counted(gpus, 'GPU')} of {machine}: use {gpus} at most")


def _start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, which Ctrl-C does not reach."""
    with log.open("ab") as file:
        return subprocess.Popen(  # noqa: S603 - our own command line
            [sys.executable, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,
        )


class RayPool:
    """Machines of a Ray cluster, which see the run folder and the images under the same paths.

    Args:
        address: Of the cluster; None is RAY_ADDRESS, or without it a cluster of this machine alone.
        devices: GPUs of each unit, or processes where the cluster has none.
        device: Of the recipe.
    """

    def __init__(self, address: str | None, devices: int, device: str = "auto") -> None:
        try:
            import ray
        except ImportError:
            raise RecipeError("--on ray needs Ray: pip install 'deitkit[ray]', or use --on local") from None
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # "local", since Ray would look for a cluster that ran here before, and wait for it for minutes.
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        settings: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            _require_answer(address)
            ray.init(address=address, log_to_driver=False, configure_logging=False, **settings)
        except (OSError, RuntimeError, ValueError) as error:
            reason = reason_of(error)
            raise RecipeError(
                f"--on ray: no cluster answers at {address} ({reason}): start one there, or use --on local"
            ) from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would end this process at once
        self.ray, self.devices, self.device = ray, devices, device
        self._logs: dict[Any, Path] = {}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.gpus = [int(node.get("GPU", 0)) if device in USES_GPUS else 0 for node in nodes]
        self.cores = [int(node.get("CPU", 0)) for node in nodes]
        _require_gpus(max(self.gpus), devices, "the cluster's largest machine")
        self.size = max(1, sum(each // devices for each in (self.gpus if any(self.gpus) else self.cores)))

    def start(self, command: Sequence[str], log: Path, share: int) -> Any:
        """Start a command as a task, on a machine with free devices."""
        cores = self._cores_of_unit(share)
        passed_on = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        passed_on |= _hidden_gpus(self.device)
        task = self.ray.remote(_run_on_node).options(
            num_cpus=cores,
            num_gpus=self.devices if any(self.gpus) else 0,
            max_retries=0,  # the units are started again here, wherever they were lost
        )
        handle = task.remote(list(command), str(log), str(Path.cwd()), passed_on, cores, self.devices)
        self._logs[handle] = log
        return handle

    def _cores_of_unit(self, share: int) -> int:
        """Return the most cores that ``share`` units can have at the same time, each on one machine.

        With GPUs it is the share of the units that fill the cluster, so that others can use the rest.
        """
        places = [each // self.devices if any(self.gpus) else share for each in self.gpus]
        share = self.size if any(self.gpus) else share

        def side_by_side(cores: int) -> int:
            return sum(min(most, each // cores) for most, each in zip(places, self.cores, strict=True))

        return next((cores for cores in range(max(self.cores), 1, -1) if side_by_side(cores) >= share), 1)

    def exit_code(self, handle: Any) -> int | None:
        """Return the exit code of a command, ``LOST`` if its machine is gone, None while it runs.

        Why the machine could not run it, such as a folder that it does not see, is added to the log.
        """
        done, _ = self.ray.wait([handle], timeout=0)
        if not done:
            return None
        try:
            return int(self.ray.get(handle))
        except self.ray.exceptions.RayError as error:
            log = self._logs.pop(handle, None)
            if log is not None:  # once
                with log.open("a", encoding="utf-8") as file:
                    file.write(f"{reason_of(getattr(error, 'cause', None) or error)}\n")
            return LOST

    def stop(self, handle: Any) -> None:
        """Ask a command to save its state and to end."""
        self.ray.cancel(handle)

    def close(self) -> None:
        """Leave the cluster; one of this machine ends."""
        self.ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise OSError within seconds if nothing listens at an address such as ``10.0.0.1:6379`` or ``ray://head:10001``."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()


def _run_on_node(command: list[str], log: str, folder: str, variables: dict[str, str], cores: int, devices: int) -> int:
    """Run a unit on some cores of a machine of the cluster; when the task is cancelled, let it save its state."""
    os.chdir(folder)
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # which Ray sets
    environment = _environment(inherited | variables, max(1, cores // devices))
    environment[UNITS_HERE] = str(max(1, usable_cores() // cores))
    process = _start(command, Path(log), environment)
    while True:
        try:
            return process.wait(timeout=CANCEL_SECONDS)
        except subprocess.TimeoutExpired:
            continue  # a wait without end would not notice that the task was cancelled
        except KeyboardInterrupt:  # how Ray cancels a task
            process.terminate()

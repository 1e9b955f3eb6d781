"""Errors that a user can correct, one sentence each: field, value, what is allowed, next step.

The command line prints them as one line and exits with code 2. Our own invariants are ``assert``s, never these.
"""

import unicodedata


def reason_of(error: object) -> str:
    """Return the first line of a library's error without its full stop, or its type if it has no text."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def os_reason(error: OSError) -> str:
    """Return what the operating system says of an error, in lower case, such as ``permission denied``."""
    return (error.strerror or str(error)).lower()


class DeitkitError(Exception):
    """An error that the user can correct; its message is one line, whatever names it contains."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class RecipeError(DeitkitError):
    """An invalid recipe, override or command."""


class DataError(DeitkitError):
    """A data set that is missing, malformed or does not fit the recipe."""


class HasTestSplit(DataError):  # noqa: N818 - a fact, which evaluation acts on
    """The data set has a test split of its own, so that folds cannot divide it."""


class CheckpointError(DeitkitError):
    """A weights file or a run folder that cannot be read, written or continued."""


class TeacherError(DeitkitError):
    """A teacher that cannot be built, or that the gate refuses."""


class NotRegistered(TeacherError):  # noqa: N818 - a fact, which the reader of a folder passes on
    """An architecture of the user's whose code was not imported."""


class OutOfMemory(DeitkitError):  # noqa: N818 - as torch names it
    """Training does not fit in memory; torch has no exception type for this on a CPU."""

    def __init__(
        self, batch_size: int, images_here: int, at_once: int | None = None, *, can_recompute: bool = True
    ) -> None:
        """Make the sentence.

        Args:
            batch_size: Images of a step.
            images_here: Those of them that this process computed.
            at_once: Those of a micro-batch, of the students that can have smaller ones; 1 if none can. By default
                ``images_here``.
            can_recompute: Whether ``speed.checkpoint_activations`` would save memory.
        """
        half, part = batch_size // 2, (images_here if at_once is None else min(at_once, images_here)) // 2
        share = "" if images_here == batch_size else f", {images_here} of them in this process"
        ways = []
        if part:
            ways.append(f"speed.micro_batch_size={part} to train the students on the same batches in smaller parts")
        if half:
            ways.append(f"train.batch_size={half} (teacher.train.batch_size={half} if the teacher was training)")
        advice = f"set {', or '.join(ways)}" if ways else "use a smaller model or smaller images"
        more = "; speed.checkpoint_activations=true saves memory too, at a third more time" if can_recompute else ""
        super().__init__(f"out of memory with batches of {batch_size} images{share}: {advice}{more}")


def one_line(text: str) -> str:
    """Escape line breaks, control characters and invalid Unicode, since files and classes may have any name."""
    harmful = ("Cc", "Cs", "Zl", "Zp")  # controls, lone surrogates, separators of lines and paragraphs
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in harmful else character
        for character in text
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory ran out, on any device."""
    # cuBLAS and cuDNN also say so as they begin, and of their own workspaces.
    signs = (
        "out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED",
        "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
    )  # fmt: skip
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in signs):
        return True
    # Or of one that was raised while the recording of a GPU was given up.
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return isinstance(error, RuntimeError) and before is not None and is_out_of_memory(before)


def is_dead_worker(error: BaseException) -> bool:
    """Return whether an exception means that a worker process died; torch raises it at an arbitrary place."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def is_lost_process(error: BaseException) -> bool:
    """Return whether an exception means that another process of the run has ended before this one."""
    signs = (
        *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL communicator was aborted"),
        *("ncclRemoteError", "ncclSystemError", "Watchdog caught collective operation timeout"),
    )
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


class Interrupted(BaseException):
    """The user stopped a run, which can be resumed from the disk.

    It can be raised anywhere. Not an ``Exception``, so that ``except Exception`` does not catch it.
    """

    exit_code = 130  # a shell's code for Ctrl-C

"""Mistakes of a user, each told in one sentence: field, value, what is allowed, next step.

The command line turns them into one line and exit code 2. Our own invariants are ``assert``s, never these.
"""

import unicodedata


class DeitkitError(Exception):
    """Something that a user can put right; the message is all that they need to see, one line whatever it names."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class RecipeError(DeitkitError):
    """A recipe, an override or a command that cannot be run as it is."""


class DataError(DeitkitError):
    """A data set that is missing, malformed or does not fit the recipe."""


class CheckpointError(DeitkitError):
    """A weights file or a run folder that cannot be read, written or continued."""


class TeacherError(DeitkitError):
    """A teacher that cannot be built or that must not teach."""


class OutOfMemory(DeitkitError):  # noqa: N818 - as torch names it
    """Training did not fit into memory; torch has no type of its own for that on a CPU."""

    def __init__(self, batch_size: int) -> None:
        half = max(1, batch_size // 2)
        super().__init__(
            f"out of memory with batches of {batch_size} images: set speed.micro_batch_size={half} for the same "
            f"training of the students in smaller parts, or train.batch_size={half} (teacher.train.batch_size={half} "
            "if the teacher was training); speed.checkpoint_activations=true saves memory too, at a third more time"
        )


def one_line(text: str) -> str:
    """Return text in which all that would break a line, steer a terminal or is no Unicode is spelt out.

    Files and classes may be called anything.
    """
    harmful = ("Cc", "Cs", "Zl", "Zp")  # controls, lone surrogates, separators of lines and paragraphs
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in harmful else character
        for character in text
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory ran out, on whatever device."""
    signs = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def is_dead_worker(error: BaseException) -> bool:
    """Return whether an exception, which torch raises wherever it is just then, tells of a dead worker process."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


class Interrupted(BaseException):
    """Somebody stopped a run; it goes on from what is on the disk.

    It comes out of the middle of anything, so whoever catches all exceptions must not catch this one.
    """

    exit_code = 130  # as shells tell of Ctrl-C

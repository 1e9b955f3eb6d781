"""Mistakes of a user, each told in one sentence: field, value, what is allowed, next step.

The command line turns them into one line and exit code 2. Our own invariants are ``assert``s, never these.
"""


class DeitkitError(Exception):
    """Something that a user can put right; the message is all that they need to see."""


class RecipeError(DeitkitError):
    """A recipe, an override or a command that cannot be run as it is."""


class DataError(DeitkitError):
    """A data set that is missing, malformed or does not fit the recipe."""


class CheckpointError(DeitkitError):
    """A weights file or a run folder that cannot be read, written or continued."""


class TeacherError(DeitkitError):
    """A teacher that cannot be built or that must not teach."""


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """The user stopped a run; everything up to the present step is saved."""

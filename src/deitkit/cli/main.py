"""The Typer app, its commands in the order of use, and the entry point."""

import errno
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from deitkit import __version__
from deitkit.cli.analyze import analyze
from deitkit.cli.apply import evaluate, predict
from deitkit.cli.bench import app as bench_app
from deitkit.cli.compare import compare, finetune, teacher, train
from deitkit.cli.console import errors, say
from deitkit.cli.convert import convert
from deitkit.cli.demo import demo
from deitkit.cli.export import export
from deitkit.cli.models import models
from deitkit.cli.publish import publish
from deitkit.cli.recipes import methods, recipes
from deitkit.cli.report import progress, report, verify
from deitkit.errors import DeitkitError, Interrupted, is_dead_worker, is_lost_process, is_out_of_memory, os_reason
from deitkit.system.process import MISTAKE, TEMPORARY_FAILURE, configure_process, were_started
from deitkit.system.restarts import all_processes_live, keep_exit_code, kept_exit_code
from deitkit.system.user_code import import_user_code

if TYPE_CHECKING:
    from deitkit.system.ranks import Ranks

STOPPED = (130, 143)  # by SIGINT, by SIGTERM
# Errors of the system that a user can correct; others, as of a network disk, may pass.
MISTAKES = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EROFS,
    errno.ENOSPC, errno.EDQUOT,
)  # fmt: skip


class Commands(TyperGroup):
    """Commands whose interruption reaches ``main``: Typer itself would end the process without a word."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("stopped") from None


app = typer.Typer(
    name="deitkit",
    cls=Commands,
    help="Distil a CNN teacher into a small vision transformer, under every method of the DeiT paper side by side.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        say(__version__)
        raise typer.Exit


for command in (
    compare, train, finetune, teacher, progress, evaluate, predict, report, analyze, verify, recipes, methods, models,
    convert, demo, export, publish,
):  # fmt: skip
    app.command()(command)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run the command line; print a user's mistake as one line and exit with code 2."""
    configure_process()
    code = kept_exit_code()
    if code is None:
        code = _run_in_all_processes() if were_started() else _kept_for_restarts(_run(_command))
    if code:
        sys.exit(code)


def _command() -> None:
    import_user_code()
    app()


def _run(command: Callable[[], object]) -> int:
    """Run a command, print why it failed as one line, and return the exit code."""
    try:
        command()
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        return end.code or 0
    except DeitkitError as error:
        say(f"error: {error}", errors, style="red")
        return getattr(error, "exit_code", MISTAKE)
    except Interrupted as stop:
        say(str(stop) or "stopped; the same command with --resume continues", errors)
        return stop.exit_code
    except KeyboardInterrupt:  # before a command began
        say("stopped", errors)
        return Interrupted.exit_code
    except OSError as error:
        if error.errno in MISTAKES:
            say(f"error: {error.filename or 'a file'}: {os_reason(error)}: check its name, rights and disk", errors)
            return MISTAKE
        say(f"error: {os_reason(error)}: the same command may succeed, and --resume continues a run", errors)
        return TEMPORARY_FAILURE
    except (MemoryError, RuntimeError) as error:
        code, advice = _of_library(error)
        say(f"error: {advice}", errors, style="red")
        return code
    return 0


def _of_library(error: MemoryError | RuntimeError) -> tuple[int, str]:
    """Return the exit code and the advice for an error of torch; raise it if it is a fault of the program."""
    if is_lost_process(error):
        return TEMPORARY_FAILURE, (
            "another process of the run was lost: the same command with --resume continues, and on one machine with "
            "torchrun's --max-restarts=3 by itself"
        )
    if is_dead_worker(error):
        return TEMPORARY_FAILURE, (
            "a process that decodes images was killed or out of memory: lower data.workers, and --resume"
        )
    if is_out_of_memory(error):
        return MISTAKE, "out of memory: lower train.batch_size, teacher.train.batch_size or data.image_px"
    raise error


def _kept_for_restarts(code: int) -> int:
    """Return an exit code; keep that of a mistake or of a run that was stopped, which torchrun is not to restart."""
    if code == MISTAKE or (code in STOPPED and all_processes_live()):
        keep_exit_code(code)
    return code


def _work(ranks: "Ranks") -> None:
    from deitkit.comparison.worker import run_worker

    import_user_code()
    run_worker(ranks)


def _run_in_all_processes() -> int:
    """Run the command in the first of the processes that torchrun started; the others help it to train."""
    from deitkit.system.ranks import current_ranks, join_ranks, leave_ranks

    code = _run(join_ranks)
    if code:
        return _kept_for_restarts(code)
    ranks, code = current_ranks(), 1  # of an error that is raised
    if ranks.rank > 0:
        code = _run(lambda: _work(ranks))
    else:
        try:
            code = _kept_for_restarts(_run(_command))
        finally:
            with suppress(RuntimeError):  # torchrun, which keeps the messages, may be gone
                ranks.broadcast_end(code)
    if code == 0:
        leave_ranks()
    return code

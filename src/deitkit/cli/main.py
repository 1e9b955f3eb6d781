"""The Typer app, its commands in the order of use, and the entry point."""

import errno
import sys
from contextlib import suppress
from typing import Annotated, Any

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
from deitkit.system.process import configure_process, were_started
from deitkit.system.user_code import import_user_code

TEMPORARY_FAILURE = 75  # of sysexits.h: the same command may succeed
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
    try:
        import_user_code()
        _run_in_all_processes() if were_started() else app()
    except DeitkitError as error:
        say(f"error: {error}", errors, style="red")
        sys.exit(2)
    except Interrupted as stop:
        say(str(stop) or "stopped; the same command with --resume continues", errors)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:  # before a command began
        say("stopped", errors)
        sys.exit(Interrupted.exit_code)
    except OSError as error:
        if error.errno in MISTAKES:
            say(f"error: {error.filename or 'a file'}: {os_reason(error)}: check its name, rights and disk", errors)
            sys.exit(2)
        say(f"error: {os_reason(error)}: the same command may succeed, and --resume continues a run", errors)
        sys.exit(TEMPORARY_FAILURE)
    except (MemoryError, RuntimeError) as error:
        code = 2
        if is_lost_process(error):
            code = TEMPORARY_FAILURE
            advice = (
                "another process of the run was lost: the same command with --resume continues, and with torchrun's "
                "--max-restarts=3 by itself"
            )
        elif is_dead_worker(error):
            code = TEMPORARY_FAILURE
            advice = "a process that decodes images was killed or out of memory: lower data.workers, and --resume"
        elif is_out_of_memory(error):
            advice = "out of memory: lower train.batch_size, teacher.train.batch_size or data.image_px"
        else:
            raise
        say(f"error: {advice}", errors, style="red")
        sys.exit(code)


def _run_in_all_processes() -> None:
    """Run the command in the first of the processes that torchrun started; the others help it to train."""
    from deitkit.comparison.worker import run_worker
    from deitkit.system.ranks import join_ranks, leave_ranks

    ranks = join_ranks()
    if ranks.rank > 0:
        run_worker(ranks)
    else:
        try:
            app()
        except SystemExit as end:
            if end.code:
                raise
        finally:
            with suppress(RuntimeError):  # torchrun, which keeps the messages, may be gone
                ranks.broadcast(None)
    leave_ranks()

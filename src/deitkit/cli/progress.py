"""The progress of a run: bars on a terminal, a text that changes in a notebook, lines elsewhere."""

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from deitkit.cli.console import plain, say
from deitkit.cli.signals import StopOnSignal
from deitkit.errors import Interrupted, one_line
from deitkit.run.metrics import EpochMetrics
from deitkit.run.observer import StepProgress
from deitkit.system.words import duration_text

# Between two looks at one training: on a terminal, in a notebook, and elsewhere, where each is a line.
TERMINAL_SECONDS, NOTEBOOK_SECONDS, LINE_SECONDS = 0.2, 1.0, 60.0


class Terminal(StopOnSignal):
    """Show the progress of a run on a console. Inside its context, Ctrl-C and SIGTERM stop the run.

    Args:
        console: Where to print.
        stopped: As for ``StopOnSignal``.
    """

    def __init__(self, console: Console, *, stopped: str = "") -> None:
        super().__init__(stopped)
        self.console = console
        self._live: Live | None = None
        self._task: Any = None
        self._title = ""
        self._losses: dict[str, float] = {}
        self._accuracies: dict[str, float] = {}
        self._waiting: float | None = None
        self._drawn = 0.0
        self._seconds = NOTEBOOK_SECONDS if console.is_jupyter else LINE_SECONDS
        if console.is_terminal:
            self._seconds = TERMINAL_SECONDS
        self._in_notebook: Any = None  # what is shown of the training with this title
        self._notebook_title = ""
        self._notebook_lines: dict[str, str] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            console=console,
            expand=True,
        )

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._end_live()
        super().__exit__(kind, error, trace)

    def say_that_it_stops(self) -> None:
        """Print that training stops after this step."""
        with suppress(SystemExit):  # rich's answer to a closed pipe: `| tee`, which Ctrl-C has ended too
            self.console.print("[yellow]stopping after this step, and saving; once more to stop at once[/]")

    def say(self, text: str) -> None:
        """Print a line."""
        self.raise_if_stopped()
        self._end_live()
        self._notebook_title = ""  # what follows stands below this line
        self._line(text)

    def _line(self, text: str) -> None:
        self._drawn = time.monotonic()
        try:
            say(text, self.console)
        except SystemExit:  # rich's answer to a closed pipe
            how = self._stopped.removeprefix("stopped; ") or "the same command with --resume continues"
            raise Interrupted(f"the program that read the output has ended; {how}") from None

    def _progress_line(self, title: str, kind: str, text: str) -> None:
        """Print a line on the progress of something; in a notebook, in place of the last one of its kind."""
        if not self.console.is_jupyter:
            self._line(text)
            return
        from IPython.display import display  # a notebook has it

        self._drawn = time.monotonic()
        if title != self._notebook_title:
            self._in_notebook, self._notebook_title, self._notebook_lines = None, title, {}
        self._notebook_lines[kind] = text
        shown = {"text/plain": "\n".join(one_line(line) for line in self._notebook_lines.values())}
        if self._in_notebook is None:
            self._in_notebook = display(shown, raw=True, display_id=True)
        else:
            self._in_notebook.update(shown, raw=True)

    def reading(self, what: str, done: int, total: int) -> None:
        """Show on a terminal how much of the data has been read."""
        self.raise_if_stopped()
        if not self.console.is_terminal:
            return
        if self._title != what:
            self._begin_live(what, total)
        self._progress.update(self._task, completed=done)
        if done >= total:
            self._end_live()

    def step(self, title: str, progress: StepProgress) -> None:
        """Update the bar and the losses a few times a second; without a terminal, print a line each minute."""
        if time.monotonic() - self._drawn < self._seconds:
            return
        self._drawn = time.monotonic()
        if not self.console.is_terminal:
            place = f"epoch {progress.epoch}/{progress.epochs} step {progress.step}/{progress.steps_per_epoch}"
            speed = f"{progress.images_per_second:.0f} images/s, {duration_text(progress.seconds_left)} left"
            losses = "  ".join(f"{name} {loss:.3f}" for name, loss in progress.losses.items())
            self._progress_line(title, "step", f"{title} {place}  {speed}  loss: {losses}")
            return
        done = (progress.epoch - 1) * progress.steps_per_epoch + progress.step
        if self._title != title:
            self._begin_live(title, progress.epochs * progress.steps_per_epoch)
        self._losses = progress.losses
        self._progress.update(
            self._task,
            completed=done,
            description=f"{title}, epoch {progress.epoch}/{progress.epochs}",
            speed=f"{progress.images_per_second:.0f} images/s, {duration_text(progress.seconds_left)} left",
        )
        assert self._live is not None
        self._live.update(self._picture())

    def epoch(self, title: str, metrics: list[EpochMetrics]) -> None:
        """Store the validation accuracies; without a terminal, print a line for the epoch."""
        if not metrics:
            return
        first = metrics[0]
        self._accuracies = {line.student: line.main_accuracy or 0.0 for line in metrics}
        self._waiting = (first.shares or {}).get("waiting") or 0.0
        if self.console.is_terminal:
            return
        students = "  ".join(
            f"{line.student} {line.train_loss:.3f}/{100 * self._accuracies[line.student]:.1f}%" for line in metrics
        )
        self._progress_line(
            title,
            "epoch",
            f"{title} epoch {first.epoch}/{first.epochs}  {first.cohort_images_per_second:.0f} images/s, "
            f"{100 * self._waiting:.0f} % waiting for data  loss/validation: {students}",
        )

    def units(self, lines: Mapping[str, str], finished: int, total: int) -> None:
        """Show the newest line of each unit on a terminal; without one, print them each minute."""
        if not self.console.is_terminal:
            if lines and time.monotonic() - self._drawn >= self._seconds:
                for unit, line in lines.items():
                    self._progress_line("units", unit, f"{unit}: {line}")
            return
        title = "units"
        if self._title != title:
            self._begin_live(title, total)
        self._progress.update(self._task, completed=finished)
        table = Table(box=None, pad_edge=False, show_header=False)
        for unit, line in lines.items():
            table.add_row(plain(unit), plain(line))
        assert self._live is not None
        self._live.update(Group(self._progress, table))

    def _picture(self) -> Group:
        table = Table(box=None, pad_edge=False)
        table.add_column("student")
        table.add_column("loss", justify="right")
        table.add_column("validation", justify="right")
        for name, loss in self._losses.items():
            accuracy = f"{100 * self._accuracies[name]:.1f} %" if name in self._accuracies else ""
            table.add_row(name, f"{loss:.3f}", accuracy)
        if self._waiting is None:
            return Group(self._progress, table)
        return Group(self._progress, table, f"{100 * self._waiting:.0f} % of the last epoch waiting for data")

    def _begin_live(self, title: str, total: int) -> None:
        self._end_live()
        self._title = title
        self._accuracies, self._losses, self._waiting = {}, {}, None
        self._task = self._progress.add_task(title, total=total, speed="")
        self._live = Live(self._progress, console=self.console, refresh_per_second=5)
        self._live.start()

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._progress.remove_task(self._task)
        self._live, self._title = None, ""

"""Files of predictions, written while they are made: CSV or JSON lines, and embeddings as parquet."""

import csv
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.progress import track

from deitkit.cli.console import errors, say
from deitkit.errors import DataError, DeitkitError, os_reason

if TYPE_CHECKING:
    from deitkit.evaluation.classify import Prediction

ROWS = 1024  # of a group in the parquet file
EVERY_SECONDS = 60.0  # a line where no terminal draws a bar


class PredictionFiles:
    """The files of ``predict``, closed at the end of a ``with`` block, however it ends.

    Args:
        out: A new ``.csv`` or ``.jsonl`` file; None for none.
        embeddings: A new ``.parquet`` file; None for none.
        top: Classes of a row of the CSV file.

    Raises:
        DataError: A file exists, cannot be made or written, or has another ending. What was made is then removed, as
            after every mistake of the user, so that the same command can be started again.
    """

    def __init__(self, out: Path | None, embeddings: Path | None, top: int) -> None:
        for path, endings in ((out, (".csv", ".jsonl")), (embeddings, (".parquet",))):
            if path is not None and path.suffix.lower() not in endings:
                raise DataError(f"{path} has another ending than {' or '.join(endings)}: name such a file")
        self.out, self.embeddings, self.top = out, embeddings, top
        self.waiting: list[Prediction] = []
        self.closing = ExitStack()
        self.made: list[Path] = []
        self.text: IO[str] | None = None
        self.parquet: Any = None

    def __enter__(self) -> "PredictionFiles":
        with self._all_or_none():
            if self.out is not None:
                self.text = self.closing.enter_context(self._new(self.out))
                if self.out.suffix.lower() == ".csv":
                    csv.writer(self.text).writerow(_csv_header(self.top))
            if self.embeddings is not None:
                self._new(self.embeddings).close()
        return self

    def _new(self, path: Path) -> IO[str]:
        try:
            file = path.open("x", encoding="utf-8", newline="")
        except FileExistsError:
            raise DataError(f"{path} exists: name a new file, or remove it") from None
        except OSError as error:
            raise DataError(f"{path} cannot be written ({os_reason(error)}): name another file") from None
        self.made.append(path)
        return file

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Remove what was made if a file cannot be written."""
        try:
            yield
        except (OSError, DataError) as error:
            self._remove()
            if isinstance(error, DataError):
                raise
            names = " and ".join(map(str, self.made))
            reason = (os.strerror(error.errno) if error.errno else str(error)).lower()  # pyarrow adds words of its own
            raise DataError(f"{names} cannot be written ({reason}): make room, or name another place") from None

    def _remove(self) -> None:
        self.waiting.clear()
        with suppress(OSError):  # which writes what is left in buffers
            self.closing.close()
        for path in self.made:
            path.unlink(missing_ok=True)

    def add(self, prediction: "Prediction") -> None:
        """Write what the model says of an image."""
        with self._all_or_none():
            self._write(prediction)

    def _write(self, prediction: "Prediction") -> None:
        if self.text is not None and self.out is not None:
            if self.out.suffix.lower() == ".csv":
                csv.writer(self.text).writerow(_csv_row(prediction, self.top))
            else:
                self.text.write(_json_line(prediction) + "\n")
        if self.embeddings is not None and "embedding" in prediction:
            self.waiting.append(prediction)
            if len(self.waiting) == ROWS:
                self._write_embeddings()

    def _write_embeddings(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        values = [prediction["embedding"] for prediction in self.waiting]
        column = pa.array(values, pa.list_(pa.float32(), len(values[0])))
        names = pa.array([prediction["image"] for prediction in self.waiting], pa.string())
        table = pa.table({"image": names, "embedding": column})
        if self.parquet is None:
            assert self.embeddings is not None
            self.parquet = self.closing.enter_context(pq.ParquetWriter(self.embeddings, table.schema))
        self.parquet.write_table(table)
        self.waiting.clear()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DeitkitError):
            self._remove()
            return
        with self._all_or_none(), self.closing:
            if self.waiting:
                self._write_embeddings()


def _json_line(prediction: "Prediction") -> str:
    """Return a prediction as one line of JSON, without its embedding."""
    return json.dumps({key: value for key, value in prediction.items() if key != "embedding"}, ensure_ascii=False)


def _csv_header(top: int) -> list[str]:
    return ["image", *[f"{what}_{place}" for place in range(1, top + 1) for what in ("class", "probability")], "error"]


def _csv_row(prediction: "Prediction", top: int) -> list[str]:
    """Return image, then class and probability of the ``top`` best, then the error."""
    cells = [cell for name, share in prediction["classes"] for cell in (name, f"{share:.6f}")]
    return [prediction["image"], *cells, *[""] * (2 * top - len(cells)), prediction.get("error", "")]


def with_progress(predictions: Iterable["Prediction"], total: int) -> Iterator["Prediction"]:
    """Yield predictions with a bar on a terminal, else with a line each minute, on standard error."""
    if errors.is_terminal:
        yield from track(predictions, "classifying", total=total, console=errors, transient=True)
        return
    started = said = time.monotonic()
    for done, prediction in enumerate(predictions, start=1):
        yield prediction
        if time.monotonic() - said > EVERY_SECONDS:
            said = time.monotonic()
            say(f"{done:,} of {total:,} images, {done / (said - started):.0f} images/s", errors)

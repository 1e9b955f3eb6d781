"""Which rows of a table speak for their models: of a student with two heads the paper's joint readout."""

from collections.abc import Iterable, Sequence

from deitkit.run.results import SomeRow


def default_readout(names: Sequence[str]) -> str:
    """Return the readout of a student's main figures: the paper's joint one if there are two heads."""
    return "joint" if "joint" in names else names[0]


def reported_rows(rows: Iterable[SomeRow]) -> list[SomeRow]:
    """Return the rows by which models are compared, one for each method and kind of weights."""
    rows = list(rows)
    readouts: dict[str, list[str]] = {}
    for row in rows:
        readouts.setdefault(row.method, []).append(row.readout)
    return [row for row in rows if row.readout == default_readout(readouts[row.method])]

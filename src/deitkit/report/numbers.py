"""How the figures of a report are written."""

from deitkit.run.difference import Difference

Number = int | float  # JSON writes a whole number as an int

NOTHING = "–"


def percent(value: Number | None, images: int) -> str:
    """Return a fraction in per cent, with as many digits as that number of images resolves."""
    return NOTHING if value is None else f"{100 * value:.{2 if images >= 1000 else 1}f}"


def millions(count: int | None) -> str:
    """Return a number of parameters as a person reads it."""
    if count is None:
        return NOTHING
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"


def milliseconds(value: float) -> str:
    """Return a time with as many digits as a measurement is worth."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def megabytes(count: int) -> str:
    """Return a size in millions of bytes with two digits."""
    value = count / 1e6
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def points(difference: Difference | None, images: int) -> str:
    """Return a difference in points, with a sign."""
    return NOTHING if difference is None else _signed(difference.mean, images)


def interval(difference: Difference | None, images: int) -> str:
    """Return the 95 % interval of a difference in points."""
    if difference is None or difference.ci95 is None:
        return NOTHING
    return f"[{', '.join(_signed(bound, images) for bound in difference.ci95)}]"


def _signed(value: Number, images: int) -> str:
    digits = 2 if images >= 1000 else 1
    return f"{round(100 * value, digits) + 0.0:+.{digits}f}".replace("-", "−")  # -0.0 + 0.0 is 0.0


def p_value(difference: Difference | None) -> str:
    """Return the p value of a difference."""
    if difference is None:
        return NOTHING
    p = difference.corrected_p
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def whole(value: Number | None) -> str:
    """Return a number without decimals."""
    return NOTHING if value is None else f"{value:,.0f}"

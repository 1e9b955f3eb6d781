"""What the fuzzing tests share: how many cases they run, and how bytes are damaged."""

from collections.abc import Sequence

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

QUICK = 20  # cases with the suite, of a kind with a share of 1


def cases(share: float) -> settings:
    """Return how many cases of a kind run: a few with the suite, its share of 1,800 each under `make fuzz`."""
    is_long = settings.default.max_examples >= 1000  # the profile `fuzz` of conftest
    return settings(
        max_examples=round((settings.default.max_examples if is_long else QUICK) * share),
        deadline=None,
        derandomize=not is_long,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


@st.composite
def mutated(draw: st.DrawFn, content: bytes, pieces: Sequence[bytes] = (b"\0", b"\xff")) -> bytes:
    """Draw a damaged copy: bits flipped, cut short, parts removed, repeated, moved or overwritten."""
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(damaged)))
        stop = min(start + draw(st.integers(0, 40)), len(damaged))
        kind = draw(st.sampled_from(("flip", "insert", "overwrite", "remove", "repeat", "cut")))
        if kind == "flip" and start < len(damaged):
            damaged[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            damaged[start:start] = draw(st.sampled_from(pieces) | st.binary(max_size=8))
        elif kind == "overwrite":
            damaged[start:stop] = draw(st.sampled_from(pieces) | st.binary(max_size=8))
        elif kind == "remove":
            del damaged[start:stop]
        elif kind == "repeat":
            damaged[start:start] = damaged[start:stop]
        elif kind == "cut" and draw(st.booleans()):
            del damaged[start:]
    return bytes(damaged)

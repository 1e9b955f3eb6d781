"""What this process asks of the libraries that it will load. Called by the command line, before torch is imported."""

import os

# Variables by which a user says how threads wait: GNU's OpenMP, any OpenMP, Intel's and LLVM's.
WAIT_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
SPIN_COUNT = 2_000


def configure_process() -> None:
    """Let the threads of a CPU wait for each other without keeping a core from other processes.

    GNU's OpenMP, with which torch is built for Linux, turns in a loop of billions of rounds at each barrier. Beside
    another busy process a thread then turns for a core that its partner needs. After `SPIN_COUNT` rounds, a few
    microseconds, it sleeps. docs/benchmarks.md has the measurements. What the user has set stays. It has an effect only
    before torch is imported.
    """
    if not any(name in os.environ for name in WAIT_SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)

"""The entry point of the command line: of its script, and of ``python -m deitkit``."""

import signal


def main() -> None:
    """Run the command line. While it is imported, Ctrl-C ends the process at once, without a traceback."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # a shell lets what runs in the background ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from deitkit.cli.main import main as run

    signal.signal(signal.SIGINT, handler)
    run()


if __name__ == "__main__":
    main()

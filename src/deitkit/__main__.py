"""``python -m deitkit``: the command line where its script is not on the path."""

from deitkit.cli.main import main

if __name__ == "__main__":
    main()

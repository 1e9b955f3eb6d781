"""torchrun for a unit of a comparison: unlike torchrun itself, it ends with the process that started it."""

from deitkit.system.process import end_with_parent


def main() -> None:
    """Run torchrun with the arguments of the command line; its processes end with it in turn."""
    end_with_parent()
    from torch.distributed.run import main as run  # only now, since it takes seconds to import

    run()


if __name__ == "__main__":
    main()

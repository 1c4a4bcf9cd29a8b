"""The `r1v3` command, and `python -m r1v3`."""

import sys


def main() -> None:
    """Run the command line, or say which packages it needs."""
    try:
        from r1v3.cli import main as run
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit("error: r1v3 was installed for its kernels alone; pip install 'r1v3[demo]'")
    run()


# Processes that multiprocessing spawns import this file too.
if __name__ == "__main__":
    main()

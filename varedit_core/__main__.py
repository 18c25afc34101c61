"""`python -m varedit_core` and the command `varedit`. Light, so that Ctrl-C is answered while all else is imported."""

import signal
import sys


def main() -> None:
    """Run the command line; exit code 130, without a word, where Ctrl-C ends it."""
    try:
        from .cli.app import main as command

        command()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the end
        sys.exit(130)


if __name__ == "__main__":
    main()

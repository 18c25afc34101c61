"""`python -m varedit_core` and the command `varedit`. Light, so that Ctrl-C is answered while all else is imported."""

import os
import signal
import sys


def main() -> None:
    """Run the command line; exit code 130, without a word, where Ctrl-C ends it."""
    interrupted = signal.getsignal(signal.SIGINT)
    try:
        if interrupted is signal.default_int_handler:  # within torch's own code an error could end in an abort
            signal.signal(signal.SIGINT, lambda *about: os._exit(130))
        from .cli.app import main as command

        signal.signal(signal.SIGINT, interrupted)
        command()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the end
        sys.exit(130)


if __name__ == "__main__":
    main()

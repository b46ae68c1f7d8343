"""The command ``holdfast``, and ``python -m holdfast``."""

from __future__ import annotations


def main() -> None:
    """Run the command line; ctrl-C while it is loaded ends it without a traceback, as later."""
    try:
        from holdfast.cli import app
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    app()


if __name__ == "__main__":  # not where a process that a command starts imports it again
    main()

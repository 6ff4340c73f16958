"""The entry point of the `fraud` command: every error is shown as one message, never as a traceback."""

from __future__ import annotations

import errno
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from fraud.environment import used
from fraud.errors import FraudError

MISTAKE = 1
"""Exit code of an error that the user can fix: an input, a setting, a file, a full disk."""
DEFECT = 70
"""Exit code of an unexpected error (EX_SOFTWARE)."""
INTERRUPTED = 130
WHERE_IT_WORKS = ("FRAUD_STORE", "FRAUD_COLD_STORE", "FRAUD_MODEL", "FRAUD_MODEL_ALIASES")
"""Variables that choose the store and the model which a command works on."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    The command-line parser itself ends with 130 on Ctrl-C, 1 when nobody reads the output, 2 on a wrong option.
    A FraudError and an error of the operating system are one message and exit code 1. Anything else is a defect of
    this program: one message with the file that holds the traceback, and exit code 70.
    """
    try:
        from fraud.cli.commands import app  # an import that fails is reported like everything else

        app(arguments)
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)
    except FraudError as error:
        _end(f"error: {error}", MISTAKE)
    except OSError as error:
        if error.errno is None:
            _end(_defect(error), DEFECT)
        _end(f"error: {_refused(error)}", MISTAKE)
    except MemoryError:
        _end("error: there is not enough memory; give a smaller file, or this command more memory", MISTAKE)
    except Exception as error:
        _end(_defect(error), DEFECT)
    finally:
        _tell_old_names()


def _tell_old_names() -> None:
    """Say which store and model came from a variable that another program on this machine may mean otherwise."""
    for variable, remark in used().items():
        if variable in WHERE_IT_WORKS:
            print(f"note: {remark}", file=sys.stderr)


def _end(message: str, code: int) -> None:
    shown = f"\033[31m{message}\033[0m" if sys.stderr.isatty() else message
    print(shown, file=sys.stderr)
    sys.exit(code)


def _refused(error: OSError) -> str:
    """Return the message of an operating system error: what failed, for which file, and the next step if known."""
    what = error.strerror or str(error)
    where = "".join(f"{name}: " for name in (error.filename, error.filename2) if name is not None)
    step = {
        errno.ENOSPC: "; free some space, or name a folder on another disk",
        errno.EDQUOT: "; free some space, or name a folder on another disk",
        errno.EACCES: "; give the user of this command access, or name another place",
        errno.EPERM: "; give the user of this command access, or name another place",
        errno.EROFS: "; name a place that can be written to",
    }.get(error.errno or 0, "")
    return f"{where}{what}{step}"


def _defect(error: BaseException) -> str:
    """Return the message of an unforeseen error; its traceback is kept in a file of its own."""
    message = " ".join(f"{type(error).__name__}: {error}".split())
    lines = "".join(traceback.format_exception(error))
    command = " ".join(sys.argv)
    try:
        with tempfile.NamedTemporaryFile("w", prefix="fraud-", suffix=".log", delete=False, encoding="utf-8") as file:
            file.write(f"{command}\nPython {sys.version}\n\n{lines}")
        kept = f"its traceback is in {Path(file.name)}"
    except OSError as refused:
        kept = f"its traceback could not be kept ({refused.strerror}): {lines.splitlines()[-2].strip()}"
    return f"error: this is a defect of fraud, not of what you gave: {message}\n{kept}; please report it with that file"

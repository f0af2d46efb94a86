"""The command line: one file per command, no logic, nothing heavy imported before it is needed."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Annotated

import typer

from mupsweep import __version__
from mupsweep.cli import cancel, check, data, plan, report, rules, run, status, sync, transfer, worker
from mupsweep.errors import MupsweepError, visible
from mupsweep.report.terminal import encoding

app = typer.Typer(
    name="mupsweep",
    no_args_is_help=True,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


# zsh loads the file of a completion at the first Tab, which Typer's file does not answer: it defines a function only.
ZSH_FIRST_TAB = """
if [ "$funcstack[1]" = "_%(prog_name)s" ]; then
  %(complete_func)s "$@"
fi
"""
with contextlib.suppress(ImportError, AttributeError, KeyError):  # Typer names its scripts in no public way
    from typer import _completion_shared

    _completion_shared._completion_scripts["zsh"] += ZSH_FIRST_TAB


def show_version(requested: bool) -> None:
    """Print the version and exit, where --version asks for it."""
    if requested:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Pick the learning rate of a model you cannot afford to sweep, and know how far to trust it."""


app.command("run")(run.run)
app.command("transfer")(transfer.transfer)
app.command("plan")(plan.plan)
app.command("rules")(rules.rules)
app.command("status")(status.status)
app.command("report")(report.report)
app.command("sync")(sync.sync)
app.command("cancel")(cancel.cancel)
app.command("worker")(worker.worker)
app.add_typer(check.app, name="check")
app.add_typer(data.app, name="data")

# An analysis is thousands of products of small matrices, on which numpy's threads only wait for one another and for the
# runs that train beside it. This counts as long as numpy is not imported yet.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def check_working_folder() -> None:
    """Refuse to work in a folder that was deleted."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise MupsweepError("the working directory is gone: change to one that is there, and run it again") from error


def drop_output() -> None:
    """Discard what stdout still holds, since Python would try to write it once more as it ends."""
    with contextlib.suppress(OSError, AttributeError):  # a stdout without a descriptor is not written at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def was_interrupted(error: BaseException | None) -> bool:
    """Return whether a Ctrl-C caused an error: libraries, and Python while it imports, raise others in its place."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__
    return error is not None


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2; a traceback is a bug of ours."""
    for stream in (sys.stdout, sys.stderr):  # charts draw lines that an ASCII locale cannot encode
        encoding.prepare(stream, os.environ)
    try:
        check_working_folder()
        try:
            app(prog_name="mupsweep")
        except Exception as error:
            if was_interrupted(error):
                raise KeyboardInterrupt from error
            raise
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # a failure of this write must still be reported
    except MupsweepError as error:
        print(f"mupsweep: {visible(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe left, for instance `head`
        drop_output()
        sys.exit(141)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        drop_output()
        what = f"cannot write {error.filename}" if error.filename else "cannot write"
        print(f"mupsweep: {what}: {error.strerror}; free space or choose another folder with out=DIR", file=sys.stderr)
        sys.exit(MupsweepError.exit_code)

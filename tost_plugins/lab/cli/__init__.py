"""The command `tost`: a file for each group of commands, which read their arguments, call the library and show the result.
What they call is imported inside them, so that `tost --help` does not wait for torch.

May import: errors, files, masks, recipe, lab.
"""

from __future__ import annotations

import sys

import typer

from tost_plugins.lab.cli import grids, masks, recipes, runs

app = typer.Typer(help="Sparse training that works: masks, ToST's tweaks, recipes.", no_args_is_help=True,
                  add_completion=False, pretty_exceptions_enable=False)  # fmt: skip
for command in (runs.train, runs.compare, runs.speed, runs.lottery, runs.superpose, grids.reproduce, masks.export):
    app.command()(command)
app.add_typer(masks.app, name="mask")
app.add_typer(recipes.app, name="recipes")
app.add_typer(grids.study, name="study")


def main() -> None:
    """Run the command line; a TostError is one line on stderr and exit status 1."""
    try:
        app()
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        from tost_plugins.errors import TostError
        from tost_plugins.lab.job import Stopped

        if isinstance(error, Stopped):
            text = f"{error}; the same command goes on (train, compare, lottery, superpose: with --resume)"
            print(text, file=sys.stderr)
            sys.exit(130)
        if isinstance(error, TostError):
            print(f"tost: {error}", file=sys.stderr)
            sys.exit(1)
        if isinstance(error, OSError) and error.strerror:
            where = "" if error.filename is None else f"{error.filename}: "
            text = f"{where}expected a place to read and write, got {error.strerror!r}; another --out, more room on the disk?"
            print(f"tost: {text}", file=sys.stderr)
            sys.exit(1)
        raise

"""What a command prints: one JSON document or something for people on stdout, progress and errors on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from radloop import logs

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 160  # columns of a table that no terminal limits
Progress = Callable[[int, int], None]


def print_json(value: object) -> None:
    """The one JSON document, with keys as given."""
    import msgspec

    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
    sys.stdout.flush()


def console(*, stderr: bool = False) -> Console:
    """A rich console that colours nothing on its own and, in a pipe, does not squeeze."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        file=stream,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=not stream.isatty(),
        width=None if stream.isatty() else _PIPE_WIDTH,
    )


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout; numbers to the right. Nothing but the title's "none" when there are no rows."""
    rows = [list(row) for row in rows]
    if not rows:
        print(f"{title}: none")
        return
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        numeric = all(isinstance(row[index], (int, float)) and not isinstance(row[index], bool) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row))
    if sys.stdout.isatty():
        console().print(table)
        return
    with (shown := console()).capture() as captured:
        shown.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_pairs(title: str, pairs: Iterable[tuple[str, object]]) -> None:
    """Names and values on lines of their own."""
    pairs = [(name, value) for name, value in pairs if value is not None and value != ""]
    print(title)
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        print(f"  {name.ljust(width)}  {value}")


@contextmanager
def progress(label: str) -> Iterator[Progress]:
    """A bar on stderr where that is a terminal, nothing elsewhere; yields the callback (done, total)."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=None)

        def show(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total or None)

        yield show


def say(message: str) -> None:
    """One line for people on stderr; a line of the log where that is asked for."""
    if logs.wanted():
        logs.write("info", {"message": message})
    else:
        print(message, file=sys.stderr, flush=True)


def tell(message: str, *, stderr: bool = False) -> None:
    """One line of a server for people on stdout; a line of the log where that is asked for."""
    if stderr or logs.wanted():
        say(message)
    else:
        print(message, flush=True)


def fail(message: str) -> None:
    """An error on stderr, `radloop: ` before it, in red on a terminal."""
    prefix = "\x1b[31mradloop:\x1b[0m" if sys.stderr.isatty() else "radloop:"
    print(f"{prefix} {message}", file=sys.stderr, flush=True)


def plural(number: int, one: str, many: str | None = None) -> str:
    """`1 file`, `2 files`, `3 studies`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def counts_line(counts: dict[str, Any]) -> str:
    """`12 new, 3 same`: what is not nought, in the order given."""
    return ", ".join(f"{value:,} {name}" for name, value in counts.items() if value) or "nothing"

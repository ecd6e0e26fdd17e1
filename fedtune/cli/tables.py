"""Tables whose figures are never cut: on a screen that is too narrow, each row becomes a list."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text


class Figures(Table):
    """A table that breaks lines between words in columns that may wrap. If its columns do not
    fit, each row is shown as a list of column names and values."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._width() <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield Text.from_markup(str(self.title), style="italic")
        names = [" ".join(_text(column.header).plain.split()) for column in self.columns]
        wide = max((len(name) for name in names), default=0)
        for cells in zip(*(column.cells for column in self.columns), strict=True):
            yield Text("")
            for name, cell in zip(names, map(_text, cells), strict=True):
                if cell.plain.strip():
                    head = Text(f"{name:<{wide}}  ", style="bold")
                    yield Text.assemble(head, Text(" ").join(cell.split()))
        if self.caption:
            yield Text("")
            yield Text.from_markup(str(self.caption))

    def _width(self) -> int:
        """Return the width below which a figure would be cut: the columns' least widths, their
        padding and the borders."""
        _, right, _, left = Padding.unpack(self.padding)
        count = len(self.columns)
        padding = count * (left + right) - (0 if self.pad_edge else left + right)
        between = (count - 1 + 2 * self.show_edge) if self.box else 0
        return sum(map(_compute_least_width, self.columns)) + padding + between


def _compute_least_width(column: Column) -> int:
    """Return the least width of a column: the width of its widest line, of its widest word if the
    column may wrap, or of a few letters if its words may be broken too."""
    texts = [_text(column.header), *map(_text, column.cells)]
    if column.no_wrap:
        return max(line.cell_len for text in texts for line in text.split() or [text])
    if column.overflow == "fold":
        return max(8, column.min_width or 0)
    words = [word for text in texts for word in text.plain.split()]
    return max(map(len, words), default=1)


def _text(cell: object) -> Text:
    return cell if isinstance(cell, Text) else Text.from_markup(str(cell))

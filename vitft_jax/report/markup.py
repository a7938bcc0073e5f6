"""HTML from Python: whatever is no `Html` is text, and is escaped."""

import html
import unicodedata
from collections.abc import Iterable
from typing import Any

_VOID = ("br", "img", "link", "meta")


class Html(str):
    """Markup that goes into a page as it is."""

    __slots__ = ()


def text(value: Any) -> Html:
    """A value as text: of no effect on the page, whoever wrote it. Control characters, which HTML forbids, become U+FFFD."""
    clean = str(value).encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written
    clean = "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in clean)
    return Html(html.escape(clean))


def join(*children: Any) -> Html:
    """Children one after the other: `Html`, text, None (nothing), or iterables of these."""
    parts = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, Iterable) and not isinstance(child, str):
            parts.append(join(*child))
        elif child is not None:
            parts.append(text(child))
    return Html("".join(parts))


def tag(element: str, /, *children: Any, **attributes: Any) -> Html:
    """An element.

    Args:
        element: Its name.
        children: As `join` takes them.
        attributes: By name, ``class_`` for 'class' and '_' for '-'; None leaves one out.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{element}{pairs}>" if element in _VOID else f"<{element}{pairs}>{join(*children)}</{element}>")


def outside(value: Any) -> Html:
    """A name from outside, in its own direction of writing, whatever that is."""
    return tag("bdi", value)


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]], caption: str = "", left: int = 1) -> Html:
    """A table that scrolls by itself where the page is narrow; the first cell of a row is its heading.

    Args:
        head: Cells of the first row.
        rows: Cells of the others.
        caption: What the table says.
        left: Columns from the left that hold words; numbers follow.
    """

    def row(cells: Iterable[Any], heading: bool) -> Html:
        made = []
        for i, cell in enumerate(cells):
            scope = "col" if heading else "row" if i == 0 else None
            made.append(tag("th" if scope else "td", cell, scope=scope, class_="words" if i < left else None))
        return tag("tr", made)

    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption) if caption else None,
            tag("thead", row(head, True)),
            tag("tbody", [row(cells, False) for cells in rows]),
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption or "table",
    )


def folded(summary: Any, *children: Any) -> Html:
    """What is shown when its heading is clicked."""
    return tag("details", tag("summary", summary), *children)

"""Tables of a Markdown text, cell by cell."""

from __future__ import annotations


def rows(text: str) -> list[dict[str, str]]:
    """Every row of every table, its cells by heading; of a heading that a table has twice, the first cell."""
    found, head = [], []
    for line in [*text.splitlines(), ""]:
        cells = [cell.strip() for cell in line[1:-1].split("|")] if line.startswith("|") else []
        if not cells:
            head = []
        elif not head:
            head = cells
        elif not set(line) <= set("|-"):
            found.append(dict(zip(reversed(head), reversed(cells), strict=True)))
    return found


def row(text: str, **cells: str) -> dict[str, str]:
    """The only row with these cells; spaces of a heading are underscores here."""
    wanted = {heading.replace("_", " "): cell for heading, cell in cells.items()}
    matching = [found for found in rows(text) if wanted.items() <= found.items()]
    assert len(matching) == 1, f"{len(matching)} rows have {wanted}:\n{text}"
    return matching[0]

"""Print the keys of a configuration with type, default and meaning: all keys, a section's keys, or one key.

mixreorg config                all keys
mixreorg config train          the keys of a section
mixreorg config train.lr       one key
mixreorg config --markdown docs/configuration.md     write them into the page as tables
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from ..errors import UserError, nearest
from .run import Config
from .section import Key, keys

WIDTH = 112


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("key", nargs="?", default="", metavar="SECTION|KEY", help="default: every key")
    parser.add_argument("--markdown", metavar="PAGE", type=Path, help="write tables into a page, between its markers")


def main(args: argparse.Namespace) -> None:
    known = list(keys(Config))
    chosen = [key for key in known if not args.key or f"{key.name}.".startswith(f"{args.key}.")]
    if not chosen:
        sections = {key.name.rpartition(".")[0] for key in known} - {""}
        raise UserError(f"config: unknown key '{args.key}'{nearest(args.key, [*sections, *(k.name for k in known)])}")
    if args.markdown:
        from ..ledger import write_page

        write_page(args.markdown, tables(chosen))
        return
    for key in chosen:
        print(f"{key.name}: {key.type} = {key.default}" if key.default else f"{key.name}: {key.type}")
        print(textwrap.indent(textwrap.fill(key.meaning, WIDTH), "    "))


def tables(chosen: list[Key]) -> str:
    """Markdown: a heading and a table for each section."""
    from ..ledger import table

    sections: dict[str, list[list[str]]] = {}
    for key in chosen:
        section, _, name = key.name.rpartition(".")
        cells = [f"`{name}`", f"`{key.type}`", f"`{key.default}`" if key.default else "", key.meaning]
        sections.setdefault(section, []).append([cell.replace("|", "\\|") for cell in cells])
    lines = []
    for section, rows in sections.items():
        lines += [f"## {section or 'a run'}", "", *table(["key", "type", "default", "meaning"], rows), ""]
    return "\n".join(lines).rstrip()

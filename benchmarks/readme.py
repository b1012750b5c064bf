"""The tables of README.md and docs/: each is between two comments, written by the script that measured it."""

import glob
import os
import re

from medgr2.errors import RunError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def find_page(name):
    """(the page of README.md and docs/ with the place of a table, its text).

    The place is between <!-- name --> and <!-- /name -->. Raises RunError unless there is exactly one.
    """
    found = []
    for page in [os.path.join(ROOT, "README.md"), *glob.glob(os.path.join(ROOT, "docs", "*.md"))]:
        with open(page, encoding="utf-8") as f:
            content = f.read()
        found += [(page, content)] * len(block_of(name).findall(content))
    if len(found) != 1:
        places = f"{len(found)} places for the table {name} in README.md and docs/"
        raise RunError(f"{places}; put <!-- {name} --> and <!-- /{name} --> where it belongs, once")
    return found[0]


def block_of(name):
    return re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)


def write_block(name, text):
    """Put `text` in the place of the table `name`. Raises RunError unless there is exactly one."""
    page, content = find_page(name)
    with open(page + ".tmp", "w", encoding="utf-8") as f:
        f.write(block_of(name).sub(lambda match: text + "\n", content))
    os.replace(page + ".tmp", page)


def format_table(headers, rows):
    """A table in Markdown: the first column is aligned left, the others right."""
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)

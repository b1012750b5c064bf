"""The README's tables: each stands between two comments and is written by the benchmark that measured it, never by hand."""

import os
import re

from medgr2.errors import RunError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def write_block(name, text, path=os.path.join(ROOT, "README.md")):
    """Put `text` between <!-- name --> and <!-- /name -->. Raises RunError where the file has no such place."""
    with open(path, encoding="utf-8") as f:
        old = f.read()
    new, n = re.subn(
        rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{text}\n{m[2]}", old, flags=re.DOTALL
    )
    if n != 1:
        raise RunError(
            f"{path}: no place for the table {name}; put <!-- {name} --> and <!-- /{name} --> where it belongs"
        )
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(new)
    os.replace(path + ".tmp", path)

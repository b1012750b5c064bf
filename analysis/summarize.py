"""Finished runs side by side: fields of their metrics.json files as a table.

python -m analysis.summarize base=runs/a/metrics.json grpo=runs/b/metrics.json --fields accuracy low high
"""

import json

from medgr2 import cli
from medgr2.errors import RunError


def summarize(rows, fields):
    """A table of fields of JSON files. `rows`: LABEL=FILE; files with the same label share a row.

    A field that no file of a row has is left empty. Raises RunError if a file cannot be read.
    """
    found = {}
    for row in rows:
        label, _, file = row.partition("=")
        try:
            with open(file, encoding="utf-8") as f:
                found[label] = found.get(label, {}) | json.load(f)
        except (OSError, ValueError, TypeError) as e:
            raise RunError(f"{row}: {e}; give LABEL=FILE, with the metrics.json of a finished run") from None
    lines = [[label, *(values.get(field) for field in fields)] for label, values in found.items()]
    return cli.format_table(lines, ["", *fields])


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("rows", nargs="+", metavar="LABEL=FILE", help="label of a row, and a metrics.json for it")
    p.add_argument("--fields", nargs="+", required=True, help="columns: fields of the files")
    return p.parse_args()


def main(args):
    print(summarize(args.rows, args.fields))


if __name__ == "__main__":
    cli.run_main(main, parse_args())

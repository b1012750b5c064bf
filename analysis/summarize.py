"""What finished runs came to, side by side: fields of their metrics.json files as a table.

python -m analysis.summarize base=runs/toy/eval_base/metrics.json grpo=runs/toy/cycle1/eval_grpo/metrics.json --fields accuracy low high
"""

import json

from medgr2 import cli
from medgr2.errors import RunError


def summarize(rows, fields):
    """A table of fields of JSON files; `rows`: LABEL=FILE, several with one label where a row draws on several files.

    Raises RunError where a file cannot be read. A field that a row's files lack is left empty.
    """
    found = {}
    for row in rows:
        label, _, file = row.partition("=")
        try:
            with open(file, encoding="utf-8") as f:
                found[label] = found.get(label, {}) | json.load(f)
        except (OSError, ValueError, TypeError) as e:
            raise RunError(f"{row}: {e}; give LABEL=FILE, with the metrics.json of a finished run") from None
    return cli.format_table(
        [[label, *(values.get(field) for field in fields)] for label, values in found.items()], ["", *fields]
    )


def parse_args():
    p = cli.Parser(description="What finished runs came to, side by side.")
    p.add_argument(
        "rows", nargs="+", metavar="LABEL=FILE", help="a row and a JSON file that its fields are read from"
    )
    p.add_argument("--fields", nargs="+", required=True, help="columns: fields of the files")
    return p.parse_args()


def main(args):
    print(summarize(args.rows, args.fields))


if __name__ == "__main__":
    cli.run_main(main, parse_args())

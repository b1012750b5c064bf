"""K records of a file at random, of one modality or task if asked for: what the scripts here train on.

python benchmarks/subset.py FILE --where modality=CT --k 240 --seed 0 --out ct.jsonl
"""

import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from medgr2 import cli, records, runs
from medgr2.errors import require


def subset(rows, k, seed, field=None, value=None):
    """k rows (all if None) whose `field` is `value`, in the order of the file.

    Raises RecordError if there are fewer.
    """
    index = [i for i, row in enumerate(rows) if field is None or row.get(field) == value]
    k = len(index) if k is None else k
    what = f"records with {field} {value}" if field else "records"
    require(
        len(index) >= k, f"--k {k}: there are only {len(index)} {what}: give a larger file, or a smaller k"
    )
    return [rows[i] for i in sorted(random.Random(runs.seed_of(seed, field, value)).sample(index, k))]


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("file", help="records (JSONL)")
    p.add_argument("--out", required=True, help="records to write (JSONL)")
    p.add_argument("--k", type=int, help="how many (all of them)")
    p.add_argument("--where", default="", metavar="FIELD=VALUE", help="only of these")
    p.add_argument("--seed", type=int, default=0, help="of the choice")
    return p.parse_args()


def main(args):
    rows = list(records.read_records(args.file, root=records.ANYWHERE))
    field, _, value = args.where.partition("=")
    count = records.write_records(args.out, subset(rows, args.k, args.seed, field or None, value))
    print(f"{args.out}: {count} records")


if __name__ == "__main__":
    cli.run_main(main, parse_args())

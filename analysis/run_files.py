"""Runs that a command line names, and their predictions: for compare, transfer and efficiency."""

import os

from medgr2 import cli, records
from medgr2.errors import RunError

# Two predictions on one item agree in these fields.
ITEM_FIELDS = ("question", "options", "answer", "image_hash")
# Flags that change no file.
FREE = ("markdown",)


def add_output_arguments(p):
    """The flags of every comparison of runs."""
    cli.add_switch(p, "--markdown", "print tables in Markdown")
    cli.add_run_arguments(p)


def named_runs(values):
    """[(name, predictions file)] of the arguments NAME=RUN, or RUN, which is then named after its folder."""
    found = []
    for value in values:
        name, equals, path = value.partition("=")
        # A path may itself hold an equals sign.
        if not equals or not path or os.sep in name or os.path.exists(value):
            name, path = os.path.basename(value.rstrip("/")), value
        found.append((name, os.path.join(path, "predictions.jsonl") if os.path.isdir(path) else path))
    return found


def read_run(path, fields=()):
    """The rows of a file of predictions, in order. Raises RecordError if one lacks a field."""
    fields = (*records.QUESTION, "prediction", *fields)
    return list(records.read_records(path, fields, records.ANYWHERE))


def read_pair(a, b):
    """The predictions in two files on the same items, in A's order. Raises RunError if the items differ."""
    rows_a, rows_b = ({row["id"]: row for row in read_run(path, ["image_hash"])} for path in (a, b))
    missing = []
    for path, here, there in ((a, rows_a, rows_b), (b, rows_b, rows_a)):
        absent = there.keys() - here.keys()
        if absent:
            missing.append(f"{path} lacks {len(absent)} of {len(there)} ({min(absent)})")
    if missing:
        raise RunError(f"not the same items: {', '.join(missing)}; give two runs on the same --data")
    for name, row in rows_a.items():
        for field in ITEM_FIELDS:
            if row.get(field) != rows_b[name].get(field):
                problem = f"item {name} has another `{field}` in {b} than in {a}"
                raise RunError(f"{problem}; give two runs on the same --data")
    return list(rows_a.values()), [rows_b[name] for name in rows_a]

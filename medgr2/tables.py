"""The rows of a public file: JSON, JSON Lines, CSV, TSV, lines split at |, Parquet, Arrow, pickle.

A field that is null, NaN or an empty cell is absent from its row, in every format.
"""

import csv
import json
import os
import pathlib
import pickle

from medgr2.errors import RecordError, require
from medgr2.images import MAX_BYTES, require_file

# The kinds of file, by suffix. From a folder all files of the first kind that it has are read.
SUFFIXES = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv")
# Fields in which a JSON object holds the rows of a data set.
HOLDERS = ("data", "annotations", "questions", "samples", "logs")
# Rows of Parquet that are in memory at one time: each may hold an image.
BATCH = 16
# The columns of VQA-Med's files, which have no header line: 2019's test file also has a category.
VQAMED_COLUMNS = {3: ["image", "question", "answer"], 4: ["image", "category", "question", "answer"]}


def find_tables(src):
    """The files of a data set: `src`, or all files below the folder `src` of the first kind in SUFFIXES."""
    if not os.path.isdir(src):
        return [src]
    paths = sorted(pathlib.Path(src).rglob("*"))
    for suffix in SUFFIXES:
        found = [str(path) for path in paths if path.suffix.lower() == suffix and path.is_file()]
        if found:
            return found
    raise RecordError(f"{src}: no file that ends in {', '.join(SUFFIXES)}: give another folder")


def read_rows(path):
    """Yield the rows of a file, each a dict without what is missing; anything else is yielded as it is.

    Raises RecordError.
    """
    require_file(path)
    reader = READERS.get(pathlib.Path(path).suffix.lower(), read_json)
    try:
        for row in reader(path):
            yield without_missing(row) if isinstance(row, dict) else row
    except RecordError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: not readable ({one_line(error)}): give another, text in UTF-8") from None


def without_missing(row):
    """The row without fields that are None or not a number."""
    return {name: value for name, value in row.items() if value is not None and value == value}


def one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__


# ---------------------------------------------------------------------------------------------------------
# One reader per kind of file: path → rows.


def read_json(path):
    """A JSON array, JSON Lines, or one object with the rows in one of its fields."""
    text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    is_array = text.lstrip().startswith("[")
    if not is_array and is_json(text):
        yield from find_inner_rows(parse_json(text))
        return
    for number, chunk in enumerate([text] if is_array else text.split("\n")):
        try:
            value = parse_json(chunk) if chunk.strip() else []
        except (ValueError, RecursionError) as error:
            line = number + getattr(error, "lineno", 1)
            advice = "give a JSON array, or one JSON object per line"
            raise RecordError(f"{path}:{line}: {error}: {advice}") from None
        yield from value if isinstance(value, list) else [value]


def parse_json(text):
    """The value of a JSON text. pandas writes NaN for a missing value: it becomes None."""
    return json.loads(text, parse_constant=lambda name: None)


def is_json(text):
    """Is the whole text one JSON value?"""
    try:
        parse_json(text)
    except (ValueError, RecursionError):
        return False
    return True


def find_inner_rows(value):
    """The rows that a JSON object holds in one of HOLDERS; else it is a row itself."""
    for name in HOLDERS:
        if isinstance(value, dict) and isinstance(value.get(name), list):
            return value[name]
    return [value]


def read_cells(path, columns=None):
    """CSV with a header line, split at what this line has most of: commas, semicolons or tabs.

    `columns`: {number of cells: names} of a file without such a line, which is split at |. A row with more
    cells than names is yielded as a list.
    """
    csv.field_size_limit(MAX_BYTES)
    with open(path, encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        delimiter = "|" if columns else max(",;\t", key=first.count)
        # In a file without a header line a quotation mark is just a character.
        quoting = csv.QUOTE_NONE if columns else csv.QUOTE_MINIMAL
        lines = csv.reader(file, delimiter=delimiter, quoting=quoting)
        try:
            names = columns.get(first.count("|") + 1) if columns else next(lines, [])
            shown = " or ".join(" | ".join(known) for known in (columns or {}).values())
            require(names is not None, f"{path}:1: not lines of {shown}: give a CSV file with a header line")
            for cells in lines:
                if cells:
                    row = {name.strip(): cell for name, cell in zip(names, cells) if cell.strip()}
                    yield row if len(cells) <= len(names) else cells
        except csv.Error as error:
            raise RecordError(f"{path}:{lines.line_num}: {error}: save it as CSV in UTF-8") from None


def read_lines(path):
    """The lines of VQA-Med: `image|question|answer`."""
    return read_cells(path, VQAMED_COLUMNS)


def import_pyarrow(path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RecordError(f"{path}: Parquet and Arrow files need pyarrow: pip install pyarrow") from None
    return pyarrow


def read_parquet(path):
    pyarrow = import_pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise RecordError(f"{path}: not readable as Parquet ({one_line(error)}): download it again") from None


def read_arrow(path):
    """A file of a folder that `datasets` saved with save_to_disk."""
    pyarrow = import_pyarrow(path)
    try:
        with pyarrow.ipc.open_stream(path) as batches:
            for batch in batches:
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise RecordError(f"{path}: not readable as Arrow ({one_line(error)}): download it again") from None


class PlainUnpickler(pickle.Unpickler):
    """Unpickles texts, numbers, lists and dicts. Whatever else is pickled names code, and is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_pickle(path):
    """A pickled list of dicts, as PathVQA's."""
    advice = "only lists of plain dicts are read: convert it to JSON"
    try:
        with open(path, "rb") as file:
            rows = PlainUnpickler(file).load()
    except OSError:
        raise
    except Exception as error:
        # A broken or hostile file may raise anything.
        raise RecordError(f"{path}: not unpickled ({one_line(error)}): {advice}") from None
    require(isinstance(rows, list), f"{path}: a pickled {type(rows).__name__}: {advice}")
    yield from rows


def refuse_spreadsheet(path):
    raise RecordError(f"{path}: a spreadsheet: save it as CSV")


READERS = {
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".csv": read_cells,
    ".tsv": read_cells,
    ".txt": read_lines,
    ".pkl": read_pickle,
    ".pickle": read_pickle,
    ".xls": refuse_spreadsheet,
    ".xlsx": refuse_spreadsheet,
}

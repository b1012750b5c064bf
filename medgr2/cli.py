"""Command lines: one way to use argparse, one line for a user's mistake, tables of cells."""

import argparse
import errno
import os
import re
import sys

from medgr2.errors import RunError, UserError

# The disk is full, over quota or read-only, the folder belongs to someone else, or the path leads through
# a file. These are the user's to solve, so they need no traceback.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring with its line breaks; each flag's help ends with its default, if it has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviated flags and reports a mistake in one line."""

    def __init__(self, **kwargs):
        super().__init__(**{"formatter_class": Help, "allow_abbrev": False} | kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help explains every flag\n")


def number(kind, least, most=None):
    """An argparse type: a finite number of this kind (int or float), at least `least` and at most `most`."""
    bounds = f"at least {least}" if most is None else f"from {least} to {most}"

    def parse(text):
        value = kind(text)
        # Not a number fails every comparison.
        if not (least <= value < float("inf") and (most is None or value <= most)):
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    # argparse shows this name if `kind` refuses the text: "invalid int value".
    parse.__name__ = kind.__name__
    return parse


def run_main(main, args):
    """Run a script's `main`. A user's mistake ends it in one line on stderr; a bug keeps its traceback."""
    try:
        main(args)
    except UserError as error:
        leave(str(error), error.exit_status)
    except Exception as error:
        reason = unwritable_reason(error)
        if not reason:
            raise
        path = getattr(error, "filename", None) or args.out
        leave(f"{path}: {reason}; make room or choose another --out, the same command resumes from here", 2)


def leave(message, status):
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(status)


def unwritable_reason(error):
    """Why nothing can be written, or None. `error` is an OSError, or what safetensors makes of one."""
    text = re.search(r"\(os error (\d+)\)", str(error))
    code = int(text[1]) if text else getattr(error, "errno", None)
    return os.strerror(code) if code in UNWRITABLE else None


def parse_pairs(flag, pairs):
    """{our name: theirs} of OURS=THEIRS. Raises RunError for a pair of another form."""
    for pair in pairs:
        if not all(pair.partition("=")):
            raise RunError(f"{flag} {pair}: give OURS=THEIRS, as answer=gt_answer")
    return dict(pair.split("=", 1) for pair in pairs)


def add_switch(parser, flag, help, default=False):
    """Add a flag that is on or off, with its --no- form."""
    parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)


def add_run_arguments(parser):
    """Add the flags that every stage has."""
    parser.add_argument("--out", required=True, help="folder to write; final once it exists")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument(
        "--image-root", help="folder that images may be in, besides the folder of the data file"
    )
    add_switch(parser, "--resume", "resume an unfinished run of the same command", default=True)


def tell_cut(replies, cut, limit):
    """Say so if more than half of the replies were cut at --max-new-tokens."""
    if 2 * cut > replies:
        advice = "raise it, or see whether the model's stop tokens hold the end of turn of its chat"
        print(f"{cut} of {replies} replies were cut at --max-new-tokens {limit}: {advice}", flush=True)


def format_table(rows, headers, markdown=False):
    """Rows of cells as aligned text or Markdown. Floats have three digits, columns of numbers align right."""
    headers = [str(header) for header in headers]
    cells = [[format_cell(cell) for cell in row] for row in rows]
    columns = range(len(headers))
    numeric = [all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in columns]
    if markdown:
        rule = ["---:" if is_numeric else "---" for is_numeric in numeric]
        return "\n".join(map(markdown_line, [headers, rule, *cells]))
    widths = [max(len(line[i]) for line in [headers, *cells]) for i in columns]
    lines = []
    for line in [headers, ["-" * width for width in widths], *cells]:
        aligned = [line[i].rjust(widths[i]) if numeric[i] else line[i].ljust(widths[i]) for i in columns]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def format_cell(cell):
    if cell is None:
        return ""
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def markdown_line(cells):
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"

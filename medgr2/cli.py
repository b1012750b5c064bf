"""Command lines: argparse in one manner for all, a user's mistake as one line, tables of cells."""

import argparse
import errno
import os
import re
import sys

# the disk is full or over quota, read-only, not ours, or the path leads through a file
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and each flag's default, if it has one, behind its help."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse in the manner of the house: no abbreviations, the docstring as it stands, one line for a mistake."""

    def __init__(self, **kwargs):
        super().__init__(**{"formatter_class": Help, "allow_abbrev": False} | kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help explains every flag\n")


def number(kind, least, most=None):
    """An argparse type: a number of this kind, from `least` to `most`; inf and nan are none."""

    def parse(text):
        value = kind(text)
        if not (least <= value <= (most if most is not None else value) and abs(value) < float("inf")):
            raise argparse.ArgumentTypeError(
                f"{text} is not " + (f"at least {least}" if most is None else f"from {least} to {most}")
            )
        return value

    # argparse: invalid int value
    parse.__name__ = kind.__name__
    return parse


def run_main(main, args):
    """Run a stage's `main`. A user's mistake is one line on stderr and exit status 2; a bug keeps its traceback."""
    try:
        main(args)
    except Exception as e:
        line = str(e)
        # RecordError, RunError and ModelError have one
        if not hasattr(e, "exit_status"):
            why = unwritable(e)
            if not why:
                raise
            line = f"{getattr(e, 'filename', None) or args.out}: {why}; make room or choose another --out, the same command goes on from here"
        print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)
        sys.exit(getattr(e, "exit_status", 2))


def unwritable(error):
    """Why nothing could be written, where that is what the error says: an OSError, or the text that safetensors makes of one."""
    text = re.search(r"\(os error (\d+)\)", str(error))
    number = int(text[1]) if text else getattr(error, "errno", None)
    return os.strerror(number) if number in UNWRITABLE else None


def add_switch(parser, flag, help):
    """A flag that is off unless given, with its --no- form."""
    parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=False, help=help)


def add_run_arguments(parser):
    """The flags that every stage has."""
    parser.add_argument("--out", required=True, help="folder to write; final once it exists")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument(
        "--image-root", help="folder that images may lie in, beside that of the file that names them"
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from an unfinished run of the same command",
    )


def format_table(rows, headers, markdown=False):
    """Rows of cells as aligned text, or in Markdown; floats with three digits, numbers to the right."""
    cells = [
        [f"{c:.3f}" if isinstance(c, float) else "" if c is None else str(c) for c in row] for row in rows
    ]
    widths = [
        max(len(str(h)), *(len(r[i]) for r in cells)) if cells else len(str(h)) for i, h in enumerate(headers)
    ]
    right = [all(isinstance(r[i], (int, float, type(None))) for r in rows) for i in range(len(headers))]
    if markdown:
        rule = ["---:" if r else "---" for r in right]
        return "\n".join(
            f"| {' | '.join(c.replace('|', '&#124;') for c in line)} |"
            for line in [[str(h) for h in headers], rule, *cells]
        )
    lines = [[str(h) for h in headers], ["-" * w for w in widths], *cells]
    return "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right)).rstrip()
        for line in lines
    )

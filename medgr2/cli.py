"""Command lines: one way to use argparse, one line for a user's mistake, tables of cells."""

import argparse
import errno
import os
import signal
import sys
import traceback

from medgr2 import processes, trackers
from medgr2.errors import RunError, UserError, explain_system_error
from medgr2.progress import is_first, tell


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring with its line breaks; each flag's help ends with its default, if it has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviated flags and reports a mistake in one line."""

    def __init__(self, **kwargs):
        super().__init__(**{"formatter_class": Help, "allow_abbrev": False} | kwargs)

    def parse_args(self, *args, **kwargs):
        """As argparse. From here on Ctrl-C shows no traceback, not even while torch is imported."""
        sys.excepthook = show_uncaught
        # The output may not be UTF-8, and the name of a file need not be text.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        return super().parse_args(*args, **kwargs)

    def error(self, message):
        line = f"{self.prog}: {message}; --help explains every flag\n"
        processes.fail(line, 2)
        self.exit(2, line)


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
    """Run a script's `main`. A mistake of the user or an error of the system ends it in one line on stderr.

    A bug keeps its traceback. Of several processes one says why, and all end.
    """
    processes.watch()
    try:
        main(args)
        # Written now: what Python writes when it ends cannot be caught.
        print(end="", flush=True)
    except UserError as error:
        leave(str(error), error.exit_status)
    except Exception as error:
        line = explain_system_error(error, vars(args))
        if not line:
            processes.wait_for_cause()
            processes.fail(traceback.format_exc(), 1)
            raise
        if getattr(error, "errno", None) == errno.EPIPE:
            # Else Python writes the rest once more when it ends, and fails again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        leave(line, 2)
    finally:
        processes.leave()


def leave(message, status):
    line = f"{os.path.basename(sys.argv[0])}: {message}"
    processes.fail(line, status)
    print(line, file=sys.stderr)
    sys.exit(status)


def leave_at_once(message):
    """Exit with the status of Ctrl-C and, from the first of several processes, one line.

    Only what a signal handler may do at any moment.
    """
    if is_first():
        os.write(2, f"{os.path.basename(sys.argv[0])}: {message}\n".encode(errors="backslashreplace"))
    os._exit(128 + signal.SIGINT)


def show_uncaught(kind, error, traceback):
    """sys.excepthook: Ctrl-C is one line, anything else Python's traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print(end="", flush=True)
        leave_at_once("stopped by Ctrl-C")
    sys.__excepthook__(kind, error, traceback)


def parse_pairs(flag, pairs):
    """{our name: theirs} of OURS=THEIRS. Raises RunError for a pair of another form."""
    for pair in pairs:
        if not all(pair.partition("=")):
            raise RunError(f"{flag} {pair}: give OURS=THEIRS, such as answer=gt_answer")
    return dict(pair.split("=", 1) for pair in pairs)


def add_switch(parser, flag, help, default=False):
    """Add a flag that is on or off, with its --no- form."""
    parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)


def add_run_arguments(parser):
    """Add the flags that every stage has."""
    parser.add_argument("--out", required=True, help="folder to write; final once it exists")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument(
        "--image-root", help="folder that images may be in, besides the folder of the data file"
    )
    add_switch(parser, "--resume", "resume an unfinished run of the same command", default=True)


def add_training_arguments(parser):
    """Add the flags that every stage has that trains a model."""
    add_run_arguments(parser)
    report = "also log the metrics there, offline by default (medgr2/trackers.py)"
    push = "also upload the finished model to the Hugging Face Hub, as a private repository if it is new"
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help=push)
    parser.add_argument("--report-to", nargs="+", choices=trackers.NAMES, default=[], help=report)


def add_image_arguments(parser):
    """Add the flags of the stages that show images to a model (loading.limit_pixels, prefetch.py)."""
    for flag, which in (("--min-pixels", "fewest"), ("--max-pixels", "most")):
        note = "a larger image is made smaller" if which == "most" else "a smaller image is made larger"
        help = f"{which} pixels of an image, width x height: {note} (the model's processor decides)"
        parser.add_argument(flag, type=number(int, 784), metavar="N", help=help)
    workers = "processes that open and encode the next images (0: a thread); same result"
    parser.add_argument("--workers", type=number(int, 0), default=0, help=workers)


def tell_cut(replies, cut, limit):
    """Say so if more than half of the replies were cut at --max-new-tokens."""
    if 2 * cut > replies:
        advice = "raise it, or check that the model's stop tokens include its chat template's end of turn"
        tell(f"{cut} of {replies} replies were cut at --max-new-tokens {limit}: {advice}")


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

"""What a stage shows while it works. Of several processes only the first shows anything."""

import datetime
import os
import sys
import time

# Seconds between lines.
EVERY = 60


def is_first():
    """Is this the first of several processes, or the only one?"""
    return os.environ.get("RANK", "0") == "0"


def tell(line):
    """Print a line on stdout."""
    if is_first():
        print(line, flush=True)


def progress(items, description):
    """Yield the items of a sequence and show how many are done, how fast, and how long the rest will take.

    On stderr: a bar on a terminal, one line a minute in a log file.
    """
    if not is_first():
        yield from items
    elif sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=description, leave=False)
    else:
        yield from with_lines(items, description)


def with_lines(items, description):
    started = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= EVERY:
            print(format_line(description, done, len(items), now - started), file=sys.stderr, flush=True)
            last = now
        yield item


def format_line(description, done, total, seconds):
    """`sft: 120 of 1000, 2.00/s, 0:07:20 left`, after `seconds` from the start."""
    rate = f"{done / seconds:.2f}/s" if done > seconds else f"{seconds / done:.2f} s each"
    left = datetime.timedelta(seconds=round(seconds / done * (total - done)))
    return f"{description}: {done} of {total}, {rate}, {left} left"

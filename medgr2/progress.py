"""The progress of a long loop: a bar on a terminal, one line a minute in a log file. Both on stderr."""

import datetime
import os
import sys
import time

# Seconds between lines.
EVERY = 60


def progress(items, description):
    """Yield the items of a sequence and show how many are done, how fast, and how long the rest will take.

    Of several processes only the first shows it.
    """
    if int(os.environ.get("RANK", 0)):
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

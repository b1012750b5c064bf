"""Progress of a long loop: a bar on a terminal, a line a minute elsewhere, nothing from other processes."""

import os
import pty
import subprocess
import sys
import termios
import types

import pytest
from helpers import ROOT

from medgr2 import progress

CODE = """
import sys
from medgr2.progress import progress
import medgr2.progress
medgr2.progress.EVERY = 0
for item in progress(range(3), "images"):
    print(item)
"""


@pytest.fixture
def clock(monkeypatch):
    """clock.now, in seconds, is what time.monotonic returns."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.delenv("RANK", raising=False)
    return clock


@pytest.mark.parametrize(
    "items, seconds, lines",
    [
        # Two items a second: after a minute 120 are done, and the other 180 take 90 seconds.
        (300, 0.5, ["120 of 300, 2.00/s, 0:01:30", "240 of 300, 2.00/s, 0:00:30"]),
        # Slower than a line a minute: one after each item, none after the last.
        (3, 90.0, ["1 of 3, 90.00 s each, 0:03:00", "2 of 3, 90.00 s each, 0:01:30"]),
        (119, 0.5, []),
        (0, 1.0, []),
    ],
)
def test_a_log_file_gets_a_line_a_minute_with_the_rate_and_the_time_left(
    clock, capsys, items, seconds, lines
):
    done = []
    for item in progress.progress(range(items), "sft"):
        done.append(item)
        clock.now += seconds
    assert done == list(range(items))
    assert capsys.readouterr() == ("", "".join(f"sft: {line} left\n" for line in lines))


def run(**settings):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment, check=True, **settings)


def test_a_terminal_gets_a_bar_with_rate_and_time_left_and_stdout_none_of_it():
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    done = run(stderr=slave, stdout=subprocess.PIPE, text=True)
    # Before the other end is closed, which would drop it. If there is nothing, it raises and does not wait.
    os.set_blocking(master, False)
    shown = os.read(master, 1 << 16).decode()
    os.close(slave)
    os.close(master)
    assert done.stdout == "0\n1\n2\n"
    # tqdm's: percentage, time gone and left, rate.
    assert "images:   0%|" in shown and "0/3 [00:00<?, ?it/s]" in shown and "of 3" not in shown


@pytest.mark.parametrize("rank, lines", [("0", 2), ("1", 0)])
def test_of_several_processes_the_first_shows_the_progress(rank, lines, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    done = run(capture_output=True, text=True)
    assert done.stdout == "0\n1\n2\n" and len(done.stderr.splitlines()) == lines

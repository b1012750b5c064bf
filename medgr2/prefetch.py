"""Prefetching: the next batches are prepared (images opened, resized, encoded) while this one is computed."""

import copy
import os
import signal
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

from medgr2.errors import RunError, UserError


def prefetch(indices, prepare, workers=0):
    """Yield prepare(i) of each index, in order. A thread makes the next one, or `workers` processes do.

    `indices` may be endless. An error of prepare(i) is raised when it is the turn of i. Raises RunError if a
    worker process dies.
    """
    indices = iter(indices)
    if workers:
        yield from by_processes(indices, prepare, workers)
        return
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(prepare, i) for i in islice(indices, 1))
        while coming:
            done = coming.popleft().result()
            coming.extend(thread.submit(prepare, i) for i in islice(indices, 1))
            yield done


def by_processes(indices, prepare, workers):
    """As prefetch. Each process prepares two ahead."""
    from torch.utils.data import DataLoader

    # Forked, so that nothing is imported or loaded again. They may not use the GPU.
    loader = DataLoader(
        Prepared(prepare), batch_size=None, sampler=indices, collate_fn=unchanged, num_workers=workers,
        worker_init_fn=start_worker, multiprocessing_context="fork",
    )  # fmt: skip
    try:
        for done in loader:
            if isinstance(done, UserError):
                raise done
            yield done
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        why = " ".join(str(error).split())
        raise RunError(f"--workers: {why}; lower --workers or give it more memory") from None


class Prepared:
    """A data set of prepare(i). A user's mistake is an item, so that its message stays one line."""

    def __init__(self, prepare):
        self.prepare = prepare

    def __getitem__(self, i):
        try:
            return self.prepare(i)
        except UserError as error:
            return error


def unchanged(item):
    return item


def start_worker(number):
    # A run that is to stop needs its workers up to its next commit.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    # torch's worker would wait for a process that was killed, if what it has prepared fills the pipe.
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent):
    """End this process once its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def for_preparing(loaded):
    """The VLM with a processor of its own: a tokenizer must not serve two threads at a time.

    Its prompts keep no images if they are never encoded again: an image takes long to pass to a process.
    """
    keeps_images = loaded.prefix_sharing != "always"
    return replace(loaded, processor=copy.deepcopy(loaded.processor), keeps_images=keeps_images)

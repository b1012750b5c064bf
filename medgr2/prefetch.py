"""Prefetching: the next batches are prepared (images opened, resized, encoded) while this one is computed."""

import copy
import functools
import multiprocessing
import os
import signal
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import util
from multiprocessing.reduction import ForkingPickler

from medgr2.errors import UserError


def prefetch(indices, prepare, workers=0):
    """Yield prepare(i) of each index, in order. A thread prepares the next one, or `workers` processes do.

    `indices` may be endless. An error of prepare(i) is raised when it is the turn of i.
    """
    if workers:
        yield from by_processes(indices, prepare, workers)
        return
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for i in indices:
            ready, coming = coming, thread.submit(prepare, i)
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()


def by_processes(indices, prepare, workers):
    """As prefetch. Each process prepares two ahead."""
    from torch.utils.data import DataLoader

    # After an error or a signal the workers may outlive the loop, and Python waits for them before it ends.
    util.Finalize(None, kill_workers, exitpriority=0)
    # Forked, so that nothing is imported or loaded again. They must not use the GPU.
    loader = DataLoader(
        Prepared(prepare), batch_size=None, sampler=indices, collate_fn=unchanged, num_workers=workers,
        worker_init_fn=functools.partial(start_worker, os.getpid()), multiprocessing_context="fork",
    )  # fmt: skip
    for pickled in loader:
        # What this process's own worker has pickled, as multiprocessing passes any object.
        done, error = ForkingPickler.loads(pickled)
        if error:
            raise error
        yield done


class Prepared:
    """A data set of (prepare(i), None), or (None, the error), pickled.

    DataLoader would add its own lines to the message of an error, and lose one of pickling, as of a full
    /dev/shm.
    """

    def __init__(self, prepare):
        self.prepare = prepare

    def __getitem__(self, i):
        try:
            return bytes(ForkingPickler.dumps((self.prepare(i), None)))
        except Exception as error:
            if not isinstance(error, UserError):
                # Shown below the traceback of the process that raises it.
                error.add_note(traceback.format_exc())
            return bytes(ForkingPickler.dumps((None, error)))


def unchanged(item):
    return item


def start_worker(parent, number):
    # A run that stops still needs its workers until its next commit.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    # torch's worker would wait for a process that was killed, if what it has prepared fills the pipe.
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent):
    """End this process once its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def kill_workers():
    # torch's handler would raise an error for each of them.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


def for_preparing(loaded):
    """The VLM with a processor of its own: a tokenizer must not serve two threads at a time.

    Its prompts keep no images if they are never encoded again: an image takes long to pass to a process.
    """
    keeps_images = loaded.prefix_sharing != "always"
    return replace(loaded, processor=copy.deepcopy(loaded.processor), keeps_images=keeps_images)

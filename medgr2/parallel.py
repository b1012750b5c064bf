"""Several processes share batches that need no gradient."""

from accelerate.utils import gather_object

from medgr2.prefetch import prefetch


def take_turns(batches, prepare, work, accelerator, workers=0):
    """Yield work(prepare(batch)) of each batch, in order, on every process.

    Each of N processes does every N-th batch, and prepares its next ones ahead (medgr2/prefetch.py). A batch
    is the same for any number of processes, and so are its padding and its results.
    """
    first, N = accelerator.process_index, accelerator.num_processes
    prepared = prefetch(batches[first::N], prepare, workers)
    for turn in range(0, len(batches), N):
        # Fewer batches than processes are left at the end.
        own = [work(next(prepared))] if turn + first < len(batches) else []
        yield from gather_object(own)

"""The processes of one run agree when to stop, and end together: none waits for another that has failed.

A launcher (torchrun, accelerate launch) starts a process per GPU. If one fails, the launcher sends SIGTERM to
the others. That is not enough: SIGTERM also asks a run to commit and leave, and a process that waits for
another inside a collective handles no signal. So a thread of each process watches the others. They tell each
other what happened through the launcher's key-value store.
"""

import contextlib
import functools
import os
import subprocess
import sys
import threading
import time

# Seconds between two looks at the others, and how long a process that fails after another waits for the
# first to say why.
LOOK, WAIT = 0.5, 2
# The exit status of a process that ends because another has failed: that of SIGTERM.
ENDED = 143


def several():
    """Does this run have several processes?"""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def are_connected():
    """Does an Accelerator connect this process with others?"""
    # Not imported here: a stage that computes in several processes has imported it.
    distributed = sys.modules.get("torch.distributed")
    return several() and distributed is not None and distributed.is_initialized()


def largest(number):
    """The largest of the numbers that the processes give. All must call it."""
    if not are_connected():
        return number
    from accelerate.utils import gather_object

    return max(gather_object([number]))


def wait_for_all():
    """Return once all processes have called it."""
    largest(0)


def from_first(function, *args):
    """What the first process gets from function(*args), on each. All must call it."""
    if not are_connected():
        return function(*args)
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([function(*args) if os.environ["RANK"] == "0" else None])[0]


@functools.cache
def watch():
    """Watch the other processes from now on → Peers; None if there are none, or no launcher with a store."""
    is_launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Peers() if several() and is_launched else None


class Peers:
    """The processes of a run, as one of them sees them."""

    def __init__(self):
        from torch.distributed import PrefixStore, TCPStore

        self.rank, self.launcher = os.environ["RANK"], os.getppid()
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        # The launcher may start all processes anew.
        self.store = PrefixStore(f"medgr2/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        self.store.set(f"process {self.rank}", f"{os.environ['GROUP_RANK']} {os.getpid()}")
        self.neighbours, self.has_left = {}, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self):
        """In a thread: end this process once another has failed or was killed, or the launcher was."""
        while not self.has_left.wait(LOOK):
            try:
                killed = self.find_killed()
                has_failed = not killed and self.store.check(["failed"])
            except RuntimeError:
                # The store ended with its launcher, perhaps on another machine.
                killed = "the launcher"
            if killed:
                script = os.path.basename(sys.argv[0])
                fail(f"{script}: {killed} was killed; the same command resumes from the last commit", ENDED)
            if has_failed:
                time.sleep(WAIT)
                end(ENDED)

    def find_killed(self):
        """Which process has ended without `leave`, as a text; None if none has."""
        if not self.is_launched():
            return "the launcher"
        self.neighbours = self.neighbours or self.find_neighbours()
        for rank, pid in self.neighbours.items():
            if not is_alive(pid) and not self.store.check([f"left {rank}"]):
                return f"the process with rank {rank}"

    def find_neighbours(self):
        """{rank: process id} of those that this launcher has started; {} until all have started."""
        keys = [f"process {rank}" for rank in range(int(os.environ["WORLD_SIZE"]))]
        if not self.store.check(keys):
            return {}
        started = enumerate(self.store.get(key).decode().split() for key in keys)
        return {rank: int(pid) for rank, (launcher, pid) in started if launcher == os.environ["GROUP_RANK"]}

    def is_launched(self):
        """Is the launcher, which holds the store, still there?"""
        return os.getppid() == self.launcher

    def is_first_to_fail(self):
        try:
            if self.is_launched():
                return self.store.add("failed", 1) == 1
        except RuntimeError:
            # As above.
            pass
        return os.environ["LOCAL_RANK"] == "0"


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def fail(text, status):
    """End this process at once, and with it the run. Only the first that fails prints why.

    Returns if there are no other processes to end.
    """
    if not watch():
        return
    if watch().is_first_to_fail():
        print(text.rstrip(), file=sys.stderr, flush=True)
        print_last(text.rstrip().splitlines()[-1])
    else:
        time.sleep(WAIT)
    end(status)


def end(status):
    """Exit at once: sys.exit could wait for the others, and ends no process from a thread."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


def wait_for_cause():
    """Wait a moment. If another process has failed and so caused this one's error, the thread ends it."""
    if watch():
        time.sleep(WAIT)


def leave():
    """Tell the others that this process ends as it should."""
    if watch() and watch().is_launched():
        watch().has_left.set()
        watch().store.set(f"left {watch().rank}", "")
        # Were it still asking the store when Python ends, the process would be aborted. A store that does not
        # answer is an error for it, after minutes.
        watch().thread.join()


def print_last(line):
    """Print a line below all that the launcher will print when it ends: its traceback and its summary."""
    if watch() and watch().is_launched():
        # A launcher that has ended is a zombie, which kill -0 finds, until its caller waits for it. One that
        # first reads all output would wait for this command, and this for it.
        is_running = 'kill -0 "$0" && ! grep -q "^State:.Z" "/proc/$0/status"'
        wait_and_print = f'while {is_running}; do sleep 0.1; done 2>/dev/null; printf "%s\\n" "$1" >&2'
        command = ["sh", "-c", wait_and_print, str(watch().launcher), line]
        # In a session of its own: the launcher ends this process's.
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

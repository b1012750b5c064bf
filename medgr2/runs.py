"""A run: the output folder of one stage. Writing it, committing, resuming.

A stage writes into `OUT.part`. When it finishes, the folder is renamed to `OUT`, so `OUT` is final once it
exists. The same command again finds the run complete, or resumes it from the last `commit`.

    args.json       arguments, seeds, versions, git commit, hardware, SHA-256 of inputs, start and end
    metrics.jsonl   one line per step
    metrics.json    the result
    README.md       the model card, of a stage that trains
    lock, state/    only while unfinished: which process is writing; the last two commits (the step, the
                    optimiser, how long the files were)

    run = runs.start(args, inputs=[args.data])
    run.announce(f"{steps} steps of {args.batch} examples")
    for step in run.progress(range(run.state.get("step", 0), steps), "training"):
        run.append("rollouts.jsonl", rows)
        run.log(step=step, loss=loss)
        if run.due(step + 1, every=100):
            run.commit(step=step + 1)
    run.finish({"loss": loss})

Ctrl-C, or the SIGTERM of a scheduler, ends a run after its next commit, and all its processes at the same
step. A second Ctrl-C or SIGKILL ends it at once. The same command resumes the run.
"""

import datetime
import hashlib
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time

from medgr2 import cli, processes
from medgr2.errors import RunError
from medgr2.model_card import make_repository, push, write_card
from medgr2.progress import progress
from medgr2.trackers import Trackers, require_installed

MIB = 1 << 20


def seed_of(*parts):
    """A seed made of numbers and names, the same on every machine: int in [0, 2^63)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def sha256(path):
    """SHA-256 of a file, or of all files of a folder by name; None if there is no such path (a Hub name)."""
    if not os.path.exists(path):
        return None
    files = [path]
    # A FIFO is hashed as an empty folder: opening it could wait forever. Its reader will refuse it.
    if not os.path.isfile(path):
        files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            while block := f.read(MIB):
                digest.update(block)
    return digest.hexdigest()


def environment():
    """Versions, git commit and hardware, for args.json and the benchmarks' result files."""
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {
        "versions": versions(),
        "git": {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": gpus},
    }


def describe_device():
    """What torch computes on: `NVIDIA L40`, `8 x NVIDIA L40` (a process each) or `CPU (2 threads)`."""
    import torch

    if not torch.cuda.is_available():
        return f"CPU ({torch.get_num_threads()} threads)"
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return (f"{processes} x " if processes > 1 else "") + torch.cuda.get_device_name()


def versions():
    """The version of Python and of each core package; None for a package that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "pillow", "numpy", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def git(*command):
    """What git prints about the folder of this file; None if it fails."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        done = subprocess.run(["git", "-C", here, *command], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def dump_json(value, path, **layout):
    """The text of a JSON value. Raises RunError, which names `path`, if a number in it is not finite."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, **layout)
    except ValueError:
        named = f" of {value['id']}" if isinstance(value, dict) and "id" in value else ""
        raise RunError(
            f"{path}: a number{named} is not finite, which JSON cannot hold; lower --lr or take another model"
        ) from None


def write_json(path, value):
    """Write a JSON file: first beside it, then renamed, so that it is never half written."""
    text = dump_json(value, path, indent=1)
    # What UTF-8 cannot hold, such as some folder names, becomes JSON's escape and is read back as it was.
    with open(path + ".tmp", "w", encoding="utf-8", errors="backslashreplace") as f:
        f.write(text + "\n")
    os.replace(path + ".tmp", path)


def read_json(path, rule):
    """The JSON value of a file. If it has none, raises RunError with the advice `rule`."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {error}; {rule}") from None


class HashingFile:
    """A file that is hashed and measured (in bytes) while it is written."""

    def __init__(self, file):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data):
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


class Run:
    """An unfinished output folder. Only the main process writes; the calls of the others do nothing."""

    def __init__(self, folder, part, main, metadata, state, lock=None, trackers=None):
        self.folder = folder
        self.part = part
        self.main = main
        self.metadata = metadata
        self.state = state
        self.lock = lock
        self.trackers = trackers
        self.files = {}
        self.commits = state.get("commits", 0)
        # The signal after which this run is to stop, and when it came.
        self.stopping, self.stopped = None, -math.inf
        self.old_handlers = self.handle_signals()

    def handle_signals(self):
        """Let Ctrl-C and SIGTERM call `stop` → {signal: its handler before}."""
        # A job in the background ignores Ctrl-C.
        signals = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) != signal.SIG_IGN]
        return {s: signal.signal(s, self.stop) for s in signals}

    def stop(self, number, frame):
        """Stop after the next commit; at a second Ctrl-C at once, as by SIGKILL."""
        # A launcher may pass on the Ctrl-C that the terminal has sent already, and the second one as SIGTERM.
        is_another, self.stopped = time.monotonic() > self.stopped + 0.2, time.monotonic()
        if self.stopping and is_another and signal.SIGINT in (number, self.stopping):
            cli.leave_at_once(f"{self.part}: stopped at once; the same command resumes from the last commit")
        self.stopping = signal.Signals(number)

    def path(self, name):
        """Where a file of this run is written (inside `OUT.part`)."""
        return os.path.join(self.part, name)

    def append(self, name, rows):
        """Append rows to a JSONL file of the run. They are safe once `commit` has been called."""
        if not self.main:
            return
        if name not in self.files:
            self.files[name] = open(self.path(name), "a", encoding="utf-8", newline="\n")
        for row in rows:
            self.files[name].write(dump_json(row, self.path(name)) + "\n")

    def log(self, **metrics):
        """Append one line to metrics.jsonl, and log it to the trackers.

        Floats are rounded to six significant digits. One that is not finite, such as the gradient norm of a
        skipped step, is null.
        """
        row = {}
        for name, value in metrics.items():
            if isinstance(value, float):
                value = float(f"{value:.6g}") if math.isfinite(value) else None
            row[name] = value
        self.append("metrics.jsonl", [row])
        if self.trackers:
            self.trackers.log(row, row.get("step"))

    def due(self, step, every):
        """Is it time to commit? It is after every `every` steps, and after Ctrl-C or SIGTERM.

        Several processes agree: each must call this, and `commit`, at the same steps.
        """
        return bool(processes.largest(self.stopping or 0)) or step % every == 0

    def commit(self, **state):
        """Make everything appended so far safe; a resumed run starts from `state`.

        `state` holds numbers, strings, tensors and dicts of them. `shards` are tensors of which each process
        holds and writes a part. After Ctrl-C or SIGTERM the run exits here with status 130 or 143. Raises
        RunError if the disk has no room; the commits before this one are kept.
        """
        self.commits += 1
        if "shards" in state:
            from medgr2 import sharding

            # The file below makes them a commit: it holds their hashes.
            state["shards"] = sharding.save(state["shards"], self.path(f"state/{self.commits:08}.shards"))
        if not self.main:
            return self.exit_if_stopping()
        sizes = dict(self.state.get("sizes", {}))
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name] = file.tell()
        self.state = {**state, "sizes": sizes, "commits": self.commits}
        os.makedirs(self.path("state"), exist_ok=True)
        checksum = self.save_state(self.path("state/new"))
        # Renamed only when complete, with the checksum in the name: half a file is never taken for a commit.
        os.replace(self.path("state/new"), self.path(f"state/{self.commits:08}-{checksum[:16]}.pt"))
        remove_old_commits(self.path("state"))
        self.exit_if_stopping()

    def save_state(self, path):
        """Write the state and return its SHA-256. Raises RunError if the disk has no room for it."""
        import torch

        try:
            with open(path, "wb") as f:
                file = HashingFile(f)
                torch.save(self.state, file)
                os.fsync(f.fileno())
        except (OSError, RuntimeError) as error:
            if os.path.exists(path):
                os.remove(path)
            self.require_room()
            # There is room, so the cause is another, such as a quota. torch may cover it with its own error.
            raise error if isinstance(error, OSError) else error.__context__ or error
        return file.digest.hexdigest()

    def require_room(self):
        """Raise RunError if the state is larger than the free space of the disk."""
        import torch

        free = shutil.disk_usage(self.part).free
        with open(os.devnull, "wb") as f:
            file = HashingFile(f)
            torch.save(self.state, file)
        if file.size > free:
            raise RunError(
                f"{self.part}: a commit needs {file.size / MIB:.3f} MiB and {free / MIB:.3f} MiB are free; "
                "make room, the same command resumes from the commit before"
            )

    def exit_if_stopping(self):
        """After Ctrl-C: exit with status 130; after SIGTERM: with 143. So do all processes if one got it."""
        stopping = processes.largest(self.stopping or 0)
        if stopping and self.main:
            name = "Ctrl-C" if stopping == signal.SIGINT else "SIGTERM"
            where = f"at step {self.state.get('step', 0)}; the same command resumes it"
            where = where if self.commits else "before its first commit; the same command starts anew"
            line = f"{self.part}: stopped by {name} {where}"
            print(line, flush=True)
            processes.print_last(line)
        if stopping:
            sys.exit(128 + stopping)

    def announce(self, work, server=None):
        """Print in one line what the run will do and where: on this machine, or on a server (its URL)."""
        if self.main:
            print(f"{self.folder}: {work}, on {server or describe_device()}", flush=True)

    def progress(self, items, description, together=False):
        """Yield the items of a sequence and show how far the run is (progress.py).

        After a signal the run ends here, without a commit. Of several processes only with `together`: all run
        this loop in step.
        """
        for item in progress(items, description):
            yield item
            if together or not processes.several():
                self.exit_if_stopping()

    def finish(self, metrics, line=""):
        """Write metrics.json and args.json, rename `OUT.part` to `OUT` and print one line."""
        if not self.main:
            return
        for file in self.files.values():
            file.close()
        if self.trackers:
            self.trackers.log({f"result/{name}": value for name, value in metrics.items()})
            self.trackers.finish()
        # The stages that train.
        if "report_to" in self.metadata["args"]:
            write_card(self.part, self.folder, self.metadata, metrics)
        self.metadata |= {"ended": now(), "peak_bytes": peak_bytes()}
        write_json(self.path("metrics.json"), metrics)
        write_json(self.path("args.json"), self.metadata)
        shutil.rmtree(self.path("state"), ignore_errors=True)
        os.replace(self.part, self.folder)
        os.remove(os.path.join(self.folder, "lock"))
        self.lock.close()
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        print(f"{self.folder}: {line or 'done'}", flush=True)
        if self.metadata["args"].get("push_to_hub"):
            push(self.folder, self.metadata["args"]["push_to_hub"])


def peak_bytes():
    """The most memory that this process has held so far: resident, and on its GPU if it has one."""
    import resource

    import torch

    # In bytes on macOS, else in KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.max_memory_allocated()
    return found


def start(args, inputs=(), main=True, free=()):
    """Start or resume the run of these arguments and return it; exit with status 0 if it is complete.

    `inputs`: the files, folders or Hub names that the run reads. Their hashes are kept, and must be the same
    when the run is resumed. `free`: arguments that may change, because no output depends on them.
    Raises RunError if `args.out` holds another run.
    """
    import torch

    random.seed(args.seed)
    torch.manual_seed(args.seed)
    report_to = getattr(args, "report_to", [])
    require_installed(report_to)
    folder = args.out.rstrip("/")
    part = folder + ".part"
    # One process reads gigabytes of weights to hash them, not all.
    metadata = processes.from_first(run_metadata, args, inputs)
    if main and getattr(args, "push_to_hub", None) and not os.path.exists(folder):
        make_repository(args.push_to_hub)
    lock = take_lock(part) if main and not os.path.exists(folder) else None
    if os.path.exists(folder):
        # Another process finished the run between the two lines above.
        if lock:
            shutil.rmtree(part)
        require_same_run(folder, metadata, free)
        if main:
            print(f"{folder}: complete already")
        sys.exit(0)
    # The others read what the first has found intact, and do not hash it again.
    if not main:
        processes.wait_for_all()
    state = {}
    if args.resume and os.path.isdir(os.path.join(part, "state")):
        require_same_run(part, metadata, free)
        state = restore(part, main)
    # Without a commit there is nothing to lose.
    if main and not state:
        clear(part)
        write_json(os.path.join(part, "args.json"), metadata)
    if main:
        processes.wait_for_all()
    trackers = None
    if main and report_to:
        trackers = Trackers(report_to, folder, part, metadata["args"], state.get("step", 0))
    return Run(folder, part, main, metadata, state, lock, trackers)


def run_metadata(args, inputs):
    """The content of args.json."""
    arguments = {name: value for name, value in vars(args).items() if name != "resume"}
    return {
        "script": os.path.basename(sys.argv[0]),
        # As they come back from the file: tuples are lists there.
        "args": json.loads(json.dumps(arguments)),
        "inputs": {path: sha256(path) for path in inputs if path},
        "started": now(),
        "ended": None,
        **environment(),
    }


def take_lock(part):
    """Make the folder `part` and lock it until this process ends. Returns the open lock file.

    Raises RunError if another process holds the lock.
    """
    import fcntl

    os.makedirs(part, exist_ok=True)
    lock = open(os.path.join(part, "lock"), "a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        raise RunError(f"{part}: {owner} is writing there; wait for it, or choose another --out") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}")
    lock.flush()
    return lock


def clear(part):
    """Remove everything but the lock."""
    for name in os.listdir(part):
        path = os.path.join(part, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif name != "lock":
            os.remove(path)


def read_metadata(folder):
    """The content of a run's args.json. Raises RunError if the folder holds no run."""
    try:
        with open(os.path.join(folder, "args.json"), encoding="utf-8") as f:
            metadata = json.load(f)
        if "script" in metadata and all(isinstance(metadata[key], dict) for key in ("args", "inputs")):
            return metadata
    except (OSError, ValueError, TypeError, LookupError):
        pass
    raise RunError(f"{folder}: holds something other than a run (no args.json); choose another --out")


def require_same_run(folder, metadata, free=()):
    """Raise RunError unless the run in `folder` has the same script, arguments (`free` aside) and inputs."""
    old = read_metadata(folder)
    advice = "choose another --out or remove it"
    if old["script"] != metadata["script"]:
        raise RunError(f"{folder}: holds another run (of {old['script']}); {advice}")
    # No output depends on these.
    free = {*free, "image_root", "workers", "report_to", "push_to_hub"}
    names = sorted({*old["args"], *metadata["args"]} - free)
    differences = []
    for name in names:
        there, here = old["args"].get(name), metadata["args"].get(name)
        if there != here:
            differences.append(f"--{name.replace('_', '-')} {there} there, {here} here")
    if differences:
        raise RunError(f"{folder}: holds another run ({', '.join(differences[:3])}); {advice}")
    for path, digest in metadata["inputs"].items():
        if old["inputs"].get(path) != digest:
            raise RunError(f"{folder}: {path} has changed since this run read it; {advice}")


def restore(part, main):
    """The state of the newest intact commit, or {}. What was appended after that commit is dropped."""
    state = load_newest_state(part, main)
    if main and state:
        sizes = state.get("sizes", {})
        for name in sorted(os.listdir(part)):
            if name.endswith(".jsonl"):
                truncate_to(os.path.join(part, name), sizes.get(name, 0))
        print(f"{part}: resuming from step {state.get('step', 0)}")
    return state


def remove_old_commits(folder):
    """Remove all but the last two commits: NUMBER-CHECKSUM.pt and, of a sharded run, NUMBER.shards/."""
    kept = sorted(name[:8] for name in os.listdir(folder) if name.endswith(".pt"))[-2:]
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name[:8] not in kept:
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def load_newest_state(part, main):
    """The newest commit whose checksums hold, or {}. Sets damaged ones aside and prints their names.

    `shards` is then the folder of its shards.
    """
    import torch

    folder = os.path.join(part, "state")
    for name in sorted(os.listdir(folder), reverse=True):
        if not name.endswith(".pt"):
            continue
        path = os.path.join(folder, name)
        checksum = name.removesuffix(".pt").partition("-")[2]
        if not main or checksum and sha256(path).startswith(checksum):
            # Every process loads it; without map_location all of them would load it onto GPU 0.
            state = torch.load(path, map_location="cpu", weights_only=True)
            if "shards" not in state:
                return state
            from medgr2 import sharding

            shards = os.path.join(folder, f"{name[:8]}.shards")
            if not main or sharding.is_intact(shards, state["shards"]):
                return state | {"shards": shards}
        if main:
            print(f"{path}: damaged, set aside; taking the commit before it")
            os.replace(path, os.path.join(part, name + ".damaged"))
    return {}


def truncate_to(path, size):
    """Cut a file back to `size` bytes and say so if that drops anything."""
    extra = os.path.getsize(path) - size
    if extra:
        os.truncate(path, size)
        print(f"{path}: dropped {extra} bytes written after the last commit")

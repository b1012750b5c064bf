"""A run: one stage's output folder, and all that a stage need not think about.

A stage writes into `OUT.part`; when it finishes, the folder is renamed to `OUT`. So `OUT` is final once it exists, and the
same command again either finds it complete, or goes on where the last `commit` left off.

    args.json       arguments, seeds, versions, git commit, hardware, SHA-256 of inputs, start and end
    metrics.jsonl   one line a step
    metrics.json    the result
    lock, state/    while unfinished: who is writing; the last two commits (position, optimiser, sizes of the files so far)

    run = runs.start(args, inputs=[args.data])
    for step in run.progress(range(run.state.get("step", 0), steps), "training"):
        run.append("rollouts.jsonl", rows)
        run.log(step=step, loss=loss)
        if run.due(step + 1, every=100):
            run.commit(step=step + 1)
    run.finish({"loss": loss})

SIGTERM (a scheduler's grace period) ends a run of one process after its next commit; SIGKILL, and SIGTERM where there are several,
at once. The same command goes on from the last commit.
"""
import argparse
import datetime
import errno
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor


# the disk is full or over quota, read-only, not ours, or the path leads through a file
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


class RunError(ValueError):
    """An output folder, or an argument, that cannot be used. The message is one line: what, where, what to do."""
    exit_status = 2


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
            raise argparse.ArgumentTypeError(f"{text} is not " + (f"at least {least}" if most is None else f"from {least} to {most}"))
        return value
    parse.__name__ = kind.__name__  # argparse: invalid int value
    return parse


def cli(main, args):
    """Run a stage's `main`. A user's mistake is one line on stderr and exit status 2; a bug keeps its traceback."""
    try:
        main(args)
    except Exception as e:
        line = str(e)
        if not hasattr(e, "exit_status"):  # RecordError, RunError and ModelError have one
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


def add_arguments(parser):
    """The flags that every stage has."""
    parser.add_argument("--out", required=True, help="folder to write; final once it exists")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--image-root", help="folder that images may lie in, beside that of the file that names them")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                        help="go on from an unfinished run of the same command")


def seed_of(*parts):
    """A seed from numbers and names, the same on every machine: int in [0, 2^63)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def batch_at(step, size, n, seed):
    """Indices of the examples of one step; every epoch is a permutation of its own, so a step needs no history."""
    orders = {}
    picked = range(step * size, (step + 1) * size)
    for epoch in {i // n for i in picked}:
        orders[epoch] = random.Random(seed_of(seed, "epoch", epoch)).sample(range(n), n)
    return [orders[i // n][i % n] for i in picked]


def ahead(items):
    """The items of an endless iterator, each made in a thread while the caller works on the one before."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items)
        while True:
            item, coming = coming.result(), thread.submit(next, items)
            yield item


def sum_gradients(parameters, accelerator):
    """Add up every process's gradients, in place: each divided its loss by the whole batch's count, so the sum is the gradient."""
    import torch
    for p in parameters:
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = accelerator.reduce(grad, "sum") if accelerator.num_processes > 1 else grad


def sha256(path):
    """SHA-256 of a file, or of a folder's files by name; None for what is not on this disk (a hub name)."""
    if not os.path.exists(path):
        return None
    files = [path] if os.path.isfile(path) else sorted(os.path.join(d, f) for d, _, fs in os.walk(path) for f in fs)
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def provenance():
    """Versions, git commit and hardware, for args.json and for benchmarks."""
    from importlib.metadata import PackageNotFoundError, version

    def git(*command):
        here = os.path.dirname(os.path.abspath(__file__))
        try:
            done = subprocess.run(["git", "-C", here, *command], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "pillow", "numpy", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {"versions": versions, "git": {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))},
            "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": gpus}}


def write_json(path, value):
    """Write beside, then rename: never half a file."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")
    os.replace(path + ".tmp", path)


def table(rows, headers, markdown=False):
    """Rows of cells as aligned text, or in Markdown; floats with three digits, numbers to the right."""
    cells = [[f"{c:.3f}" if isinstance(c, float) else "" if c is None else str(c) for c in row] for row in rows]
    widths = [max(len(str(h)), *(len(r[i]) for r in cells)) if cells else len(str(h)) for i, h in enumerate(headers)]
    right = [all(isinstance(r[i], (int, float, type(None))) for r in rows) for i in range(len(headers))]
    if markdown:
        rule = ["---:" if r else "---" for r in right]
        return "\n".join(f"| {' | '.join(c.replace('|', '&#124;') for c in line)} |" for line in [[str(h) for h in headers], rule, *cells])
    lines = [[str(h) for h in headers], ["-" * w for w in widths], *cells]
    return "\n".join("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right)).rstrip()
                     for line in lines)


class Hashed:
    """A file that is hashed and measured while it is written."""

    def __init__(self, file):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data):
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


class Run:
    """An output folder in the making. Only the main process writes; the others' calls do nothing."""

    def __init__(self, folder, part, main, meta, state, lock=None):
        self.folder, self.part, self.main, self.meta, self.state, self.lock = folder, part, main, meta, state, lock
        self.files, self.commits, self.stopping = {}, state.get("commits", 0), False
        self.handler = signal.signal(signal.SIGTERM, self.stop) if main else None

    def stop(self, *_):
        self.stopping = True

    def path(self, name):
        """Where a file of this run is written (inside `OUT.part`)."""
        return os.path.join(self.part, name)

    def append(self, name, rows):
        """Add rows to a JSONL file of the run. They count once `commit` has been called."""
        if not self.main:
            return
        if name not in self.files:
            self.files[name] = open(self.path(name), "a", encoding="utf-8", newline="\n")
        for row in rows:
            self.files[name].write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def log(self, **metrics):
        """One line of metrics.jsonl; floats are rounded to six significant digits."""
        self.append("metrics.jsonl", [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items()}])

    def due(self, step, every):
        """Is it time to commit? Every so many steps, and when SIGTERM has asked to stop."""
        return step % every == 0 or self.stopping

    def commit(self, **state):
        """All that was appended so far is safe; `state` (numbers, strings, tensors, dicts of them) is where to go on.

        After SIGTERM the run ends here, with status 143. Raises RunError where the disk has no room; the commits before it stay.
        """
        if not self.main:
            return
        sizes = dict(self.state.get("sizes", {}))
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name] = file.tell()
        self.commits += 1
        self.state = {**state, "sizes": sizes, "commits": self.commits}
        os.makedirs(self.path("state"), exist_ok=True)
        checksum = self.save_state(self.path("state/new"))
        # the checksum is in the name: a file is whole and has it, or is not there
        os.replace(self.path("state/new"), self.path(f"state/{self.commits:08}-{checksum[:16]}.pt"))
        for old in sorted(os.listdir(self.path("state")))[:-2]:
            os.remove(self.path(f"state/{old}"))
        self.leave_if_stopping()

    def save_state(self, path):
        """Write the state and return its SHA-256. Raises RunError where the disk has no room for it."""
        import torch
        try:
            with open(path, "wb") as file:
                hashed = Hashed(file)
                torch.save(self.state, hashed)
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch may put its own over the disk's
            if os.path.exists(path):
                os.remove(path)
            free = shutil.disk_usage(self.part).free
            with open(os.devnull, "wb") as nowhere:
                torch.save(self.state, whole := Hashed(nowhere))
            if whole.size <= free:  # a quota, say
                raise error if isinstance(error, OSError) else error.__context__ or error
            raise RunError(f"{self.part}: a commit needs {whole.size / 2**20:.3f} MiB and {free / 2**20:.3f} MiB are free; "
                           "make room, the same command goes on from the commit before") from None
        return hashed.digest.hexdigest()

    def leave_if_stopping(self):
        if self.stopping:
            print(f"{self.part}: stopped by SIGTERM at step {self.state.get('step', 0)}; the same command goes on from here", flush=True)
            sys.exit(128 + signal.SIGTERM)

    def progress(self, items, what):
        """A progress bar on a terminal, nothing elsewhere."""
        from tqdm import tqdm
        for item in tqdm(items, desc=what, disable=None if self.main else True, leave=False):
            yield item
            self.leave_if_stopping()  # a loop that commits nothing

    def finish(self, metrics, line=""):
        """Write metrics.json and args.json, rename `OUT.part` to `OUT`, print one line."""
        if not self.main:
            return
        for file in self.files.values():
            file.close()
        self.meta["ended"] = now()
        write_json(self.path("metrics.json"), metrics)
        write_json(self.path("args.json"), self.meta)
        shutil.rmtree(self.path("state"), ignore_errors=True)
        os.replace(self.part, self.folder)
        os.remove(os.path.join(self.folder, "lock"))
        self.lock.close()
        signal.signal(signal.SIGTERM, self.handler)
        print(f"{self.folder}: {line}" if line else f"{self.folder}: done", flush=True)


def now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def start(args, inputs=(), main=True, free=()):
    """Open the run of these arguments: new, or resumed; leaves with status 0 if it is complete already.

    `inputs`: files, folders or hub names that the run reads; their hashes are kept and must not change before a resume.
    `free`: arguments that may, because nothing in the output depends on them.
    Raises RunError where `args.out` holds another run.
    """
    import torch
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    folder = args.out.rstrip("/")
    part = folder + ".part"
    given = {k: v for k, v in vars(args).items() if k != "resume"}
    meta = {"script": os.path.basename(sys.argv[0]), "args": json.loads(json.dumps(given)),
            "inputs": {p: sha256(p) for p in inputs if p}, "started": now(), "ended": None, **provenance()}
    lock = take_lock(part) if main and not os.path.exists(folder) else None
    if os.path.exists(folder):
        if lock:  # it was finished this very moment
            shutil.rmtree(part)
        same_run(folder, meta, free)
        if main:
            print(f"{folder}: complete already")
        sys.exit(0)
    state = {}
    if args.resume and os.path.isdir(os.path.join(part, "state")):
        same_run(part, meta, free)
        state = restore(part, main)
    if main and not state:  # nothing was committed: nothing is lost
        empty(part)
        write_json(os.path.join(part, "args.json"), meta)
    return Run(folder, part, main, meta, state, lock)


def take_lock(part):
    """Make the folder and lock it for this process; the lock goes when the process does. Raises RunError where it is taken."""
    import fcntl
    os.makedirs(part, exist_ok=True)
    lock = open(os.path.join(part, "lock"), "a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise RunError(f"{part}: {lock.read().strip() or 'another process'} is writing there; wait for it, or choose another --out") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}")
    lock.flush()
    return lock


def empty(part):
    """Remove all but the lock."""
    for name in os.listdir(part):
        remove = shutil.rmtree if os.path.isdir(os.path.join(part, name)) else os.remove
        name == "lock" or remove(os.path.join(part, name))


def same_run(folder, meta, free=()):
    """Raise RunError unless the run in `folder` had the same script, arguments (but for those in `free`) and inputs."""
    try:
        with open(os.path.join(folder, "args.json"), encoding="utf-8") as f:
            old = json.load(f)
        old["script"], old["args"].items(), old["inputs"].items()
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        raise RunError(f"{folder}: holds something else than a run (no args.json); choose another --out") from None
    where = f"{folder}: holds another run"
    if old["script"] != meta["script"]:
        raise RunError(f"{where} (of {old['script']}); choose another --out or remove it")
    keys = sorted({*old["args"], *meta["args"]} - {*free, "image_root"})  # it says what may be read, not what is
    other = [k for k in keys if old["args"].get(k) != meta["args"].get(k)]
    if other:
        flags = ", ".join(f"--{k.replace('_', '-')} {old['args'].get(k)} there, {meta['args'].get(k)} here" for k in other[:3])
        raise RunError(f"{where} ({flags}); choose another --out or remove it")
    changed = [p for p, digest in meta["inputs"].items() if old["inputs"].get(p) != digest]
    if changed:
        raise RunError(f"{folder}: {changed[0]} has changed since this run read it; choose another --out or remove the folder")


def restore(part, main):
    """The newest commit whose checksum holds; what was written after it is cut off and said. {} if there is none."""
    import torch
    state = {}
    for name in sorted(os.listdir(os.path.join(part, "state")), reverse=True):
        path = os.path.join(part, "state", name)
        if not state and sha256(path).startswith(name.partition("-")[2].removesuffix(".pt") or "none"):
            state = torch.load(path, map_location="cpu", weights_only=True)  # every process reads it: not all onto GPU 0
        elif not state and main and name.endswith(".pt"):
            print(f"{path}: damaged, set aside; taking the commit before it")
            os.replace(path, os.path.join(part, name + ".damaged"))
    sizes = state.get("sizes", {})
    for name in sorted(os.listdir(part)) if main and state else []:
        extra = os.path.getsize(os.path.join(part, name)) - sizes.get(name, 0) if name.endswith(".jsonl") else 0
        if extra:
            os.truncate(os.path.join(part, name), sizes.get(name, 0))
            print(f"{os.path.join(part, name)}: dropped {extra} bytes written after the last commit")
    if main and state:
        print(f"{part}: going on from step {state.get('step', 0)}")
    return state


# ---------------------------------------------------------------------------------------------------------
# python runs.py: what finished runs came to, side by side.

def show(rows, fields):
    """A table of fields of JSON files; `rows`: LABEL=FILE, several with one label where a row draws on several files.

    Raises RunError where a file cannot be read. A field that a row's files lack is left empty.
    """
    found = {}
    for row in rows:
        label, _, file = row.partition("=")
        try:
            with open(file, encoding="utf-8") as f:
                found[label] = found.get(label, {}) | json.load(f)
        except (OSError, ValueError, TypeError) as e:
            raise RunError(f"{row}: {e}; give LABEL=FILE, with the metrics.json of a finished run") from None
    return table([[label, *(values.get(field) for field in fields)] for label, values in found.items()], ["", *fields])


def parse_args():
    p = Parser(description="What finished runs came to, side by side.")
    p.add_argument("rows", nargs="+", metavar="LABEL=FILE", help="a row and a JSON file that its fields are read from")
    p.add_argument("--fields", nargs="+", required=True, help="columns: fields of the files")
    return p.parse_args()


if __name__ == "__main__":
    cli(lambda args: print(show(args.rows, args.fields)), parse_args())

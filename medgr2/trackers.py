"""Experiment trackers (--report-to): what metrics.jsonl gets goes there too, through accelerate's trackers.

Everything stays on this machine unless the tracker's own environment variables say otherwise. TensorBoard
writes into OUT/tensorboard and wandb, offline, into OUT/wandb (WANDB_MODE=online, or `wandb sync` later);
trackio and mlflow write where they always do (TRACKIO_DIR; MLFLOW_TRACKING_URI).
"""

import importlib
import os

from medgr2.errors import RunError, in_one_line

# All are on PyPI under these names.
NAMES = ("tensorboard", "wandb", "trackio", "mlflow")
PROJECT = "medgr2"


def require_installed(names):
    """Raise RunError for a tracker whose package cannot be imported."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            raise RunError(f"--report-to {name}: not installed; pip install {name}") from None


class Trackers:
    """The trackers of one run, one for each of `names`, on its main process.

    folder: OUT; part: where the run writes; config: its arguments; step: where it starts or resumes.
    """

    def __init__(self, names, folder, part, config, step):
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        arguments = {
            # What was logged after the last commit is logged again: the reader drops the first.
            "tensorboard": {"run_name": "tensorboard", "logging_dir": part, "purge_step": step or None},
            "wandb": {"run_name": PROJECT, "name": folder, "dir": part, "settings": {"quiet": True}},
            "trackio": {"run_name": PROJECT, "name": folder},
            "mlflow": {"experiment_name": PROJECT, "run_name": folder},
        }
        os.environ.setdefault("WANDB_MODE", "offline")
        # Numbers and texts only: TensorBoard takes no list.
        config = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in config.items()}
        self.trackers = []
        for name in names:
            tracker = LOGGER_TYPE_TO_CLASS[name](**arguments[name])
            try:
                tracker.start()
                tracker.store_init_configuration(config)
            except Exception as error:
                # Each library raises its own exceptions.
                raise RunError(
                    f"--report-to {name}: {in_one_line(error)}; leave it out, or set it up"
                ) from error
            self.trackers.append(tracker)

    def log(self, metrics, step=None):
        """Log the numbers in `metrics`. The run does not stop if a tracker fails: it goes on without it."""
        numbers = {k: v for k, v in metrics.items() if type(v) in (int, float) and k != "step"}
        self.call(lambda tracker: tracker.log(numbers, step=step))

    def finish(self):
        self.call(lambda tracker: tracker.finish())

    def call(self, function):
        for tracker in list(self.trackers):
            try:
                function(tracker)
            except Exception as error:
                # As above.
                self.trackers.remove(tracker)
                print(f"--report-to {tracker.name}: {in_one_line(error)}; continuing without it", flush=True)

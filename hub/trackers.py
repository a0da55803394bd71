"""Where else a run's metrics go: TensorBoard, Weights & Biases, or a csv file, each by its own library.

metrics.jsonl has them whatever happens here: trouble is told in one line, and ends the sending, never the run.
"""

import contextlib
import csv
import importlib.util
import os
import secrets
from dataclasses import asdict

from configurator import UserError, require
from hub.files import read_jsonl

LIBRARIES = ("tensorboard", "wandb")
# How long wandb may look for its server at the start, and go on sending after the end; the rest stays on the disk.
SECONDS = {"init_timeout": 30, "finish_timeout": 60}


def require_library(log_to):
    """Raise a UserError if the library is not installed."""
    if log_to in LIBRARIES:
        require(importlib.util.find_spec(log_to), f"log_to {log_to!r}: pip install {log_to}")


class Tracker:
    """Sends metrics on from the main process, from run.step on: a resumed run writes what an unbroken one would."""

    def __init__(self, run, log_to):
        self.log_to = log_to
        self.send = None
        if run.world.is_main and log_to != "none":
            with self.tell_trouble():
                self.send = SENDERS[log_to](run)

    def log(self, row):
        """row: of metrics.jsonl, where it stands already; a number that is not finite is None."""
        if self.send is not None:
            with self.tell_trouble():
                self.send(row)

    @contextlib.contextmanager
    def tell_trouble(self):
        try:
            yield
        except (Exception, UserError) as error:
            self.send = None
            tell(self.log_to, error, "the run goes on, and metrics.jsonl has all")


def tell(log_to, error, then):
    reason = " ".join(str(error).split())[:200]
    print(f"\nlog_to={log_to}: {reason}; {then}", flush=True)


def to_csv(run):
    """out_dir/metrics.csv, with an empty cell where an update has no such number."""
    columns = []

    def send(row):
        rows = [row]
        mode = "a"
        # At the first row, and where a metric is new, all is written again: the header has to name it.
        if not set(row) <= set(columns):
            rows = read_jsonl(run.out_dir / "metrics.jsonl")
            mode = "w"
            for row in rows:
                columns.extend(name for name in row if name not in columns)
        with open(run.out_dir / "metrics.csv", mode, newline="") as file:
            writer = csv.DictWriter(file, columns)
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)

    return send


def to_tensorboard(run):
    """out_dir/tensorboard, for `tensorboard --logdir`."""
    from torch.utils.tensorboard import SummaryWriter

    # What was written of these updates before a kill is written again: TensorBoard leaves out the older.
    writer = SummaryWriter(run.out_dir / "tensorboard", purge_step=run.step)

    def send(row):
        for name, value in row.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return send


def to_wandb(run):
    """A run of wandb in the project nplus, or in that of WANDB_PROJECT; without a server it is kept in out_dir/wandb.

    A resumed run goes on in the same one. wandb leaves out the updates that it knows already.
    """
    import wandb

    run.state.setdefault("wandb_id", secrets.token_hex(4))
    options = {
        "project": os.environ.get("WANDB_PROJECT", "nplus"),
        "name": run.out_dir.name,
        "id": run.state["wandb_id"],
        "resume": "allow",
        "reinit": "finish_previous",  # a notebook may train one run after the other
        "dir": str(run.out_dir),
        "config": asdict(run.cfg),
        "settings": wandb.Settings(silent=True, **SECONDS),
    }
    try:
        session = wandb.init(**options)
    except (wandb.errors.Error, OSError) as error:
        tell("wandb", error, f"rows are kept in {run.out_dir}/wandb, and `wandb sync` sends them")
        wandb.teardown()  # what is left of the attempt holds the id
        session = wandb.init(**options, mode="offline")

    def send(row):
        session.log(row, step=row["step"])

    return send


SENDERS = {"csv": to_csv, "tensorboard": to_tensorboard, "wandb": to_wandb}

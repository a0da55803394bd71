"""What every stage needs and none is about: its data, the run in its directory.

What stages use of distributed/ they take from here: `backward`, `optimizer_step` (optimizer.py), `generate_rows`,
`load_model` (sharding.py), `open_directory` (checkpoint.py), and the decorator `stage` (processes.py), by which errors
become one line.

All randomness is a function of the seed and of where in the run it is drawn: there is no generator state to save.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from config.fields import RunConfig, TrainConfig  # noqa: F401
from configurator import UserError, require
from data import Rows, batch_indices
from distributed.checkpoint import open_directory, resume, save_checkpoint
from distributed.inputs import check_inputs, check_rows, load_split, load_splits  # noqa: F401
from distributed.optimizer import AdamW, backward, optimizer_step  # noqa: F401
from distributed.processes import Done, Signals, Stopwatch, World, stage  # noqa: F401
from distributed.sharding import generate_rows, keep_whole, load_model  # noqa: F401
from hub.companions import write_companions
from hub.files import move, write_jsonl
from hub.tokenizer import Tokenizer
from hub.trackers import Tracker, require_library

# ---------------------------------------------------------------------------- the start


@dataclass
class Data:
    """What a stage reads, and how many updates that makes."""

    tokenizer: Tokenizer
    train: Any  # the rows to train on: a datasets.Dataset with the columns that load_rows gives them
    held_out: Any  # the rows to evaluate on, likewise; None without an eval_split
    n_updates: int


def start(cfg, n_responses, models, functions, tokenizer_source="", n_minibatches=1, **options):
    """Join the process group, open cfg.out_dir, load the tokenizer (cfg.model's, if none is named) and the rows.

    models, functions: what else decides the run, see `check_inputs`. n_responses and options go to `load_rows`. A batch
    must divide into n_minibatches, and each of these into the processes' shares.
    Returns this process's World, and Data. Raises Done if the run is complete already.
    """
    require_library(cfg.log_to)
    world = World(cfg)
    out_dir = open_directory(cfg, world)
    tokenizer = Tokenizer.load(tokenizer_source or cfg.model)
    options["n_responses"] = n_responses
    train, held_out = load_splits(cfg, world, tokenizer, **options)

    parts = n_minibatches * world.size
    require(cfg.batch_size % parts == 0, f"batch_size must be a multiple of {parts}, minibatches x processes")

    n_rows = cfg.episodes or len(train)
    n_updates = n_rows // cfg.batch_size
    require(n_updates > 0, f"{n_rows} rows are less than a batch of {cfg.batch_size}; lower batch_size")
    shape = f"{n_minibatches} minibatches x {world.size} ranks x {cfg.batch_size // parts} rows"
    world.print(f"{n_updates} updates: {shape}")

    data = Data(tokenizer, train, held_out, n_updates)
    check_inputs(cfg, world, data, models, functions)
    # Rank 0 looks: processes must not differ in what they find.
    if world.agree_on((out_dir / "final").exists()):
        world.print(f"{out_dir}/final is there already; to train again, choose another out_dir")
        raise Done  # `stage` ends quietly
    return world, data


# ---------------------------------------------------------------------------- the run


class Run:
    """A training run: its rows, models and optimizer, and how far it is (`step`)."""

    def __init__(self, cfg, world, data, models, lrs=None):
        """models: name -> module to train, each with a group of the optimizer. lrs: name -> its rate, if not cfg.lr."""
        self.cfg = cfg
        self.world = world
        self.out_dir = Path(cfg.out_dir)
        self.lock = open(self.out_dir / "lock", "w")  # noqa: SIM115 (`resume` locks it until this process ends)

        self.tokenizer = data.tokenizer
        self.rows = data.train
        self.held_out = data.held_out
        self.total = data.n_updates

        self.models = nn.ModuleDict(models)
        self.optimizer = AdamW(cfg, self.models, lrs or {})
        self.losses = []  # (positions in the batch, loss): `backward` appends, `optimizer_step` looks and clears
        self.skipped = 0  # steps that optimizer_step left out since the last row of metrics.jsonl
        self.n_tokens = 0  # of this update's passes with gradients
        self.phase = Stopwatch(world.device)  # run.phase("policy"): what the update does from here on
        self.tracker = None  # `updates` opens it, at the step from which the run goes on

        self.state = {}  # what else a resumed run needs, in JSON; stages and variants change it in place
        self.bar = tqdm(total=self.total, disable=not world.is_main, desc=self.out_dir.name)
        self.signals = Signals(self.bar)
        self.step = 0  # `updates` goes on from the last checkpoint

    def updates(self):
        """Resume, and yield the updates still to do, under a progress bar; with save_every, save the run now and then.

        SIGTERM or SIGINT (Ctrl-C) ends the run after the update, with a checkpoint; after that, Ctrl-C ends it at once.
        """
        resume(self)
        self.tracker = Tracker(self, self.cfg.log_to)

        self.bar.initial = self.step
        self.bar.n = self.step
        self.signals.listen()

        while self.step < self.total:
            self.n_tokens = 0
            self.phase.begin()
            yield self.step
            self.log_time(self.phase.end())

            self.step += 1
            self.bar.update()

            # A signal may have come to one process alone: all must stop after the same update.
            stopping = self.world.any_rank(self.signals.asked > 0)
            if stopping or self.checkpoint_is_due():
                save_checkpoint(self)
            if stopping:
                self.world.print(f"stopped after update {self.step}; the same command goes on from there")
                raise Done
        self.signals.let_it_finish()  # from here on SIGTERM changes nothing, and Ctrl-C ends at once

    def checkpoint_is_due(self):
        if self.cfg.save_every == 0:
            return False
        # The last update has one too: evaluation and export can fail.
        return self.step % self.cfg.save_every == 0 or self.step == self.total

    def row_indices(self):
        """The rows of the data (batch_size,) that this step is about; PPO's group_size repeats each, side by side."""
        group_size = getattr(self.cfg, "group_size", 1)
        n_different = self.cfg.batch_size // group_size
        indices = batch_indices(len(self.rows), n_different, self.step, self.cfg.seed)
        return np.repeat(indices, group_size)

    def batch(self):
        """The rows that this step is about, see `data.Rows`."""
        return Rows(self.rows[self.row_indices()])

    def micro_batches(self, lengths):
        """Yield this rank's share of rows of these lengths, as arrays of their positions, for passes that train.

        With train_gather parameters and gradients stay whole until the last.
        """
        self.n_tokens += sum(lengths)
        micro_batches = self.world.split_rows(lengths, self.cfg.micro_batch_size)
        for number, indices in enumerate(micro_batches, 1):
            is_last = number == len(micro_batches)
            keep_whole(self.models.values(), self.cfg.train_gather and not is_last)
            yield indices

    def log(self, metrics, watch=()):
        """Append one row to metrics.jsonl; show the metrics named in `watch` beside the progress bar."""
        row = {"step": self.step, **metrics}
        bad = {name: x for name, x in metrics.items() if not math.isfinite(x)}
        if self.cfg.on_nonfinite == "skip":
            row.update(dict.fromkeys(bad))  # JSON has no NaN: null
            row["skipped"] = self.skipped
            self.skipped = 0
        elif bad:
            raise UserError(f"step {self.step}: {bad}; lower lr, or look at the rows of that step")

        if self.world.is_main:
            write_jsonl(self.out_dir / "metrics.jsonl", [row], "a")
            self.tracker.log(row)
        self.bar.set_postfix({name.split("/")[-1]: f"{metrics[name]:.4g}" for name in watch})

    def log_time(self, phases):
        """Append a row to timing.jsonl: how long this update took, with all that was done in it.

        tokens: of the rows that were trained on, once for each epoch. phases: {name: seconds}.
        """
        seconds = sum(phases.values())
        row = {
            "step": self.step,
            "time": time.time(),
            "seconds": seconds,
            "tokens_per_second": self.n_tokens / seconds,
            "episodes_per_second": self.cfg.batch_size / seconds,
        }
        row.update({f"seconds/{name}": x for name, x in phases.items()})
        if self.world.is_main:
            write_jsonl(self.out_dir / "timing.jsonl", [row], "a")

    def export(self, model, name="final"):
        """Write out_dir/`name`, a model directory that transformers and the next stage load. Collective."""
        # Written under another name and renamed when complete: a killed run leaves no partial model.
        temporary = self.out_dir / f"tmp_{name}"
        model.config.eos_token_id = self.tokenizer.eos_id
        model.save_pretrained(temporary)
        if self.world.is_main:
            write_companions(temporary, self.tokenizer, model.config.max_position_embeddings)
            move(temporary, self.out_dir / name)  # replaces: a resumed run may export the same name again
            print(f"\nwrote {self.out_dir / name}", flush=True)

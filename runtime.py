"""What every stage needs and none is about: its configuration, its data, the run in its directory.

What stages use of distributed/ they take from here: `backward`, `optimizer_step` (optimizer.py), `generate_rows`,
`load_model` (sharding.py), `open_directory` (checkpoint.py), and the decorator `stage` (processes.py), by which errors
become one line.

All randomness is a function of the seed and of where in the run it is drawn: there is no generator state to save.
"""

import math
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn
from tqdm import tqdm

from configurator import Count, Share, UserError, check, require
from data import batch_indices, load_rows
from distributed.checkpoint import open_directory, resume, save_checkpoint
from distributed.inputs import check_inputs, check_rows  # noqa: F401
from distributed.optimizer import backward, make_optimizer, optimizer_step  # noqa: F401
from distributed.processes import Done, Signals, World, stage  # noqa: F401
from distributed.sharding import generate_rows, keep_whole, load_model  # noqa: F401
from hub.companions import write_companions
from hub.config import GPTNeoXConfig
from hub.fetch import find_model
from hub.files import expand, move, split_names, write_jsonl
from hub.reader import has_split
from hub.tokenizer import Tokenizer
from hub.trackers import Tracker, require_library


@dataclass
class RunConfig:
    """The fields that all scripts share."""

    # ---- the run
    out_dir: str = "out/run"  # where everything that a run writes goes
    seed: int = 44413  # decides the initial weights, the data order and every sampled token
    accept_changes: bool = False  # go on in an out_dir that holds a run with another configuration
    # ---- data
    max_query_tokens: Count = 512  # posts are cut to this (arXiv:2403.17031 detail 2.2); articles to no less than 1919
    too_long: Literal["stop", "drop", "cut"] = "stop"  # rows longer than max_length, or the model; cut: their responses
    # ---- processes and memory
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute; auto: bfloat16 on cuda; the masters are float32
    shard_size: int = 0  # processes that share one copy of a model, a node's for example; 0: all
    offload: Literal["none", "frozen", "all"] = "none"  # to CPU memory: frozen models; or trained ones and Adam's too
    rollout_gather: bool = True  # sample with a model's parameters whole on each process; False: block by block
    compile: bool = False  # torch.compile of each block, once for all lengths; generation goes without

    def __post_init__(self):
        for field in fields(self):
            check(field, getattr(self, field.name), type(self).__qualname__)
        self.out_dir = expand(self.out_dir)


@dataclass
class TrainConfig(RunConfig):
    """The fields that all training stages share; the values are those of arXiv:2403.17031."""

    # ---- data
    train_split: str = "train"  # the rows to train on
    eval_split: str = "validation"  # empty: no evaluation
    max_length: int = 638  # tokens of query + response; 0: as many as the model takes
    # ---- batch
    episodes: int = 0  # rows in the whole run, shuffled anew in each epoch; 0: every row once
    batch_size: Count = 64  # rows per update, over all processes
    micro_batch_size: Count = 1  # rows that a process takes through one pass with gradients
    # ---- optimizer
    lr: float = 3e-6  # peak learning rate
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # of the learning rate; the first two go to 0
    warmup_steps: int = 0  # updates over which it rises to its peak
    adam_beta1: Share = 0.9  # decay of the gradient's mean
    adam_beta2: Share = 0.999  # decay of the squared gradient's mean
    adam_eps: float = 1e-5  # added to the root of the latter
    adam_style: Literal["torch", "tf"] = "torch"  # tf: eps is added before the bias correction (arXiv:1909.08593)
    weight_decay: float = 0.01  # decoupled, on all parameters
    max_grad_norm: float = 0.0  # clip the gradient's global norm; 0: do not clip
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what to do when a loss or the gradient is not finite
    # ---- memory
    train_gather: bool = False  # keep parameters and gradients whole on each process until a step's last micro-batch
    logits_chunk: int = 0  # positions of a row whose logits are in memory together, computed again for backward; 0: all
    activation_checkpointing: bool = False  # compute a block's activations again in the backward pass
    # ---- checkpoints
    save_every: int = 0  # updates between resumable checkpoints; 0: none but that of a run stopped by a signal
    keep_checkpoints: Count = 2  # how many of them to keep: the last ones
    keep_every: int = 0  # and those after each multiple of this many updates; 0: no others
    # ---- logging
    log_to: Literal["none", "csv", "tensorboard", "wandb"] = "none"  # where metrics go besides metrics.jsonl


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

    models, functions: what else decides the run, see `check_inputs`. n_responses and options go to `load_rows`.
    Returns this process's World, and Data. Raises Done if the run is complete already.
    """
    require_library(cfg.log_to)
    world = World(cfg)
    out_dir = open_directory(cfg, world)
    tokenizer = Tokenizer.load(tokenizer_source or cfg.model)
    options["n_responses"] = n_responses
    train = load_split(cfg, world, tokenizer, cfg.data, cfg.train_split, **options)
    held_out = None
    if cfg.eval_split and has_split(cfg.data, cfg.eval_split):
        held_out = load_split(cfg, world, tokenizer, cfg.data, cfg.eval_split, **options)
    elif cfg.eval_split:
        share = "--train_split=train[:90%] --eval_split=train[90%:] would do so"
        world.print(f"{cfg.data}: without {{split}} in its path no rows are held out, and none evaluated; {share}")

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


def load_split(cfg, world, tokenizer, source, split, n_responses, **options):
    """`load_rows` with the limits of the configuration and of the model, on rank 0 first."""
    options.setdefault("max_query_tokens", cfg.max_query_tokens)

    def load():
        directory = find_model(split_names(cfg.model)[0], patterns=["config.json"])
        limit = GPTNeoXConfig.from_directory(directory).max_position_embeddings
        if n_responses == 0:
            limit -= getattr(cfg, "response_length", 0)  # the responses are still to come
        longest = options.pop("max_length", getattr(cfg, "max_length", 0))
        if longest:
            limit = min(limit, longest)

        return load_rows(source, split, tokenizer, n_responses, limit, too_long=cfg.too_long, **options)

    return world.main_first(load)


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
        self.optimizer = make_optimizer(cfg, self.models, lrs or {})
        self.losses = []  # (positions in the batch, loss): `backward` appends, `optimizer_step` looks and clears
        self.skipped = 0  # steps that optimizer_step left out since the last row of metrics.jsonl
        self.n_tokens = 0  # of this update's passes with gradients
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
            begin = time.perf_counter()
            yield self.step
            self.log_time(time.perf_counter() - begin)

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

    def log_time(self, seconds):
        """Append a row to timing.jsonl: how long this update took, with all that was done in it.

        tokens: of the rows that were trained on, once for each pass with gradients.
        """
        row = {
            "step": self.step,
            "time": time.time(),
            "seconds": seconds,
            "tokens_per_second": self.n_tokens / seconds,
            "episodes_per_second": self.cfg.batch_size / seconds,
        }
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

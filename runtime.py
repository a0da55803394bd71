"""What every stage needs and none is about: processes, sharding, the optimizer, checkpoints, metrics.

One process is a world of one and runs the same code as eight under torchrun: gloo on a CPU, nccl on GPUs. (In
float32 its models are plain modules, for there is nothing to share or to cast.)
All randomness is a pure function of (seed, step, row), so there is no generator state here to save.
"""

import contextlib
import ctypes
import fcntl
import functools
import gc
import hashlib
import json
import math
import os
import shutil
import signal
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed import fsdp
from tqdm import tqdm

from configurator import Count, Share, UserError, check, explain, require
from data import Tokenizer, batch_rows, load_rows, pad_right
from model import GPTNeoXConfig, find_model, full, generate, init_weights, load_weights, read_json, write_json

LOGS = ("metrics.jsonl", "samples.jsonl")
MALLOC = {-4: 0, -1: 2**31 - 1, -2: 2**26}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class RunConfig:
    """The fields that all scripts share."""

    out_dir: str = "out/run"  # where everything that a run writes goes
    seed: int = 44413  # decides the initial weights, the data order and every sampled token
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute; auto: bfloat16 on cuda; the masters are float32
    max_query_tokens: Count = 512  # longer posts are cut (detail 2.2)
    shard_size: int = 0  # processes that share one copy of a model, a node's for example; 0: all
    offload: Literal["none", "frozen", "all"] = "none"  # to CPU memory: frozen models; or trained ones and Adam's too
    compile: bool = False  # torch.compile of each block, once for all lengths; generation goes without
    rollout_gather: bool = True  # sample with a model's parameters whole on each process; False: block by block
    accept_changes: bool = False  # go on in an out_dir that holds a run with another configuration

    def __post_init__(self):
        for field in fields(self):
            check(field, getattr(self, field.name), type(self).__qualname__)


@dataclass
class TrainConfig(RunConfig):
    """The fields that all training stages share; the values are those of arXiv:2403.17031."""

    train_split: str = "train"  # the rows to train on
    eval_split: str = "validation"  # empty: no evaluation
    max_length: int = 638  # tokens of query + response; a longer row is an error; 0: any
    episodes: int = 0  # rows in the whole run, shuffled anew in each epoch; 0: every row once
    batch_size: Count = 64  # rows per update, over all processes
    micro_batch_size: Count = 1  # rows per forward and backward pass and process
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
    train_gather: bool = False  # keep parameters and gradients whole on each process until an update's last micro-batch
    logits_chunk: int = 0  # positions whose logits are there at a time, computed again in the backward pass; 0: all
    activation_checkpointing: bool = False  # compute a block's activations again in the backward pass
    save_every: int = 0  # updates between resumable checkpoints; 0: none but that of a run stopped by a signal
    keep_checkpoints: Count = 2  # how many of them to keep: the last ones
    keep_every: int = 0  # and those after each multiple of this many updates; 0: no others


class Done(Exception):
    """There is nothing to do, or a signal has ended the run: `stage` ends quietly."""


def stage(main):
    """Decorate a script's main(cfg, ...): trouble with the disk, the memory or a checkpoint becomes a UserError, one
    line that says what to do; a run that ends well leaves no process group behind.
    """

    @functools.wraps(main)
    def wrapped(cfg, *args, **kwargs):
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            with contextlib.suppress(Done):
                main(cfg, *args, **kwargs)
            dist.barrier()  # a process that tears down early can abort the others
            dist.destroy_process_group()
        except (OSError, MemoryError, RuntimeError, dcp.CheckpointException) as error:
            # a CheckpointException has failures: rank -> (its error, a traceback)
            cause = next(iter(getattr(error, "failures", {0: [error]}).values()))[0]
            reason = str(cause).split("\n")[0]
            if isinstance(cause, MemoryError) or "out of memory" in reason or "can't allocate memory" in reason:
                sizes = " or ".join(f"{name} ({n})" for name, n in vars(cfg).items() if "micro_batch_size" in name)
                raise UserError(f"out of memory: {reason}; lower {sizes}, or see activation_checkpointing") from None
            if (cause is not error and isinstance(cause, Exception)) or getattr(cause, "errno", None):
                raise UserError(f"out_dir {cfg.out_dir}: {reason}; mend that and run the same command again") from None
            raise
        finally:
            handle_signals(handlers)

    return wrapped


def handle_signals(handlers):
    with contextlib.suppress(ValueError):  # only the main thread may
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Run:
    """This process's place in the world, and the run's directory."""

    def __init__(self, cfg):
        self.cfg, self.out_dir, self.bar = cfg, Path(cfg.out_dir), tqdm(disable=True)
        self.models, self.losses, self.skipped, self.stopping = {}, [], 0, False
        kind = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        require(kind == "cpu" or torch.cuda.is_available(), "device 'cuda' is not there; use --device=cpu")
        self.dtype = getattr(torch, cfg.dtype.replace("auto", "bfloat16" if kind == "cuda" else "float32"))
        self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        elif "MALLOC_" not in " ".join(os.environ):  # glibc: keep what is freed; else large tensors come page by page
            with contextlib.suppress(OSError, AttributeError):  # other C libraries have no mallopt
                for option in MALLOC.items():
                    ctypes.CDLL(None).mallopt(*option)
        if not dist.is_initialized():
            # gloo beside nccl: for what is offloaded to the CPU
            backend, device = ("cpu:gloo,cuda:nccl", self.device) if kind == "cuda" else ("gloo", None)
            alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
            with explain("no process group; start with torchrun, or unset RANK", ValueError, RuntimeError):
                # the time limit covers rank 0's fetching and tokenising, for which the others wait
                dist.init_process_group(backend, timeout=timedelta(minutes=30), device_id=device, **alone)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.is_main, shards = self.rank == 0, cfg.shard_size or self.size
        require(self.size % shards == 0, f"shard_size {shards} does not divide the {self.size} processes; lower it")
        mesh = dist.init_device_mesh(kind, (self.size // shards, shards), mesh_dim_names=("replicas", "shards"))
        self.mesh = mesh if shards < self.size else mesh["shards"]

    # ---- rows: who computes what, and how all learn the result

    def share(self, lengths, micro_batch_size):
        """This rank's rows of 0 .. n-1, as index arrays of micro-batches of similar length.

        Sorted by length and dealt in turn, so ranks carry equal work. All ranks get equally many rows, for
        sharded models run in lockstep: if n does not divide, the first rows are dealt again.
        """
        order = np.argsort(-np.asarray(lengths), kind="stable")
        order = np.resize(order, math.ceil(len(order) / self.size) * self.size)
        mine = order[self.rank :: self.size]
        return [mine[start : start + micro_batch_size] for start in range(0, len(mine), micro_batch_size)]

    def accumulate(self, lengths, micro_batch_size):
        """`share`, for passes that train: with cfg.train_gather parameters and gradients stay whole until the last."""
        micro_batches = self.share(lengths, micro_batch_size)
        for number, index in enumerate(micro_batches, 1):
            keep_whole(self.models.values(), self.cfg.train_gather and number < len(micro_batches))
            yield index

    @torch.no_grad()
    def map_rows(self, function, lengths, micro_batch_size):
        """Apply function(index (rows,)) -> dict of tensors (rows, ...) to micro-batches of all rows 0 .. n-1.

        The ranks share the work; each gets the results of all rows, in row order: a dict of tensors (n, ...).
        """
        micro_batches = self.share(lengths, micro_batch_size)
        results = [function(index) for index in micro_batches]
        index = self._gather(torch.from_numpy(np.concatenate(micro_batches)).to(self.device))
        first = np.unique(index.cpu().numpy(), return_index=True)[1]  # rows in order, each once
        return {name: self._gather(torch.cat([result[name] for result in results]))[first] for name in results[0]}

    def _gather(self, tensor):
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def sum(self, parts):
        """Add up dicts of scalar tensors, one per micro-batch, over all ranks, in one reduction; returns floats."""
        total = torch.stack([sum(part[name].detach() for part in parts).double() for name in parts[0]])
        dist.all_reduce(total)
        return dict(zip(parts[0], total.tolist()))

    def agree(self, value):
        """Rank 0's value, on every rank: what depends on files must not differ between them."""
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def load(self, source, split, **options):
        """`load_rows` with the configuration's limits; rank 0 goes first, the others then find its cache."""
        limits = {k: v for k, v in vars(self.cfg).items() if k in ("max_query_tokens", "max_length")}
        for turn in (True, False):
            if self.is_main == turn:
                rows = load_rows(source, split, self.tokenizer, **(limits | options))
            dist.barrier()
        return rows

    # ---- progress

    def train(self, models, state=None, lrs=None):
        """Yield the updates still to do, under a progress bar; with a checkpoint after each save_every and the last.

        SIGTERM or SIGINT (Ctrl-C) ends the run after the update, with a checkpoint; a second Ctrl-C ends it at once.

        models: name -> module, each with a group of the optimizer. lrs: name -> its learning rate, if not cfg.lr.
        state:  what else a resumed run needs, in JSON; the loop's body changes it in place.
        """
        self.models, state = nn.ModuleDict(models), {} if state is None else state
        self.optimizer = make_optimizer(self.cfg, self.models, lrs or {})
        self.step = resume(self, state)
        handle_signals(dict.fromkeys(SIGNALS, self.stop))
        self.bar = tqdm(initial=self.step, total=self.total, disable=not self.is_main, desc=self.out_dir.name)
        while self.step < self.total:
            yield self.step
            self.step += 1
            self.bar.update()
            stopping = self.sum([{"asked": torch.tensor(float(self.stopping), device=self.device)}])["asked"] > 0
            # the last update has one too: evaluation and export can fail
            if stopping or (self.cfg.save_every and (self.step % self.cfg.save_every == 0 or self.step == self.total)):
                save_checkpoint(self, state)
            if stopping:
                self.end(f"stopped after update {self.step}; the same command goes on from there")
        self.stopping = signal.SIGTERM  # evaluation and export go on after a SIGTERM; Ctrl-C ends them at once

    def stop(self, number, frame):
        # twice SIGTERM, from scheduler and torchrun, is one; with a Ctrl-C among the two somebody means: at once
        if self.stopping and signal.SIGINT in (number, self.stopping):
            raise KeyboardInterrupt("ended at once by a second signal")
        self.stopping, self.bar.disable = number, True
        with contextlib.suppress(OSError):  # the `tee` of `| tee log` ends by the same Ctrl-C: no more bar, no message
            os.write(2, b"\nends as soon as all is saved (Ctrl-C: at once)\n")

    def end(self, text):
        self.print(text)
        raise Done(text)

    def print(self, *lines):
        if self.is_main:
            print(*lines, sep="\n", flush=True)

    def batch(self):
        """Indices (batch_size,) of this step's rows."""
        return batch_rows(len(self.rows), self.cfg.batch_size, self.step, self.cfg.seed)

    def log(self, metrics, watch=()):
        """Append one row to metrics.jsonl; show the metrics named in `watch` beside the progress bar."""
        bad, skips = {name: x for name, x in metrics.items() if not math.isfinite(x)}, self.cfg.on_nonfinite == "skip"
        require(skips or not bad, f"step {self.step}: {bad}; lower lr, or look at the rows of that step")
        row = {"step": self.step, **metrics, **dict.fromkeys(bad)} | ({"skipped": self.skipped} if skips else {})
        self.skipped = 0
        if self.is_main:
            write_jsonl(self.out_dir / "metrics.jsonl", [row], "a")  # JSON has no NaN: null
        self.bar.set_postfix({name.split("/")[-1]: f"{metrics[name]:.4g}" for name in watch})


def start(cfg, n_responses, tokenizer="", n_minibatches=1, **options):
    """Join the process group, open cfg.out_dir, load the tokenizer (cfg.model's, if none is named) and the rows.

    Returns a Run with tokenizer, rows, held_out ("" without an eval_split) and total, the number of updates.
    Raises Done if the run is complete already. n_responses and options go to `load_rows`.
    """
    run = Run(cfg)
    open_directory(run)
    if run.agree((run.out_dir / "final").exists()):
        run.end(f"{run.out_dir}/final is there already; to train again, choose another out_dir")
    run.tokenizer = Tokenizer.load(tokenizer or cfg.model)
    run.rows = run.load(cfg.data, cfg.train_split, n_responses=n_responses, **options)
    run.held_out = cfg.eval_split and run.load(cfg.data, cfg.eval_split, n_responses=n_responses, **options)
    parts, n_rows = n_minibatches * run.size, cfg.episodes or len(run.rows)
    require(cfg.batch_size % parts == 0, f"batch_size must be a multiple of {parts}, minibatches x processes")
    run.total = n_rows // cfg.batch_size
    require(run.total > 0, f"{n_rows} rows are less than a batch of {cfg.batch_size}; lower batch_size")
    run.print(f"{run.total} updates: {n_minibatches} minibatches x {run.size} ranks x {cfg.batch_size // parts} rows")
    return run


def open_directory(run):
    """Print the resolved configuration, and write it to out_dir/config.json.

    Raises UserError if a run with another configuration has begun there.
    """
    values = asdict(run.cfg)
    del values["accept_changes"], values["out_dir"]  # a run may be moved
    require(run.cfg.out_dir, "out_dir is empty; name a directory")
    # a model's config.json must stay, too
    begun = ("checkpoints", "final", "model.safetensors", "model.safetensors.index.json", *LOGS)
    if not run.cfg.accept_changes and any((run.out_dir / name).exists() for name in begun):
        was = read_json(run.out_dir / "config.json")
        changed = [f"{key} ({was.get(key)!r} -> {new!r})" for key, new in values.items() if was.get(key) != new]
        which = f"{run.out_dir} holds a run with another configuration: {', '.join(changed)}"
        require(not changed, f"{which}; choose another out_dir, or go on knowingly with --accept_changes")
    run.print(*(f"{key} = {value!r}" for key, value in asdict(run.cfg).items()))
    if run.is_main:
        run.out_dir.mkdir(parents=True, exist_ok=True)
        write_json(run.out_dir / "config.json", values)


def write_jsonl(path, rows, mode="w"):
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---------------------------------------------------------------------------- models


def load_model(run, cls, source, trainable=False, scratch=False, new_head=False):
    """Build a sharded model; each rank reads only its own rows of the weights.

    trainable: float32 masters; a frozen model is kept in the compute dtype.
    scratch:   draw all weights; of `source` only config.json is read.
    new_head:  draw the scalar head, and read the body, of either kind of model.
    """
    directory = find_model(source)
    gc.collect()  # FSDP's modules are in cycles: a model that is no longer used goes before the next one comes
    with torch.device("meta"):
        model = cls(GPTNeoXConfig.from_directory(directory))
    size, n_vocab = model.config.vocab_size, run.tokenizer.n_vocab
    require(size >= n_vocab, f"{directory}: vocab_size {size} is less than the tokenizer's {n_vocab}; use its own")
    offload = run.cfg.offload == "all" or (run.cfg.offload == "frozen" and not trainable)
    for layer in model.gpt_neox.layers if run.cfg.compile else ():
        layer.forward = torch.compile(layer.forward, dynamic=True)
    shard(model, run, torch.float32 if trainable else run.dtype, offload)
    model.to_empty(device="cpu" if offload else run.device)
    model.gpt_neox.checkpointing = trainable and run.cfg.activation_checkpointing
    model.logits_chunk = getattr(run.cfg, "logits_chunk", 0)  # of frozen ones too: they must round alike
    if scratch or new_head:
        init_weights(model, run.cfg.seed, only="score" if new_head else "")
    if not scratch:
        load_weights(model, directory, new_head)
    return model.requires_grad_(trainable)


def shard(model, run, master_dtype, offload=False):
    """FSDP2: every block, then the rest; masters in master_dtype, compute in run.dtype, reductions in float32. Where
    that would change nothing, because one process computes in float32, the model stays as it is.

    The modules that a model lists in `float32_modules` compute in float32 whatever run.dtype is.
    offload: the shards live in CPU memory, gradients and the optimizer's state with them.
    """
    model.to(master_dtype)
    if run.size == 1 and run.dtype == torch.float32 and not offload:
        return  # nothing to share, to cast or to move
    where = fsdp.CPUOffloadPolicy(pin_memory=run.device.type == "cuda") if offload else fsdp.OffloadPolicy()
    exact = [model.get_submodule(name).float() for name in model.float32_modules]
    for module in [*exact, *model.gpt_neox.layers, model]:
        dtypes = dict(param_dtype=torch.float32 if module in exact else run.dtype, reduce_dtype=torch.float32)
        policies = dict(mp_policy=fsdp.MixedPrecisionPolicy(**dtypes), offload_policy=where)
        fsdp.fully_shard(module, mesh=run.mesh, reshard_after_forward=True, **policies)
    if hasattr(model, "logprobs"):
        fsdp.register_fsdp_forward_method(model, "logprobs")


def keep_whole(models, yes):
    """Whether the next passes leave parameters and gradients of sharded models whole on each process."""
    for model in models:
        if isinstance(model, fsdp.FSDPModule):
            model.set_requires_gradient_sync(not yes)
            model.set_reshard_after_forward(not yes)
            model.set_reshard_after_backward(not yes)


def generate_rows(run, model, queries, draws, temperature, stop, micro_batch_size):
    """Sample for n queries (lists of ids) with draws (n, R): responses and their logprobs (n, R), on all ranks.

    A response that has drawn the id `stop` goes on with it; None: all are sampled to their end.
    With cfg.rollout_gather the parameters stay whole meanwhile, with no collective per token; without it they are
    gathered block by block for each, and all ranks take as many steps as the slowest.
    """
    ends = torch.all if run.cfg.rollout_gather else lambda done: not run.sum([{"left": (~done).sum()}])["left"]

    def sample(index):
        ids, lengths = pad_right([queries[i] for i in index])
        ids, lengths, draw = (x.to(run.device) for x in (ids, lengths, draws[index]))
        n_vocab, R = run.tokenizer.n_vocab, draws.shape[1]
        out = generate(model, ids, lengths, R, temperature, draw, stop, n_vocab, return_logprobs=True, all_done=ends)
        return dict(zip(("responses", "logprobs"), out))

    keep_whole([model], run.cfg.rollout_gather)
    rows = run.map_rows(sample, [len(query) for query in queries], micro_batch_size)
    keep_whole([model], False)  # the next forward pass shards them again
    return rows["responses"], rows["logprobs"]


# ---------------------------------------------------------------------------- the optimizer


def make_optimizer(cfg, models, lrs):
    """AdamW with a group per model; frozen models have none. Its state is there from the start, so that a
    checkpoint holds that of every parameter, also of those that have not had a gradient yet.
    """
    trained = {name: model for name, model in models.items() if next(model.parameters()).requires_grad}
    groups = [dict(params=model.parameters(), initial_lr=lrs.get(name) or cfg.lr) for name, model in trained.items()]
    optimizer = torch.optim.AdamW(groups, cfg.lr, (cfg.adam_beta1, cfg.adam_beta2), cfg.adam_eps, cfg.weight_decay,
                                  fused=True)  # fmt: skip
    for parameter in nn.ModuleDict(trained).parameters():
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
    return optimizer


def learning_rate(step, total_steps, lr, schedule, warmup_steps=0):
    """The learning rate of update `step` (from 0): "linear" to 0, "cosine" to 0, or "constant"; linear warm-up."""
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    factors = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}
    return lr * ((step + 1) / warmup_steps if step < warmup_steps else factors[schedule])


def backward(run, loss, rows=()):
    """Back-propagate this rank's part of a loss that is a sum over all ranks. rows: positions in run.batch(), to be
    named if the loss is not finite.

    FSDP averages gradients over the ranks; the factor undoes that. (set_gradient_divide_factor does not work on
    gloo, and on the root module alone it leaves the blocks averaged.)
    """
    run.losses.append((rows, loss.detach()))
    (loss * run.size).backward()


def optimizer_step(run):
    """One update with the scheduled learning rates; returns {"lr", "grad_norm"}; lr is the first model's.

    If a loss or the gradient is not finite, no weight changes: UserError, or with on_nonfinite="skip" the update is
    left out and counted in run.skipped.
    """
    cfg, optimizer = run.cfg, run.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = full(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])).to(run.device)
    losses, run.losses = run.losses, []
    # one rank's bad loss stops, or skips, the update on all
    skip = run.sum([{"bad": ~torch.stack([norm, *(loss for _, loss in losses)]).isfinite().all()}])["bad"] > 0
    if skip and cfg.on_nonfinite == "stop":
        rows = sorted({row for at, loss in losses if not loss.isfinite() for row in run.batch()[list(at)].tolist()})
        what = f"the gradient norm is {norm.item()}; this rank's rows whose loss is not finite: {rows or 'none'}"
        raise UserError(f"step {run.step}, rank {run.rank}: {what}; lower lr, or mend the rows")
    if cfg.max_grad_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, cfg.max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(run.step, run.total, group["initial_lr"], cfg.schedule, cfg.warmup_steps)
        if cfg.adam_style == "tf":  # torch adds eps to the corrected root, TensorFlow to the root before correction
            n_steps = 1 + optimizer.state[group["params"][0]]["step"].item()
            group["eps"] = cfg.adam_eps / math.sqrt(1 - cfg.adam_beta2**n_steps)
    if not skip:
        optimizer.step()
    run.skipped += skip
    optimizer.zero_grad()
    return {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm.item()}


# ---------------------------------------------------------------------------- checkpoints


def training_state(run):
    """The tensors that a resumed run needs, to be written or filled in place: parameters, Adam's moments and counts."""
    named = dict(run.models.named_parameters())
    moments = {f"{key}.{name}": x for name, p in named.items() for key, x in run.optimizer.state.get(p, {}).items()}
    return named | moments


def save_checkpoint(run, state):
    """Write checkpoints/step_N: each rank's shards as safetensors, `state` as JSON, and the checksums of all files.

    It is on the disk and complete before it gets its final name. Collective.
    """
    directory, tensors = run.out_dir / "checkpoints", training_state(run)
    temporary = directory / f"tmp_{run.step}"
    if run.is_main:
        for old in directory.glob("tmp_*"):
            shutil.rmtree(old, ignore_errors=True)  # of a run that was killed while it wrote
        temporary.mkdir(parents=True)
        sizes = {path.name: path.stat().st_size for path in map(run.out_dir.joinpath, LOGS) if path.exists()}
        write_json(temporary / "state.json", {"step": run.step, "sizes": sizes, **state})
    dist.barrier()
    files = {name: 1 + i // 32 for i, name in enumerate(tensors)}  # a file is copied to CPU memory before it is written
    dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(temporary, files, save_distributed=True))
    written = checksums(run, temporary)
    require(written, f"{temporary}: not all of it can be read back; out_dir must be one disk that all processes see")
    if run.is_main:
        write_json(temporary / "checksums.json", written)
        move(temporary, directory / f"step_{run.step}")
        for step in list_checkpoints(run)[: -run.cfg.keep_checkpoints]:
            if not run.cfg.keep_every or step % run.cfg.keep_every:
                shutil.rmtree(directory / f"step_{step}", ignore_errors=True)


def list_checkpoints(run):
    """The steps of which there is a checkpoint, in order."""
    names = [path.name.removeprefix("step_") for path in (run.out_dir / "checkpoints").glob("step_*")]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def checksums(run, directory):
    """SHA-256 of each file of a checkpoint, on every rank; {} if one cannot be read. The ranks share the reading."""
    names = run.agree(sorted(path.name for path in directory.glob("*") if path.name != "checksums.json"))
    mine, parts = {}, [None] * run.size
    with contextlib.suppress(OSError):
        for name in names[run.rank :: run.size]:
            mine[name] = hashlib.file_digest((directory / name).open("rb"), "sha256").hexdigest()
    dist.all_gather_object(parts, mine)
    digests = {name: digest for part in parts for name, digest in part.items()}
    return digests if len(digests) == len(names) else {}


def resume(run, state):
    """Load the newest whole checkpoint in place, `state` too; returns its step, or 0 if none was ever written.

    Newer ones, which are damaged, become bad_step_N, and metrics.jsonl and samples.jsonl go back to that step, so that
    a resumed run writes what an unbroken one would. Raises UserError if there are checkpoints, but none is whole, and
    if another run is at work in the directory.
    """
    if run.is_main:
        # the lock ends with this process: one may have survived its torchrun. Not every file system has locks.
        with contextlib.suppress(OSError), explain(f"{run.out_dir}: another run is there; stop it", BlockingIOError):
            run.lock = (run.out_dir / "lock").open("w")
            fcntl.lockf(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    found, directory = run.agree(list_checkpoints(run)), run.out_dir / "checkpoints"
    for step in reversed(found):
        path, written = directory / f"step_{step}", {}
        with contextlib.suppress(UserError):
            written = read_json(path / "checksums.json")
        if checksums(run, path) == run.agree(written) != {}:  # both are {} where nothing can be read
            dcp.load(training_state(run), storage_reader=dcp.HuggingFaceStorageReader(path))
            state.update(read_json(path / "state.json"))
            run.print(f"resumed from {path}")
            break
        run.print(f"passed over {path}: its files are not as they were written")
    else:
        require(not found, f"{run.out_dir}/checkpoints: none can be read; remove them all to start anew")
    step, sizes = state.pop("step", 0), state.pop("sizes", {})
    for late in [late for late in found if run.is_main and late > step]:  # the logs will not reach them: hide them
        move(directory / f"step_{late}", directory / f"bad_step_{late}")
    for path in filter(Path.exists, map(run.out_dir.joinpath, LOGS if run.is_main else ())):
        os.truncate(path, min(sizes.get(path.name, 0), path.stat().st_size))
    return step


def move(temporary, final):
    """Give a directory its final name once all of it is on the disk; another of that name is replaced."""
    os.sync()
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    os.sync()


def export(run, model, name="final"):
    """Write out_dir/`name`, a model directory that transformers and the next stage load. Collective."""
    final, temporary = run.out_dir / name, run.out_dir / f"tmp_{name}"
    model.save_pretrained(temporary)
    if run.is_main:
        shutil.copyfile(run.tokenizer.path, temporary / "tokenizer.json")
        move(temporary, final)  # a resumed run writes some again
        print(f"\nwrote {final}", flush=True)

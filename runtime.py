"""What every stage needs and none is about: processes, sharding, the optimizer, checkpoints, metrics.

One process is a world of one and runs the same code as eight under torchrun: gloo on a CPU, nccl on GPUs.
All randomness is a pure function of (seed, step, row), so there is no generator state here to save.
"""

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from configurator import Count, Share, UserError, check
from data import Tokenizer, batch_rows, load_rows, pad_right
from model import GPTNeoXConfig, find_model, full, generate, init_weights, load_weights, read_json, write_json

LOGS = ("metrics.jsonl", "samples.jsonl")


@dataclass
class RunConfig:
    """The fields that all scripts share."""

    out_dir: str = "out/run"  # where everything that a run writes goes
    seed: int = 44413  # decides the initial weights, the data order and every sampled token
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute; auto: bfloat16 on cuda; the masters are float32
    max_query_tokens: Count = 512  # longer posts are cut (detail 2.2)

    def __post_init__(self):
        for field in fields(self):
            check(field, getattr(self, field.name), type(self).__qualname__)


@dataclass
class TrainConfig(RunConfig):
    """The fields that all training stages share; the values are those of arXiv:2403.17031."""

    train_split: str = "train"  # the rows to train on
    eval_split: str = "validation"  # empty: no evaluation
    max_length: int = 638  # tokens of query + response; a longer row is an error; 0: any
    drop_long: bool = False  # leave longer rows out instead
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
    save_every: int = 0  # updates between resumable checkpoints; 0: none, only the final model
    keep_checkpoints: Count = 2  # how many of them to keep
    wandb: str = ""  # a Weights & Biases project to log to as well


class Run:
    """This process's place in the world, and the run's directory."""

    def __init__(self, cfg):
        self.cfg, self.out_dir, self.bar, self.wandb = cfg, Path(cfg.out_dir), tqdm(disable=True), None
        kind = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if kind == "cuda" and not torch.cuda.is_available():
            raise UserError("device 'cuda' is not there; use --device=cpu, or run on a machine with a GPU")
        half = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and kind == "cuda")
        self.dtype = torch.bfloat16 if half else torch.float32
        self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            backend, device = ("nccl", self.device) if kind == "cuda" else ("gloo", None)
            alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
            # under torchrun all wait while rank 0 fetches and tokenises
            dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=device, **alone)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0
        self.mesh = init_device_mesh(kind, (self.size,))

    def close(self):
        self.bar.close()
        dist.barrier()  # a process that tears down early can abort the others
        dist.destroy_process_group()

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

    def load(self, source, split, **options):
        """`load_rows` with the configuration's limits; rank 0 goes first, the others then find its cache."""
        limits = {k: v for k, v in vars(self.cfg).items() if k in ("max_query_tokens", "max_length", "drop_long")}
        for turn in (True, False):
            if self.is_main == turn:
                rows = load_rows(source, split, self.tokenizer, **(limits | options))
            dist.barrier()
        return rows

    # ---- progress

    def train(self, models, state=None, lrs=None):
        """Yield the updates still to do, under a progress bar; a checkpoint follows after each save_every.

        models: name -> module, each with a group of the optimizer. lrs: name -> its learning rate, if not cfg.lr.
        state:  what else a resumed run needs, in JSON; the loop's body changes it in place.
        """
        self.models, state = nn.ModuleDict(models), {} if state is None else state
        self.optimizer = make_optimizer(self.cfg, self.models, lrs or {})
        self.step = resume(self, state)
        self.bar = tqdm(initial=self.step, total=self.total, disable=not self.is_main, desc=self.out_dir.name)
        while self.step < self.total:
            yield self.step
            self.step += 1
            self.bar.update()
            save_checkpoint(self, state)

    def batch(self):
        """Indices (batch_size,) of this step's rows."""
        return batch_rows(len(self.rows), self.cfg.batch_size, self.step, self.cfg.seed)

    def log(self, metrics, watch=()):
        """Append one row to metrics.jsonl; show the metrics named in `watch` beside the progress bar."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise UserError(f"step {self.step}: {name} is {value}; lower lr, or look at the rows of that step")
        if self.is_main:
            write_jsonl(self.out_dir / "metrics.jsonl", [{"step": self.step, **metrics}], "a")
        if self.wandb:
            self.wandb.log(metrics, step=self.step)
        self.bar.set_postfix({name.split("/")[-1]: f"{metrics[name]:.4g}" for name in watch})


def start(cfg, n_responses, tokenizer="", n_minibatches=1, **options):
    """Join the process group, open cfg.out_dir, load the tokenizer (cfg.model's, if none is named) and the rows.

    Returns a Run with tokenizer, rows, held_out ("" without an eval_split) and total, the number of updates; or
    None if the run is complete already. n_responses and options go to `load_rows`.
    """
    run = Run(cfg)
    open_directory(run)
    if (run.out_dir / "final").exists():
        if run.is_main:
            print(f"{run.out_dir}/final is there already; to train again, choose another out_dir")
        return run.close()
    if run.is_main and cfg.wandb:
        import wandb

        run.wandb = wandb.init(project=cfg.wandb, name=run.out_dir.name, config=asdict(cfg))
    run.tokenizer = Tokenizer.load(tokenizer or cfg.model)
    run.rows = run.load(cfg.data, cfg.train_split, n_responses=n_responses, **options)
    run.held_out = cfg.eval_split and run.load(cfg.data, cfg.eval_split, n_responses=n_responses, **options)
    parts, n_rows = n_minibatches * run.size, cfg.episodes or len(run.rows)
    if cfg.batch_size % parts:
        across = f"{n_minibatches} minibatches x {run.size} processes"
        raise UserError(f"batch_size {cfg.batch_size} does not divide by {across}; make it a multiple of {parts}")
    run.total = n_rows // cfg.batch_size
    if run.total < 1:
        raise UserError(f"{n_rows} rows are less than a batch of {cfg.batch_size}; lower batch_size")
    if run.is_main:
        print(f"{run.total} updates: {n_minibatches} minibatches x {run.size} ranks x {cfg.batch_size // parts} rows")
    return run


def open_directory(run):
    """Print the resolved configuration, and write it to out_dir/config.json.

    Raises UserError if a run with another configuration has begun there.
    """
    values = asdict(run.cfg)
    if any((run.out_dir / name).exists() for name in ("checkpoints", "final", *LOGS)):
        was = read_json(run.out_dir / "config.json")
        changed = [f"{key} ({was.get(key)!r} -> {new!r})" for key, new in values.items() if was.get(key) != new]
        if changed:
            which = f"{run.out_dir} holds a run with another configuration: {', '.join(changed)}"
            raise UserError(f"{which}; choose another out_dir")
    dist.barrier()
    if run.is_main:
        print("\n".join(f"{key} = {value!r}" for key, value in values.items()), flush=True)
        try:
            run.out_dir.mkdir(parents=True, exist_ok=True)
            write_json(run.out_dir / "config.json", values)
        except OSError as error:
            raise UserError(f"out_dir {run.out_dir}: cannot be written ({error.strerror}); choose another") from None


def report(run, metrics, table, **details):
    """Log the last evaluation's metrics; write them, `details` and a table of rows to eval.json, and print it all."""
    run.log(metrics)
    if run.is_main:
        write_json(run.out_dir / "eval.json", {**metrics, **details, "accuracy": table})
        for group, row in {"": {**metrics, **details}, **table}.items():
            print(f"{group:44} " + "  ".join(f"{name} {value:.4g}" for name, value in row.items()))


def write_jsonl(path, rows, mode="w"):
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---------------------------------------------------------------------------- models


def load_model(run, cls, source, trainable=False, random=None):
    """Build a sharded model; each rank reads only its own rows of the weights.

    trainable: float32 masters; a frozen model is kept in the compute dtype.
    random: draw the tensors whose names begin with this, and read the others: "score" puts a new head on the body
            of a model of the other kind, with "" all are drawn.
    """
    directory = find_model(source)
    with torch.device("meta"):
        model = cls(GPTNeoXConfig.from_directory(directory))
    if model.config.vocab_size < run.tokenizer.n_vocab:
        sizes = f"vocab_size {model.config.vocab_size} is less than the tokenizer's {run.tokenizer.n_vocab}"
        raise UserError(f"{directory}: {sizes}; use the model's own tokenizer")
    shard(model, run, torch.float32 if trainable else run.dtype)
    model.to_empty(device=run.device)
    if random is not None:
        init_weights(model, run.cfg.seed, only=random)
    if random != "":
        load_weights(model, directory, new_head=random is not None)
    return model.requires_grad_(trainable)


def shard(model, run, master_dtype):
    """FSDP2: every block, then the rest; masters in master_dtype, compute in run.dtype, reductions in float32.

    The modules that a model lists in `float32_modules` compute in float32 whatever run.dtype is.
    """
    model.to(master_dtype)
    exact = [model.get_submodule(name).float() for name in model.float32_modules]
    for module in [*exact, *model.gpt_neox.layers, model]:
        dtypes = dict(param_dtype=torch.float32 if module in exact else run.dtype, reduce_dtype=torch.float32)
        fully_shard(module, mesh=run.mesh, mp_policy=MixedPrecisionPolicy(**dtypes), reshard_after_forward=True)


def generate_rows(run, model, queries, draws, temperature, stop, micro_batch_size):
    """Sample for n queries (lists of ids) with draws (n, R): responses and their logprobs (n, R), on all ranks.

    A response that has drawn the id `stop` goes on with it; None: all are sampled to their end.
    """

    def sample(index):
        ids, lengths = pad_right([queries[i] for i in index])
        ids, lengths, draw = (x.to(run.device) for x in (ids, lengths, draws[index]))
        n_vocab, R = run.tokenizer.n_vocab, draws.shape[1]
        out = generate(model, ids, lengths, R, temperature, draw, stop, n_vocab, return_logprobs=True)
        return dict(zip(("responses", "logprobs"), out))

    model.set_reshard_after_forward(False)  # its parameters stay whole: no collective per token
    rows = run.map_rows(sample, [len(query) for query in queries], micro_batch_size)
    model.set_reshard_after_forward(True)  # the next forward pass shards them again
    return rows["responses"], rows["logprobs"]


# ---------------------------------------------------------------------------- the optimizer


def make_optimizer(cfg, models, lrs):
    """AdamW with a group per model; frozen models have none. Its state is there from the start, so that a
    checkpoint holds that of every parameter, also of those that have not had a gradient yet.
    """
    trained = {name: model for name, model in models.items() if next(model.parameters()).requires_grad}
    groups = [dict(params=model.parameters(), initial_lr=lrs.get(name) or cfg.lr) for name, model in trained.items()]
    optimizer = torch.optim.AdamW(groups, cfg.lr, (cfg.adam_beta1, cfg.adam_beta2), cfg.adam_eps, cfg.weight_decay)
    for parameter in nn.ModuleDict(trained).parameters():
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}
    return optimizer


@torch.no_grad()
def mix(target, source, share):
    """Move the parameters of `target` by `share` of the way to those of `source`; both are sharded alike."""
    for ours, theirs in zip(target.parameters(), source.parameters()):
        ours.to_local().lerp_(theirs.to_local(), share)


def learning_rate(step, total_steps, lr, schedule, warmup_steps=0):
    """The learning rate of update `step` (from 0): "linear" to 0, "cosine" to 0, or "constant"; linear warm-up."""
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    factors = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}
    return lr * ((step + 1) / warmup_steps if step < warmup_steps else factors[schedule])


def backward(run, loss):
    """Back-propagate this rank's part of a loss that is a sum over all ranks.

    FSDP averages gradients over the ranks; the factor undoes that. (set_gradient_divide_factor does not work on
    gloo, and on the root module alone it leaves the blocks averaged.)
    """
    (loss * run.size).backward()


def optimizer_step(run):
    """One update with the scheduled learning rates; returns {"lr", "grad_norm"}; lr is the first model's.

    Raises UserError before any weight changes if the gradient is not finite.
    """
    cfg, optimizer = run.cfg, run.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = full(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if not norm.isfinite():
        raise UserError(f"step {run.step}: the gradient norm is {norm.item()}; lower lr, or look at that step's rows")
    if cfg.max_grad_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, cfg.max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(run.step, run.total, group["initial_lr"], cfg.schedule, cfg.warmup_steps)
        if cfg.adam_style == "tf":  # torch adds eps to the corrected root, TensorFlow to the root before correction
            n_steps = 1 + optimizer.state[group["params"][0]]["step"].item()
            group["eps"] = cfg.adam_eps / math.sqrt(1 - cfg.adam_beta2**n_steps)
    optimizer.step()
    optimizer.zero_grad()
    return {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm.item()}


# ---------------------------------------------------------------------------- checkpoints


def save_checkpoint(run, state):
    """Write checkpoints/step_N after every save_every updates: models, optimizer, and `state` as JSON.

    The directory gets its final name only when it is complete.
    """
    if not run.cfg.save_every or run.step % run.cfg.save_every:
        return
    final, temporary = (run.out_dir / "checkpoints" / f"{name}_{run.step}" for name in ("step", "tmp"))
    weights, moments = get_state_dict(run.models, run.optimizer)
    dcp.save({"models": weights, "optimizer": moments}, checkpoint_id=temporary)
    if run.is_main:
        sizes = {path.name: path.stat().st_size for path in map(run.out_dir.joinpath, LOGS) if path.exists()}
        write_json(temporary / "state.json", {"step": run.step, "sizes": sizes, **state})
        temporary.rename(final)
        for old in list_checkpoints(run)[: -run.cfg.keep_checkpoints]:
            shutil.rmtree(old)
    dist.barrier()


def list_checkpoints(run):
    return sorted((run.out_dir / "checkpoints").glob("step_*"), key=lambda path: int(path.name[len("step_") :]))


def resume(run, state):
    """Load the newest checkpoint in place, `state` too; returns its step, or 0 if there is none.

    metrics.jsonl and samples.jsonl go back to that step, so that a resumed run writes what an unbroken one would.
    """
    found, step, sizes = list_checkpoints(run), 0, {}
    if found:
        weights, moments = get_state_dict(run.models, run.optimizer)
        dcp.load({"models": weights, "optimizer": moments}, checkpoint_id=found[-1])
        set_state_dict(run.models, run.optimizer, model_state_dict=weights, optim_state_dict=moments)
        state.update(read_json(found[-1] / "state.json"))
        step, sizes = state.pop("step"), state.pop("sizes")
    dist.barrier()
    if run.is_main:
        for path in map(run.out_dir.joinpath, LOGS):
            if path.exists():
                os.truncate(path, sizes.get(path.name, 0))
        if found:
            print(f"resumed from {found[-1]}", flush=True)
    return step


def export(run, model, name="final"):
    """Write out_dir/`name`, a model directory that transformers and the next stage load. Collective."""
    final, temporary = run.out_dir / name, run.out_dir / f"tmp_{name}"
    model.save_pretrained(temporary)
    if run.is_main:
        shutil.copyfile(run.tokenizer.path, temporary / "tokenizer.json")
        shutil.rmtree(final, ignore_errors=True)  # a resumed run writes some again
        temporary.rename(final)
        print(f"\nwrote {final}", flush=True)

"""What every stage needs and none is about: processes, sharding, the optimizer, checkpoints, metrics.

One process is a world of one and runs the same code as eight under torchrun: gloo on a CPU, nccl on GPUs.
All randomness is a pure function of (seed, step, row), so there is no generator state here to save.
"""

import contextlib
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from configurator import UserError
from data import load_rows, pad_right
from model import GPTNeoXConfig, find_model, full, generate, init_weights, load_weights, read_json, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class TrainConfig:
    """The fields that all training stages share; the values are those of arXiv:2403.17031."""

    out_dir: str = "out/run"  # where config.json, metrics.jsonl, checkpoints/ and final/ go
    seed: int = 44413  # decides the initial weights, the data order and every sampled token
    device: str = "auto"  # cpu, cuda, or auto: cuda if there is one
    dtype: str = "auto"  # compute: float32, bfloat16, or auto: bfloat16 on cuda; the masters are float32
    train_split: str = "train"  # the rows to train on
    eval_split: str = "validation"  # empty: no evaluation
    max_query_tokens: int = 512  # longer posts are cut (detail 2.2)
    max_length: int = 0  # tokens of query + response; a longer row is an error; 0: any
    drop_long: bool = False  # leave longer rows out instead
    episodes: int = 0  # rows in the whole run, shuffled anew in each epoch; 0: every row once
    batch_size: int = 64  # rows per update, over all processes
    micro_batch_size: int = 1  # rows per forward and backward pass and process
    lr: float = 3e-6  # peak learning rate
    schedule: str = "cosine"  # of the learning rate: cosine or linear to 0, or constant
    warmup_steps: int = 0  # updates over which it rises to its peak
    adam_beta1: float = 0.9  # decay of the gradient's mean
    adam_beta2: float = 0.999  # decay of the squared gradient's mean
    adam_eps: float = 1e-5  # added to the root of the latter
    weight_decay: float = 0.01  # decoupled, on all parameters
    max_grad_norm: float = 0.0  # clip the gradient's global norm; 0: do not clip
    save_every: int = 0  # updates between resumable checkpoints; 0: none, only the final model
    keep_checkpoints: int = 2  # how many of them to keep
    wandb: str = ""  # a Weights & Biases project to log to as well


class Run:
    """This process's place in the world, and the run's directory."""

    def __init__(self, cfg):
        self.cfg, self.out_dir, self.bar, self.wandb = cfg, Path(cfg.out_dir), None, None
        if cfg.seed < 0:
            raise UserError(f"seed must not be negative, got {cfg.seed}")
        kind = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
            raise UserError(f"device {kind!r} is not there; use --device=cpu, or --device=cuda on a machine with a GPU")
        if cfg.dtype not in ("auto", *DTYPES):
            raise UserError(f"dtype {cfg.dtype!r} is not known; use one of auto, {', '.join(DTYPES)}")
        self.dtype = DTYPES[cfg.dtype if cfg.dtype != "auto" else "bfloat16" if kind == "cuda" else "float32"]
        self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            backend = "nccl" if kind == "cuda" else "gloo"
            if "RANK" in os.environ:  # torchrun; all wait while rank 0 fetches and tokenises
                device = self.device if kind == "cuda" else None
                dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=device)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0
        self.mesh = init_device_mesh(kind, (self.size,))

    def close(self):
        if self.bar is not None:
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
        rows = {}
        for name in results[0]:
            rows[name] = self._gather(torch.cat([result[name] for result in results]))[first]
        return rows

    def _gather(self, tensor):
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def sum(self, values):
        """Add up a dict of numbers or scalar tensors over all ranks, in one reduction; returns floats."""
        total = torch.stack([torch.as_tensor(v, device=self.device).detach().double() for v in values.values()])
        dist.all_reduce(total)
        return dict(zip(values, total.tolist()))

    @contextlib.contextmanager
    def main_first(self):
        """Let rank 0 do something (fill a cache) before the others find it done."""
        if not self.is_main:
            dist.barrier()
        yield
        if self.is_main:
            dist.barrier()

    # ---- progress

    def steps(self, start, total):
        """Yield the updates still to do, under a progress bar."""
        self.bar = tqdm(initial=start, total=total, disable=not self.is_main, desc=self.out_dir.name)
        for step in range(start, total):
            yield step
            self.bar.update()

    def log(self, step, metrics, watch=()):
        """Append one row to metrics.jsonl; show the metrics named in `watch` beside the progress bar."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise UserError(f"step {step}: {name} is {value}; lower lr, or look at the rows of that step")
        if not self.is_main:
            return
        append_jsonl(self.out_dir / "metrics.jsonl", [{"step": step, **metrics}])
        if self.bar is not None:
            self.bar.set_postfix({name.split("/")[-1]: f"{metrics[name]:.4g}" for name in watch})
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)


def start(cfg):
    """Join the process group and open cfg.out_dir. Returns a Run, or None if the run is complete already."""
    run = Run(cfg)
    open_directory(run)
    if (run.out_dir / "final").exists():
        if run.is_main:
            print(f"{run.out_dir}/final is there already; to train again, choose another out_dir")
        run.close()
        return None
    if run.is_main and cfg.wandb:
        import wandb

        run.wandb = wandb.init(project=cfg.wandb, name=run.out_dir.name, config=asdict(cfg))
    return run


def open_directory(run):
    """Print the resolved configuration, and write it to out_dir/config.json.

    Raises UserError if a run with another configuration has begun there.
    """
    values = asdict(run.cfg)
    if any((run.out_dir / name).exists() for name in ("metrics.jsonl", "checkpoints", "final")):
        was = read_json(run.out_dir / "config.json")
        changed = [key for key in values if was.get(key) != values[key]]
        if changed:
            named = ", ".join(f"{key} ({was.get(key)!r} -> {values[key]!r})" for key in changed)
            raise UserError(f"{run.out_dir} holds a run with another configuration: {named}; choose another out_dir")
    dist.barrier()
    if run.is_main:
        print("\n".join(f"{key} = {value!r}" for key, value in values.items()), flush=True)
        try:
            run.out_dir.mkdir(parents=True, exist_ok=True)
            write_json(run.out_dir / "config.json", values)
        except OSError as error:
            raise UserError(f"out_dir {run.out_dir}: cannot be written ({error.strerror}); choose another") from None


def positive(cfg, *names):
    """Raise UserError unless these fields are above 0."""
    for name in names:
        if getattr(cfg, name) <= 0:
            raise UserError(f"{name} is {getattr(cfg, name)}; it must be above 0")


def load_splits(run, tokenizer, n_responses):
    """The training rows, and the evaluation rows, which are "" if eval_split is."""
    cfg = run.cfg
    limits = dict(max_length=cfg.max_length, max_query_tokens=cfg.max_query_tokens, drop_long=cfg.drop_long)
    with run.main_first():
        rows = load_rows(cfg.data, cfg.train_split, tokenizer, n_responses, **limits)
        return rows, cfg.eval_split and load_rows(cfg.data, cfg.eval_split, tokenizer, n_responses, **limits)


def report(run, step, metrics, table):
    """Log the last evaluation, write it with a table {group: {"accuracy", "n"}} to eval.json, and print that."""
    run.log(step, metrics)
    if run.is_main:
        write_json(run.out_dir / "eval.json", {**metrics, "accuracy": table})
        print("\n" + "\n".join(f"{group:44} {row['accuracy']:.3f}  n {row['n']}" for group, row in table.items()))


def append_jsonl(path, rows):
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---------------------------------------------------------------------------- models


def load_model(run, cls, source, trainable=False, new_head=False, scratch=None):
    """Build a sharded model; each rank reads only its own rows of the weights.

    trainable: float32 masters; a frozen model is kept in the compute dtype.
    new_head:  take only the body from `source`, which is a model of the other kind; the head is random.
    scratch:   a GPTNeoXConfig: random weights instead of `source`.
    """
    directory = None if scratch else find_model(source)
    with torch.device("meta"):
        model = cls(scratch or GPTNeoXConfig.from_directory(directory))
    shard(model, run, torch.float32 if trainable else run.dtype)
    model.to_empty(device=run.device)
    if scratch:
        init_weights(model, run.cfg.seed)
    else:
        load_weights(model, directory, new_head)
    if new_head:
        init_weights(model, run.cfg.seed, only="score")
    return model.requires_grad_(trainable)


def shard(model, run, master_dtype):
    """FSDP2: every block, then the rest; masters in master_dtype, compute in run.dtype, reductions in float32.

    The modules that a model lists in `float32_modules` compute in float32 whatever run.dtype is.
    """
    model.to(master_dtype)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    mixed = MixedPrecisionPolicy(param_dtype=run.dtype, reduce_dtype=torch.float32)
    for name in model.float32_modules:
        fully_shard(model.get_submodule(name).float(), mesh=run.mesh, mp_policy=exact)
    for block in model.gpt_neox.layers:
        fully_shard(block, mesh=run.mesh, mp_policy=mixed)
    fully_shard(model, mesh=run.mesh, mp_policy=mixed, reshard_after_forward=True)


@contextlib.contextmanager
def gathered(model):
    """Keep the parameters whole on every rank, so that generation needs no collective per token."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in modules:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


def generate_rows(run, model, queries, draws, temperature, tokenizer, micro_batch_size):
    """Sample for n queries (lists of ids) with draws (n, R): responses and their logprobs (n, R), on all ranks."""

    def sample(index):
        ids, lengths = pad_right([queries[i] for i in index])
        responses, logprobs = generate(
            model, ids.to(run.device), lengths.to(run.device), draws.shape[1], temperature,
            draws[index].to(run.device), tokenizer.eos_id, tokenizer.n_vocab, return_logprobs=True,
        )  # fmt: skip
        return {"responses": responses, "logprobs": logprobs}

    with gathered(model):
        rows = run.map_rows(sample, [len(query) for query in queries], micro_batch_size)
    return rows["responses"], rows["logprobs"]


# ---------------------------------------------------------------------------- the optimizer


def make_optimizer(cfg, models):
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    return torch.optim.AdamW(models.parameters(), cfg.lr, betas, eps=cfg.adam_eps, weight_decay=cfg.weight_decay)


def learning_rate(step, total_steps, lr, schedule, warmup_steps=0):
    """The learning rate of update `step` (from 0): "linear" to 0, "cosine" to 0, or "constant"; linear warm-up."""
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    factors = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}
    if schedule not in factors:
        raise UserError(f"schedule {schedule!r} is not known; use one of {', '.join(factors)}")
    return lr * ((step + 1) / warmup_steps if step < warmup_steps else factors[schedule])


def backward(run, loss):
    """Back-propagate this rank's part of a loss that is a sum over all ranks.

    FSDP averages gradients over the ranks; the factor undoes that. (set_gradient_divide_factor does not work on
    gloo, and on the root module alone it leaves the blocks averaged.)
    """
    (loss * run.size).backward()


def optimizer_step(run, optimizer, step, total_steps):
    """One update with the scheduled learning rate; returns {"lr", "grad_norm"}.

    Raises UserError before any weight changes if the gradient is not finite.
    """
    cfg = run.cfg
    lr = learning_rate(step, total_steps, cfg.lr, cfg.schedule, cfg.warmup_steps)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = full(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if not norm.isfinite():
        raise UserError(f"step {step}: the gradient norm is {norm.item()}; lower lr, or look at the rows of that step")
    if cfg.max_grad_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, cfg.max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return {"lr": lr, "grad_norm": norm.item()}


def count_updates(run, n_rows, n_minibatches=1):
    """The number of updates in the run; checks the schedule and how a batch is divided, and prints that once."""
    cfg, parts = run.cfg, n_minibatches * run.size
    positive(cfg, "batch_size", "micro_batch_size")
    if cfg.batch_size % parts:
        across = f"{n_minibatches} minibatches x {run.size} processes"
        raise UserError(f"batch_size {cfg.batch_size} does not divide by {across}; make it a multiple of {parts}")
    total, rows = (cfg.episodes or n_rows) // cfg.batch_size, cfg.batch_size // parts
    learning_rate(0, total, cfg.lr, cfg.schedule)  # an unknown schedule is refused here
    if total < 1:
        raise UserError(f"{cfg.episodes or n_rows} rows are less than a batch of {cfg.batch_size}; lower batch_size")
    if run.is_main:
        micro = f"in micro-batches of {min(cfg.micro_batch_size, rows)}"
        print(f"{total} updates of {n_minibatches} minibatches x {run.size} processes x {rows} rows, {micro}")
    return total


# ---------------------------------------------------------------------------- checkpoints


def save_checkpoint(run, step, models, optimizer, **scalars):
    """Write checkpoints/step_N after every save_every updates: models (an nn.ModuleDict), optimizer, and scalars.

    The directory gets its final name only when it is complete.
    """
    if not run.cfg.save_every or step % run.cfg.save_every:
        return
    directory = run.out_dir / "checkpoints"
    final, temporary = directory / f"step_{step}", directory / f"tmp_{step}"
    weights, moments = get_state_dict(models, optimizer)
    dcp.save({"models": weights, "optimizer": moments}, checkpoint_id=temporary)
    if run.is_main:
        write_json(temporary / "scalars.json", {"step": step, **scalars})
        temporary.rename(final)
        for old in list_checkpoints(run)[: -max(1, run.cfg.keep_checkpoints)]:
            shutil.rmtree(old)
    dist.barrier()


def list_checkpoints(run):
    return sorted((run.out_dir / "checkpoints").glob("step_*"), key=lambda path: int(path.name[len("step_") :]))


def resume(run, models, optimizer):
    """Load the newest checkpoint in place; returns its scalars, or {"step": 0} if there is none.

    metrics.jsonl and samples.jsonl go back to that step, so that a resumed run writes what an unbroken one would.
    """
    found, scalars = list_checkpoints(run), {"step": 0}
    if found:
        weights, moments = get_state_dict(models, optimizer)
        dcp.load({"models": weights, "optimizer": moments}, checkpoint_id=found[-1])
        set_state_dict(models, optimizer, model_state_dict=weights, optim_state_dict=moments)
        scalars = read_json(found[-1] / "scalars.json")
    dist.barrier()
    if run.is_main:
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = run.out_dir / name
            if path.exists():
                lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline is torn
                kept = [line + "\n" for line in lines if json.loads(line)["step"] < scalars["step"]]
                path.with_suffix(".tmp").write_text("".join(kept), encoding="utf-8")
                path.with_suffix(".tmp").replace(path)
        if found:
            print(f"resumed from {found[-1]}", flush=True)
    return scalars


def export(run, model, tokenizer):
    """Write out_dir/final, a model directory that transformers and the next stage load. Collective."""
    final, temporary = run.out_dir / "final", run.out_dir / "tmp_final"
    model.save_pretrained(temporary)
    if run.is_main:
        shutil.copyfile(tokenizer.path, temporary / "tokenizer.json")
        temporary.rename(final)
        print(f"\nwrote {final}", flush=True)

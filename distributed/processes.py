"""The processes of a run: who this one is, which rows it computes, how all learn the result, and how they end.

One process is a world of one and runs the same code as eight under torchrun: gloo on a CPU, nccl on GPUs.
"""

import contextlib
import ctypes
import functools
import math
import os
import signal
import sys
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import UserError, explain, require

# glibc's names for what mallopt sets
M_MMAP_MAX = -4
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2


class World:
    """This process's place: `rank` of `size`, its device, the dtype that it computes in, the mesh for sharding."""

    def __init__(self, cfg):
        self.device = pick_device(cfg.device)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
        dtype = cfg.dtype
        if dtype == "auto":
            dtype = "bfloat16" if on_gpu else "float32"
        self.dtype = getattr(torch, dtype)

        if not dist.is_initialized():
            join_process_group(self.device if on_gpu else None)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.is_main = self.rank == 0

        self.n_shards = cfg.shard_size or self.size
        wrong = f"shard_size {self.n_shards} does not divide the {self.size} processes; lower it"
        require(self.size % self.n_shards == 0, wrong)
        shape = (self.size // self.n_shards, self.n_shards)
        self.mesh = dist.init_device_mesh(self.device.type, shape, mesh_dim_names=("replicas", "shards"))
        if self.n_shards == self.size:
            self.mesh = self.mesh["shards"]  # one copy: FSDP; with two dimensions it replicates, too

    def print(self, *lines):
        if self.is_main:
            print(*lines, sep="\n", flush=True)

    def split_rows(self, lengths, micro_batch_size):
        """This rank's share of the rows 0 .. n-1, as index arrays of micro-batches of similar length.

        Sorted by length and dealt in turn, so ranks carry equal work. All ranks get equally many rows, for
        sharded models run in lockstep: if n does not divide, the first rows are dealt again.
        """
        order = np.argsort(-np.asarray(lengths), kind="stable")
        rows_per_rank = math.ceil(len(order) / self.size)
        order = np.resize(order, rows_per_rank * self.size)
        mine = order[self.rank :: self.size]
        starts = range(0, rows_per_rank, micro_batch_size)
        return [mine[start : start + micro_batch_size] for start in starts]

    @torch.no_grad()
    def map_rows(self, function, lengths, micro_batch_size):
        """Apply function(indices (rows,)) -> dict of tensors (rows, ...) to micro-batches of all rows 0 .. n-1.

        The ranks share the work; each gets the results of all rows, in row order: a dict of tensors (n, ...).
        What takes more than two seconds has a progress bar, with the function's name.
        """
        micro_batches = self.split_rows(lengths, micro_batch_size)
        options = {"delay": 2, "leave": False, "disable": not self.is_main}
        bar = tqdm(micro_batches, desc=function.__name__, **options)
        results = [function(indices) for indices in bar]
        mine = torch.from_numpy(np.concatenate(micro_batches))
        indices = self.gather_rows(mine.to(self.device))
        # All rows in order; one that was dealt twice counts once.
        _, first = np.unique(indices.cpu().numpy(), return_index=True)
        columns = {}
        for name in results[0]:
            column = torch.cat([result[name] for result in results])
            columns[name] = self.gather_rows(column)[first]
        return columns

    def gather_rows(self, tensor):
        """The tensors (rows, ...) of all ranks, one after the other."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def sum_scalars(self, parts):
        """Add up dicts of scalar tensors, one per micro-batch, over all ranks, in one reduction; returns floats."""
        names = list(parts[0])
        sums = [sum(part[name].detach() for part in parts) for name in names]
        total = torch.stack(list(map(torch.Tensor.double, sums)))
        dist.all_reduce(total)
        return dict(zip(names, total.tolist()))

    def any_rank(self, flag):
        """Whether `flag`, a bool or a tensor of one, is true on any rank."""
        count = torch.as_tensor(flag, device=self.device).float()
        return self.sum_scalars([{"count": count}])["count"] > 0

    def agree_on(self, value):
        """Rank 0's value, on every rank: what depends on files must not differ between them."""
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def main_first(self, function):
        """function() on every rank, rank 0 first: the others then find what it has cached."""
        for turn in (True, False):
            if self.is_main == turn:
                result = function()
            dist.barrier()
        return result


class Stopwatch:
    """How long the phases of an update take: a call with a name ends the phase before, and begins that one."""

    def __init__(self, device):
        self.device = device
        self.begin()

    def begin(self):
        self.seconds = {"rest": 0.0}
        self.name = "rest"
        self.since = time.perf_counter()

    def __call__(self, name):
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # else work that was asked for in one phase would be done in another
        now = time.perf_counter()
        self.seconds[self.name] += now - self.since
        self.seconds.setdefault(name, 0.0)
        self.name = name
        self.since = now

    def end(self):
        """{name: seconds}"""
        self("rest")
        return self.seconds


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    require(name == "cpu" or torch.cuda.is_available(), "device 'cuda' is not there; use --device=cpu")
    if name == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def keep_freed_memory():
    """Ask glibc to keep what is freed; else large tensors come page by page. The user's MALLOC_ variables win."""
    if not any(name.startswith("MALLOC_") for name in os.environ):
        # Other C libraries have no mallopt.
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(M_TOP_PAD, 2**26)


def join_process_group(gpu):
    """Join torchrun's process group, or make a group of one."""
    backend = "gloo"
    if gpu is not None:
        backend = "cpu:gloo,cuda:nccl"  # gloo beside nccl: for what is offloaded to the CPU
    alone = {}
    if "RANK" not in os.environ:
        alone = dict(store=dist.HashStore(), rank=0, world_size=1)
    # The time limit covers rank 0's fetching and tokenising, for which the others wait.
    limit = timedelta(minutes=30)
    with explain("no process group; start with torchrun, or unset RANK", ValueError, RuntimeError):
        dist.init_process_group(backend, timeout=limit, device_id=gpu, **alone)


# ---------------------------------------------------------------------------- how a run ends


class Done(Exception):
    """There is nothing to do, or a signal has ended the run: `stage` ends quietly."""


class CheckpointError(Exception):
    """A checkpoint could not be written or read; its cause says why."""


class Signals:
    """SIGTERM or SIGINT (Ctrl-C) asks the run to end after the update; after either, Ctrl-C ends it at once."""

    numbers = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, bar):
        self.bar = bar
        self.asked = 0  # the number of the signal that has come

    def listen(self):
        set_handlers(dict.fromkeys(self.numbers, self.note))

    def note(self, number, frame):
        # Two SIGTERMs, of a scheduler and of torchrun, count as one. If one of two is a Ctrl-C, a person wants an end.
        if self.asked and signal.SIGINT in (number, self.asked):
            raise KeyboardInterrupt("ended at once by a second signal")
        self.asked = number
        self.bar.disable = True  # it would draw over the message
        # Nobody may be there to read: the same Ctrl-C ends the `tee` of `| tee log`.
        with contextlib.suppress(OSError):
            os.write(2, b"\nends as soon as all is saved (Ctrl-C: at once)\n")

    def let_it_finish(self):
        """After the last update a SIGTERM lets evaluation and export go on; Ctrl-C ends them at once.

        As if a SIGTERM had come already: another is the same one, and a Ctrl-C is the second signal.
        """
        self.asked = signal.SIGTERM


def set_handlers(handlers):
    with contextlib.suppress(ValueError):  # only the main thread may
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stage(main):
    """Decorate a script's main(cfg, ...): trouble with the disk, the memory or a checkpoint becomes a UserError, one
    line that says what to do; a run that ends well leaves no process group.
    """

    @functools.wraps(main)
    def wrapped(cfg, *args, **kwargs):
        handlers = {number: signal.getsignal(number) for number in Signals.numbers}
        is_inside = dist.is_initialized()  # of another stage, which goes on in the same processes
        try:
            with contextlib.suppress(Done):
                main(cfg, *args, **kwargs)
            if dist.is_initialized():
                dist.barrier()  # a process that tears down early can abort the others
                if not is_inside:
                    dist.destroy_process_group()
        except KeyboardInterrupt as interrupt:
            if main.__module__ != "__main__":
                raise  # a notebook shows it
            close_bars()
            print(str(interrupt) or "interrupted; the same command begins again where it can", file=sys.stderr)
            sys.exit(130)
        except UserError:
            close_bars()
            raise
        except (OSError, MemoryError, RuntimeError, CheckpointError) as error:
            close_bars()
            if not getattr(error, "is_of_user", False):
                raise_in_one_line(error, cfg)
            raise
        except Exception:
            close_bars()
            raise
        finally:
            set_handlers(handlers)
            # After an error a notebook goes on; of several processes each ends.
            if dist.is_initialized() and dist.get_world_size() == 1 and not is_inside:
                dist.destroy_process_group()

    return wrapped


def close_bars():
    """End all progress bars, so that a message begins on a line of its own and nothing is drawn behind it."""
    for bar in list(tqdm._instances):
        bar.close()


def raise_in_one_line(error, cfg):
    """Raise a UserError for an error that the user can mend; return for any other."""
    cause = error
    if isinstance(error, CheckpointError):
        cause = error.__cause__
    reason = str(cause).split("\n")[0]
    if isinstance(cause, MemoryError) or "out of memory" in reason or "can't allocate memory" in reason:
        names = [name for name in vars(cfg) if "micro_batch_size" in name]
        sizes = " or ".join(f"{name} ({getattr(cfg, name)})" for name in names)
        raise UserError(f"out of memory: {reason}; lower {sizes}, or see activation_checkpointing") from None
    if cause is not error or getattr(cause, "errno", None):
        mend = "mend that and run the same command again"
        path = str(getattr(cause, "filename", None) or cfg.out_dir)
        where = f"out_dir {cfg.out_dir}: " if path.startswith(cfg.out_dir) else ""
        raise UserError(f"{where}{reason}; {mend}") from None

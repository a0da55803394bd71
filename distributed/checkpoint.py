"""A run's directory, and resumable checkpoints: complete before they have their name, checked before they are used.

    out_dir/config.json             the configuration; another one is refused
    out_dir/checkpoints/step_N/     each rank's shards as safetensors, state.json, checksums.json
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from configurator import UserError, require
from distributed.processes import CheckpointError
from hub.files import move, read_json, write_json

LOGS = ("metrics.jsonl", "samples.jsonl", "timing.jsonl")
# What changes a run's speed, its memory or its files, and no number (but its rounding): a resumed run may have others.
FREE = (
    "device", "micro_batch_size", "rollout_micro_batch_size", "shard_size", "offload", "compile", "rollout_gather",
    "train_gather", "logits_chunk", "activation_checkpointing", "save_every", "keep_checkpoints", "keep_every",
    "export_every", "log_to",
)  # fmt: skip
TENSORS_PER_FILE = 32  # a file is copied to CPU memory before it is written


def open_directory(cfg, world):
    """Print the resolved configuration, and write it to out_dir/config.json; returns out_dir as a path.

    Raises UserError if a run with another configuration has begun there.
    """
    require(cfg.out_dir, "out_dir is empty; name a directory")
    out_dir = Path(cfg.out_dir)
    values = asdict(cfg)
    lines = [f"{key} = {value!r}" for key, value in values.items()]
    del values["accept_changes"]
    del values["out_dir"]  # a run may be moved

    # Signs of a run, which has its configuration there; or of a model, whose config.json then differs in every key.
    signs = ("checkpoints", "final", "model.safetensors", "model.safetensors.index.json", *LOGS)
    has_begun = any((out_dir / name).exists() for name in signs)
    inputs = {}
    if has_begun:
        was = read_json(out_dir / "config.json")
        inputs = {"inputs": was["inputs"]} if "inputs" in was else {}
    if has_begun and not cfg.accept_changes:
        was = {**asdict(type(cfg)()), **was}  # a field that was not there yet had its default
        pairs = [(key, was[key], new) for key, new in values.items() if key not in FREE]
        changed = ", ".join(f"{key} ({old!r} -> {new!r})" for key, old, new in pairs if old != new)
        mend = "choose another out_dir, or go on knowingly with --accept_changes"
        require(not changed, f"{out_dir} holds a run with another configuration: {changed}; {mend}")

    world.print(*lines)
    if world.is_main:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_json(out_dir / "config.json", {**values, **inputs})
    return out_dir


# ---------------------------------------------------------------------------- saving


def training_state(run):
    """The tensors that a resumed run needs, to be written or filled in place: parameters, Adam's moments and counts."""
    tensors = {}
    for name, parameter in run.models.named_parameters():
        tensors[name] = parameter
        for key, moment in run.optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = moment
    return tensors


def save_checkpoint(run):
    """Write checkpoints/step_N: each rank's shards, run.state as JSON, and the checksums of all files. Collective."""
    directory = run.out_dir / "checkpoints"
    temporary = directory / f"tmp_{run.step}"
    if run.world.is_main:
        for old in directory.glob("tmp_*"):
            shutil.rmtree(old, ignore_errors=True)  # of a run that was killed while it wrote
        temporary.mkdir(parents=True)
        sizes = {path.name: path.stat().st_size for path in log_files(run)}
        write_json(temporary / "state.json", {"step": run.step, "sizes": sizes, **run.state})
    dist.barrier()

    tensors = training_state(run)
    files = {name: 1 + number // TENSORS_PER_FILE for number, name in enumerate(tensors)}
    with checkpointing() as dcp:
        writer = dcp.HuggingFaceStorageWriter(temporary, files, save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
    written = checksums(run.world, temporary)
    require(written, f"{temporary}: not all of it can be read back; out_dir must be one disk that all processes see")
    if run.world.is_main:
        write_json(temporary / "checksums.json", written)
        move(temporary, directory / f"step_{run.step}")
        remove_old(run)


@contextlib.contextmanager
def checkpointing():
    """PyTorch's module for checkpoints, whose exception holds the errors of all ranks: one of them takes its place."""
    import torch.distributed.checkpoint as dcp  # here, because it takes a second

    try:
        yield dcp
    except dcp.CheckpointException as error:
        # It has failures: rank -> (its error, a traceback).
        cause, _ = next(iter(error.failures.values()))
        if not isinstance(cause, Exception):
            raise
        raise CheckpointError(cause) from cause


def log_files(run):
    """The logs that a resumed run cuts back."""
    return [run.out_dir / name for name in LOGS if (run.out_dir / name).exists()]


def checksums(world, directory):
    """SHA-256 of each file of a checkpoint, on every rank; {} if one cannot be read. The ranks share the reading."""
    names = world.agree_on(sorted(path.name for path in directory.glob("*") if path.name != "checksums.json"))
    mine = {}
    with contextlib.suppress(OSError):
        for name in names[world.rank :: world.size]:
            with open(directory / name, "rb") as file:
                mine[name] = hashlib.file_digest(file, "sha256").hexdigest()
    digests = {}
    parts = [None] * world.size
    dist.all_gather_object(parts, mine)
    for part in parts:
        digests.update(part)
    return digests if len(digests) == len(names) else {}


def list_steps(run):
    """The steps of which there is a checkpoint, in order."""
    steps = []
    for path in (run.out_dir / "checkpoints").glob("step_*"):
        name = path.name.removeprefix("step_")
        if name.isdecimal() and name == str(int(name)):  # not step_04, step_4.bak
            steps.append(int(name))
    return sorted(steps)


def remove_old(run):
    """Keep the newest keep_checkpoints, and those at multiples of keep_every."""
    for step in list_steps(run)[: -run.cfg.keep_checkpoints]:
        if run.cfg.keep_every == 0 or step % run.cfg.keep_every:
            shutil.rmtree(run.out_dir / "checkpoints" / f"step_{step}", ignore_errors=True)


# ---------------------------------------------------------------------------- resuming


def resume(run):
    """Go on from the newest whole checkpoint, in place; run.step is 0 if none was ever written.

    A resumed run writes what an unbroken one would. Raises UserError if there are checkpoints, but none is whole, and
    if another run is at work in the directory.
    """
    if run.world.is_main:
        take_lock(run)
    steps = run.world.agree_on(list_steps(run))
    sizes = {}
    if steps:
        run.step = find_newest_whole(run, steps)
        sizes = load_checkpoint(run)
    if run.world.is_main:
        hide_later(run, steps)
        cut_logs(run, sizes)


def take_lock(run):
    """Hold out_dir/lock until this process ends: it may outlive its torchrun."""
    try:
        fcntl.lockf(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{run.out_dir}: another run is there; stop it") from None
    except OSError:
        return  # not every file system has locks


def find_newest_whole(run, steps):
    """The last of `steps` whose checkpoint is as it was written."""
    for step in reversed(steps):
        path = run.out_dir / "checkpoints" / f"step_{step}"
        written = {}
        with contextlib.suppress(UserError):
            written = read_json(path / "checksums.json")
        written = run.world.agree_on(written)
        found = checksums(run.world, path)
        if found and found == written:  # both are {} where nothing can be read
            return step
        run.world.print(f"passed over {path}: its files are not as they were written")
    raise UserError(f"{run.out_dir}/checkpoints: none can be read; remove them all to start anew")


def load_checkpoint(run):
    """Fill models, optimizer and run.state from run.step's checkpoint; returns the sizes that the logs had."""
    path = run.out_dir / "checkpoints" / f"step_{run.step}"
    with checkpointing() as dcp:
        dcp.load(training_state(run), storage_reader=dcp.HuggingFaceStorageReader(path))
    stored = read_json(path / "state.json")
    del stored["step"]
    sizes = stored.pop("sizes")
    run.state.update(stored)
    run.world.print(f"resumed from {path}")
    return sizes


def hide_later(run, steps):
    """Damaged checkpoints, later than run.step, become bad_step_N: nobody looks at them again."""
    for step in steps:
        if step > run.step:
            directory = run.out_dir / "checkpoints"
            move(directory / f"step_{step}", directory / f"bad_step_{step}")


def cut_logs(run, sizes):
    """Cut the logs back to the sizes that they had; one that has become shorter stays as it is."""
    for path in log_files(run):
        os.truncate(path, min(sizes.get(path.name, 0), path.stat().st_size))

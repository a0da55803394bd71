"""Processes under torchrun (gloo) are the same run as one process, up to float32 rounding, and share its memory."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipeline import EVERYTHING, ROOT, ROUNDING, arguments, metrics, ranked, same_metrics, write_rows
from safetensors.torch import load_file

import ppo
import sample
from distributed.processes import World
from model import GPTNeoX, GPTNeoXConfig

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(stage, cfg, n=2):
    """stage: a name like "ppo", run as a script, or "variants.ppo_max", run as a module."""
    script = ["-m", stage] if "." in stage else [f"{stage}.py"]
    return launch(n, *script, *arguments(cfg))


def in_turn(n, jobs, directory):
    """Run stages one after the other in one group of processes: jobs are pairs of a name and a configuration."""
    path = directory / f"jobs_{len(jobs)}.json"
    path.write_text(json.dumps([(stage, asdict(cfg)) for stage, cfg in jobs]))
    return launch(n, ROOT / "tests" / "in_turn.py", path)


def launch(n, *script, **env):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *script]
    result = subprocess.run(command, cwd=ROOT, env={**ENV, **env}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def same_weights(one, other):
    ours = load_file(Path(one.out_dir) / "final" / "model.safetensors")
    theirs = load_file(Path(other.out_dir) / "final" / "model.safetensors")
    for name, tensor in ours.items():
        atol = ROUNDING
        if name == "score.bias":
            # A reward model's bias is minus a mean of scores: a sum over the width of weights that are each so far off.
            atol = ROUNDING * ours["score.weight"].shape[1] ** 0.5
        np.testing.assert_allclose(tensor, theirs[name], atol=atol, err_msg=name)


RANKED = dict(eval_split="train", normalize_data="", label_noise=0.1)
MEMORY = dict(train_gather=True, logits_chunk=7, activation_checkpointing=True)
CASES = {
    "sft": ("sft", {}),
    "rm": ("rm", {}),
    "ppo": ("ppo", {}),
    "dpo": ("dpo", {}),
    "ppo, every option": ("variants.ppo_max", {**EVERYTHING, "critic_steps": 1}),
    "ppo, less memory": ("ppo", MEMORY),
    "rm, rankings": ("rm", RANKED),
    "a reference that follows": ("variants.reference_ema", dict(ema=0.3)),
    "early stop": ("variants.early_stop", dict(target_kl=1e-4, n_epochs=3)),
    "DPO, a reference that follows": ("variants.tr_dpo", dict(ema=0.3, sync_every=1)),
    "DPO, a threshold that follows": ("variants.bco", dict(loss_type="bco_pair,sft", beta=1.0)),
    "PPO, each process with whole models": ("ppo", dict(shard_size=1, max_grad_norm=0.5)),
    "DPO, sorted over the batch": ("variants.aot", dict(loss_type="aot_unpaired", beta=1.0)),
}


SAVING = [dict(rollout_gather=False, offload="frozen"), dict(activation_checkpointing=True, offload="all")]
SHARDED = dict(episodes=40, save_every=2, kl_target=0.5)


def case(pipeline, name, n):
    """The stage of a case, and its configuration for n processes."""
    stage, options = CASES[name]
    options = dict(options)
    if options.get("eval_split") == "train":
        options["data"] = write_rows(pipeline.directory / "ranked.jsonl", ranked(24))
    return stage, pipeline.config(importlib.import_module(stage), f"{name}, {n}", micro_batch_size=3, **options)


@pytest.fixture(scope="module")
def on_two(pipeline):
    """All that two processes run, in one launch."""
    jobs = [case(pipeline, name, 2) for name in CASES]
    jobs.append(("sample", pipeline.config(sample, "sample_two")))
    jobs.append(("ppo", pipeline.config(ppo, "sharded", keep_checkpoints=3, **SHARDED)))
    for number, options in enumerate(SAVING):
        jobs.append(("ppo", pipeline.config(ppo, f"saving{number}", **SHARDED, **options)))
    in_turn(2, jobs, pipeline.directory)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_run(pipeline, on_two, name):
    """Same rows, same sampled tokens, same losses; evaluation rows (21, 15) do not divide by 2."""
    stage_name, one = case(pipeline, name, 1)
    _, two = case(pipeline, name, 2)
    importlib.import_module(stage_name).main(one)
    first = metrics(one)
    second = metrics(two)
    for rows in (first, second):
        rows[0].pop("rewards/accuracies", None)  # DPO starts with all rewards 0: rounding decides the sign
    same_metrics(first, second)
    same_weights(one, two)


@pytest.fixture(scope="module")
def sharded(pipeline, on_two):
    """A PPO run on two processes, with a checkpoint after its second, fourth and last update."""
    return pipeline.config(ppo, "sharded", keep_checkpoints=3, **SHARDED)


@pytest.mark.parametrize("number", range(len(SAVING)))
def test_ways_to_save_memory_change_no_bit(pipeline, sharded, number):
    for name in ("metrics.jsonl", "final/model.safetensors"):
        saving = pipeline.directory / f"saving{number}" / name
        assert saving.read_bytes() == (Path(sharded.out_dir) / name).read_bytes()


MOVES = [(1, {}), (2, dict(shard_size=1)), (4, {}), (4, dict(shard_size=2, offload="all"))]


def move(pipeline, sharded, n, options):
    """The run of two processes as it was after its second update, in a directory of its own: a configuration for n."""
    moved = pipeline.directory / f"resumed_on_{n}_{len(options)}"
    shutil.copytree(sharded.out_dir, moved)
    for name in ("final", "checkpoints/step_4", "checkpoints/step_5"):
        shutil.rmtree(moved / name)
    return pipeline.config(ppo, moved.name, keep_checkpoints=3, accept_changes=True, **SHARDED, **options)


@pytest.fixture(scope="module")
def on_four(pipeline, sharded):
    """What four processes run, in one launch: their configurations, and what they said."""
    hybrid = dict(episodes=40, kl_target=0.5, shard_size=2, offload="frozen")
    cfgs = [pipeline.config(ppo, "hybrid", **hybrid)]
    cfgs += [move(pipeline, sharded, n, options) for n, options in MOVES if n == 4]
    output = in_turn(4, [("ppo", cfg) for cfg in cfgs], pipeline.directory)
    return cfgs, output


def test_two_replicas_of_two_shards_are_one_run(sharded, on_four):
    """Hybrid sharding on four processes, frozen models offloaded."""
    cfg = on_four[0][0]
    same_metrics(metrics(sharded), metrics(cfg))
    same_weights(sharded, cfg)


@pytest.mark.parametrize("n, options", MOVES)
def test_a_run_saved_by_two_processes_goes_on_in_others(pipeline, sharded, n, options, capsys, request):
    """From its second update; the reference is the run that two processes finished."""
    if n == 4:
        cfgs, output = request.getfixturevalue("on_four")
        cfg = cfgs[MOVES.index((n, options)) - 1]
    else:
        cfg = move(pipeline, sharded, n, options)
        if n == 1:
            ppo.main(cfg)
            output = capsys.readouterr().out
        else:
            output = torchrun("ppo", cfg, n)
    assert f"resumed from {cfg.out_dir}/checkpoints/step_2" in output
    same_metrics(metrics(sharded), metrics(cfg))
    assert metrics(sharded)[:2] == metrics(cfg)[:2]  # those were not written anew
    same_weights(sharded, cfg)


LOAD_AND_WRITE = """
import json, sys, threading
import torch
from torch.distributed import fsdp  # sharding imports it: that is no part of a model
import sft
from model import GPTNeoX
from runtime import Data, Run, Tokenizer, World, load_model, open_directory

def anonymous():  # bytes of this process's own, without the pages of files that it maps
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def watch(function, *args, **options):
    peak = 0
    before = anonymous()
    done = threading.Event()

    def look():
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous() - before)

    thread = threading.Thread(target=look)
    thread.start()
    result = function(*args, **options)
    done.set()
    thread.join()
    return result, peak

source, out_dir = sys.argv[1:]
cfg = sft.Config(device="cpu", dtype="float32", out_dir=out_dir)
world = World(cfg)
open_directory(cfg, world)
torch.distributed.barrier()
tokenizer = Tokenizer.load(source)
model, loading = watch(load_model, cfg, world, tokenizer, GPTNeoX, source, trainable=True)
run = Run(cfg, world, Data(tokenizer, train=[], held_out="", n_updates=1), {"model": model})
_, writing = watch(run.export, model)
print(json.dumps([world.rank, loading, writing]))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_no_process_ever_holds_a_whole_model(pipeline, tmp_path):
    """Four processes load a float16 file of 113 M parameters as float32 and write it again.

    A rank's share is a quarter of 451 MB; what the first load imports, 10 MB; while its rows of the largest tensor
    (12,000 x 1024: 49 MB in all) are checked there are some copies of these, less than the whole tensor. That is
    172 MB; a whole copy of the model would be 451 MB more. Writing gathers one tensor at a time, from parts that other
    ranks send, and makes bytes of it: less than three of the largest.
    """
    shape = GPTNeoXConfig(vocab_size=12_000, hidden_size=1024, num_hidden_layers=7, num_attention_heads=8)
    model = GPTNeoX(shape).half()
    model.save_pretrained(tmp_path / "model")
    shutil.copy(pipeline.sft / "tokenizer.json", tmp_path / "model")
    (tmp_path / "memory.py").write_text(LOAD_AND_WRITE)
    env = {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back at once
    output = launch(4, tmp_path / "memory.py", tmp_path / "model", tmp_path / "out", **env)
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    largest = 4 * 12_000 * 1024
    assert len(rows) == 4 and whole > 450e6
    for rank, loading, writing in rows:
        assert loading < whole / 4 + largest + 10e6, (rank, loading)
        assert writing < 3 * largest, (rank, writing)
    again = load_file(tmp_path / "out" / "final" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor.float()), name


def test_two_processes_sample_the_same_texts(pipeline, on_two):
    one = pipeline.config(sample, "sample_one")
    two = pipeline.config(sample, "sample_two")
    sample.main(one)
    first = read_samples(one)
    second = read_samples(two)
    assert len(first) == 21
    for ours, theirs in zip(first, second, strict=True):
        assert ours["response"] == theirs["response"]
        for key in ("score", "kl"):
            np.testing.assert_allclose(ours[key], theirs[key], rtol=ROUNDING, atol=ROUNDING)


def read_samples(cfg):
    return [json.loads(line) for line in (Path(cfg.out_dir) / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n_rows, micro_batch_size", [(8, 1), (21, 4), (5, 8), (1, 2)])
def test_split_rows_deals_every_row_and_equal_counts(size, n_rows, micro_batch_size):
    """Ranks run sharded models in lockstep, so all must have the same number of micro-batches of the same size."""
    lengths = np.random.default_rng(n_rows).integers(1, 50, n_rows)
    dealt = []
    for rank in range(size):
        world = SimpleNamespace(rank=rank, size=size)
        dealt.append(World.split_rows(world, lengths, micro_batch_size))
    counts = {tuple(map(len, micro_batches)) for micro_batches in dealt}
    assert len(counts) == 1
    rows = np.concatenate([indices for micro_batches in dealt for indices in micro_batches])
    assert set(rows) == set(range(n_rows))
    assert len(rows) == -(-n_rows // size) * size
    for micro_batches in dealt:
        ordered = lengths[np.concatenate(micro_batches)[: n_rows // size]]
        assert (np.diff(ordered) <= 0).all()  # longest first

"""Processes under torchrun (gloo) are the same run as one process, up to float32 rounding, and share its memory."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline import EVERYTHING, ROOT, ROUNDING, arguments, metrics, ranked, same_metrics, write_rows
from safetensors.torch import load_file

import ppo
import runtime
import sample
from model import GPTNeoX, GPTNeoXConfig

RANKED = dict(rows=ranked(24), eval_split="train", normalize_data="", label_noise=0.1)
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(stage, cfg, n=2):
    return launch(n, f"{stage}.py", *arguments(cfg))


def launch(n, *script, **env):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *script]
    result = subprocess.run(command, cwd=ROOT, env=ENV | env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def same_weights(one, other):
    weights = [load_file(Path(cfg.out_dir) / "final" / "model.safetensors") for cfg in (one, other)]
    for key, value in weights[0].items():
        # a reward model's bias is minus a mean of scores: a sum over the width of weights that are each so far apart
        terms = weights[0]["score.weight"].shape[1] if key == "score.bias" else 1
        np.testing.assert_allclose(value, weights[1][key], atol=ROUNDING * terms**0.5, err_msg=key)


MEMORY = dict(train_gather=True, logits_chunk=7, activation_checkpointing=True)


@pytest.mark.parametrize("name, options", [("sft", {}), ("rm", {}), ("ppo", {}), ("dpo", {}),
                                           ("ppo", {**EVERYTHING, "critic_steps": 1}), ("ppo", MEMORY),
                                           ("rm", RANKED)])  # fmt: skip
def test_two_processes_are_one_run(pipeline, name, options, tmp_path):
    """Same rows, same sampled tokens, same losses; evaluation rows (21, 15) do not divide by 2."""
    stage, options = importlib.import_module(name), dict(options)
    if "rows" in options:
        options["data"] = write_rows(tmp_path / "rows.jsonl", options.pop("rows"))
    one, two = (pipeline.config(stage, f"{name}_{len(options)}_{n}", micro_batch_size=3, **options) for n in (1, 2))
    stage.main(one)
    torchrun(name, two)
    first, second = metrics(one), metrics(two)
    for rows in (first, second):
        rows[0].pop("rewards/accuracies", None)  # DPO starts with all rewards 0: rounding decides the sign
    same_metrics(first, second)
    same_weights(one, two)


@pytest.fixture(scope="module")
def sharded(pipeline):
    """A PPO run on two processes, with a checkpoint after its second, fourth and last update."""
    cfg = pipeline.config(ppo, "sharded", episodes=40, save_every=2, keep_checkpoints=3, kl_target=0.5)
    torchrun("ppo", cfg)
    return cfg


@pytest.mark.parametrize("options", [
    dict(rollout_gather=False, offload="frozen"), dict(activation_checkpointing=True, offload="all"),
])  # fmt: skip
def test_ways_to_save_memory_change_no_bit(pipeline, sharded, options):
    cfg = pipeline.config(ppo, "saving", episodes=40, save_every=2, kl_target=0.5, **options)
    torchrun("ppo", cfg)
    for name in ("metrics.jsonl", "final/model.safetensors"):
        assert (Path(cfg.out_dir) / name).read_bytes() == (Path(sharded.out_dir) / name).read_bytes()
    shutil.rmtree(cfg.out_dir)


def test_two_replicas_of_two_shards_are_one_run(pipeline, sharded):
    """Hybrid sharding on four processes, frozen models offloaded."""
    cfg = pipeline.config(ppo, "hybrid", episodes=40, kl_target=0.5, shard_size=2, offload="frozen")
    torchrun("ppo", cfg, 4)
    same_metrics(metrics(sharded), metrics(cfg))
    same_weights(sharded, cfg)


@pytest.mark.parametrize("n, options", [(1, {}), (4, {}), (4, dict(shard_size=2, offload="all"))])
def test_a_run_saved_by_two_processes_goes_on_in_others(pipeline, sharded, n, options):
    """From its second update; the reference is the run that two processes finished."""
    moved = pipeline.directory / f"resumed_on_{n}_{len(options)}"
    shutil.copytree(sharded.out_dir, moved)
    for name in ("final", "checkpoints/step_4", "checkpoints/step_5"):
        shutil.rmtree(moved / name)
    cfg = pipeline.config(ppo, moved.name, episodes=40, save_every=2, keep_checkpoints=3, kl_target=0.5,
                          accept_changes=True, **options)  # fmt: skip
    assert f"resumed from {moved}/checkpoints/step_2" in torchrun("ppo", cfg, n)
    same_metrics(metrics(sharded), metrics(cfg))
    assert metrics(sharded)[:2] == metrics(cfg)[:2]  # those were not written anew
    same_weights(sharded, cfg)


MEMORY = """
import json, sys, threading, time
import torch
import runtime, sft
from model import GPTNeoX

def anonymous():  # bytes of this process's own, without the pages of files that it maps
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

def watch(function, *args):
    peak, before, done = [0], anonymous(), threading.Event()
    def look():
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous() - before)
    thread = threading.Thread(target=look)
    thread.start()
    result = function(*args)
    done.set()
    thread.join()
    return result, peak[0]

run = runtime.Run(sft.Config(device="cpu", dtype="float32", out_dir=sys.argv[2]))
run.tokenizer = runtime.Tokenizer.load(sys.argv[1])
model, loading = watch(runtime.load_model, run, GPTNeoX, sys.argv[1], True)
_, writing = watch(runtime.export, run, model)
print(json.dumps([run.rank, loading, writing]))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_no_process_ever_holds_a_whole_model(pipeline, tmp_path):
    """Four processes load a float16 file of 113 M parameters as float32 and write it again.

    A rank's share is a quarter of 451 MB; what the first load imports, 30 MB; while its rows of the largest tensor
    (12,000 x 1024: 49 MB in all) are checked there are some copies of these, less than the whole tensor. That is
    192 MB; a whole copy of the model would be 451 MB more. Writing gathers one tensor at a time, from parts that other
    ranks send, and makes bytes of it: less than three of the largest.
    """
    shape = GPTNeoXConfig(vocab_size=12_000, hidden_size=1024, num_hidden_layers=7, num_attention_heads=8)
    model = GPTNeoX(shape).half()
    model.save_pretrained(tmp_path / "model")
    shutil.copy(pipeline.sft / "tokenizer.json", tmp_path / "model")
    (tmp_path / "memory.py").write_text(MEMORY)
    env = {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back at once
    output = launch(4, tmp_path / "memory.py", tmp_path / "model", tmp_path / "out", **env)
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    whole, largest = 4 * sum(p.numel() for p in model.parameters()), 4 * 12_000 * 1024
    assert len(rows) == 4 and whole > 450e6
    for rank, loading, writing in rows:
        assert loading < whole / 4 + largest + 30e6, (rank, loading)
        assert writing < 3 * largest, (rank, writing)
    again = load_file(tmp_path / "out" / "final" / "model.safetensors")
    assert all(torch.equal(again[name], tensor.float()) for name, tensor in model.state_dict().items())


def test_two_processes_sample_the_same_texts(pipeline):
    one, two = (pipeline.config(sample, f"sample_{n}") for n in ("one", "two"))
    sample.main(one)
    torchrun("sample", two)
    rows = [[json.loads(line) for line in (Path(cfg.out_dir) / "samples.jsonl").read_text().splitlines()]
            for cfg in (one, two)]  # fmt: skip
    assert len(rows[0]) == 21
    for a, b in zip(*rows):
        assert a["response"] == b["response"]
        np.testing.assert_allclose([a["score"], a["kl"]], [b["score"], b["kl"]], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n, micro", [(8, 1), (21, 4), (5, 8), (1, 2)])
def test_share_deals_every_row_and_equal_counts(size, n, micro):
    """Ranks run sharded models in lockstep, so all must have the same number of micro-batches of the same size."""
    lengths = np.random.default_rng(n).integers(1, 50, n)
    dealt = []
    for rank in range(size):
        run = object.__new__(runtime.Run)
        run.rank, run.size = rank, size
        dealt.append(run.share(lengths, micro))
    assert len({tuple(len(index) for index in mine) for mine in dealt}) == 1
    rows = np.concatenate([index for mine in dealt for index in mine])
    assert set(rows) == set(range(n)) and len(rows) == -(-n // size) * size
    for mine in dealt:
        ordered = lengths[np.concatenate(mine)[: n // size]]
        assert (np.diff(ordered) <= 0).all()  # longest first

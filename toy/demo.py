"""The demo: data, SFT, reward model, PPO and DPO by the values of config/toy_*.py, then samples and a table.

    python -m toy.demo out/toy --seed=1

It calls each stage's `main`, as `python sft.py config/toy_sft.py` does, but imports PyTorch once. With two cores or
more, two processes share the rows, and each has whole models (`shard_size=1`): for products as small as a toy's that is
faster than two threads. What a stage prints goes to out/toy/STAGE.log. Finished stages are left alone, and one that was
stopped goes on where it was.
"""

import argparse
import contextlib
import multiprocessing
import os
import socket
import sys
import textwrap
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import dpo
import ppo
import rm
import sample
import sft
from configurator import configure
from distributed.processes import join_process_group
from hub.files import read_json, read_jsonl
from toy import gold, make_data, report


class Part(NamedTuple):
    script: ModuleType
    title: str
    metric: str  # of metrics.jsonl, whose curve is drawn
    words: str  # what the metric is


PARTS = {
    "sft": Part(sft, "SFT imitates the reference summaries", "loss/sft",
                "loss, -log p of a summary's token: down is better"),
    "rm": Part(rm, "the reward model learns which of two summaries people prefer", "train/accuracy",
               "accuracy, the share of pairs whose preferred summary has the higher reward: up is better"),
    "ppo": Part(ppo, "PPO learns to write what the reward model likes", "objective/scores",
                "score of the policy's summaries by the reward model: up is better"),
    "dpo": Part(dpo, "DPO learns from the preferences, without a reward model", "rewards/accuracies",
                "accuracy, the share of pairs in which the policy moved to the preferred summary: up is better"),
}  # fmt: skip
N_SHOWN = 3  # posts whose summaries are shown after each stage


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the directory for everything")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--config", default="config", help="the directory of the files toy_STAGE.py")
    args = parser.parse_args()
    print(f"writing posts, summaries and preferences to {args.out}/data", flush=True)
    make_data.write_data(f"{args.out}/data", args.seed)

    n_processes = min(2, n_cores())
    port = free_port()
    others = []
    # On Linux a fork shares what is imported. Elsewhere forks are not safe: the other process imports it again.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    for rank in range(1, n_processes):
        others.append(context.Process(target=run, args=(rank, n_processes, port, args)))
        others[-1].start()
    try:
        run(0, n_processes, port, args)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it can", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        # Of gloo, most likely, for the other process is gone.
        sys.exit(f"error: {error}; the last *.log in {args.out} says more")
    finally:
        for other in others:
            other.kill()  # it may wait for this one, for ever


def n_cores():
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(rank, n_processes, port, args):
    """What each process does: all stages in turn. Rank 0 is the one that talks."""
    out = args.out
    environment = dict(RANK=rank, WORLD_SIZE=n_processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TOY_OUT=out)
    os.environ.update({name: str(value) for name, value in environment.items()})
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, n_cores() // n_processes))
    if rank > 0:
        # Both would say the same.
        sys.stdout = sys.stderr = open(f"{out}/rank{rank}.log", "a", buffering=1)  # noqa: SIM115
    join_process_group(gpu=None)

    began = time.perf_counter()
    for number, (name, part) in enumerate(PARTS.items(), 1):
        print(f"\n[{number}/{len(PARTS)}] {part.title} (log: {out}/{name}.log)", flush=True)
        run_script(args, part.script, name)
        if not Path(out, name, "final").exists():
            print(f"{name}: stopped; the same command goes on from there")
            return
        show_curve(name, out)
        if name != "rm":
            write_samples(args, name, "first", f"--split=validation[:{N_SHOWN}]", "--reward_model=")
            show_samples(name, out)
        print(f"{time.perf_counter() - began:.0f} seconds so far", flush=True)

    for name in report.STAGES:
        write_samples(args, name, "samples")
    print()
    if rank == 0:
        report.main(out)
    dist.barrier()
    dist.destroy_process_group()


def run_script(args, script, log_name, *options):
    """`python SCRIPT.py config/toy_SCRIPT.py`, with its output in a log."""
    values = [f"{args.config}/toy_{script.__name__}.py", f"--seed={args.seed}", "--device=cpu", "--shard_size=1"]
    cfg = configure(script.Config, [*values, *options])
    with open(f"{args.out}/{log_name}.log", "a") as log, contextlib.redirect_stdout(log):
        try:
            script.main(cfg)
        except RuntimeError:
            traceback.print_exc(file=log)  # `main` shows one line
            raise


def write_samples(args, stage, name, *options):
    """What a stage's model writes to the held-out posts."""
    directory = f"{args.out}/{stage}"
    run_script(args, sample, stage, f"--model={directory}/final", f"--out_dir={directory}/{name}", *options)


def show_curve(stage, out):
    """Draw a stage's learning curve."""
    part = PARTS[stage]
    values = [row[part.metric] for row in read_jsonl(f"{out}/{stage}/metrics.jsonl") if part.metric in row]
    print(f"\n{part.words}", *chart(values), f"{'':10}{len(values)} updates", sep="\n")
    if stage == "rm":
        accuracy = read_json(f"{out}/rm/eval.json")["eval/accuracy"]
        print(f"on held-out pairs {accuracy:.2f}; one label in ten is the toss of a coin")


def chart(values, width=60, height=8):
    """Lines of text that draw `values` from left to right; a column is the mean of its share of them."""
    parts = np.array_split(values, min(width, len(values)))
    means = [part.mean() for part in parts]
    low = min(means)
    step = (max(means) - low) / (height - 1) or 1.0
    levels = [round((x - low) / step) for x in means]
    lines = []
    for level in reversed(range(height)):
        marks = "".join("*" if x == level else " " for x in levels)
        lines.append(f"{low + level * step:8.2f} |{marks.rstrip()}")
    return lines


def show_samples(stage, out):
    """Show what a stage's model writes to a few posts, and its gold score; at first the posts, too."""
    rows = read_jsonl(f"{out}/{stage}/first/samples.jsonl")
    if stage == "sft":
        print("\nposts that no stage learns from:")
        for number, row in enumerate(rows, 1):
            post = f"  {number}. {gold.post_of(row['query'])}"
            print(textwrap.fill(post, 100, subsequent_indent="     "))
    print(f"\nwhat {stage.upper()} writes to them (gold: the true score, which no stage sees; at most 4):")
    for number, row in enumerate(rows, 1):
        response = row["response"].removesuffix("<|endoftext|>").replace("\n", " ")
        print(f"  {number}.{response}   gold {gold.gold_score(gold.post_of(row['query']), response):g}")


if __name__ == "__main__":
    main()

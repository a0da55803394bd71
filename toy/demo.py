"""The demo: data, SFT, reward model, PPO and DPO by the values of config/toy_*.py, then samples and a table.

    python -m toy.demo out/toy --seed=1

It calls each stage's `main`, as `python sft.py config/toy_sft.py` does, but imports PyTorch once; and on two cores it
is two processes with half of the rows each (`shard_size=1`: each has whole models), for two processes of one thread
take products as small as a toy's faster than one of two threads. What a stage prints goes to out/toy/STAGE.log.
Finished stages are left alone; one that was stopped goes on where it was.
"""

import argparse
import contextlib
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

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
from hub.files import read_jsonl
from toy import gold, make_data, report

STAGES = {"sft": sft, "rm": rm, "ppo": ppo, "dpo": dpo}
# stage: what is drawn of it, by its name in metrics.jsonl and in words
CURVES = {
    "sft": ("loss/sft", "-log p of the summaries' tokens, in nats"),
    "rm": ("train/accuracy", "share of pairs whose preferred summary has the higher reward"),
    "ppo": ("objective/scores", "the reward model's score of what the policy writes"),
    "dpo": ("rewards/accuracies", "share of pairs whose preferred summary has gained on the other"),
}
N_SHOWN = 3  # posts whose summaries are shown after each stage


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the directory for everything")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--config", default="config", help="the directory of the files toy_STAGE.py")
    args = parser.parse_args()
    make_data.write_data(f"{args.out}/data", args.seed)

    n_processes = min(2, os.cpu_count())
    port = free_port()
    # A fork has what is imported here. Other systems than Linux do not fork well, and import it again.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    for rank in range(1, n_processes):
        other = context.Process(target=run, args=(rank, n_processes, port, args), daemon=True)
        other.start()
    run(0, n_processes, port, args)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(rank, n_processes, port, args):
    """What each process does: all stages in turn. Rank 0 is the one that talks."""
    out = args.out
    environment = dict(RANK=rank, WORLD_SIZE=n_processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TOY_OUT=out)
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(max(1, os.cpu_count() // n_processes))
    if rank > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    join_process_group(gpu=None)

    for name in STAGES:
        began = time.perf_counter()
        print(f"\n{name}: output in {out}/{name}.log", flush=True)
        run_script(args, STAGES[name], name)
        if not Path(out, name, "final").exists():
            return  # it was stopped
        show_curve(name, out)
        if name != "rm":
            write_samples(args, name, "first", f"--split=validation[:{N_SHOWN}]", "--reward_model=")
            show_samples(name, out)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)

    for name in report.STAGES:
        write_samples(args, name, "samples")
    print()
    if rank == 0:
        report.main(out)
    dist.barrier()
    dist.destroy_process_group()


def run_script(args, script, name, *options):
    """`python NAME.py config/toy_NAME.py`, with its output in a log."""
    cfg = configure(script.Config, [f"{args.config}/toy_{script.__name__}.py", f"--seed={args.seed}", *options])
    with open(f"{args.out}/{name}.log", "a") as log, contextlib.redirect_stdout(log):
        script.main(cfg)


def write_samples(args, stage, name, *options):
    """What a stage's model writes to the held-out posts."""
    directory = f"{args.out}/{stage}"
    run_script(args, sample, stage, f"--model={directory}/final", f"--out_dir={directory}/{name}", *options)


def show_curve(stage, out):
    """Draw a stage's learning curve."""
    metric, words = CURVES[stage]
    values = [row[metric] for row in read_jsonl(f"{out}/{stage}/metrics.jsonl") if metric in row]
    print(f"\n{words}; {len(values)} updates", *chart(values), sep="\n", flush=True)


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
        lines.append(f"{low + level * step:8.2f} |{marks}")
    return lines


def show_samples(stage, out):
    """Show what a stage's model writes to a few posts, and its gold score."""
    print(f"\nto {N_SHOWN} posts that it has not seen, {stage} writes")
    for row in read_jsonl(f"{out}/{stage}/first/samples.jsonl"):
        post = gold.post_of(row["query"])
        response = row["response"].removesuffix("<|endoftext|>")
        print(f"  {post}\n    ->{response}   (gold {gold.gold_score(post, response):.2f})", flush=True)


if __name__ == "__main__":
    main()

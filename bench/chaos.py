"""Kill -9 a run at random moments, start it again by the same command, and compare it with one that was left alone.

    python bench/chaos.py                                            # one process, about ten minutes
    python bench/chaos.py --processes=2 --kills=20 --seed=1          # the same under torchrun

For each stage, on the embedded toy data and a tiny model: every second kill comes at any moment, the others while a
checkpoint is being written (or the final model: as soon as a temporary directory is there, and up to 40 ms later). A
run that gets through is compared, and the next one begins. Prints a table in Markdown.
"""

import argparse
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pipeline import Pipeline, arguments  # noqa: E402

STAGES = dict(sft=dict(episodes=640), rm=dict(episodes=480, eval_split="train"), dpo=dict(episodes=320),
              ppo=dict(episodes=96, kl_target=0.5, samples_every=1))  # fmt: skip
MARK = "NPLUS_CHAOS"  # an environment variable by which all processes of a job are found


def start(stage, cfg, processes):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), f"{stage}.py", *arguments(cfg)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: cfg.out_dir}
    with open(f"{cfg.out_dir}.log", "ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def kill(process, cfg):
    """SIGKILL every process of the job, the launcher first."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    mark = f"{MARK}={cfg.out_dir}".encode()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (directory / "environ").read_bytes().split(b"\0"):
                os.kill(int(directory.name), signal.SIGKILL)
        except OSError:
            continue  # it has ended by itself


def temporary(cfg):
    return next(iter([*Path(cfg.out_dir).glob("checkpoints/tmp_*"), *Path(cfg.out_dir).glob("tmp_*")]), None)


def moment(cfg):
    """What a job was doing, by what lies in its directory."""
    directory, found = Path(cfg.out_dir), temporary(cfg)
    if found:
        return "export" if found.parent == directory else "save"
    log = directory / "metrics.jsonl"
    return "update" if log.exists() and log.stat().st_size else "setup"


def results(cfg):
    names = ("metrics.jsonl", "samples.jsonl", "final/model.safetensors", "eval.json")
    return [(Path(cfg.out_dir) / name).read_bytes() for name in names if (Path(cfg.out_dir) / name).exists()]


def torment(stage, cfg, processes, kills, seconds, expected, dice):
    """Returns what the job was doing at each kill, and whether each finished run was as expected."""
    moments, same = Counter(), []
    while moments.total() < kills or not same:
        process, deadline = start(stage, cfg, processes), time.monotonic() + dice.uniform(0, seconds)
        while process.poll() is None and moments.total() < kills:
            if temporary(cfg) if moments.total() % 2 else time.monotonic() > deadline:
                time.sleep(dice.uniform(0, 0.04))
                moments[moment(cfg)] += 1
                kill(process, cfg)
            else:
                time.sleep(0.0005)
        if process.wait() == 0:
            same.append(results(cfg) == expected)
            shutil.rmtree(cfg.out_dir)
        elif process.returncode != -signal.SIGKILL:
            raise SystemExit(f"{stage} failed by itself: see {cfg.out_dir}.log")
    return moments, same


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(STAGES))
    args = parser.parse_args()
    dice, pipeline = random.Random(args.seed), Pipeline(Path(tempfile.mkdtemp(prefix="chaos-")))
    rows = [f"| stage | kills, {args.processes} process{'es' * (args.processes > 1)} | in the setup | in an update | "
            "in a save | in the export | finished runs | identical |", "|" + "---|" * 8]  # fmt: skip
    for stage in args.stages.split(","):
        options = dict(STAGES[stage], save_every=2)
        alone, tormented = (pipeline.config(importlib.import_module(stage), f"{stage}_{n}", **options) for n in "at")
        begun = time.monotonic()
        if start(stage, alone, args.processes).wait():
            raise SystemExit(f"{stage} failed: see {alone.out_dir}.log")
        seconds = time.monotonic() - begun
        moments, same = torment(stage, tormented, args.processes, args.kills, seconds, results(alone), dice)
        counts = " | ".join(str(moments[name]) for name in ("setup", "update", "save", "export"))
        rows.append(f"| {stage} | {sum(moments.values())} | {counts} | {len(same)} | {sum(same)} |")
        print(rows[-1], f"({seconds:.0f} s when left alone)", flush=True)
    print("\n".join(rows))


if __name__ == "__main__":
    main()

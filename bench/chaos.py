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

# stage: what its configuration adds
STAGES = {
    "sft": {"episodes": 640},
    "rm": {"episodes": 480, "eval_split": "train"},
    "dpo": {"episodes": 320},
    "ppo": {"episodes": 96, "kl_target": 0.5, "samples_every": 1},
}
MOMENTS = {"setup": "in the setup", "update": "in an update", "save": "in a save", "export": "in the export"}
MARK = "NPLUS_CHAOS"  # an environment variable by which all processes of a job are found


# ---------------------------------------------------------------------------- a job


def start(stage, cfg, processes):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [f"{stage}.py", *arguments(cfg)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: cfg.out_dir}
    with open(f"{cfg.out_dir}.log", "ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


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
    """The directory of a checkpoint, or of the final model, that is being written; None if there is none."""
    out_dir = Path(cfg.out_dir)
    found = [*out_dir.glob("checkpoints/tmp_*"), *out_dir.glob("tmp_*")]
    return found[0] if found else None


def moment(cfg):
    """What a job was doing, by what lies in its directory."""
    found = temporary(cfg)
    if found is not None:
        return "export" if found.parent == Path(cfg.out_dir) else "save"
    log = Path(cfg.out_dir) / "metrics.jsonl"
    has_begun = log.exists() and log.stat().st_size
    return "update" if has_begun else "setup"


def results(cfg):
    """The bytes of what a run has written."""
    names = ("metrics.jsonl", "samples.jsonl", "final/model.safetensors", "eval.json")
    paths = [Path(cfg.out_dir) / name for name in names]
    return {path.name: path.read_bytes() for path in paths if path.exists()}


# ---------------------------------------------------------------------------- kills


def torment(stage, cfg, processes, kills, seconds, expected, dice):
    """Returns what the job was doing at each kill, and whether each finished run was as expected."""
    moments = Counter()
    same = []
    while moments.total() < kills or not same:
        process = start(stage, cfg, processes)
        deadline = time.monotonic() + dice.uniform(0, seconds)
        while process.poll() is None and moments.total() < kills:
            is_due = time.monotonic() > deadline
            if moments.total() % 2:
                is_due = temporary(cfg) is not None
            if is_due:
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
    dice = random.Random(args.seed)
    pipeline = Pipeline(Path(tempfile.mkdtemp(prefix="chaos-")))
    rows = []
    for stage in args.stages.split(","):
        module = importlib.import_module(stage)
        alone = pipeline.config(module, f"{stage}_alone", save_every=2, **STAGES[stage])
        tormented = pipeline.config(module, f"{stage}_tormented", save_every=2, **STAGES[stage])
        begun = time.monotonic()
        if start(stage, alone, args.processes).wait():
            raise SystemExit(f"{stage} failed: see {alone.out_dir}.log")
        seconds = time.monotonic() - begun
        moments, same = torment(stage, tormented, args.processes, args.kills, seconds, results(alone), dice)
        counts = [moments.total(), *(moments[name] for name in MOMENTS), len(same), sum(same)]
        rows.append(f"| {stage} | {' | '.join(map(str, counts))} |")
        print(rows[-1], f"({seconds:.0f} s when left alone)", flush=True)

    processes = "1 process" if args.processes == 1 else f"{args.processes} processes"
    titles = ["stage", f"kills, {processes}", *MOMENTS.values(), "finished runs", "identical"]
    print(f"\n| {' | '.join(titles)} |")
    print("|---" * len(titles) + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

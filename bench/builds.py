"""This tree beside an earlier commit, and two processes beside one: seconds of an update, or of generation, by turns.

    python bench/builds.py 2e9c53a --what ppo sft generate --shape 14m --data "$NPLUS_DATA"

Both sides get the same random weights and rows (bench/bench.py makes them) and as many threads as there are cores; "two
processes" have half of them each, whole models (--shard_size=1) and half of the rows. A round is a run of its own for
each side, one after the other; of its updates the first is left out, and the median of all others is printed. Run it
alone.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from bench import EPOCHS, NEW, SEED, make_rows, write_models  # noqa: E402
from data import Tokenizer  # noqa: E402
from hub.files import read_jsonl  # noqa: E402

N_ROWS = {"ppo": 16, "sft": 8, "rm": 8, "dpo": 8, "generate": 16}
MICRO = 8  # rows in a pass with gradients

# What a side runs for "generate": the same calls in every tree.
GENERATE = """
import json, sys, time
import torch
from data import pad_right, uniforms
from distributed.processes import keep_freed_memory
from model import GPTNeoX, generate
keep_freed_memory()
source, n_new, n_vocab, rounds = sys.argv[1], *map(int, sys.argv[2:5])
model = GPTNeoX.from_pretrained(source).requires_grad_(False)
ids, lengths = pad_right(json.load(sys.stdin))
for step in range(rounds + 1):
    began = time.perf_counter()
    generate(model, ids, lengths, n_new, 0.7, uniforms((len(ids), n_new), 1, step), None, n_vocab)
    print(json.dumps(time.perf_counter() - began))
"""


def run(root, processes, directory, what, rows, args):
    """Seconds of each unit of work of one run, the first left out."""
    threads = max(1, os.cpu_count() // processes)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(root)}
    options = dict(cwd=root, env=env)
    if what == "generate":
        queries = json.dumps([row["query"] for row in rows["rows"]])
        command = [sys.executable, "-c", GENERATE, str(directory / "policy"), str(NEW), str(rows["n_vocab"])]
        output = call([*command, str(args.units)], input=queries, **options)
        return [float(line) for line in output.split()][1:]

    out_dir = directory / "run"
    shutil.rmtree(out_dir, ignore_errors=True)
    n = len(rows["rows"])
    values = dict(
        model=directory / "policy", data=rows["path"], train_split=rows["split"], eval_split="", out_dir=out_dir,
        seed=SEED, batch_size=n, episodes=n * (args.units + 1), micro_batch_size=MICRO, device="cpu", dtype="float32",
        max_length=0,
    )  # fmt: skip
    if what == "ppo":
        values.update(
            reward_model=directory / "reward", response_length=NEW, n_epochs=EPOCHS, rollout_micro_batch_size=n,
            truncate_after=NEW - 1, samples_every=0,
        )  # fmt: skip
    if what == "rm":
        values["normalize_data"] = ""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        values["shard_size"] = 1
    command.append(f"{what}.py")
    command += [f"--{name}={value}" for name, value in values.items()]
    call(command, **options)
    return [row["seconds"] for row in read_jsonl(out_dir / "timing.jsonl")][1:]


def call(command, **options):
    """A command's output; if it fails, the end of what it said."""
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if result.returncode:
        raise SystemExit(f"{options['cwd']}: {result.stderr[-2000:]}")
    return result.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rev", help="the commit to compare with")
    parser.add_argument("--what", nargs="+", default=["ppo"], choices=N_ROWS)
    parser.add_argument("--shape", default="14m")
    parser.add_argument("--data", default=os.environ.get("NPLUS_DATA", "out/toy/data"), type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--units", type=int, default=3, help="units of work in a round, besides the first")
    args = parser.parse_args()
    data = args.data.resolve()
    temporary = tempfile.TemporaryDirectory(prefix="builds-")  # until the end of this script, whatever that is
    directory = Path(temporary.name)
    earlier = directory / "tree"
    subprocess.run(["git", "clone", "--quiet", "--no-checkout", ROOT, earlier], check=True)
    subprocess.run(["git", "checkout", "--quiet", "--detach", args.rev], cwd=earlier, check=True)
    vocabulary = data / "pythia_tokenizer.json"
    if not vocabulary.exists():
        vocabulary = data / "tokenizer.json"
    tokenizer = Tokenizer.load(str(vocabulary))
    write_models(directory, args.shape, vocabulary)

    sides = {args.rev: (earlier, 1), "now": (ROOT, 1), "now, two processes": (ROOT, 2)}
    for what in args.what:
        path, split, found = make_rows(what, N_ROWS[what], 0, data, tokenizer, directory)
        rows = {"path": path, "split": split, "rows": found, "n_vocab": tokenizer.n_vocab}
        seconds = {name: [] for name in sides if what != "generate" or sides[name][1] == 1}
        for _ in range(args.rounds):
            for name in seconds:
                root, processes = sides[name]
                seconds[name] += run(root, processes, directory, what, rows, args)
        before = statistics.median(seconds[args.rev])
        for name, values in seconds.items():
            median = statistics.median(values)
            spread = f"[{min(values):.2f}, {max(values):.2f}]"
            print(f"{what} {args.shape}, {name}: {median:.2f} s {spread}, {before / median:.2f} x", flush=True)


if __name__ == "__main__":
    main()

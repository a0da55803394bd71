"""Ours against what people would use instead, in one run: A B A B ..., the same weights, rows and number of steps.

    pip install -r bench/requirements.txt
    python bench/bench.py --what ppo --shape 14m --peer trl --data "$NPLUS_DATA"

--data: a directory with pythia_tokenizer.json and tldr_sample/ (posts and judged pairs as jsonl); without it the
embedded toy data is used, whose queries are short. Weights are random, written once in the hub's layout, and loaded by
both sides. Each side is a process of its own (bench/sides.py) that waits while the other works. The first unit of
each is a warm-up, and a check: greedy tokens, or the first loss, must agree in float32 (PPO, which samples first, has
none).
Run it alone: threads that wait spin for a while (OpenMP's default), and beside other work both sides crawl.

`generate`: a batch of responses, all of full length. `sft`, `rm`, `dpo`: an update. `ppo`: an update with its rollout.
Time is wall-clock; memory is the peak resident set of the process (on a GPU, of PyTorch's allocator). Operations are
those that the work needs: in a block 24 d^2 per token and 2 d T^2 for causal attention (of the last block, keys and
values everywhere and the rest where an output is read), 2 V d where there are logits; backward twice as many. They
are by real lengths: what a side computes on padding or in vain does not count. A row for each run is appended to
bench/RESULTS.md with --append.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from plan import PYTHIA  # noqa: E402

from configurator import require  # noqa: E402
from data import Tokenizer, load_rows  # noqa: E402
from model import GPTNeoX, GPTNeoXConfig, ScalarModel, init_weights  # noqa: E402

RESPONSE, NEW, EPOCHS = 50, 53, 4


def write_models(directory, shape, tokenizer):
    """Random weights in the hub's layout: a policy and a reward model with the same body."""
    width, layers, heads, vocabulary = PYTHIA[shape]
    config = GPTNeoXConfig(vocabulary, width, layers, heads)
    for name, cls in (("policy", GPTNeoX), ("reward", ScalarModel)):
        if not (directory / name / "model.safetensors").exists():
            with torch.device("meta"):
                model = cls(config)
            model.to_empty(device="cpu")
            init_weights(model, seed=1)
            model.save_pretrained(directory / name)
            shutil.copy(tokenizer, directory / name / "tokenizer.json")
            del model


def make_rows(what, n, query, data, tokenizer):
    """n rows of ids from real text, of the posts' own lengths; or, with `query`, of that many and RESPONSE tokens."""
    file, k = ("comparisons_train", 2) if what in ("rm", "dpo") else ("sft_train", 1)
    source = next(path for path in (data / "tldr_sample" / f"{file}.jsonl", data / f"{file}.jsonl") if path.exists())
    rows = load_rows(str(source), f"train[:{8 * n if query else n}]", tokenizer, n_responses=k)
    rows = [dict(query=row["query"], responses=row["responses"]) for row in rows]
    if query:  # cut from one long text
        text = itertools.cycle([token for row in rows for token in row["query"]])
        answers = itertools.cycle([token for row in rows for response in row["responses"] for token in response[:-1]])
        rows = [dict(query=take(text, query), responses=[take(answers, RESPONSE - 1) + [tokenizer.eos_id]
                                                         for _ in range(k)]) for _ in range(n)]  # fmt: skip
    return [row | dict(length=len(row["query"]) + max(map(len, row["responses"]))) for row in rows]


def take(tokens, n):
    return list(itertools.islice(tokens, n))


def operations(what, shape, rows):
    """Floating-point operations of a unit of work: see above."""
    d, layers, _, vocabulary = PYTHIA[shape]

    def forward(tokens, outputs, logits=True):
        blocks = (layers - 1) * (24 * d**2 * tokens + 2 * d * tokens**2)
        last = 4 * d**2 * tokens + (20 * d**2 + 4 * d * tokens - 2 * d * outputs) * outputs
        return blocks + last + 2 * vocabulary * d * outputs * logits

    total = 0
    for row in rows:
        Q = len(row["query"])
        whole = [Q + len(response) for response in row["responses"]]
        generation = forward(Q + NEW - 1, NEW)
        if what == "generate":
            total += generation
        elif what == "sft":
            total += 3 * forward(whole[0] - 1, whole[0] - 1)
        elif what == "rm":
            total += 3 * sum(forward(n, 1, False) for n in whole)
        elif what == "dpo":
            total += 3 * sum(forward(n, n - Q) for n in whole)
        else:
            both = forward(Q + NEW, NEW) + forward(Q + NEW, NEW, False)
            total += generation + 2 * both + EPOCHS * 3 * both
    return total


def fastest(work, device):
    """Seconds that work() takes: the least of several."""
    best = float("inf")
    for _ in range(12):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def matmul_peak(device, dtype):
    """Operations per second of a product of square matrices."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / fastest(lambda: a @ b, device)


def copy_peak(device):
    """Bytes per second that the copy of a large tensor reads and writes."""
    a, b = (torch.zeros(2**28, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * len(a) / fastest(lambda: a.copy_(b), device)


class Side:
    """A process that does units of work on demand."""

    def __init__(self, name, spec, directory, env):
        path = directory / f"{name}.json"
        path.write_text(json.dumps(spec))
        self.name, self.units, self.log = name, [], directory / f"{name}.log"
        command = [sys.executable, str(ROOT / "bench" / "sides.py"), str(path)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                            text=True, env={**os.environ, **env}, cwd=ROOT)  # fmt: skip

    def work(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        require(line, f"the side {self.name!r} ended; see {self.log}")
        self.units.append(json.loads(line))

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def versions(names=("torch", "transformers", "trl", "accelerate")):
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    return ", ".join(f"{name} {version}" for name, version in found.items())


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    name, vectors = names[0] if names else platform.processor(), torch.backends.cpu.get_cpu_capability()
    return f"{name}, {os.cpu_count()} cores, {vectors}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["generate", "sft", "rm", "dpo", "ppo"], required=True)
    parser.add_argument("--shape", choices=["14m", "70m", "160m", "1b", "2.8b"], default="14m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--peer", choices=["hf", "trl", "none"], default="none")
    parser.add_argument("--peer-dtype", choices=["float32", "bfloat16", "autocast"], help="if not the same as ours")
    parser.add_argument("--peer-cache", choices=["dynamic", "static"], default="dynamic")
    parser.add_argument("--peer-micro", type=int, default=0, help="the peer's rows at a time; 0: all")
    parser.add_argument("--peer-option", action="append", default=[], help="key=value of the peer's configuration")
    parser.add_argument("--micro", type=int, help="our rows at a time; by default 2, or 4 (rm, ppo)")
    parser.add_argument("--option", action="append", default=[], help="key=value of our configuration")
    parser.add_argument("--plain-malloc", action="store_true", help="leave the peer glibc's allocator as it comes")
    parser.add_argument("--rows", type=int, help="of a batch; by default 8, or 16 (generate, ppo)")
    parser.add_argument("--query", type=int, help="tokens of each query; 0: the posts' own, up to 512 (not sft, dpo)")
    parser.add_argument("--units", type=int, default=5, help="timed, of each side")
    parser.add_argument("--data", default=os.environ.get("NPLUS_DATA", "out/toy/data"))
    parser.add_argument("--out", default="out/bench")
    parser.add_argument("--append", action="store_true", help="append the row to bench/RESULTS.md")
    args = parser.parse_args()
    what, data, directory = args.what, Path(args.data), Path(args.out).resolve() / args.shape
    found = [path for path in (data / "pythia_tokenizer.json", data / "tokenizer.json") if path.exists()]
    require(found, f"{data}: no tokenizer there; set --data or NPLUS_DATA, or run make demo once")
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(str(found[0]))
    write_models(directory, args.shape, found[0])
    n = args.rows or (16 if what in ("generate", "ppo") else 8)
    query = (512 if what in ("sft", "dpo") else 0) if args.query is None else args.query
    rows = make_rows(what, n, query, data, tokenizer)
    theirs = args.peer_dtype or args.dtype
    shared = dict(what=what, rows=rows, policy=str(directory / "policy"), reward=str(directory / "reward"),
                  new_tokens=NEW, epochs=EPOCHS, device=args.device, n_vocab=tokenizer.n_vocab, pad_id=1,
                  unused=list(range(tokenizer.n_vocab, PYTHIA[args.shape][3])), rollout_micro_batch_size=n)  # fmt: skip
    micro = args.micro or (4 if what in ("rm", "ppo") else 2)
    specs = {"ours": shared | dict(dtype=args.dtype, micro_batch_size=micro, options=literals(args.option))}
    if args.peer != "none":
        specs[args.peer] = shared | dict(dtype=theirs, micro_batch_size=args.peer_micro, cache=args.peer_cache,
                                         autocast=theirs == "autocast", options=literals(args.peer_option),
                                         weights="float32" if theirs == "autocast" else theirs)  # fmt: skip
    # both keep what they free, which is faster for both: runtime.py asks glibc for it, the peer is given it here
    malloc = dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**31 - 1), MALLOC_TOP_PAD_=str(2**26))
    quiet = dict(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
    sides = []
    for name, spec in specs.items():
        out_dir = directory / f"{what}-{name}"
        shutil.rmtree(out_dir, ignore_errors=True)
        env = quiet if args.plain_malloc and name != "ours" else quiet | malloc
        sides.append(Side(name, spec | dict(side=name, out_dir=str(out_dir)), directory, env))
        sides[-1].work()  # one after the other: loading, and warming up
    peak = matmul_peak(args.device, getattr(torch, args.dtype))
    for _ in range(args.units):
        for side in sides:
            side.work()
    for side in sides:
        side.end()
    flops = operations(what, args.shape, rows)
    tokens = n * NEW if what in ("generate", "ppo") else sum(row["length"] for row in rows)  # sampled, or trained on
    cells = []
    for side in sides:
        seconds = [unit["seconds"] for unit in side.units[1:]]
        median, memory = statistics.median(seconds), max(unit["peak"] for unit in side.units) / 2**30
        cells.append((median, min(seconds), max(seconds), memory))
        speed = f"{tokens / median:8.1f} tokens/s  {n / median:7.3f} rows/s"
        rate = f"{flops / median / 1e9:8.1f} GFLOP/s, {100 * flops / median / peak:.0f} % of {peak / 1e9:.0f}"
        span = f"{median:8.3f} s  [{min(seconds):.3f}, {max(seconds):.3f}]"
        print(f"{side.name:5} {span}  {speed}  {memory:6.2f} GiB  {rate}", flush=True)
    check, ratio, less = agreement(what, sides, exact=args.dtype == theirs == "float32"), "", ""
    if what == "generate":  # what generating in small batches cannot go below: each token reads all blocks and the head
        width, layers, _, vocabulary = PYTHIA[args.shape]
        read = (12 * layers * width**2 + vocabulary * width) * getattr(torch, args.dtype).itemsize
        limit = NEW * read / copy_peak(args.device)
        reads = f"reading the weights {NEW} times: {limit:.2f} s, {100 * limit / cells[0][0]:.0f} % of ours"
        check = "; ".join(filter(None, (check, reads)))
    print(check)
    if len(sides) == 2:
        ratio, less = f"{cells[1][0] / cells[0][0]:.2f}", f"{cells[0][3] / cells[1][3]:.2f}"
        print(f"ratio {ratio}, memory {less}")
    if args.append:
        changes = [f"micro-batch {args.peer_micro}"] * (args.peer_micro > 0) + args.peer_option
        changes += [theirs] * (theirs != args.dtype) + [args.peer_cache] * (what == "generate")
        changes += ["glibc's malloc as it comes"] * args.plain_malloc
        how = " ".join(["-" if args.peer == "none" else args.peer, *([f"({', '.join(changes)})"] if changes else [])])
        times = [f"{median:.2f} [{low:.2f}, {high:.2f}] s" for median, low, high, _ in cells] + ["-"]
        speed = f"{flops / cells[0][0] / 1e9:.0f} GFLOP/s, {100 * flops / cells[0][0] / peak:.0f} %"
        size = f"{n} x {query or 'up to 512'}"
        memory = " / ".join(f"{cell[3]:.2f}" for cell in cells) + " GiB"
        row = [what, args.shape, args.dtype, size, times[0], how, times[1], ratio, memory, less,
               f"{tokens / cells[0][0]:.0f}", f"{n / cells[0][0]:.2f}", speed, check,
               f"{device_name(args.device)}; {versions()}"]  # fmt: skip
        with open(ROOT / "bench" / "RESULTS.md", "a", encoding="utf-8") as file:
            file.write("| " + " | ".join(row) + " |\n")


def literals(pairs):
    return {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in pairs)}


def agreement(what, sides, exact):
    """Do both compute the same? Greedy tokens, or the loss of the first update (not of PPO, which samples first).

    exact: it is an error if they do not.
    """
    if len(sides) < 2 or what == "ppo":
        return ""
    if what == "generate":
        ours, theirs = (side.units[0]["tokens"] for side in sides)
        require(not exact or ours == theirs, "the greedy tokens are not the same")
        same = [next((i for i, (x, y) in enumerate(zip(p, q)) if x != y), len(p)) for p, q in zip(ours, theirs)]
        return f"greedy: {sum(same)} of {sum(map(len, ours))} tokens before a row's first difference"
    # the peer logs a loss after its unit
    losses = [side.units[late].get("loss", torch.nan) for late, side in enumerate(sides)]
    require(not exact or abs(losses[0] - losses[1]) < 1e-3, f"the first losses are not the same: {losses}")
    return "first loss " + " / ".join(f"{loss:.4f}" for loss in losses)


if __name__ == "__main__":
    main()

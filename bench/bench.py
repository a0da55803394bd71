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
import functools
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
from hub.files import read_jsonl, write_jsonl  # noqa: E402
from model import GPTNeoX, GPTNeoXConfig, ScalarModel, init_weights  # noqa: E402

RESPONSE = 50  # tokens of a response that is trained on, EOS included, where queries have a fixed length
NEW = 53  # tokens sampled
EPOCHS = 4  # of PPO
SEED = 1  # of the weights, and of our runs
PAIRS = ("rm", "dpo")  # what trains on pairs
SAMPLES = ("generate", "ppo")  # what samples


# ---------------------------------------------------------------------------- the same models and rows for both


def write_models(directory, shape, tokenizer):
    """Random weights in the hub's layout: a policy, and a reward model with the same body.

    Its head is the one that rm.py draws from its seed, so that a peer can begin with the same.
    """
    width, layers, heads, vocabulary = PYTHIA[shape]
    config = GPTNeoXConfig(vocabulary, width, layers, heads)
    for name, cls in (("policy", GPTNeoX), ("reward", ScalarModel)):
        if not (directory / name / "model.safetensors").exists():
            with torch.device("meta"):
                model = cls(config)
            model.to_empty(device="cpu")
            init_weights(model, SEED)
            model.save_pretrained(directory / name)
            del model
        shutil.copyfile(tokenizer, directory / name / "tokenizer.json")  # an earlier run may have had other data


def make_rows(what, n, query, data, tokenizer, directory):
    """n rows of real text, of the posts' own lengths; or, with `query`, of that many tokens and RESPONSE.

    Returns the file and the split of it where they are, and what load_rows gives for that: both sides get these ids.
    """
    name = "comparisons_train.jsonl" if what in PAIRS else "sft_train.jsonl"
    path = data / "tldr_sample" / name
    if not path.exists():
        path = data / name
    n_responses = 2 if what in PAIRS else 1
    split = f"train[:{n}]"
    if query:
        texts = load_rows(str(path), f"train[:{8 * n}]", tokenizer, n_responses=n_responses)
        path = directory / f"{what}.jsonl"
        split = "train"
        write_jsonl(path, cut_rows(texts, n, query, tokenizer))
    rows = []
    for row in load_rows(str(path), split, tokenizer, n_responses=n_responses):
        rows.append({key: row[key] for key in ("query", "responses", "length")})
    if query:
        require(all(row["length"] == query + RESPONSE for row in rows), f"{path}: rows of other lengths")
    return path, split, rows


def cut_rows(texts, n, query, tokenizer):
    """n rows of {prompt, completion} or {prompt, chosen, rejected}, cut from one long text."""
    prompts = []
    answers = []
    for row in texts:
        prompts += row["query"]
        for response in row["responses"]:
            answers += response[:-1]  # without EOS, which load_rows adds
    prompts = pieces(prompts, query, tokenizer)
    answers = pieces(answers, RESPONSE - 1, tokenizer)
    names = ("chosen", "rejected") if len(texts[0]["responses"]) == 2 else ("completion",)
    rows = []
    for _ in range(n):
        row = {"prompt": next(prompts)}
        row.update((name, next(answers)) for name in names)
        rows.append(row)
    return rows


def pieces(ids, length, tokenizer):
    """Endless texts of `length` tokens: pieces of `ids`, one behind the other, that have the same tokens alone.

    (Where a piece ends within a word, or begins so, its text may be tokenised otherwise: the next one is taken.)
    """
    ids = ids * (1 + 2 * length // len(ids))
    texts = []
    start = 0
    while start + length <= len(ids):
        piece = ids[start : start + length]
        text = tokenizer.decode(piece)
        if tokenizer.encode(text) == piece:
            texts.append(text)
            start += length
        else:
            start += 1
    require(texts, f"no piece of {length} tokens of the data has the same tokens when it stands alone")
    return itertools.cycle(texts)


# ---------------------------------------------------------------------------- what the work needs


def operations_of_a_pass(d, layers, vocabulary, tokens, outputs, logits=True):
    """Over a row of `tokens`, of which the last `outputs` are asked for."""
    blocks = (layers - 1) * (24 * d**2 * tokens + 2 * d * tokens**2)
    last = 4 * d**2 * tokens + (20 * d**2 + 4 * d * tokens - 2 * d * outputs) * outputs
    head = 2 * vocabulary * d * outputs if logits else 0
    return blocks + last + head


def operations(what, shape, rows):
    """Floating-point operations of a unit of work: see above."""
    d, layers, _, vocabulary = PYTHIA[shape]
    forward = functools.partial(operations_of_a_pass, d, layers, vocabulary)
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
            total += 3 * sum(forward(length, 1, logits=False) for length in whole)
        elif what == "dpo":
            total += 3 * sum(forward(length, length - Q) for length in whole)
        else:
            both = forward(Q + NEW, NEW) + forward(Q + NEW, NEW, logits=False)
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
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / fastest(lambda: left @ right, device)


def copy_peak(device):
    """Bytes per second that the copy of a large tensor reads and writes."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * len(source) / fastest(lambda: target.copy_(source), device)


# ---------------------------------------------------------------------------- the sides


class Side:
    """A process that does units of work on demand."""

    def __init__(self, name, spec, directory, environment):
        self.name = name
        self.units = []  # what it answered, the warm-up first
        self.out_dir = Path(spec["out_dir"])
        self.log = directory / f"{name}.log"
        path = directory / f"{name}.json"
        path.write_text(json.dumps(spec))
        command = [sys.executable, str(ROOT / "bench" / "sides.py"), str(path)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, **environment}, cwd=ROOT,
            )  # fmt: skip

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

    @property
    def seconds(self):
        return [unit["seconds"] for unit in self.units[1:]]

    @property
    def median(self):
        return statistics.median(self.seconds)

    @property
    def gigabytes(self):
        return max(unit["peak"] for unit in self.units) / 2**30

    def first_loss(self):
        """Ours writes it to metrics.jsonl; the peer's comes with its next unit."""
        if self.name != "ours":
            return self.units[1].get("loss", torch.nan)
        first = read_jsonl(self.out_dir / "metrics.jsonl")[0]
        return next(value for name, value in first.items() if name.startswith("loss/"))


def start_sides(args, directory, tokenizer, path, split, rows):
    """Each side, when it has loaded all and warmed up."""
    n_vocab = tokenizer.n_vocab
    common = {
        "what": args.what,
        "data": str(path),
        "split": split,
        "rows": rows,
        "policy": str(directory / "policy"),
        "reward": str(directory / "reward"),
        "seed": SEED,
        "new_tokens": NEW,
        "epochs": EPOCHS,
        "device": args.device,
        "n_vocab": n_vocab,
        "pad_id": 1,
        "unused": list(range(n_vocab, PYTHIA[args.shape][3])),
        "rollout_micro_batch_size": len(rows),
    }
    ours = {"dtype": args.dtype, "micro_batch_size": args.micro, "options": literals(args.option)}
    specs = {"ours": ours}
    if args.peer != "none":
        autocast = args.peer_dtype == "autocast"
        specs[args.peer] = {
            "dtype": args.peer_dtype,
            "autocast": autocast,
            "weights": "float32" if autocast else args.peer_dtype,
            "micro_batch_size": args.peer_micro,
            "cache": args.peer_cache,
            "options": literals(args.peer_option),
        }
    # Both keep what they free, which is faster for both: our runs ask glibc for it, the peer is given it here.
    malloc = {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
        "MALLOC_TOP_PAD_": str(2**26),
    }
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    sides = []
    for name, own in specs.items():
        out_dir = directory / f"{args.what}-{name}"
        shutil.rmtree(out_dir, ignore_errors=True)
        is_plain = args.plain_malloc and name != "ours"
        environment = quiet if is_plain else {**quiet, **malloc}
        side = Side(name, {**common, **own, "side": name, "out_dir": str(out_dir)}, directory, environment)
        side.work()  # one after the other: loading, and warming up
        sides.append(side)
    return sides


def literals(pairs):
    """["key=value", ...] -> {key: value}, values read as JSON; what is none is a text."""
    values = {}
    for pair in pairs:
        key, text = pair.split("=", 1)
        values[key] = text
        with contextlib.suppress(json.JSONDecodeError):
            values[key] = json.loads(text)
    return values


def agreement(what, sides, exact):
    """Do both compute the same? Greedy tokens, or the loss of the first update (not of PPO, which samples first).

    exact: it is an error if they do not.
    """
    if len(sides) < 2 or what == "ppo":
        return ""
    if what == "generate":
        ours = sides[0].units[0]["tokens"]
        theirs = sides[1].units[0]["tokens"]
        require(not exact or ours == theirs, "the greedy tokens are not the same")
        same = sum(map(shared_length, ours, theirs))
        return f"greedy: {same} of {sum(map(len, ours))} tokens before a row's first difference"
    losses = [side.first_loss() for side in sides]
    require(not exact or abs(losses[0] - losses[1]) < 1e-3, f"the first losses are not the same: {losses}")
    return "first loss " + " / ".join(f"{loss:.4f}" for loss in losses)


def shared_length(left, right):
    """How many tokens two rows share before they differ."""
    for number, (one, other) in enumerate(zip(left, right)):
        if one != other:
            return number
    return len(left)


def weight_reading(args, seconds):
    """What generating in small batches cannot go below: each token reads all blocks and the head."""
    width, layers, _, vocabulary = PYTHIA[args.shape]
    read = (12 * layers * width**2 + vocabulary * width) * getattr(torch, args.dtype).itemsize
    limit = NEW * read / copy_peak(args.device)
    return f"reading the weights {NEW} times: {limit:.2f} s, {100 * limit / seconds:.0f} % of ours"


# ---------------------------------------------------------------------------- the command


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["generate", "sft", "rm", "dpo", "ppo"], required=True)
    parser.add_argument("--shape", choices=["14m", "70m", "160m", "1b", "2.8b"], default="14m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--peer", choices=["hf", "trl", "rloo", "none"], default="none", help="rloo: our own variant")
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
    if args.rows is None:
        args.rows = 16 if args.what in SAMPLES else 8
    if args.query is None:
        args.query = 512 if args.what in ("sft", "dpo") else 0
    if args.micro is None:
        args.micro = 4 if args.what in ("rm", "ppo") else 2
    if args.peer_dtype is None:
        args.peer_dtype = args.dtype
    return args


def main():
    args = arguments()
    data = Path(args.data)
    directory = Path(args.out).resolve() / args.shape
    found = [path for path in (data / "pythia_tokenizer.json", data / "tokenizer.json") if path.exists()]
    require(found, f"{data}: no tokenizer there; set --data or NPLUS_DATA, or run make demo once")
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(str(found[0]))
    write_models(directory, args.shape, found[0])
    path, split, rows = make_rows(args.what, args.rows, args.query, data, tokenizer, directory)

    sides = start_sides(args, directory, tokenizer, path, split, rows)
    peak = matmul_peak(args.device, getattr(torch, args.dtype))
    for _ in range(args.units):
        for side in sides:
            side.work()
    for side in sides:
        side.end()

    flops = operations(args.what, args.shape, rows)
    tokens = args.rows * NEW  # sampled,
    if args.what not in SAMPLES:
        tokens = sum(row["length"] for row in rows)  # or trained on
    for side in sides:
        print_side(side, flops, tokens, args.rows, peak)
    exact = args.dtype == args.peer_dtype == "float32"
    checks = [agreement(args.what, sides, exact)]
    if args.what == "generate":
        checks.append(weight_reading(args, sides[0].median))
    check = "; ".join(filter(None, checks))
    print(check)
    if len(sides) == 2:
        print(f"ratio {sides[1].median / sides[0].median:.2f}, memory {sides[0].gigabytes / sides[1].gigabytes:.2f}")
    if args.append:
        append(args, sides, flops, tokens, peak, check)


def print_side(side, flops, tokens, n_rows, peak):
    span = f"{side.median:8.3f} s  [{min(side.seconds):.3f}, {max(side.seconds):.3f}]"
    speed = f"{tokens / side.median:8.1f} tokens/s  {n_rows / side.median:7.3f} rows/s"
    rate = f"{flops / side.median / 1e9:8.1f} GFLOP/s, {100 * flops / side.median / peak:.0f} % of {peak / 1e9:.0f}"
    print(f"{side.name:5} {span}  {speed}  {side.gigabytes:6.2f} GiB  {rate}", flush=True)


def append(args, sides, flops, tokens, peak, check):
    """A row of the table that ends bench/RESULTS.md."""
    ours = sides[0]
    times = [f"{side.median:.2f} [{min(side.seconds):.2f}, {max(side.seconds):.2f}] s" for side in sides]
    memory = " / ".join(f"{side.gigabytes:.2f}" for side in sides)
    time_ratio = ""
    memory_ratio = ""
    if len(sides) == 2:
        time_ratio = f"{sides[1].median / ours.median:.2f}"
        memory_ratio = f"{ours.gigabytes / sides[1].gigabytes:.2f}"
    cells = [
        args.what,
        args.shape,
        args.dtype,
        f"{args.rows} x {args.query or 'up to 512'}",
        times[0],
        peer_settings(args),
        times[1] if len(sides) == 2 else "-",
        time_ratio,
        f"{memory} GiB",
        memory_ratio,
        f"{tokens / ours.median:.0f}",
        f"{args.rows / ours.median:.2f}",
        f"{flops / ours.median / 1e9:.0f} GFLOP/s, {100 * flops / ours.median / peak:.0f} %",
        check,
        f"{device_name(args.device)}; {versions()}",
    ]
    with open(ROOT / "bench" / "RESULTS.md", "a", encoding="utf-8") as file:
        file.write(f"| {' | '.join(cells)} |\n")


def peer_settings(args):
    """The peer, and in brackets what is not its default."""
    if args.peer == "none":
        return "-"
    changes = []
    if args.peer_micro:
        changes.append(f"micro-batch {args.peer_micro}")
    changes += args.peer_option
    if args.peer_dtype != args.dtype:
        changes.append(args.peer_dtype)
    if args.what == "generate":
        changes.append(args.peer_cache)
    if args.plain_malloc:
        changes.append("glibc's malloc as it comes")
    return f"{args.peer} ({', '.join(changes)})" if changes else args.peer


def versions(names=("torch", "transformers", "trl", "accelerate")):
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} -")
    return ", ".join(found)


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()

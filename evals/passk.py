"""pass@k: how likely one of k samples is right, where a function can tell right from wrong (arXiv:2107.03374).

    python sample.py config/sums_sample.py --scorer=toy.sums --model=out/sums/grpo/final --out_dir=out/sums/grpo/samples
    torchrun --nproc_per_node=8 -m evals.passk --scorer=my.answers --model=out/grpo_1b/final --data=... --n_samples=64

The scorer is a Python module with score(queries, responses, rows) -> floats, 1 for right and 0 for wrong: two lists of
texts, and the data's rows, so that it can look up an answer. A response that is cut off is scored as it stands; in
training it has missing_eos_score.

Prints pass@1, pass@2, pass@4 .. pass@n_samples, each with the 95 % bootstrap interval over the queries. With out_dir:
samples.jsonl, a row per query (query, its first response, correct: how many samples are right, n_samples), and
summary.json.
"""

import math
from dataclasses import dataclass

from configurator import Count, configure, require
from evals import scores
from evals.samples import sample, split_of
from evals.tables import line
from evals.winrate import interval
from hub.files import write_json, write_jsonl
from hub.tokenizer import Tokenizer
from model import GPTNeoX
from runtime import Data, RunConfig, World, load_model, load_split, open_directory, stage


@dataclass
class Config(RunConfig):
    # ---- models
    model: str = "out/ppo_1b/final"  # what to sample from: hub id or directory
    scorer: str = ""  # says what is right: a Python module with score(queries, responses, rows) -> 1 or 0 each
    # ---- queries
    data: str = ""  # hub id, directory or file (hub/reader.py)
    split: str = ""  # the rows to sample for, for example validation[:100]; empty: validation, or all of a single file
    # ---- sampling
    n_samples: Count = 16  # responses drawn for each query
    response_length: Count = 53  # tokens sampled at most
    temperature: float = 0.7  # 0: greedy, so that all samples of a query are the same
    micro_batch_size: Count = 64  # rows per forward pass and process
    # ---- results
    out_dir: str = ""  # where all files go; empty: only print


@stage
def main(cfg):
    world = World(cfg)
    if cfg.out_dir:
        out_dir = open_directory(cfg, world)
    function = scores.from_module(cfg.scorer)
    require(cfg.data, "pass@k needs rows to sample for; give --data=...")

    tokenizer = Tokenizer.load(cfg.model)
    rows = load_split(cfg, world, tokenizer, cfg.data, split_of(cfg), n_responses=0)
    data = Data(tokenizer, rows, held_out=None, n_updates=0)
    score = scores.by_function(cfg, world, data, function, split_of(cfg))
    model = load_model(cfg, world, tokenizer, GPTNeoX, cfg.model)

    # n rounds, in each of which every query has one response.
    queries = list(rows["query"])
    n = cfg.n_samples
    responses = sample(cfg, world, tokenizer, model, queries * n)
    counts = count_right(score, queries, responses, n)
    table = pass_table(counts, n, cfg.seed)
    world.print(cfg.model)
    for name, row in table.items():
        world.print(line(name, row))

    if cfg.out_dir and world.is_main:
        samples = []
        for query, response, n_right in zip(queries, responses, counts):
            row = {"query": tokenizer.decode(query), "response": tokenizer.decode(response)}
            samples.append({**row, "correct": n_right, "n_samples": n})
        write_jsonl(out_dir / "samples.jsonl", samples)
        rates = {name: row["rate"] for name, row in table.items()}
        write_json(out_dir / "summary.json", {"model": cfg.model, "n": len(queries), **rates, "intervals": table})
        print(f"wrote {out_dir}/samples.jsonl and summary.json")


def count_right(score, queries, responses, n):
    """How many of the n responses to each query are right: a list of ints.

    score: as in evals/scores.py, 1.0 or 0.0 for each. responses: n rounds, each to all queries.
    """
    indices = list(range(len(queries))) * n
    found = score(queries * n, responses, indices)
    unclear = found[(found != 0) & (found != 1)].tolist()
    require(not unclear, f"the scorer gave {unclear[:1]}; pass@k needs 1 for right and 0 for wrong")
    rounds = found.int().view(n, -1)  # (n, queries)
    return rounds.sum(0).tolist()


def pass_table(counts, n, seed=0):
    """{"pass@1": {"rate", "low", "high"}, "pass@2": ..}, for k = 1, 2, 4 .. and n: means over queries.

    counts: how many of the n samples of each query are right.
    """
    sizes = [2**power for power in range(n.bit_length())]
    if sizes[-1] < n:
        sizes.append(n)
    table = {}
    for k in sizes:
        estimates = [pass_at_k(n, n_right, k) for n_right in counts]
        table[f"pass@{k}"] = interval(estimates, seed)
    return table


def pass_at_k(n, n_right, k):
    """Of all choices of k among n samples, the share that holds a right one: 1 - C(n - n_right, k) / C(n, k). (eq. 1)

    It estimates pass@k without bias; 1 - (1 - n_right / n)^k is too low.
    """
    require(k <= n, f"pass@{k} cannot be told from {n} samples; draw {k} or more")
    none_right = math.comb(n - n_right, k) / math.comb(n, k)
    return 1 - none_right


if __name__ == "__main__":
    main(configure(Config))

"""What bench/ counts on paper is what PyTorch counts in a pass, and in an update of PPO.

Operations of products: FlopCounterMode sees them in every call. In bfloat16 on a CPU attention is two products as well,
over all pairs of a query and a key, of which a causal model needs half: these are taken apart.
"""

import json
import subprocess
import sys

import pytest
from pipeline import ROOT, arguments, write_rows

import ppo

COUNT = """
import json, sys
sys.path[:0] = ["bench", "."]
import torch
from torch.utils.flop_counter import FlopCounterMode

def counted(work):
    # Attention is bmm, all else mm or addmm.
    with FlopCounterMode(display=False) as counter:
        work()
    products = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in products.items() if "bmm" in str(op))
    return sum(products.values()) - attention, attention
"""

PASS = """
from bench import operations_of_a_pass
from cost import forward
from model import GPTNeoX, GPTNeoXConfig

d, layers, vocabulary, T, R = 32, 3, 640, 40, 6
shape = GPTNeoXConfig(hidden_size=d, num_hidden_layers=layers, vocab_size=vocabulary, num_attention_heads=4)
model = GPTNeoX(shape).bfloat16()
ids = torch.zeros(1, T, dtype=torch.long)
select = torch.arange(T - R, T)[None]
print(json.dumps({
    "all": counted(lambda: model(ids)),
    "some": counted(lambda: model(ids, select)),
    "bench all": operations_of_a_pass(d, layers, vocabulary, T, T),
    "bench some": operations_of_a_pass(d, layers, vocabulary, T, R),
    "bench body": operations_of_a_pass(d, layers, vocabulary, T, T, logits=False),
    "head": 2 * vocabulary * d * T,
    "attention": 4 * d * sum(layers * (T - t) for t in range(T)),
    "attention some": 4 * d * sum((layers - 1) * (T - t) for t in range(T)) + 4 * d * sum(T - t for t in range(R)),
    "q": 2 * d * d * (T - R),
}))
"""

UPDATE = """
import ppo
from configurator import configure
from data import load_rows
from hub.tokenizer import Tokenizer
from phases import operations
from plan import shape_of

cfg = configure(ppo.Config, sys.argv[1:])
query = load_rows(cfg.data, "train", Tokenizer.load(cfg.model), 0)[0]["query"]
linear, attention = counted(lambda: ppo.main(cfg))
settings = {name: getattr(cfg, name) for name in ("n_epochs", "batch_size")}
phases = operations(shape_of(cfg.model), settings, len(query), cfg.response_length)
print(json.dumps([linear, attention, phases]))
"""


def run(script, *options):
    command = [sys.executable, "-c", COUNT + script, *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_a_pass_takes_the_operations_that_are_counted_for_it():
    """Attention: query t sees t + 1 keys, which the formulas round to t + 1/2; the code computes all T, and q at all
    positions of the last block, of which bench/bench.py counts those that are asked for.
    """
    n = run(PASS)
    rounded = n["attention"] / 40  # half a key for each query, of 20 that it sees in the mean
    linear, attention = n["all"]
    assert attention == pytest.approx(2 * n["attention"], rel=0.03)
    assert n["bench all"] == pytest.approx(linear + n["attention"], abs=rounded)
    assert n["bench all"] - n["bench body"] == n["head"]
    linear, attention = n["some"]
    assert n["bench some"] + n["q"] == pytest.approx(linear + n["attention some"], abs=rounded)
    assert attention < 2 * n["attention some"]


def test_an_update_takes_the_operations_that_are_counted_for_it(pipeline, tmp_path):
    """The phases of bench/phases.py together, for equal queries and responses that are sampled to their end.

    Of attention the code computes two to three times what is needed: all pairs of a pass, and all columns of the cache.
    What is counted for it lies within that; everything else is the same but for 1 % (q of the last block).
    """
    post = {"prompt": "a post of a few words that all rows have " * 3, "completion": " x"}
    data = write_rows(tmp_path / "rows.jsonl", [post] * 8)
    cfg = pipeline.config(ppo, "counted", data=data, episodes=8, dtype="bfloat16", truncate_after=9)
    linear, attention, phases = run(UPDATE, *arguments(cfg))
    assert list(phases) == ["generation", "scoring", "policy", "critic"]
    assert 0.99 * linear + attention / 3 < sum(phases.values()) < linear + attention / 2
    assert phases["policy"] / phases["critic"] > 1.2  # the head for the vocabulary

"""What bench/ counts on paper is what PyTorch counts: in a pass, and in each phase of an update of PPO.

FlopCounterMode sees every product. In bfloat16 on a CPU attention is two products as well, over all pairs of a query
and a key, of which a causal model needs half: these are left out, and what is needed is added by hand.
"""

import json
import subprocess
import sys

import pytest
from pipeline import ROOT, arguments, write_rows

import ppo

D, LAYERS, VOCABULARY = 32, 2, 896

COUNT = """
import json, sys
sys.path[:0] = ["bench", "."]
import torch
from torch.utils.flop_counter import FlopCounterMode

def linear(counter):
    # Attention is bmm, all else mm or addmm.
    products = counter.get_flop_counts().get("Global", {})
    return sum(n for op, n in products.items() if "bmm" not in str(op))
"""

PASS = """
from bench import operations_of_a_pass
from cost import forward
from model import GPTNeoX, GPTNeoXConfig
from plan import PYTHIA

d, layers, vocabulary, T, R = map(int, sys.argv[1:])
PYTHIA["tiny"] = (d, layers, 4, vocabulary)
shape = GPTNeoXConfig(hidden_size=d, num_hidden_layers=layers, vocab_size=vocabulary, num_attention_heads=4)
model = GPTNeoX(shape).bfloat16()
ids = torch.zeros(1, T, dtype=torch.long)
found = {"bench": operations_of_a_pass(d, layers, vocabulary, T, R), "cost": forward("tiny", T, R)}
with FlopCounterMode(display=False) as counter:
    model(ids, torch.arange(T - R, T)[None])
print(json.dumps({**found, "counted": linear(counter)}))
"""

UPDATE = """
import ppo
from configurator import configure
from data import load_rows
from distributed.processes import Stopwatch
from hub.tokenizer import Tokenizer
from phases import operations
from plan import shape_of

counter = FlopCounterMode(display=False)
counted = {}
before = 0
end_phase = Stopwatch.__call__

def count_phase(stopwatch, name):
    global before
    now = linear(counter)
    counted[stopwatch.name] = counted.get(stopwatch.name, 0) + now - before
    before = now
    end_phase(stopwatch, name)

Stopwatch.__call__ = count_phase
cfg = configure(ppo.Config, sys.argv[1:])
query = load_rows(cfg.data, "train", Tokenizer.load(cfg.model), 0)[0]["query"]
with counter:
    ppo.main(cfg)
settings = {name: getattr(cfg, name) for name in ("n_epochs", "batch_size")}
paper = operations(shape_of(cfg.model), settings, len(query), cfg.response_length)
print(json.dumps([len(query), counted, paper]))
"""


def run(script, *options):
    command = [sys.executable, "-c", COUNT + script, *map(str, options)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def attention(T, R):
    """Operations for a row of T tokens, in the last block for R of them alone: 4 d for each key that a query sees.

    (The papers' formulas round the t keys that query t sees to t - 1/2: by 1 / T of the whole.)
    """
    seen = range(1, T + 1)
    return 4 * D * ((LAYERS - 1) * sum(seen) + sum(seen[T - R :]))


def unasked(T, R):
    """The code computes q of all positions in the last block, of which R are asked for."""
    return 2 * D**2 * (T - R)


@pytest.mark.parametrize("T, R", [(40, 40), (40, 6), (40, 1)])
def test_a_pass_takes_the_operations_that_are_counted_for_it(T, R):
    n = run(PASS, D, LAYERS, VOCABULARY, T, R)
    rounded = attention(T, T) / T
    assert n["bench"] + unasked(T, R) == pytest.approx(n["counted"] + attention(T, R), abs=rounded)
    # bench/cost.py has the last block compute all positions.
    rest_of_last = 18 * D**2 * (T - R) + attention(T, T) - attention(T, R)
    assert n["cost"] == pytest.approx(n["counted"] + attention(T, R) + rest_of_last, abs=rounded)


def test_an_update_takes_the_operations_that_are_counted_for_it(pipeline, tmp_path):
    """Phase by phase, for equal queries and responses that are sampled to their end."""
    post = {"prompt": "a post of a few words that all rows have " * 3, "completion": " x"}
    data = write_rows(tmp_path / "rows.jsonl", [post] * 8)
    cfg = pipeline.config(ppo, "counted", data=data, episodes=8, dtype="bfloat16", truncate_after=9, n_epochs=3)
    query, counted, paper = run(UPDATE, *arguments(cfg))
    R = cfg.response_length
    T = query + R
    passes = {
        "generation": [(T - 1, R)],  # the last token is not read
        "scoring": [(T, R)] * 3 + [(T, 1)],
        "policy": [(T, R)] * 3 * cfg.n_epochs,  # forward, and backward twice as much
        "critic": [(T, R)] * 3 * cfg.n_epochs,
    }
    assert list(paper) == list(passes)
    for phase, sizes in passes.items():
        by_code = counted[phase] + cfg.batch_size * sum(attention(*size) for size in sizes)
        by_paper = paper[phase] + cfg.batch_size * sum(unasked(*size) for size in sizes)
        assert by_paper == pytest.approx(by_code, rel=5e-3), phase  # attention is a tenth, and rounded by 1 / T
    assert counted["optimizer"] == 0

"""pass@k: the estimator by enumeration, and what evals/passk.py counts and writes."""

import dataclasses
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from pipeline import ROOT, read_rows

from configurator import UserError
from evals import passk
from hub.files import read_json

# Right are responses of an even number of characters. The module keeps what it was given.
SCORER = """
calls = []

def score(queries, responses, rows):
    calls.append((queries, responses, rows))
    return [float(len(response) % 2 == 0) for response in responses]
"""


# ---------------------------------------------------------------------------- the estimator


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_one(n):
    for n_right in range(n + 1):
        is_right = [True] * n_right + [False] * (n - n_right)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(is_right, k))
            share = sum(map(any, subsets)) / len(subsets)
            assert passk.pass_at_k(n, n_right, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_matches_the_program_of_the_paper():
    """arXiv:2107.03374 figure 3: 1 - prod(1 - k / i) over i = n - c + 1 .. n."""
    for n, n_right, k in itertools.product([100, 200], [1, 3, 50], [1, 10, 100]):
        if n - n_right < k:
            expected = 1.0
        else:
            expected = 1 - np.prod(1 - k / np.arange(n - n_right + 1, n + 1))
        assert passk.pass_at_k(n, n_right, k) == pytest.approx(expected, abs=1e-10)


def test_pass_at_k_has_no_bias():
    """Over all outcomes of 10 samples, each right with probability 0.3, its mean is 1 - 0.7^k; the plug-in's is not."""
    chances = [math.comb(10, n_right) * 0.3**n_right * 0.7 ** (10 - n_right) for n_right in range(11)]
    for k in (1, 2, 5, 10):
        mean = sum(chance * passk.pass_at_k(10, n_right, k) for n_right, chance in enumerate(chances))
        assert mean == pytest.approx(1 - 0.7**k, abs=1e-12)
    plug_in = sum(chance * (1 - (1 - n_right / 10) ** 5) for n_right, chance in enumerate(chances))
    assert plug_in < 1 - 0.7**5 - 0.02


def test_pass_at_k_of_none_and_of_all():
    for k in (1, 7, 64):
        assert passk.pass_at_k(64, 0, k) == 0
        assert passk.pass_at_k(64, 64, k) == 1
    assert passk.pass_at_k(64, 1, 64) == 1  # whoever draws all has the right one
    assert passk.pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)  # numbers of 3,000 digits
    with pytest.raises(UserError, match="pass@9 cannot be told from 8 samples; draw 9 or more"):
        passk.pass_at_k(8, 3, 9)


def test_table_has_the_powers_of_two_and_n():
    """Two queries, none and 1 of n right: pass@k is half of k / n."""
    for n, sizes in [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (10, [1, 2, 4, 8, 10])]:
        table = passk.pass_table([0, 1], n)
        assert list(table) == [f"pass@{k}" for k in sizes]
        for k in sizes:
            row = table[f"pass@{k}"]
            assert row["rate"] == pytest.approx(k / n / 2)
            assert row["low"] == 0 and row["high"] == pytest.approx(k / n)  # one draw in four has twice the same query


# ---------------------------------------------------------------------------- the script


def test_right_samples_are_counted_for_their_own_query():
    """Three queries, two rounds: the first is right in both, the second in one, the third in none."""
    queries = [[1], [2], [3]]
    responses = [[1, 0], [2, 0], [9, 0], [1, 0], [8, 0], [9, 0]]
    asked = []

    def score(queries, responses, indices):
        asked.extend(indices)
        return torch.tensor([float(query[0] == response[0]) for query, response in zip(queries, responses)])

    assert passk.count_right(score, queries, responses, 2) == [2, 1, 0]
    assert asked == [0, 1, 2, 0, 1, 2]
    with pytest.raises(UserError, match=r"the scorer gave \[0.5\]; pass@k needs 1 for right and 0 for wrong"):
        passk.count_right(lambda *_: torch.tensor([1, 0, 1, 0.5, 0, 0]), queries, responses, 2)


@pytest.fixture
def config(pipeline, tmp_path, monkeypatch):
    """Of a run with the scorer above, as the module `even`."""
    (tmp_path / "even.py").write_text(SCORER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "even", raising=False)
    options = dict(device="cpu", response_length=6, temperature=1.0, micro_batch_size=50)
    data = f"{pipeline.data}/sft_{{split}}.jsonl"
    return passk.Config(
        model=str(pipeline.sft), data=data, scorer="even", n_samples=5, out_dir=str(tmp_path / "out"), **options
    )


def test_files_say_what_the_scorer_said(config, pipeline, tmp_path):
    passk.main(config)
    ((queries, responses, rows),) = sys.modules["even"].calls
    data = read_rows(pipeline.data / "sft_validation.jsonl")
    assert rows == data * 5
    assert all(row["post"] in query for query, row in zip(queries, rows))
    counts = [sum(len(response) % 2 == 0 for response in responses[number::21]) for number in range(21)]
    assert len(set(counts)) > 2

    samples = read_rows(tmp_path / "out/samples.jsonl")
    assert [row["correct"] for row in samples] == counts
    assert [row["response"] for row in samples] == responses[:21]
    assert [row["query"] for row in samples] == queries[:21]
    summary = read_json(tmp_path / "out/summary.json")
    assert summary["n"] == 21
    assert summary["pass@1"] == pytest.approx(sum(counts) / len(responses))
    assert summary["pass@5"] == pytest.approx(np.mean(np.array(counts) > 0))
    assert summary["pass@1"] < summary["pass@2"] < summary["pass@4"] <= summary["pass@5"]


def test_greedy_samples_are_all_the_same(config, tmp_path):
    """pass@k is then pass@1."""
    passk.main(dataclasses.replace(config, temperature=0.0, split="validation[:6]"))
    summary = read_json(tmp_path / "out/summary.json")
    assert {row["correct"] for row in read_rows(tmp_path / "out/samples.jsonl")} <= {0, 5}
    assert summary["pass@1"] == summary["pass@5"]


def test_sample_hands_over_where_there_is_a_scorer(pipeline):
    command = [sys.executable, "sample.py", "--scorer=toy.sums", f"--model={pipeline.sft}", "--n_samples=2"]
    options = ["--device=cpu", "--response_length=3", f"--data={pipeline.data}/sft_{{split}}.jsonl"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    # These rows have no answer: the scorer that is named has been asked.
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert done.stderr.rstrip().split("\n")[-1].endswith("give each row an int as `answer`")


@pytest.mark.parametrize(
    "changes, line",
    [
        (dict(scorer="no.such"), "scorer 'no.such': not a module with a function `score`: ModuleNotFoundError"),
        (dict(scorer="toy.world"), "scorer 'toy.world': not a module with a function `score`: AttributeError"),
        (dict(scorer=""), "scorer '': not a module with a function `score`"),
        (dict(data=""), "pass@k needs rows to sample for; give --data="),
    ],
)
def test_bad_input_is_one_line(config, changes, line):
    with pytest.raises(UserError, match=line):
        passk.main(dataclasses.replace(config, **changes))

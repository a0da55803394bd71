"""Rewards that can be checked: the toy sums, their strict score, and PPO, GRPO and RLOO that learn from it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pipeline import ROOT, metrics, read_rows, write_rows

import sft
from configurator import UserError
from hub.tokenizer import Tokenizer
from toy import sums
from variants import verifiable

FILES = ["sft_train.jsonl", "sft_validation.jsonl", "tokenizer.json"]

# ---------------------------------------------------------------------------- the data


def test_files_are_the_same_for_the_same_seed(tmp_path):
    script = str(Path(sums.__file__))  # as a script, with a hash seed of its own
    subprocess.run([sys.executable, script, str(tmp_path / "a"), "--seed=3"], check=True)
    sums.main([str(tmp_path / "b"), "--seed=3"])
    sums.main([str(tmp_path / "c"), "--seed=4"])
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == FILES
    for name in FILES:
        first, again, other = [(tmp_path / folder / name).read_bytes() for folder in "abc"]
        assert first == again
        # A model fits the tokenizer of every seed.
        assert (first == other) == (name == "tokenizer.json")


def test_each_sum_is_there_once_and_right(tmp_path):
    sums.write_data(tmp_path, 1)
    train = read_rows(tmp_path / "sft_train.jsonl")
    held_out = read_rows(tmp_path / "sft_validation.jsonl")
    assert len(train) == 800 and len(held_out) == 200
    prompts = {row["prompt"] for row in train + held_out}
    assert len(prompts) == 1000
    for row in train + held_out:
        digits = re.fullmatch(r"(\d)\+(\d)\+(\d)=", row["prompt"]).groups()
        assert sum(map(int, digits)) == row["answer"] == int(row["completion"])


def test_each_digit_is_a_token(tmp_path):
    sums.write_data(tmp_path, 1)
    tokenizer = Tokenizer.load(str(tmp_path))
    assert [tokenizer.decode([id]) for id in tokenizer.encode("9+5+8=22")] == list("9+5+8=22")


# ---------------------------------------------------------------------------- the score


@pytest.mark.parametrize(
    "response, right",
    [
        ("22", 1.0),
        ("23", 0.0),
        ("2", 0.0),
        ("222", 0.0),
        ("", 0.0),
        (" 22", 0.0),
        ("22 ", 0.0),
        ("22\n", 0.0),
        ("022", 0.0),
        ("+22", 0.0),
        ("-22", 0.0),
        ("22.0", 0.0),
        ("22.", 0.0),
        ("2 2", 0.0),
        ("22 22", 0.0),
        ("22 or 23", 0.0),
        ("9+5+8=22", 0.0),
        ("the answer is 22", 0.0),
        ("twenty-two", 0.0),
        ("２２", 0.0),  # digits to int(), other characters
        ("9" * 10_000, 0.0),  # too long for int()
    ],
)
def test_score_takes_the_number_alone(response, right):
    for answer in (22, "22"):  # an int, or the text in a CSV file
        assert sums.score(["9+5+8="], [response], [{"answer": answer}]) == [right]


def test_score_looks_at_the_answer_of_its_row():
    rows = [{"answer": 3}, {"answer": 4}, {"answer": 0}]
    assert sums.score(["1+1="] * 3, ["3", "3", "0"], rows) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("row", [{}, {"answer": None}, {"answer": 22.0}, {"answer": [22]}])
def test_score_needs_an_answer(row):
    with pytest.raises(UserError, match="toy.sums: the answer of .* give each row an int as `answer`"):
        sums.score(["9+5+8="], ["22"], [{"prompt": "9+5+8=", **row}])


# ---------------------------------------------------------------------------- the reward in a run

# What a row's answer is, the query does not say. SFT has seen every completion after each query equally often, so it is
# right in one of four; who learns more than that has been given the row that belongs to the query.
SECRETS = {"1": 7, "2": 3, "3": 5, "4": 1}


@pytest.fixture(scope="module")
def guesser(tmp_path_factory):
    """Directory of a tiny model that guesses, and of the rows with the secrets."""
    directory = tmp_path_factory.mktemp("sums")
    sums.write_data(directory, 0)
    rows = []
    for prompt in SECRETS:
        for completion in SECRETS.values():
            rows.append({"prompt": prompt, "completion": str(completion)})
    secrets = [{"prompt": prompt, "answer": answer} for prompt, answer in SECRETS.items()]
    write_rows(directory / "guesses.jsonl", rows)
    write_rows(directory / "secrets.jsonl", secrets)
    shape = dict(vocab_size=896, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    (directory / "config.json").write_text(json.dumps(shape))
    options = dict(scratch=True, loss_on="response", eval_split="", batch_size=16, micro_batch_size=16)
    cfg = sft.Config(
        model=str(directory), data=str(directory / "guesses.jsonl"), out_dir=str(directory / "sft"),
        episodes=100 * 16, lr=5e-3, adam_eps=1e-8, device="cpu", **options,
    )  # fmt: skip
    sft.main(cfg)
    return directory


def config(guesser, name, **changes):
    options = dict(
        model=str(guesser / "sft/final"), data=str(guesser / "secrets.jsonl"), out_dir=str(guesser / name),
        batch_size=64, micro_batch_size=64, group_size=4, episodes=40 * 64, response_length=2, temperature=1.0,
        missing_eos_score=0.0, kl_coef=0.0, lr=2e-3, adam_eps=1e-8, device="cpu", scorer="toy.sums",
    )  # fmt: skip
    return verifiable.Config(**{**options, **changes})


@pytest.mark.parametrize("algorithm", verifiable.ALGORITHMS)
def test_the_answers_of_the_rows_are_learned(guesser, algorithm):
    cfg = config(guesser, algorithm, algorithm=algorithm)
    verifiable.main(cfg)
    scores = [row["objective/scores"] for row in metrics(cfg)]
    assert scores[0] < 0.4
    assert np.mean(scores[-5:]) > 0.5  # with the answers of other rows nobody gets beyond 0.25
    assert ("loss/value_avg" in metrics(cfg)[0]) == (algorithm == "ppo")
    kept = json.loads((guesser / algorithm / "config.json").read_text())
    assert kept["algorithm"] == algorithm and kept["scorer"] == "toy.sums"


def test_a_run_without_answers_ends_in_one_line(guesser):
    write_rows(guesser / "no_answer.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    cfg = config(guesser, "no_answer", data=str(guesser / "no_answer.jsonl"))
    options = [f"--{key}={getattr(cfg, key)}" for key in ("model", "data", "out_dir", "batch_size", "group_size")]
    command = [sys.executable, "-m", "variants.verifiable", "config/sums_ppo.py", *options, "--device=cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = "error: toy.sums: the answer of {'prompt': '1+1=', 'completion': '2'} is None; give each row an int"
    assert done.stderr.rstrip().split("\n")[-1].startswith(line)


def test_a_module_without_a_score_is_refused(guesser):
    with pytest.raises(UserError, match="scorer 'toy.world': not a module with a function `score`"):
        verifiable.main(config(guesser, "no_score", scorer="toy.world"))

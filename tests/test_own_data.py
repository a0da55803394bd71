"""docs/own_data.md: its blocks run in their order, print what is shown, and have the effects that the page promises.
And the commands of `make repro`.
"""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from pipeline import metrics, read_rows

import ppo
import sample
from configurator import configure
from data import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
STARTERS = {"sh": ["bash", "-euc"], "python": [sys.executable, "-c"]}
HELD_OUT = slice(900, None)  # the last tenth of 1,000 rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """out/own in a copy of the repository, after all blocks."""
    copy = tmp_path_factory.mktemp("own_data") / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="passive")
    environment["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    environment["HF_DATASETS_CACHE"] = str(copy / "cache")

    printed = ""
    for language, text in BLOCKS:
        if language == "text":
            assert printed == text
        else:
            command = STARTERS[language] + [text]
            result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, text + result.stderr[-2000:]
            printed = result.stdout
    return copy / "out" / "own"


@pytest.fixture(scope="module")
def log(folder):
    """The rows of replies.csv."""
    with open(folder / "replies.csv", newline="") as file:
        return list(csv.DictReader(file))


def share_that_helps(rows, texts):
    """Of these replies to the rows' questions."""
    n_helpful = 0
    for row, text in zip(rows, texts):
        n_helpful += row["place"] in text
    return n_helpful / len(rows)


def luck(log, n):
    """A share of n replies that a policy which replies as the log does has no chance to reach: four standard errors
    above the log's.
    """
    share = share_that_helps(log, [row["completion"] for row in log])
    return share + 4 * math.sqrt(share * (1 - share) / n)


def test_page_shows_what_its_first_blocks_print():
    """That they do is asserted while the blocks run."""
    languages = [language for language, _ in BLOCKS]
    assert languages[:5] == ["python", "sh", "text", "python", "text"]


def test_sft_reads_the_question(folder, log):
    """A model that does not read it gives a reply r of n tokens some probability q(r). Where r is a share f(r) of the
    rows, the loss, a mean over rows of -log q / n, is least for q in proportion to f / n (by Gibbs' inequality).
    """
    tokenizer = Tokenizer.load(folder)
    replies = Counter(row["completion"] for row in log[HELD_OUT])
    weights = []
    for reply, count in replies.items():
        n_tokens = len(tokenizer.encode(reply)) + 1  # and EOS
        weights.append(count / replies.total() / n_tokens)
    blind_loss = 0
    for weight in weights:
        blind_loss -= weight * math.log(weight / sum(weights))
    assert metrics(folder / "sft")[-1]["eval/loss"] < blind_loss


def test_ppo_raises_the_reward_of_a_function(folder, log):
    """A score is 1 or 0 (-1 without EOS), and each of the last four updates has 64."""
    scores = [row["objective/scores"] for row in metrics(folder / "ppo")]
    assert sum(scores[-4:]) / 4 > luck(log, 4 * 64)


def test_reward_model_prefers_what_the_pairs_do(folder):
    """100 pairs were held out: a coin gets half, with a standard error of 0.05."""
    report = json.loads((folder / "rm" / "eval.json").read_text())
    assert report["eval/accuracy"] > 0.7


def test_ppo_with_the_reward_model_helps_with_questions_that_were_held_out(folder, log):
    samples = read_rows(folder / "samples" / "samples.jsonl")
    rows = log[HELD_OUT]
    assert [found["query"] for found in samples] == [row["prompt"] for row in rows]
    responses = [found["response"] for found in samples]
    assert share_that_helps(rows, responses) > luck(log, len(rows))


def test_make_repro_runs_ppo_at_the_published_size_and_samples_before_and_after():
    """`make -n` prints its commands, which must fit the stages, and runs none."""
    result = subprocess.run(["make", "-n", "repro"], cwd=ROOT, capture_output=True, text=True, check=True)
    stages = {"ppo": ppo, "sample": sample}
    configs = []
    for script, words in re.findall(r"python (ppo|sample)\.py (.*)", result.stdout):
        configs.append(configure(stages[script].Config, words.split()))
    train, before, after = configs
    assert (train.episodes, train.batch_size, train.n_epochs, train.lr) == (131_072, 128, 1, 3e-6)
    assert before.model == train.model
    assert after.model == f"{train.out_dir}/final"
    assert before.reward_model == after.reward_model == train.reward_model

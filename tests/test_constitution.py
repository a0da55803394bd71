"""Labels and revisions by principles: numbers by hand, and a server that answers as a script says."""

import contextlib
import json
import math
import sqlite3
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from pipeline import metrics, read_rows, write_rows

import rm
import sft
from configurator import UserError
from evals.chat import ANSWER, REVISE, THINK_FIRST, preference, read_letters
from variants import constitution

PRINCIPLES = ["it is true", "it is short", "it is kind"]


class Server:
    """POST /v1/chat/completions; answer(request) returns a choice of the completion, or a status to fail with."""

    def __init__(self, answer):
        self.answer = answer
        self.requests = []
        handler = type("Handler", (Handler,), {"owner": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        self.judge = f"http://127.0.0.1:{self.http.server_port}/v1#model"

    def asked(self):
        """The requests so far; the next call begins anew."""
        requests = self.requests
        self.requests = []
        return requests


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.owner.requests.append(request)
        answer = self.owner.answer(request)
        status = 200
        body = {"choices": [answer]}
        if isinstance(answer, int):
            status = answer
            body = {"error": {"message": "the reason that the server gives"}}
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", len(content)),
                            ("Retry-After-Ms", "1")):  # fmt: skip
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        """Say nothing of requests on the terminal."""


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = []

    def start(answer):
        started.append(Server(answer))
        return started[-1]

    yield start
    for one in started:
        one.http.shutdown()
        one.http.server_close()


def says(text, **fields):
    return {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}, **fields}


def letters(**logprobs):
    """A choice whose first token has these log-probabilities, as llama.cpp and vLLM send them."""
    top = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in logprobs.items()]
    content = [{**top[0], "top_logprobs": top}, {"token": ")", "logprob": 0.0, "bytes": None, "top_logprobs": []}]
    return says("A)", logprobs={"content": content}, finish_reason="length")


def surely(p):
    return letters(A=math.log(p), B=math.log(1 - p))


def pairs(n):
    queries = [f"post {i:02}\n\nTL;DR:" for i in range(n)]
    return [dict(query=query, response=f" ours {query[5:7]}", reference=f" theirs {query[5:7]}") for query in queries]


def run(tmp_path, server, rows, **options):
    """The rows that are written for samples `rows`."""
    (tmp_path / "principles.txt").write_text("\n".join(PRINCIPLES) + "\n\n")
    samples = write_rows(tmp_path / "samples.jsonl", rows)
    cfg = dict(judge=server.judge, samples=samples, principles=str(tmp_path / "principles.txt"), device="cpu")
    cfg = constitution.Config(**{**cfg, "out_dir": str(tmp_path / "out"), **options})
    constitution.main(cfg)
    return read_rows(f"{cfg.out_dir}/{cfg.write}.jsonl")


def refused(words, *args, **options):
    with pytest.raises(UserError, match=words) as error:
        run(*args, **options)
    assert "\n" not in str(error.value)


def turns_of(request):
    roles = [message["role"] for message in request["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"][: len(roles)]
    return [message["content"] for message in request["messages"]]


# ---------------------------------------------------------------------------- numbers by hand


@pytest.mark.parametrize("a, b, p", [
    (-1.2, -0.7, 0.377541),  # 1 / (1 + e^0.5)
    (-0.7, -1.2, 0.622459), (-3.0, -3.0, 0.5), (-2.0, -9999.0, 1.0), (-9999.0, -2.0, 0.0),
])  # fmt: skip
def test_preference_matches_numbers_by_hand(a, b, p):
    assert preference(json.dumps({"A": a, "B": b})) == pytest.approx(p, abs=1e-6)


def test_without_one_of_the_letters_there_is_no_preference():
    assert [preference(reply) for reply in ("{}", '{"A": -0.1}', '{"B": -0.1}')] == [None] * 3


@pytest.mark.parametrize("shares, plain, clamped", [
    ([0.377541], 0.377541, 0.4), ([0.9, 0.3], 0.6, 0.6), ([0.99, 0.9, 0.9, 0.6], 0.8475, 0.6),
    ([0.2, 0.7], 0.45, 0.45), ([1.0, 1.0], 1.0, 0.6), ([0.0], 0.0, 0.4),
])  # fmt: skip
def test_soft_target_is_the_mean_and_clamped_with_thoughts(shares, plain, clamped):
    """The mean is clamped, not what it is the mean of."""
    assert constitution.soft_target(shares, thoughts=False) == pytest.approx(plain)
    assert constitution.soft_target(shares, thoughts=True) == pytest.approx(clamped)


def test_letters_are_those_of_the_first_token():
    """Tokens that are the letter but for blanks, brackets and stars add up; words that begin with it do not."""
    chances = {"A": 0.2, " A": 0.1, "(B": 0.25, "**B**": 0.05, "a": 0.1, "Answer": 0.1, "AB": 0.1, "": 0.05}
    logprobs = {token: math.log(chance) for token, chance in chances.items()}
    choice = letters(**logprobs)
    first, second = choice["logprobs"]["content"]
    second["top_logprobs"] = [{"token": "A", "logprob": -0.1}]  # another token's do not count
    tops = [[SimpleNamespace(**top) for top in token["top_logprobs"]] for token in (first, second)]
    content = [SimpleNamespace(top_logprobs=top) for top in tops]
    found = json.loads(read_letters(SimpleNamespace(logprobs=SimpleNamespace(content=content))))
    assert found == pytest.approx({"A": math.log(0.3), "B": math.log(0.3)})


# ---------------------------------------------------------------------------- labels


def by_place(request):
    """The p of A that depends on which text stands there, and on the principle."""
    prompt = turns_of(request)[0]
    p = 0.7 if prompt.index("ours") < prompt.index("theirs") else 0.4
    return surely(p + 0.1 * ("short" in prompt) - 0.2 * ("kind" in prompt))


def test_label_is_the_mean_over_orders_and_principles(server, tmp_path):
    """True: (.7 + 1 - .4) / 2 = .65; short: (.8 + 1 - .5) / 2 = .65; kind: (.5 + 1 - .2) / 2 = .65. Bias cancels."""
    one = server(by_place)
    rows = run(tmp_path, one, pairs(3), write="labels", n_principles=3)
    for row, pair in zip(rows, pairs(3), strict=True):
        expected = {"prompt": pair["query"], "chosen": pair["response"], "rejected": pair["reference"]}
        assert row == {**expected, "target": pytest.approx(0.65)}

    requests = one.asked()
    assert len(requests) == 3 * 3 * 2
    shown = set()
    for request in requests:
        prompt, beginning = turns_of(request)
        assert beginning == ANSWER
        options = {key: value for key, value in request.items() if key != "messages"}
        assert options == dict(model="model", temperature=0, max_tokens=1, logprobs=True, top_logprobs=20)
        principle = next(text for text in PRINCIPLES if text in prompt)
        shown.add((prompt[:7], principle, "(A) ours" in prompt))
    assert len(shown) == 18


def test_a_model_that_always_prefers_the_first_labels_nothing(server, tmp_path):
    one = server(lambda request: surely(0.8))
    rows = run(tmp_path, one, pairs(4), write="labels")
    assert [row["target"] for row in rows] == pytest.approx([0.5] * 4)


def test_the_likelier_text_is_the_chosen_one(server, tmp_path):
    """p(ours) = (.3 + 1 - .9) / 2 = .2."""
    one = server(lambda request: surely(0.3 if "(A) ours" in turns_of(request)[0] else 0.9))
    rows = run(tmp_path, one, pairs(1), write="labels")
    expected = {"prompt": "post 00\n\nTL;DR:", "chosen": " theirs 00", "rejected": " ours 00"}
    assert rows == [{**expected, "target": pytest.approx(0.8)}]


def test_principles_are_drawn_anew_for_each_pair_and_by_its_place_alone(server, tmp_path):
    one = server(by_place)

    def drawn(name, n, **options):
        (tmp_path / name).mkdir()
        run(tmp_path / name, one, pairs(n), write="labels", **options)
        found = {}
        for request in one.asked():
            prompt = turns_of(request)[0]
            found.setdefault(prompt[:7], set()).add(next(text for text in PRINCIPLES if text in prompt))
        return [found[f"post {i:02}"] for i in range(n)]

    many = drawn("many", 24)
    assert all(len(principles) == 1 for principles in many)  # both orders are asked of the same
    assert set.union(*many) == set(PRINCIPLES)
    assert drawn("few", 5) == many[:5]
    assert drawn("seed", 24, seed=1) != many
    assert all(len(principles) == 2 for principles in drawn("two", 5, n_principles=2))


def test_an_answer_without_both_letters_is_counted_and_its_pair_left_out(server, tmp_path, capsys):
    """It is never guessed. The next run asks for that answer again, and for no other."""
    unclear = {"post 01": letters(A=-0.1, The=-3.0), "post 03": letters(The=-0.1, I=-3.0)}

    def answer(request):
        prompt = turns_of(request)[0]
        return unclear.get(prompt[:7], surely(0.6)) if "(A) ours" in prompt else surely(0.2)

    one = server(answer)
    rows = run(tmp_path, one, pairs(5), write="labels")
    assert [row["prompt"][:7] for row in rows] == ["post 00", "post 02", "post 04"]
    printed = capsys.readouterr().out
    assert "2 of 10 answers lack A or B among the likeliest tokens" in printed
    assert "labels.jsonl: 3 rows" in printed
    assert len(one.asked()) == 10
    unclear.clear()
    assert len(run(tmp_path, one, pairs(5), write="labels")) == 5
    assert sorted(turns_of(request)[0][:7] for request in one.asked()) == ["post 01", "post 03"]


@pytest.mark.parametrize("answer, words", [
    (says("A"), "log-probabilities; ask a server, and a model, that give logprobs"),
    (says("A", logprobs=None), "log-probabilities; ask a server"),
    (says("A", logprobs={"content": None}), "log-probabilities; ask a server"),
    (400, "the reason that the server gives"),
    (letters(The=-0.1), "no reply can be used; ask another model"),
], ids=["no field", "null", "null content", "refused", "no letters"])  # fmt: skip
def test_a_server_without_log_probabilities_is_one_line(server, tmp_path, answer, words):
    one = server(lambda request: answer)
    refused(f"{one.judge}: .*{words}", tmp_path, one, pairs(20), write="labels")


def test_thoughts_go_before_the_answer_and_keep_the_label_near_a_half(server, tmp_path):
    def answer(request):
        turns = turns_of(request)
        if len(turns) == 1:
            assert turns[0].endswith(THINK_FIRST)
            return says("Ours is true.")
        assert turns[1] == f"Ours is true.\n{ANSWER}"
        return surely(0.99 if "(A) ours" in turns[0] else 0.02)

    one = server(answer)
    rows = run(tmp_path, one, pairs(2), write="labels", thoughts=True)
    assert [row["target"] for row in rows] == [0.6, 0.6]
    assert len(one.asked()) == 8


def test_a_thought_that_has_no_end_leaves_its_pair_out(server, tmp_path, capsys):
    def answer(request):
        turns = turns_of(request)
        if len(turns) == 1:
            return says("Well, well, well", finish_reason="length" if "post 01" in turns[0] else "stop")
        return surely(0.5)

    rows = run(tmp_path, server(answer), pairs(3), write="labels", thoughts=True)
    assert [row["prompt"][:7] for row in rows] == ["post 00", "post 02"]
    assert "no reply on 2 of 6 thoughts (the reply was cut off" in capsys.readouterr().out


# ---------------------------------------------------------------------------- revisions


def reviser(request):
    """The critique names what the summary was; the revision adds a word to it."""
    turns = turns_of(request)
    if len(turns) == 1:
        summary = turns[0].split("TL;DR: ")[1].split("\n")[0]
        return says(f"I saw <{summary}>.")
    return says(turns[1].split("<")[1].split(">")[0] + " better\n")


@pytest.mark.parametrize("n_revisions", [1, 3])
def test_each_round_revises_what_the_last_one_wrote(server, tmp_path, n_revisions):
    one = server(reviser)
    samples = [dict(query=f"post {i:02}\n\nTL;DR:", response=f" ours {i:02}") for i in range(4)]  # without references
    rows = run(tmp_path, one, samples, n_revisions=n_revisions)
    for sample, row in zip(samples, rows, strict=True):
        assert row["prompt"] == sample["query"]
        assert row["completion"] == sample["response"] + n_revisions * " better"
        assert row["draft"] == sample["response"]

    requests = one.asked()
    assert len(requests) == 2 * 4 * n_revisions
    for request in requests:
        assert request["temperature"] == 1
        turns = turns_of(request)
        assert len(turns) == 1 or turns[2] == REVISE
        assert any(turns[0].endswith(principle) for principle in PRINCIPLES)
    # A critique and its revision are drawn with one seed, which no other row and no other round has.
    assert len({request["seed"] for request in requests}) == 4 * n_revisions

    assert run(tmp_path, one, samples, n_revisions=n_revisions) == rows
    assert one.asked() == []


def test_principles_and_seeds_of_revisions_depend_on_row_and_round_alone(server, tmp_path):
    one = server(reviser)

    def drawn(name, n, **options):
        (tmp_path / name).mkdir()
        run(tmp_path / name, one, pairs(n), **options)
        found = {}
        for request in one.asked():
            turns = turns_of(request)
            if len(turns) == 1:
                n_rounds = turns[0].count("better")
                found[turns[0][:7], n_rounds] = (turns[0].split(": ")[-1], request["seed"])
        return found

    many = drawn("many", 12, n_revisions=2)
    assert {principle for principle, _ in many.values()} == set(PRINCIPLES)
    few = drawn("few", 3, n_revisions=1)
    assert few == {name: many[name] for name in few}
    assert drawn("seed", 12, n_revisions=2, seed=1) != many


def test_a_row_without_a_revision_is_left_out_of_later_rounds(server, tmp_path, capsys):
    def answer(request):
        turns = turns_of(request)
        if "post 02" in turns[0] and len(turns) == 3:
            return says("")
        return reviser(request)

    one = server(answer)
    rows = run(tmp_path, one, pairs(4), n_revisions=2)
    assert [row["prompt"][:7] for row in rows] == ["post 00", "post 01", "post 03"]
    assert "no reply on 1 of 4 revisions (the reply is empty" in capsys.readouterr().out
    # The next run gives that row its two rounds, with the principles and seeds of its place.
    one.answer = reviser
    one.asked()
    rows = run(tmp_path, one, pairs(4), n_revisions=2)
    assert [row["completion"] for row in rows] == [f" ours {i:02} better better" for i in range(4)]
    assert {turns_of(request)[0][:7] for request in one.asked()} == {"post 02"}


def test_a_stopped_run_goes_on(server, tmp_path):
    """The server goes after a while: what has been answered is not asked again."""
    one = server(reviser)

    def fails(request):
        return reviser(request) if len(one.requests) <= 10 else 404

    one.answer = fails
    refused(f"{one.judge}: ", tmp_path, one, pairs(20))
    with contextlib.closing(sqlite3.connect(tmp_path / "out" / "replies.sqlite")) as replies:
        n_kept = replies.execute("select count(*) from replies").fetchone()[0]
    assert 0 < n_kept <= 10
    one.asked()
    one.answer = reviser
    assert len(run(tmp_path, one, pairs(20))) == 20
    assert len(one.asked()) == 40 - n_kept


def test_the_data_of_sft_can_be_revised(pipeline, server, tmp_path):
    """Posts with a summary, and rows of prompt and completion: the prompt is the query that sft.py makes of a post."""
    one = server(reviser)
    posts = read_rows(pipeline.data / "sft_train.jsonl")[:2]
    rows = run(tmp_path, one, [*posts, dict(prompt="post 02\n\nTL;DR:", completion=" ours 02")])
    for post, row in zip(posts, rows):
        head = f"SUBREDDIT: r/{post['subreddit']}\n\nTITLE: {post['title']}\n\nPOST: "
        assert row["prompt"] == f"{head}{post['post']}\n\nTL;DR:"
        assert row["draft"] == " " + post["summary"]
        assert row["completion"] == f" {post['summary']} better"
    assert rows[2]["completion"] == " ours 02 better"


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("options, words", [
    (dict(n_revisions=5), "n_revisions 5: take 1 to 4"),
    (dict(n_principles=4, write="labels"), "principles .*: has 3 lines; write 4 at the least"),
    (dict(principles="nowhere.txt"), "principles nowhere.txt: cannot be read"),
    (dict(judge="http://127.0.0.1:1/v1"), "names no model; write URL#model"),
    (dict(judge=""), "judge : names no model"),
    (dict(samples="nowhere.jsonl"), "nowhere.jsonl: cannot be read"),
])  # fmt: skip
def test_bad_options_are_one_line(server, tmp_path, options, words):
    one = server(reviser)
    refused(words, tmp_path, one, pairs(2), **options)
    assert one.asked() == []


@pytest.mark.parametrize("rows, words", [
    ([dict(query="post", response=" a"), dict(query="post", response=None)], "samples .*: row 2: 'response' is None"),
    ([dict(response=" a")], "samples .*: row 1: 'query' is None"),
    ([dict(prompt="post")], "samples .*: row 1: it has no response; sample some"),
    ([dict(words="post")], "samples .*: row 1: .*fit no schema"),
    ([], "no rows"),
])  # fmt: skip
def test_samples_without_texts_are_one_line(server, tmp_path, rows, words):
    refused(words, tmp_path, server(reviser), rows)


# ---------------------------------------------------------------------------- the stages read what is written


def test_sft_trains_on_revisions_and_the_reward_model_on_labels(pipeline, server, tmp_path):
    posts = read_rows(pipeline.data / "sft_train.jsonl")[:12]
    query = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    samples = []
    for post in posts:
        samples.append(dict(query=query.format(**post), response=" " + post["summary"], reference=" Anna danced."))

    one = server(lambda request: says("Anna sang in the park at dawn."))
    revised = run(tmp_path, one, samples)
    cfg = pipeline.config(sft, "revised", data=str(tmp_path / "out" / "revisions.jsonl"))
    sft.main(cfg)
    losses = [row["loss/sft"] for row in metrics(cfg) if "loss/sft" in row]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert {row["completion"] for row in revised} == {" Anna sang in the park at dawn."}

    one.answer = lambda request: surely(0.9 if "(A) Anna danced." in turns_of(request)[0] else 0.3)
    labelled = run(tmp_path, one, samples, write="labels", out_dir=str(tmp_path / "labelled"))
    assert [row["target"] for row in labelled] == pytest.approx([0.8] * 12)
    assert {row["chosen"] for row in labelled} == {" Anna danced."}
    # A new head scores all alike, at first: the loss of a soft label is then log 2, whatever the label.
    cfg = pipeline.config(rm, "labelled", data=str(tmp_path / "labelled" / "labels.jsonl"), episodes=96, lr=3e-3)
    rm.main(cfg)
    losses = [row["loss/rm"] for row in metrics(cfg) if "loss/rm" in row]
    # No model can be better than the labels' own entropy: .5004 nats for p = .8.
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert losses[-1] < losses[0]
    assert min(losses) > entropy - 1e-3

"""A language model behind an OpenAI-compatible endpoint: it compares two summaries, or answers any other question.

Each pair is shown in random order (by seed), since judges favour a place. A reply without one clear verdict counts as
none; it is never guessed. Requests that fail are sent again, later and later, by the openai library; a reply that is
empty or was cut off counts as a failure, too. With out_dir every reply is kept at once, in an SQLite file there. The
next run of the same command asks for what has no reply, or none with a clear verdict.

`ask_each` is the same for questions of any kind: variants/constitution.py asks for critiques and for the
log-probabilities of an answer.
"""

import hashlib
import itertools
import json
import os
import re
import sqlite3
import types
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError, explain, require
from hub.files import read_jsonl
from hub.queries import format_query
from hub.rows import schema_of, text_of

OPTIONS = {"temperature": 0}  # some models refuse it: take it out for them
CUT_OFF = ("length", "model_length", "max_tokens")  # finish_reason of servers when a model has no tokens left
PROMPT = """\
Below are a post from a forum and two summaries of it. Which of the two serves better someone who will not
read the post?

Judge by
- accuracy: it says nothing that the post does not say;
- coverage: it has what matters most in the post, and leaves out what does not;
- coherence: it can be understood on its own.
Being longer does not make a summary better.

### Post
{query}

### Summary A
{a}

### Summary B
{b}

First compare the two in one or two sentences. Then write a last line that is exactly one of
Verdict: A
Verdict: B
Verdict: tie"""


def prompt_for(pair, swapped):
    first, second = in_order(pair, swapped)
    return PROMPT.format(query=pair["query"], a=first, b=second)


def in_order(pair, swapped):
    """The pair's response and the other text, as they are shown."""
    texts = [pair["response"].strip(), pair["other"].strip()]
    if swapped:
        texts.reverse()
    return texts


VERDICT = re.compile(r"verdict\W+(?:summary\W+)?(a|b|tie)\W*$", re.IGNORECASE | re.MULTILINE)
THINK = re.compile(r"[<\[](/?)think(?:ing)?[>\]]", re.IGNORECASE)


def parse_verdict(reply, swapped):
    """1.0 if the reply prefers the pair's response, 0.0 the other, 0.5 neither; None if it is not one clear verdict.

    Of a model that thinks aloud, in <think> ... </think>, only what stands behind the last </think> counts.
    """
    if reply is None:
        return None
    tags = THINK.findall(reply)  # "" for <think>, "/" for </think>
    if tags and tags[-1] == "":
        return None
    answer = THINK.split(reply)[-1]
    verdicts = {word.lower() for word in VERDICT.findall(answer)}
    if len(verdicts) != 1:
        return None
    if "tie" in verdicts:
        return 0.5
    prefers_first = "a" in verdicts
    return float(prefers_first != swapped)


def has_verdict(reply):
    return parse_verdict(reply, False) is not None


def ask_all(judge, pairs, seed, cache, **options):
    """Verdicts and replies on all pairs by `judge`, "URL#model": two lists; a reply that could not be had is None.

    cache, options, errors: as in ask_each.
    """
    swapped = (np.random.default_rng(seed).random(len(pairs)) < 0.5).tolist()
    prompts = map(prompt_for, pairs, swapped)
    questions = {number: Question([prompt]) for number, prompt in enumerate(prompts)}
    replies = ask_each(judge, questions, cache, has_verdict, unit="pairs", **options)
    found = [replies.get(number) for number in questions]
    return list(map(parse_verdict, found, swapped)), found


@dataclass
class Question:
    """What is sent: the turns of a chat, the user's first. If the last one is the model's, its reply begins so."""

    turns: list
    options: dict = field(default_factory=lambda: OPTIONS)  # of the request


def ask_each(
    judge,
    questions,
    cache,
    is_usable,
    read=None,
    unit="questions",
    workers=8,
    timeout=300.0,
    retries=6,
):
    """Ask `judge`, "URL#model": {name: question} -> {name: reply}, without those that had no reply.

    cache: an SQLite file of replies by model and question; those for which is_usable(reply) holds are not asked for
    again. read(choice): the text that is kept of a chat completion's choice; by default its own. timeout: seconds, of
    which a server of one's own, where requests wait for each other, may need some.
    Raises UserError if the endpoint refuses the request (key, model), or if as many requests as there are workers fail
    one after the other; the replies so far are kept.
    """
    url, _, model = judge.partition("#")
    require(model, f"judge {judge}: names no model; write URL#model")
    keys = {name: key_of(model, question) for name, question in questions.items()}

    replies = Replies(cache, set(keys.values()), is_usable)
    try:
        missing = {key: questions[name] for name, key in keys.items() if key not in replies.known}
        asker = Asker(judge, url, model, read or read_reply, timeout, retries)
        ask_missing(asker, missing, list(keys.values()), replies, workers)
    finally:
        replies.close()
    found = {name: replies.known[key] for name, key in keys.items() if key in replies.known}
    n_lost = len(keys) - len(found)
    if n_lost:
        why = " ".join(asker.trouble.split())
        print(f"judge {judge}: no reply on {n_lost} of {len(keys)} {unit} ({why}); the same command asks again")
    return found


def key_of(model, question):
    """By which a reply is found again."""
    text = json.dumps([model, question.options, *question.turns])
    return hashlib.sha256(text.encode()).hexdigest()


class Replies:
    """The replies to `keys` that are known, {key: text}; each is on the disk as soon as it has come.

    A reply of an earlier run that is not usable is not known: one without a clear verdict may have been cut off.
    """

    def __init__(self, cache, keys, is_usable):
        self.cache = cache
        with explain(f"{cache}: is no cache of replies; move it away", sqlite3.Error):
            self.table = sqlite3.connect(cache, isolation_level=None)
            self.table.execute("create table if not exists replies (key text primary key, reply text)")
            kept = self.table.execute("select key, reply from replies")
            self.known = {key: reply for key, reply in kept if key in keys and is_usable(reply)}

    def keep(self, key, reply):
        self.known[key] = reply
        with explain(f"{self.cache}: cannot keep replies; make room there", sqlite3.Error):
            self.table.execute("insert or replace into replies values (?, ?)", (key, reply))

    def close(self):
        self.table.close()


def ask_missing(asker, missing, keys, replies, workers):
    """Ask for `missing`, {key: question}, until all are there or as many as there are workers have failed in a row."""
    failed_in_a_row = 0
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(asker, question): key for key, question in missing.items()}
        bar = tqdm(as_completed(futures), desc=asker.model, total=len(futures), delay=2)
        for future in bar:
            reply, refused = future.result()
            if reply is not None:
                replies.keep(futures[future], reply)
            n_known = sum(key in replies.known for key in keys)

            failed_in_a_row += 1
            # To refuse a prompt is an answer, unless all are refused.
            if reply is not None or (refused and n_known):
                failed_in_a_row = 0
            limit = workers if n_known else min(workers, len(missing))
            if failed_in_a_row == limit:
                raise UserError(describe_failure(asker, failed_in_a_row, n_known, replies.cache))
    finally:
        pool.shutdown(cancel_futures=True)


def describe_failure(asker, n_failed, n_known, cache):
    why = f"{n_failed} requests in a row had no reply ({asker.trouble})"
    kept = "lost (--out_dir keeps them)" if cache == ":memory:" else "kept"
    mend = "mend that, and run the same command again"
    return f"judge {asker.judge}: {why}; {n_known} replies are {kept}: {mend}"


class Asker:
    """A call sends one question; it returns the reply's text, or None, and whether the server refused this question."""

    def __init__(self, judge, url, model, read, timeout, retries):
        with explain("a judge's endpoint needs the openai library; pip install openai", ImportError):
            import openai
        self.judge = judge
        self.model = model
        self.read = read
        self.openai = openai
        self.trouble = ""  # what the last request that failed said
        key = os.environ.get("OPENAI_API_KEY") or "none"  # a server of one's own may need none
        options = {"max_retries": retries, "timeout": timeout}
        with explain(f"judge {judge}: no such URL", Exception):
            self.client = openai.OpenAI(base_url=url, api_key=key, **options)

    def __call__(self, question):
        openai = self.openai
        refused = False
        # The library sends again what fails; a second round does so for an answer that is none.
        for _ in range(2):
            try:
                return self.ask(question), False
            except openai.APIStatusError as error:
                if error.status_code in (401, 403, 404):
                    mend = "mend OPENAI_API_KEY, URL or model"
                    raise UserError(f"judge {self.judge}: {error}; {mend}") from None
                self.trouble = str(error)
                return None, error.status_code in (400, 413, 422)  # too long, or filtered
            except openai.APIConnectionError as error:  # time-outs too
                self.trouble = f"{error} {error.__cause__ or ''}"
                return None, False
            except NoReply as error:
                self.trouble = str(error)
                refused = True
            except (openai.APIError, ValueError, LookupError, TypeError, AttributeError) as error:
                self.trouble = f"not a chat completion: {error}"
        return None, refused

    def ask(self, question):
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, question.turns)]
        completions = self.client.chat.completions
        answer = completions.create(model=self.model, messages=messages, **question.options)
        if not getattr(answer, "choices", None):
            raise ValueError(str(answer)[:300])  # some servers say what is wrong with status 200
        return self.read(answer.choices[0])


class NoReply(Exception):
    """A chat completion that holds no whole reply."""


def read_reply(choice):
    """The text of a chat completion's choice; raises NoReply if that is refused, empty or cut off."""
    reason = choice.finish_reason
    message = choice.message
    if message.refusal or reason == "content_filter":
        raise NoReply(f"refused: {message.refusal or reason}")

    limit = "max_tokens in OPTIONS of evals/chat.py, or the server's limit"
    mend = f"(finish_reason {reason}); give the judge more tokens ({limit}), or ask another model"
    if reason in CUT_OFF:
        raise NoReply(f"the reply was cut off {mend}")
    text = message.content
    if isinstance(text, list):  # parts, some of which are thoughts
        text = "".join(part["text"] for part in text if part["type"] == "text")
    # A server that gives thoughts apart (reasoning_content) has no content until they end.
    if not text or not text.strip():
        raise NoReply(f"the reply is empty {mend}")
    return text.encode(errors="replace").decode()  # half a surrogate pair cannot be kept


# ---------------------------------------------------------------------------- critique and revision

CRITIQUE = """\
{prompt}{completion}

Say in one sentence where this summary of the post fails the principle: {principle}"""
REVISE = "Write the summary anew, so that it keeps to the principle. Write nothing but the summary."


def read_principles(path, n_needed):
    """The lines of a text file."""
    with explain(f"principles {path}: cannot be read", OSError, ValueError):
        text = Path(path).read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = f"principles {path}: has {len(lines)} lines; write {n_needed} at the least"
    require(len(lines) >= n_needed, wrong)
    require(len(set(lines)) == len(lines), f"principles {path}: a line stands there twice; take one out")
    return lines


def read_drafts(path):
    """Rows of sample.py or of SFT's data as {prompt, completion, draft}, their responses being drafts."""
    rows = []
    for number, row in enumerate(read_jsonl(path), 1):
        with explain(f"samples {path}: row {number}", UserError):
            query, draft = query_and_response(row)
        rows.append({"prompt": query, "completion": draft, "draft": draft})
    require(rows, f"samples {path}: no rows; sample some")
    return rows


def query_and_response(row):
    if "response" in row:
        return text_of(row, "query"), text_of(row, "response")
    prompt, responses = schema_of(row)(row)
    require(responses, "it has no response; sample some")
    if isinstance(prompt, str):
        return prompt, responses[0]
    # A tokenizer that leaves the text as it is, and no limit, give the query's text.
    query = format_query(prompt, types.SimpleNamespace(encode=str), max_tokens=np.inf)
    return query, responses[0]


def ask_revisions(judge, rows, cache, **options):
    """The model says where a completion fails a principle, and then writes it anew: {name: row} -> {name: text}.

    A row has prompt, completion and principle, and the seed with which both are drawn, at temperature 1. A text begins
    with the space that parts it from its prompt. What has no critique or no revision is left out. cache, options: as in
    ask_each.
    """
    questions = {}
    for name, row in rows.items():
        sampling = {"temperature": 1, "seed": row["seed"]}
        questions[name] = Question([CRITIQUE.format(**row)], sampling)
    critiques = ask_each(judge, questions, cache, bool, unit="critiques", **options)
    again = {}
    for name, critique in critiques.items():
        turns = [*questions[name].turns, critique, REVISE]
        again[name] = Question(turns, questions[name].options)
    revisions = ask_each(judge, again, cache, bool, unit="revisions", **options)
    return {name: " " + text.strip() for name, text in revisions.items()}


# ---------------------------------------------------------------------------- how sure the model is

LETTER = {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}  # OpenAI's servers give no more
COMPARE = """\
{query}

Two summaries of this post:
(A) {a}
(B) {b}

Which of the two keeps better to the principle: {principle}"""
THINK_FIRST = "\nFirst compare them in one sentence."
ANSWER = "The answer is ("  # the reply begins so: the next token is the letter


def ask_preferences(judge, pairs, principles, cache, thoughts=False, **options):
    """How likely it is by `judge` that a pair's response keeps better to a principle than the other text does.

    principles: a list for each pair. thoughts: the model reasons before it answers. cache, options: as in ask_each.
    The server must go on with a last turn that is the model's, as llama.cpp's does; not all do.
    Returns for each pair {(principle, swapped): p}, where swapped tells whether the other text stood first; without
    those of which the answer, or the thought, could not be had, or is neither A nor B.
    """
    prompts = {}
    for number, pair in enumerate(pairs):
        for swapped in (False, True):
            for principle in principles[number]:
                first, second = in_order(pair, swapped)
                prompt = COMPARE.format(query=pair["query"], a=first, b=second, principle=principle)
                prompts[number, principle, swapped] = prompt
    beginnings = dict.fromkeys(prompts, ANSWER)
    if thoughts:
        prompts = {name: prompt + THINK_FIRST for name, prompt in prompts.items()}
        questions = {name: Question([prompt]) for name, prompt in prompts.items()}
        replies = ask_each(judge, questions, cache, bool, unit="thoughts", **options)
        beginnings = {name: f"{thought}\n{ANSWER}" for name, thought in replies.items()}

    questions = {}
    for name, beginning in beginnings.items():
        questions[name] = Question([prompts[name], beginning], LETTER)
    replies = ask_each(judge, questions, cache, has_letters, read_letters, unit="answers", **options)
    found = [{} for _ in pairs]
    n_unclear = 0
    for (number, principle, swapped), reply in replies.items():
        p = preference(reply)
        if p is None:
            n_unclear += 1
        else:
            found[number][principle, swapped] = 1 - p if swapped else p
    if n_unclear:
        answers = f"{n_unclear} of {len(replies)} answers"
        print(f"judge {judge}: {answers} lack A or B among the likeliest tokens")
    return found


def read_letters(choice):
    """The log-probabilities of A and of B as a choice's first token, as JSON: {"A": ..., "B": ...}.

    A letter that is not among the likeliest tokens is left out; a token such as " A" counts as its letter.
    """
    if not choice.logprobs or not choice.logprobs.content:
        mend = "ask a server, and a model, that give logprobs and top_logprobs"
        raise NoReply(f"the reply has no log-probabilities; {mend}")
    letters = {}
    for candidate in choice.logprobs.content[0].top_logprobs:
        letter = candidate.token.strip(" (*")
        if letter in ("A", "B"):
            letters[letter] = float(np.logaddexp(letters.get(letter, -np.inf), candidate.logprob))
    return json.dumps(letters)


def has_letters(reply):
    return preference(reply) is not None


def preference(reply):
    """How likely the answer is A, not B: e^a / (e^a + e^b), of what read_letters kept. None if a letter is missing."""
    letters = json.loads(reply)
    if len(letters) < 2:
        return None
    # Not by their exponentials, for -9999 is what some servers write for no chance at all.
    return float(np.exp(letters["A"] - np.logaddexp(letters["A"], letters["B"])))

"""A language model behind an OpenAI-compatible endpoint compares two summaries.

Each pair is shown in random order (by seed), since judges favour a place. A reply without one clear verdict counts as
none; it is never guessed. Requests that fail are sent again, later and later, by the openai library; a reply that is
empty or was cut off counts as a failure, too. With out_dir every reply is kept at once, in an SQLite file there. The
next run of the same command asks for what has no reply, or none with a clear verdict.
"""

import hashlib
import json
import os
import re
import sqlite3
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
from tqdm import tqdm

from configurator import UserError, explain, require

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
    first = pair["response"].strip()
    second = pair["other"].strip()
    if swapped:
        first, second = second, first
    return PROMPT.format(query=pair["query"], a=first, b=second)


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


def ask_all(judge, pairs, seed, cache, workers=8, timeout=60.0, retries=6):
    """Verdicts and replies on all pairs by `judge`, "URL#model": two lists; a reply that could not be had is None.

    cache: an SQLite file of replies by model and prompt; what it has a verdict on is not asked again. timeout: seconds.
    Raises UserError if the endpoint refuses the request (key, model), or if as many requests as there are workers fail
    one after the other; the replies so far are kept.
    """
    url, _, model = judge.partition("#")
    require(model, f"judge {judge}: names no model; write URL#model")
    swapped = (np.random.default_rng(seed).random(len(pairs)) < 0.5).tolist()
    prompts = list(map(prompt_for, pairs, swapped))
    keys = [key_of(model, prompt) for prompt in prompts]

    replies = Replies(cache)
    try:
        missing = {key: prompt for key, prompt in zip(keys, prompts) if key not in replies.known}
        asker = Asker(judge, url, model, timeout, retries)
        ask_missing(asker, missing, keys, replies, workers)
    finally:
        replies.close()
    found = list(map(replies.known.get, keys))
    n_lost = found.count(None)
    if n_lost:
        why = " ".join(asker.trouble.split())
        print(f"judge {judge}: no reply on {n_lost} of {len(pairs)} pairs ({why}); the same command asks again")
    return list(map(parse_verdict, found, swapped)), found


def key_of(model, prompt):
    """By which a reply is found again."""
    question = json.dumps([model, OPTIONS, prompt])
    return hashlib.sha256(question.encode()).hexdigest()


class Replies:
    """The replies that are known, {key: text}; each is on the disk as soon as it has come.

    A reply of an earlier run that has no clear verdict is not known: it may have been cut off.
    """

    def __init__(self, cache):
        self.cache = cache
        with explain(f"{cache}: is no cache of replies; move it away", sqlite3.Error):
            self.table = sqlite3.connect(cache, isolation_level=None)
            self.table.execute("create table if not exists replies (key text primary key, reply text)")
            kept = self.table.execute("select key, reply from replies")
            self.known = {key: reply for key, reply in kept if parse_verdict(reply, False) is not None}

    def keep(self, key, reply):
        self.known[key] = reply
        with explain(f"{self.cache}: cannot keep replies; make room there", sqlite3.Error):
            self.table.execute("insert or replace into replies values (?, ?)", (key, reply))

    def close(self):
        self.table.close()


def ask_missing(asker, missing, keys, replies, workers):
    """Ask for `missing`, {key: prompt}, until all are there or as many as there are workers have failed in a row."""
    failed_in_a_row = 0
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(asker, prompt): key for key, prompt in missing.items()}
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
    """A call sends one prompt; it returns the reply's text, or None, and whether the server refused this prompt."""

    def __init__(self, judge, url, model, timeout, retries):
        with explain("a judge's endpoint needs the openai library; pip install openai", ImportError):
            import openai
        self.judge = judge
        self.model = model
        self.openai = openai
        self.trouble = ""  # what the last request that failed said
        key = os.environ.get("OPENAI_API_KEY") or "none"  # a server of one's own may need none
        options = {"max_retries": retries, "timeout": timeout}
        with explain(f"judge {judge}: no such URL", Exception):
            self.client = openai.OpenAI(base_url=url, api_key=key, **options)

    def __call__(self, prompt):
        openai = self.openai
        refused = False
        # The library sends again what fails; a second round does so for an answer that is none.
        for _ in range(2):
            try:
                return self.ask(prompt), False
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

    def ask(self, prompt):
        messages = [{"role": "user", "content": prompt}]
        completions = self.client.chat.completions
        answer = completions.create(model=self.model, messages=messages, **OPTIONS)
        if not getattr(answer, "choices", None):
            raise ValueError(str(answer)[:300])  # some servers say what is wrong with status 200
        return read_reply(answer.choices[0])


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

"""An index that runs: the 25 numbered details of arXiv:2403.17031, one test or more for each ("detail N" is its).

Every test goes through what a user calls (a stage's main, the loaders, the config files of the paper's sizes, the
files on disk) and compares with something that shares no code with it: transformers and tokenizers, float64 NumPy
loops, or numbers worked by hand. "fails if" names undoings of the detail that were tried and seen to fail.

The models are those of the `pipeline` fixture with their matrices eight times as large (`enlarge`): attention is then
far from uniform, so that a wrong position or token shows, and both kinds of response come, with EOS and without.

What a run of PPO computes in its middle comes out of the door `advantages` of ppo.main (`rollouts_of`).
"""

import functools
import itertools
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from pipeline import ROOT, metrics
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXForCausalLM, GPTNeoXModel

import dpo
import ppo
import rm
import sample
import sft
from configurator import UserError, configure
from data import batch_indices, last_scalars, load_rows
from distributed.optimizer import learning_rate
from hub.tokenizer import Tokenizer
from model import GPTNeoX, GPTNeoXConfig, ScalarModel
from runtime import World

SIZES = ("1b", "2.8b", "6.9b")
TEMPERATURE = 0.7
EOS = 0

# A log-probability, value or reward by a float32 forward pass of these models, against float64. A float32 rounding is
# u = 6e-8; a sum of n <= 128 products errs by sqrt(128) u = 7e-7 of its size; eight such sums lie on the way through
# two blocks, which makes sqrt(8) times that, 2e-6, and what comes out is of size 7 at most.
FORWARD = 2e-5
# A sum of a response's 10 such numbers, of independent errors: sqrt(10) times that.
SUMMED = 4 * FORWARD
# float32 sums of fewer than 256 numbers of size up to 10 that are float32 themselves: sqrt(256) u 10.
FLOAT32 = 1e-5
# Numbers worked by hand are of size 1, printed to six decimals: half of the last one, and 16 float32 roundings.
PRINTED = 1.5e-6


def paper(stage, size="1b", **changes):
    """The paper's configuration of a stage: its config file, with `changes`."""
    return replace(configure(stage.Config, [str(ROOT / "config" / f"{stage.__name__}_{size}.py")]), **changes)


def tiny(pipeline, stage, name, **changes):
    """The paper's configuration of a stage, with the tiny models and data of the tests in place of the real ones."""
    places = ("model", "reward_model", "data", "normalize_data", "device", "dtype", "out_dir")
    there = pipeline.config(stage, f"detail_{name}")
    values = {key: getattr(there, key) for key in places if hasattr(there, key)}
    values.update(model=str(pipeline.sft), batch_size=8, micro_batch_size=3)
    if stage is ppo:
        values.update(response_length=10, rollout_micro_batch_size=7, episodes=changes.get("batch_size", 8))
    values.update(changes)
    return paper(stage, **values)


def main(stage, cfg, **options):
    """Run a stage; returns its metrics."""
    stage.main(cfg, **options)
    return metrics(cfg)


def rollouts_of(cfg, **options):
    """Run PPO; returns its metrics and, for each update, the tensors of its batch, advantages among them."""
    batches = []

    def keep_batch(cfg, batch, state):
        batch = ppo.advantages(cfg, batch, state)
        batches.append(batch)
        return batch

    return main(ppo, cfg, advantages=keep_batch, **options), batches


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_report(cfg):
    return json.loads((Path(cfg.out_dir) / "eval.json").read_text())


def final(cfg):
    return Path(cfg.out_dir) / "final"


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def copy_model(source, name, change=lambda name, tensor: tensor, **config):
    """A copy of a model directory, beside `source`, with changed tensors and config.json."""
    target = source.parent / f"detail_{name}_model"
    shutil.copytree(source, target)
    tensors = {name: change(name, tensor).contiguous() for name, tensor in weights(source).items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    values = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **config}))
    return target


def enlarge(name, tensor):
    matrix = tensor.dim() == 2 and ("layers" in name or "embed_in" in name)
    return tensor * 8 if matrix else tensor


# ---- oracles: transformers in float64, one unpadded row at a time


@functools.lru_cache
def hub_model(directory):
    return GPTNeoXForCausalLM.from_pretrained(directory).double().eval()


@functools.lru_cache
def hub_body(directory):
    tensors = {name: tensor.double() for name, tensor in weights(directory).items() if name.startswith("score")}
    return GPTNeoXModel.from_pretrained(directory).double().eval(), tensors["score.weight"][0], tensors["score.bias"]


@torch.no_grad()
def hub_logprobs(directory, query, response, temperature=1.0, n_vocab=None):
    """log p of each token of the response."""
    logits = hub_model(directory)(torch.tensor([query + response])).logits[0, len(query) - 1 : -1, :n_vocab]
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(response)[:, None])[:, 0].numpy()


@torch.no_grad()
def hub_scalars(directory, ids, **options):
    """The scalar at each token of a row: transformers' body (its last state is behind the final norm), and the head."""
    body, weight, bias = hub_body(directory)
    states = body(torch.tensor([ids]), **options).last_hidden_state[0]
    return (states @ weight + bias).numpy()


def hub_rewards(directory, row):
    """The reward of each response of a row: the scalar at its last token."""
    return [hub_scalars(directory, row["query"] + response)[-1] for response in row["responses"]]


def left_padded(rows):
    """ids and attention mask (B, T) of rows padded on the left, as the paper's PPO feeds its queries."""
    width = max(map(len, rows))
    ids = [[EOS] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def reference_step(responses, logprobs, ref_logprobs, values, scores, whiten_rewards=False):
    """From a rollout to advantages as arXiv:2403.17031's script does it, but row by row, in float64.

    What stands behind EOS is set to constants before anything is computed, as there: both log-probabilities to 1,
    values to 0 from the second column behind it. Returns kl, rewards, values, advantages (raw and whitened), returns.
    """
    B, R = responses.shape
    logprobs = np.array(logprobs, np.float64)
    ref_logprobs = np.array(ref_logprobs, np.float64)
    values = np.array(values, np.float64)
    is_action = np.zeros((B, R), bool)
    is_state = np.zeros((B, R), bool)
    rewards = np.zeros((B, R))
    for row in range(B):
        response = responses[row].tolist()
        has_eos = EOS in response
        end = response.index(EOS) if has_eos else R - 1
        is_action[row, : end + 1] = True
        is_state[row, : end + 2] = True
        logprobs[row, end + 1 :] = 1.0
        ref_logprobs[row, end + 1 :] = 1.0
        values[row, end + 2 :] = 0.0
        rewards[row] = -0.05 * (logprobs[row] - ref_logprobs[row])
        rewards[row, min(end + 1, R - 1)] += scores[row] if has_eos else -1.0

    if whiten_rewards:
        kept = rewards[is_state]
        rewards = (rewards - kept.mean()) / np.sqrt(kept.var() + 1e-8) + kept.mean()
        rewards[~is_state] = 0.0

    # The sum of arXiv:1506.02438 eq. 16, gamma 1, with a value of 0 after the last token.
    next_values = np.concatenate([values[:, 1:], np.zeros((B, 1))], 1)
    deltas = rewards + next_values - values
    advantages = np.zeros((B, R))
    for row in range(B):
        for column in range(R):
            advantages[row, column] = sum(0.95**ahead * delta for ahead, delta in enumerate(deltas[row, column:]))
    kept = advantages[is_action]
    whitened = np.where(is_action, (advantages - kept.mean()) / np.sqrt(kept.var() + 1e-8), 0.0)
    return SimpleNamespace(
        kl=logprobs - ref_logprobs, rewards=rewards, values=values, raw=advantages, advantages=whitened,
        returns=advantages + values, mask=is_action, mask_p1=is_state,
    )  # fmt: skip


def close(got, expected, atol):
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(expected, np.float64), atol=atol, rtol=0)


class AdamW:
    """One parameter's AdamW in float64, by its paper's formulas (arXiv:1711.05101), with the numbers of detail 20."""

    def __init__(self):
        self.mean = 0.0
        self.squares = 0.0
        self.n_steps = 0

    def step(self, weight, gradient, lr):
        self.n_steps += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.squares = 0.999 * self.squares + 0.001 * gradient * gradient
        mean = self.mean / (1 - 0.9**self.n_steps)
        squares = self.squares / (1 - 0.999**self.n_steps)
        return weight - lr * mean / (squares**0.5 + 1e-5) - lr * 0.01 * weight


# ---- what the tests share


@pytest.fixture(scope="module")
def toy(pipeline):
    return Tokenizer.load(str(pipeline.data))


@pytest.fixture(scope="module")
def real(real_tokenizer):
    return Tokenizer.load(str(real_tokenizer))


@pytest.fixture(scope="module")
def library(library):
    """Token ids of a text by the tokenizers library."""
    return lambda text: library.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def posts(pipeline, toy):
    return list(load_rows(f"{pipeline.data}/sft_{{split}}.jsonl", "train", toy, 1))


@pytest.fixture(scope="module")
def policy(pipeline):
    return copy_model(pipeline.sft, "policy", enlarge)


@pytest.fixture(scope="module")
def other(pipeline, policy):
    """A reference that is not the policy, so that there is a KL from the first update on."""

    def flatter(name, tensor):
        return tensor * 0.8 if "embed_out" in name else tensor

    return copy_model(policy, "other", flatter)


@pytest.fixture(scope="module")
def pairs(pipeline):
    """40 comparisons to train on, the same and 15 more to evaluate on: a path with {split}, the latter's raw rows."""
    train = read_jsonl(f"{pipeline.data}/comparisons_train.jsonl")
    more = read_jsonl(f"{pipeline.data}/comparisons_validation.jsonl")
    directory = pipeline.directory / "detail_pairs"
    write_jsonl(directory / "train.jsonl", train)
    write_jsonl(directory / "validation.jsonl", more + train)
    return SimpleNamespace(path=str(directory / "{split}.jsonl"), raw=more + train)


@pytest.fixture(scope="module")
def frozen_rm(pipeline, policy, pairs):
    """A reward model's run at learning rate 0: its files are those that it began with."""
    return tiny(pipeline, rm, "frozen_rm", model=str(policy), data=pairs.path, lr=0.0, normalize_data="", eval_split="")


@pytest.fixture(scope="module")
def frozen_rows(frozen_rm):
    return [row for row in main(rm, frozen_rm) if "loss/rm" in row]


@pytest.fixture(scope="module")
def reward(pipeline, policy, pairs):
    """A reward model, trained, normalised and evaluated: its configuration. Its files are in final(reward)."""
    cfg = tiny(pipeline, rm, "rm", model=str(policy), data=pairs.path, lr=3e-3, episodes=160)
    rm.main(cfg)
    return cfg


@pytest.fixture(scope="module")
def margins(reward, pairs, toy):
    """Reward of the chosen minus that of the rejected text of each held-out comparison, from the raw rows."""
    return hub_margins(final(reward), pairs.raw, toy)


def hub_margins(directory, raw, tokenizer):
    found = []
    for row in raw:
        info = row["info"]
        query = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}\n\nTL;DR:"
        responses = [tokenizer.encode(summary["text"]) + [EOS] for summary in row["summaries"]]
        rewards = hub_rewards(directory, {"query": tokenizer.encode(query), "responses": responses})
        found.append(rewards[row["choice"]] - rewards[1 - row["choice"]])
    assert np.abs(found).min() > FORWARD  # else rounding decides who wins
    return np.array(found)


@pytest.fixture(scope="module")
def run_ppo(pipeline, policy, other, reward, toy, posts):
    """Two updates of the paper's PPO on the tiny models: metrics, batches, and the first batch by transformers."""
    cfg = tiny(pipeline, ppo, "ppo", model=str(policy), reference=str(other), reward_model=str(final(reward)),
               batch_size=24, micro_batch_size=5, episodes=48, lr=1e-3)  # fmt: skip
    rows, batches = rollouts_of(cfg)
    queries = []
    for step in (0, 1):
        queries.append([posts[index]["query"] for index in batch_indices(len(posts), 24, step, cfg.seed)])
    oracle = hub_rollout(policy, other, final(reward), queries[0], batches[0]["responses"].numpy(), toy.n_vocab)
    return SimpleNamespace(cfg=cfg, metrics=rows, batches=batches, queries=queries, oracle=oracle)


def hub_rollout(policy, reference, reward_model, queries, responses, n_vocab):
    """What four models say of the responses (B, R), critic and reward model from the same files. See reference_step."""
    found = SimpleNamespace(logprobs=[], ref_logprobs=[], values=[], scores=[])
    for query, response in zip(queries, responses.tolist()):
        end = response.index(EOS) if EOS in response else len(response) - 1
        for name, directory in (("logprobs", policy), ("ref_logprobs", reference)):
            getattr(found, name).append(hub_logprobs(directory, query, response, TEMPERATURE, n_vocab))
        scalars = hub_scalars(reward_model, query + response)
        found.values.append(scalars[len(query) - 1 : -1])  # before each token of the response
        found.scores.append(scalars[len(query) + end])
    return SimpleNamespace(responses=responses, **{name: np.array(x) for name, x in vars(found).items()})


@pytest.fixture(scope="module")
def sampled(pipeline, policy, reward):
    """What sample.py writes of the training posts, the rewards of their references among it."""
    out_dir = str(pipeline.directory / "detail_sampled")
    cfg = replace(pipeline.config(sample, "unused"), model=str(policy), reward_model=str(final(reward)), reference="",
                  split="train", response_length=1, micro_batch_size=16, out_dir=out_dir)  # fmt: skip
    sample.main(cfg)
    return read_jsonl(Path(cfg.out_dir) / "samples.jsonl")


# ---------------------------------------------------------------------------- details 1 to 6: data

POST = {
    "id": "t3_1", "subreddit": "tifu", "title": "TIFU by naps", "post": "I slept.\n\nToo long.",
    "summary": "slept late",
}  # fmt: skip
QUERY = "SUBREDDIT: r/tifu\n\nTITLE: TIFU by naps\n\nPOST: I slept.\n\nToo long.\n\nTL;DR:"
ARTICLE = "A cat sat down.\nThen it rose."


def comparison(choice=0, confidence=3, texts=(" slept in", " overslept"), article=None):
    """A row with the columns of the released comparisons, and those that the reference script added to them."""
    info = dict.fromkeys(["id", "subreddit", "title", "post", "site", "article"])
    if article:
        info.update(id="x", site="cnn", article=article)
    else:
        info.update({key: POST[key] for key in ("id", "subreddit", "title", "post")})
    summaries = [
        {"text": texts[0], "policy": "sup4_ppo_rm3_kl10", "note": None},
        {"text": texts[1], "policy": "ref", "note": None},
    ]
    return {
        "info": info, "summaries": summaries,
        "choice": choice, "worker": "w1", "batch": "batch7", "split": "train", "extra": {"confidence": confidence},
        "query": "not to be read", "query_token": [1, 2], "chosen": "nor this", "chosen_token": [3],
        "rejected": "nor that", "rejected_token": [4], "chosen_policy": "ref", "rejected_policy": "ref",
    }  # fmt: skip


def test_detail_01_1_columns(library, real, tmp_path):
    """Detail 1: posts of five columns and comparisons of info, summaries and choice, each also as preprocessed there.

    fails if: hub/rows.py:SCHEMAS names "chosen" before "summaries", so that the added columns are read;
    hub/rows.py:from_comparison takes `1 - choice` for the chosen text; hub/table.py:load_rows refuses columns that
    it does not know.
    """
    extra = {"query_token": [1], "query": "not to be read", "reference_response": "nor this"}
    write_jsonl(tmp_path / "sft_train.jsonl", [POST, {**POST, "summary": "napped"}])
    write_jsonl(tmp_path / "sft_test.jsonl", [{**POST, **extra}])
    pairs = [comparison(0), comparison(1), comparison(1, article=ARTICLE)]
    write_jsonl(tmp_path / "pairs_validation_cnndm.jsonl", pairs)
    query = library(QUERY)
    for split, summaries in (("train", ["slept late", "napped"]), ("test", ["slept late"])):
        rows = load_rows(str(tmp_path / "sft_{split}.jsonl"), split, real, 1)
        assert rows["query"] == [query] * len(summaries)
        assert rows["responses"] == [[library(" " + text) + [EOS]] for text in summaries]
    rows = load_rows(str(tmp_path / "pairs_{split}.jsonl"), "validation_cnndm", real, 2)
    first = [*library(" slept in"), EOS]
    second = [*library(" overslept"), EOS]
    assert rows["responses"] == [[first, second], [second, first], [second, first]]
    assert rows["query"] == [query, query, library(f"Article:\n{ARTICLE}\n\nTL;DR:\n")]
    assert rows["batch"] == ["batch7"] * 3


@pytest.fixture(scope="module")
def frozen_sft(pipeline, policy):
    """The SFT of the config file at learning rate 0, so that one oracle fits every update."""
    cfg = tiny(pipeline, sft, "frozen_sft", model=str(policy), lr=0.0)
    return cfg, main(sft, cfg)


@pytest.fixture(scope="module")
def post_losses(posts, policy):
    """Mean loss per token of query + response of every post, by transformers' own loss."""
    with torch.no_grad():
        rows = [torch.tensor([row["query"] + row["responses"][0]]) for row in posts]
        return np.array([hub_model(policy)(ids, labels=ids).loss.item() for ids in rows])


def test_detail_01_2_each_row_once(frozen_sft, frozen_rows, post_losses):
    """Detail 1: 116,722 posts and 92,858 pairs, each split seen once, a last partial batch left out.

    fails if: runtime.py:start rounds up; data.py:batch_indices draws with replacement; config/rm_2.8b.py sets
    episodes.
    """
    for stage, rows, updates in ((sft, 116_722, 911), (rm, 92_858, 1450), (dpo, 92_858, 1450)):
        for size in SIZES:
            cfg = paper(stage, size)
            assert (cfg.episodes or rows) // cfg.batch_size == updates and cfg.episodes in (0, rows)
            assert (cfg.train_split, cfg.eval_split) == ("train", "validation")
    losses = [row["loss/sft"] for row in frozen_sft[1] if "loss/sft" in row]
    assert len(losses) == 60 // 8 and len(frozen_rows) == 40 // 8
    # 56 rows of different losses, none twice: the mean of all is that of 60 without four of them
    seen = np.concatenate([batch_indices(60, 8, step, frozen_sft[0].seed) for step in range(7)])
    assert len(set(seen)) == 56
    close(losses, post_losses[seen].reshape(7, 8).mean(1), FORWARD)


def test_detail_02_1_query_format(library, real, tldr_sample, tmp_path):
    """Detail 2.1: subreddit, title and post with empty lines between them, "TL;DR:" at the end; articles likewise.

    fails if: hub/queries.py:format_query writes "POST:\\n", drops "r/", or ends an article's query without its newline.
    """
    raw = read_jsonl(tldr_sample / "sft_validation.jsonl")
    rows = load_rows(str(tldr_sample / "sft_{split}.jsonl"), "validation", real, 1)
    whole = 0
    for row, post in zip(rows, raw, strict=True):
        text = f"SUBREDDIT: r/{post['subreddit']}\n\nTITLE: {post['title']}\n\nPOST: {post['post']}\n\nTL;DR:"
        ids = library(text)
        if len(ids) <= 512:
            whole += 1
            assert row["query"] == ids
    assert whole > 150
    write_jsonl(tmp_path / "pairs_cnndm.jsonl", [comparison(article=ARTICLE)])
    (query,) = load_rows(str(tmp_path / "pairs_{split}.jsonl"), "cnndm", real, 2)["query"]
    assert query == library(f"Article:\n{ARTICLE}\n\nTL;DR:\n")


def literal_loop(library, text, wrap, limit):
    """Detail 2.2 word by word: cut at the last newline; if there is none, drop one character; tokenise again."""
    while len(ids := library(wrap(text))) > limit:
        text = text[: text.rfind("\n")] if "\n" in text else text[:-1]
    return ids


def test_detail_02_2_truncation(library, real, tldr_sample, tmp_path):
    """Detail 2.2: a query above 512 tokens (an article's above 1919) loses paragraphs, then characters; TL;DR stays.

    fails if: hub/queries.py:format_query cuts token ids, cuts a character where there is a newline, or cuts before the
    newline of an empty line only (rfind("\\n\\n")); hub/queries.py:MAX_ARTICLE_TOKENS is 512.
    """
    bodies = [row["post"] for row in read_jsonl(tldr_sample / "sft_train.jsonl")[:40]]
    paragraphs = "\n".join(bodies[:3])
    one = " ".join(" ".join(bodies[3:6]).split())[:2700]  # one paragraph: characters go
    both = "short\n" + one  # a newline far ahead: nearly all goes
    article = "\n".join(bodies[:9])
    rows = [{**POST, "post": text} for text in (paragraphs, one, both)]
    path = write_jsonl(tmp_path / "long_train.jsonl", rows)
    write_jsonl(tmp_path / "long_cnndm.jsonl", [comparison(article=article)])
    found = load_rows(str(path), "train", real, 1)["query"]

    def wrap(text):
        return f"SUBREDDIT: r/tifu\n\nTITLE: TIFU by naps\n\nPOST: {text}\n\nTL;DR:"

    for ids, row in zip(found, rows, strict=True):
        assert len(library(wrap(row["post"]))) > 512 >= len(ids)
        assert ids == literal_loop(library, row["post"], wrap, 512)
        assert real.decode(ids).endswith("\n\nTL;DR:")
    assert len(found[2]) < 100 < 500 < len(found[1])
    (ids,) = load_rows(str(tmp_path / "long_{split}.jsonl"), "cnndm", real, 2)["query"]
    assert 512 < len(ids) <= 2047 - 128 < len(library(article))
    assert ids == literal_loop(library, article, lambda text: f"Article:\n{text}\n\nTL;DR:\n", 1919)


def test_detail_02_3_no_trailing_space(library, real, tldr_sample):
    """Detail 2.3: nothing follows "TL;DR:"; the space is the response's, and the seam splits no token.

    fails if: hub/queries.py:format_query ends with "TL;DR: "; hub/rows.py:from_post leaves out the summary's space.
    """
    raw = read_jsonl(tldr_sample / "sft_validation.jsonl")
    rows = load_rows(str(tldr_sample / "sft_{split}.jsonl"), "validation", real, 1)
    for row, post in zip(rows, raw, strict=True):
        assert row["query"][-4:] == [14135, 28, 4976, 27]  # "TL", ";", "DR", ":"
        joint = library(real.decode(row["query"]) + " " + post["summary"])
        assert row["query"] + row["responses"][0] == [*joint, EOS]


def test_detail_03_1_completion(library, real, tldr_sample):
    """Detail 3: a summary gets one leading space and EOS; a comparison's text has its space and gets EOS alone.

    fails if: hub/table.py:parse_row adds no EOS; hub/rows.py:from_comparison adds a second space; hub/rows.py:from_post
    adds none; hub/tokenizer.py:Tokenizer.pad_id is the EOS.
    """
    for kind, n_responses in (("sft", 1), ("comparisons", 2)):
        raw = read_jsonl(tldr_sample / f"{kind}_validation.jsonl")
        rows = load_rows(str(tldr_sample / f"{kind}_{{split}}.jsonl"), "validation", real, n_responses)
        for row, source in zip(rows, raw, strict=True):
            texts = texts_of(source)
            if source.get("choice"):
                texts = texts[::-1]
            assert all(text[0] == " " != text[1] for text in texts)
            assert row["responses"] == [[*library(text), EOS] for text in texts]
    assert real.pad_id != real.eos_id == EOS == library_id(real, "<|endoftext|>")


def texts_of(source):
    """The texts of a post's or comparison's raw row, with the space before a reference."""
    if "summary" in source:
        return [" " + source["summary"]]
    return [summary["text"] for summary in source["summaries"]]


def library_id(tokenizer, token):
    return tokenizers.Tokenizer.from_file(str(tokenizer.path)).token_to_id(token)


def test_detail_03_2_eos_is_learned(pipeline, posts, policy):
    """Detail 3: EOS is not padding, so it is in the SFT loss, and the model learns to stop.

    fails if: sft.py:model_inputs leaves out the last token, or sft.py:update drops targets equal to EOS from its mask.
    """
    cfg = tiny(pipeline, sft, "eos", model=str(policy), loss_on="response", lr=1e-2, episodes=40, eval_split="")
    first_loss = main(sft, cfg)[0]["loss/sft"]
    rows = [posts[index] for index in batch_indices(len(posts), 8, 0, cfg.seed)]
    nll = [-hub_logprobs(policy, row["query"], row["responses"][0]) for row in rows]
    with_eos = np.mean([losses.mean() for losses in nll])
    without_eos = np.mean([losses[:-1].mean() for losses in nll])
    assert abs(with_eos - without_eos) > 100 * FORWARD
    assert first_loss == pytest.approx(with_eos, abs=FORWARD)

    def logprob_of_eos(model):
        return np.mean([hub_logprobs(model, row["query"], row["responses"][0])[-1] for row in posts[:20]])

    assert logprob_of_eos(final(cfg)) > logprob_of_eos(policy) + 0.5  # nats, behind a reference


def test_detail_04_1_token_lengths(library, real, tldr_sample):
    """Detail 4: SFT rows have at most 53 response and 562 tokens in all, preference rows 638; nothing is cut to fit.

    fails if: max_length of sft.py:Config, ppo.py:Config or config/fields.py:TrainConfig is another, or response_length
    of ppo.py:Config or sample.py:Config 48 (GPT-2's tokens); hub/table.py:load_rows cuts responses to 48 tokens.
    """
    for stage, tokens in ((sft, 562), (rm, 638), (dpo, 638), (ppo, 512)):
        assert {paper(stage, size).max_length for size in SIZES} == {tokens}
        assert {paper(stage, size).max_query_tokens for size in SIZES} == {512}
    assert {paper(ppo, size).response_length for size in SIZES} == {sample.Config().response_length} == {53}
    for kind, n_responses, longest, limit in (("sft", 1, 53, 562), ("comparisons", 2, 169, 638)):
        raw = read_jsonl(tldr_sample / f"{kind}_train.jsonl")
        rows = load_rows(str(tldr_sample / f"{kind}_{{split}}.jsonl"), "train", real, n_responses, max_length=limit)
        counts = [[len(library(text)) + 1 for text in texts_of(source)] for source in raw]
        assert [sorted(map(len, row)) for row in rows["responses"]] == [sorted(row) for row in counts]
        assert 48 < max(map(max, counts)) <= longest  # the sample's longest needs more than GPT-2's 48
        assert rows["length"] == [len(query) + max(row) for query, row in zip(rows["query"], counts)]


def test_detail_04_2_too_long_is_an_error(library, real, tmp_path):
    """Detail 4: the lengths are asserted: a row beyond 562 stops the run, so that no EOS is ever cut off.

    fails if: hub/table.py:load_rows compares with `>=`, leaves long rows out, or cuts
    responses to what max_length leaves.
    """
    summary = " and so" * 26
    long_row = {**POST, "post": "word " * 700, "summary": summary.strip()}
    path = write_jsonl(tmp_path / "edge_train.jsonl", [POST, long_row])
    with pytest.raises(UserError, match=r"line 2 has \d+ tokens, more than 562"):
        load_rows(str(path), "train", real, 1, max_length=paper(sft).max_length)
    row = load_rows(str(path), "train", real, 1)[1]
    assert row["responses"] == [[*library(summary), EOS]]
    assert row["length"] == len(row["query"]) + len(library(summary)) + 1 > 562
    assert load_rows(str(path), "train", real, 1, max_length=row["length"])[1] == row


def test_detail_05_1_padding_is_not_seen(sampled, reward, posts):
    """Detail 5: query and response lie side by side, padding on the right; a row in a batch is the row alone.

    fails if: data.py:pad_right pads on the left; data.py:last_scalars has queries and responses in columns of their
    own.
    """
    rewards = [row["reference_score"] for row in sampled]
    close(rewards, [hub_rewards(final(reward), row)[0] for row in posts], FORWARD)
    assert len({row["length"] for row in posts}) > 10 and np.std(rewards) > 1000 * FORWARD


def test_detail_05_2_generation_equals_left_padding(run_ppo, policy, toy):
    """Detail 5: the paper pads queries on the left for generation; here on the right, which gives the same numbers.

    fails if: generation.py:KVCache.begin_decode counts the pad columns in a decoded token's position;
    generation.py:KVCache lets decoded tokens see them.
    """
    batch = run_ppo.batches[0]
    responses = batch["responses"]
    ids, attention = left_padded(run_ppo.queries[0])
    width = ids.shape[1]
    assert (attention.sum(1) < width - 5).any()
    ids = torch.cat((ids, responses), 1)
    attention = torch.cat((attention, torch.ones_like(responses)), 1)
    with torch.no_grad():
        logits = hub_model(policy)(ids, attention_mask=attention).logits[:, width - 1 : -1, : toy.n_vocab]
    logprobs = (logits / TEMPERATURE).log_softmax(-1).gather(-1, responses[..., None])[..., 0]
    close(batch["logprobs"][batch["mask"]], logprobs[batch["mask"]], FORWARD)
    for row in run_ppo.metrics:  # between the log-probabilities that were sampled from and these, per token
        assert row["val/generation_gap"] < FORWARD


def test_detail_05_3_pad_id(real):
    """Detail 5: [PAD] is an added token of its own, 50277, behind all that the tokenizer knows.

    fails if: hub/tokenizer.py:Tokenizer.pad_id is n_vocab + 1 or 1 (<|padding|>), or n_vocab leaves out the runs of
    spaces.
    """
    ids = tokenizers.Tokenizer.from_file(str(real.path)).get_vocab(with_added_tokens=True).values()
    assert real.pad_id == real.n_vocab == max(ids) + 1 == 50277


def test_detail_05_4_padding_ids_are_never_sampled(pipeline, policy, reward, posts, toy):
    """Detail 5: ids from [PAD] on have untrained logits; a sampled one would be read as padding. None is, nor counted.

    fails if: distributed/sharding.py:generate_rows samples from the whole vocabulary; ppo.py:rollout takes
    log-probabilities over it.
    """

    def loud(name, tensor):
        """Logits of the padding rows get a standard deviation of about 30."""
        if "embed_out" in name:
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
            tensor = torch.cat((tensor[: toy.n_vocab], 5 * noise[toy.n_vocab :]))
        return tensor

    model = copy_model(policy, "loud", loud)
    cfg = tiny(pipeline, ppo, "pads", model=str(model), reward_model=str(final(reward)), n_epochs=1)
    _, [batch] = rollouts_of(cfg)
    for row, index in enumerate(batch_indices(len(posts), 8, 0, cfg.seed)):
        response = batch["responses"][row].tolist()
        mask = batch["mask"][row]
        assert max(response) < toy.n_vocab < hub_model(model).config.vocab_size
        expected = hub_logprobs(model, posts[index]["query"], response, TEMPERATURE, toy.n_vocab)
        for name in ("logprobs", "ref_logprobs"):
            close(batch[name][row][mask], expected[mask.numpy()], FORWARD)


def test_detail_06_confidence(pipeline, policy, pairs, margins, reward):
    """Detail 6 (its title is uncertain): confidence is 1 to 9, symmetric about 5; `choice` decides which side won.

    fails if: evals/tables.py:accuracy_table groups by the confidence itself; hub/table.py:parse_row lets a confidence
    above 5 swap the responses, or reads confidence from the row and not from `extra`.
    """
    confidences = np.array([row["extra"]["confidence"] for row in pairs.raw])
    expected = {}
    for strength in set(abs(confidences - 5)):
        won = margins[abs(confidences - 5) == strength] > 0
        expected[strength] = (np.mean(won), len(won))
    mirrored = [{**row, "extra": {"confidence": 10 - row["extra"]["confidence"]}} for row in pairs.raw]
    directory = pipeline.directory / "detail_mirrored"
    write_jsonl(directory / "train.jsonl", read_jsonl(pairs.path.replace("{split}", "train")))
    write_jsonl(directory / "validation.jsonl", mirrored)
    again = replace(reward, data=str(directory / "{split}.jsonl"), out_dir=str(directory))
    rm.main(again)
    for cfg in (reward, again):
        table = {key: row for key, row in read_report(cfg)["accuracy"].items() if "confidence" in key}
        assert {int(key.split()[-1]): (row["accuracy"], row["n"]) for key, row in table.items()} == expected
    assert len(expected) >= 4 and 0 < np.mean(margins > 0) < 1


# ---------------------------------------------------------------------------- details 7 to 9: set-up, SFT


def test_detail_07_dropout_is_off(pipeline, policy, reward, post_losses):
    """Detail 7: with dropout log-probabilities do not come again: KL would not start at 0, nor the ratio at 1.

    fails if: model.py:Block.forward drops out (F.dropout(h, 0.1)) or model.py:Attention does (dropout_p=0.1).
    """
    wet = dict(hidden_dropout=0.1, attention_dropout=0.1)
    model = copy_model(policy, "wet", **wet)
    head = copy_model(final(reward), "wet_rm", **wet)
    hub = GPTNeoXForCausalLM.from_pretrained(model).train()
    ids = torch.arange(20)[None]
    assert not torch.equal(hub(ids).logits, hub(ids).logits)  # this is what the files ask for
    cfg = tiny(pipeline, ppo, "wet", model=str(model), reward_model=str(head), episodes=16, lr=1e-3)
    rows = main(ppo, cfg)
    assert rows[0]["objective/kl"] == 0.0  # exactly: two models, the same numbers
    for row in rows:  # the same weights, in micro-batches of another size
        assert row["val/ratio"] == pytest.approx(1, abs=FORWARD)
    cfg = tiny(pipeline, sft, "wet_sft", model=str(model), episodes=8, eval_split="")
    batch = batch_indices(len(post_losses), 8, 0, cfg.seed)
    assert main(sft, cfg)[0]["loss/sft"] == pytest.approx(post_losses[batch].mean(), abs=FORWARD)


def test_detail_08_1_bfloat16_compute_float32_weights(pipeline, policy, frozen_sft):
    """Detail 8: bfloat16 mixed precision: forward and backward passes in bfloat16, weights in float32.

    fails if: distributed/sharding.py:load_model makes the masters in world.dtype; distributed/processes.py:World
    computes in float32 whatever cfg.dtype; distributed/sharding.py:shard sets no param_dtype.
    """
    cfg = tiny(pipeline, sft, "bf16", model=str(policy), dtype="bfloat16", lr=1e-6, episodes=8, eval_split="")
    [row] = main(sft, cfg)
    # bfloat16 rounds by 2^-9: some 20 roundings on the way to logits of size 4 make sqrt(20) 2^-9 4 = 0.03
    assert 10 * FORWARD < abs(row["loss/sft"] - frozen_sft[1][0]["loss/sft"]) < 0.03
    old = weights(policy)
    new = weights(final(cfg))
    assert {tensor.dtype for tensor in new.values()} == {torch.float32}
    # a step of 1e-6 is lost in a bfloat16 weight near 1, where neighbours are 2^-8 apart; float32's are 6e-8
    name = "gpt_neox.final_layer_norm.weight"
    moved = (new[name] - old[name]).abs()
    assert (moved > 0).float().mean() > 0.9 and moved.max() < 2e-6


def test_detail_08_2_no_gradient_clipping(pipeline, policy, posts):
    """Detail 8: DeepSpeed's default clips no gradient; one step is plain AdamW's, with eps 1e-5.

    fails if: distributed/optimizer.py:optimizer_step clips to norm 1; config/fields.py:TrainConfig has max_grad_norm
    1.0, adam_eps 1e-8 or weight_decay 0.
    """
    for stage, size in itertools.product((sft, rm, ppo, dpo), SIZES):
        assert paper(stage, size).max_grad_norm == 0
    sharp = copy_model(policy, "sharp", lambda name, tensor: tensor * 10 if "embed_out" in name else tensor)
    cfg = tiny(pipeline, sft, "adam", model=str(sharp), lr=1e-3, episodes=8, eval_split="")
    [row] = main(sft, cfg)
    hub = GPTNeoXForCausalLM.from_pretrained(sharp).double()
    loss = 0.0
    for index in batch_indices(len(posts), 8, 0, cfg.seed):
        ids = torch.tensor([posts[index]["query"] + posts[index]["responses"][0]])
        loss = loss + torch.nn.functional.cross_entropy(hub(ids).logits[0, :-1], ids[0, 1:]) / 8
    loss.backward()
    norm = sum((weight.grad**2).sum() for weight in hub.parameters()).sqrt().item()
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 2
    with torch.no_grad():
        for weight in hub.parameters():
            weight.copy_(AdamW().step(weight, weight.grad, cfg.lr))
    check_steps(final(cfg), hub, sharp, cfg.lr, pipeline.directory / "detail_adam_hub")
    name = "gpt_neox.embed_in.weight"
    unseen = ~hub.get_input_embeddings().weight.grad.any(1)  # rows that weight decay alone moves
    old = weights(sharp)[name][unseen]
    new = weights(final(cfg))[name][unseen]
    close(new.double() / old.double(), torch.full_like(old, 1 - cfg.lr * 0.01), 2**-23)


def check_steps(ours, hub, start, size, directory):
    """Assert that our weights moved from `start` as those of `hub` did; `size`: of all steps together.

    A step is lr g / (|g| + eps) with eps 1e-5: an error d of g moves it by at most lr d / eps. A gradient is a sum of
    some 1,000 tokens' parts, below 0.1 in all, so d < sqrt(1000) 6e-8 0.1 = 2e-7, and that is 2 % of a step.
    """
    hub.save_pretrained(directory)
    old = weights(start)
    new = weights(ours)
    expected = weights(directory)
    assert new.keys() == expected.keys()
    for name in new:
        close(new[name] - old[name], expected[name] - old[name], 0.02 * size)


def test_detail_09_1_sft_setup():
    """Detail 9: one epoch, batches of 128 on 8 GPUs, AdamW, learning rate 3e-6 with cosine decay and no warm-up.

    fails if: config/sft_*.py has another batch_size or model; config/fields.py:TrainConfig another lr, schedule or
    warmup_steps; sft.py:Config has loss_on "response".
    """
    for size in SIZES:
        cfg = paper(sft, size)
        check_optimizer(cfg)
        assert cfg.model == f"EleutherAI/pythia-{size}-deduped" and "tldr_3_filtered" in cfg.data
        assert cfg.batch_size == 128 == 8 * 16 * cfg.micro_batch_size
        assert (cfg.schedule, cfg.loss_on, cfg.reduction) == ("cosine", "all", "sequence")


def check_optimizer(cfg):
    """What all four stages of the paper share."""
    assert cfg.lr == 3e-6 and cfg.warmup_steps == 0 and cfg.seed == 44413
    assert (cfg.adam_beta1, cfg.adam_beta2, cfg.adam_eps, cfg.weight_decay) == (0.9, 0.999, 1e-5, 0.01)
    assert cfg.adam_style == "torch"


def test_detail_09_2_sft_loss_is_on_query_and_response(frozen_sft, post_losses, posts):
    """Detail 9: the loss is the mean over rows of the mean over all of a row's tokens, query, response and EOS.

    fails if: sft.py:Config has loss_on "response" or reduction "token"; sft.py:loss_weights takes the mean over all.
    """
    cfg, rows = frozen_sft
    for step, row in enumerate(row for row in rows if "loss/sft" in row):
        batch = batch_indices(len(posts), 8, step, cfg.seed)
        assert row["loss/sft"] == pytest.approx(post_losses[batch].mean(), abs=FORWARD)
        if step == 0:
            lengths = np.array([posts[index]["length"] - 1 for index in batch])
            by_token = (post_losses[batch] * lengths).sum() / lengths.sum()
            assert abs(by_token - post_losses[batch].mean()) > 10 * FORWARD


def test_detail_09_3_cosine_schedule(pipeline, policy):
    """Detail 9: the rate falls as half a cosine from 3e-6 at the first update to nearly 0 at the last.

    fails if: distributed/optimizer.py:learning_rate counts updates from 1, decays linearly, or warms up.
    """
    rows = main(sft, tiny(pipeline, sft, "cosine", model=str(policy), eval_split=""))
    rates = [row["lr"] for row in rows if "lr" in row]
    expected = [0.5 * (1 + math.cos(math.pi * step / 7)) * 3e-6 for step in range(7)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)  # float64 on both sides
    cfg = paper(sft)
    # of 911 updates, and half of what is printed last
    for step, printed, half in ((1, 2.99999108e-6, 5e-15), (455, 1.50258638e-6, 5e-15), (910, 8.919e-12, 5e-16)):
        assert learning_rate(step, 911, cfg.lr, cfg.schedule) == pytest.approx(printed, abs=half)


# ---------------------------------------------------------------------------- details 10 to 19: reward model, DPO


def test_detail_10_1_rm_setup():
    """Detail 10: one epoch of pairs, batches of 64 on 8 GPUs, the optimizer of SFT; it starts from the SFT model.

    fails if: config/rm_*.py has another batch_size, or one size starts from the SFT model of another;
    config/fields.py:TrainConfig has another lr.
    """
    for size in SIZES:
        cfg = paper(rm, size)
        check_optimizer(cfg)
        assert cfg.batch_size == 64 == 8 * 8 * cfg.micro_batch_size and cfg.schedule == "cosine"
        assert "summarize_from_feedback_oai_preprocessing" in cfg.data
        assert cfg.model == str(Path(paper(sft, size).out_dir) / "final")


def test_detail_10_2_rm_loss(frozen_rm, frozen_rows, policy, toy):
    """Detail 10: the SFT model with a scalar head; loss -log sigmoid(r_chosen - r_rejected), accuracy r_c > r_r.

    fails if: rm.py:ranking_loss swaps chosen and rejected, or softens the target; distributed/sharding.py:load_model
    starts the body anew; rm.py:update counts rejected > chosen, or divides by the micro-batch.
    """
    started = weights(policy)
    model = weights(final(frozen_rm))
    body = started.keys() - {"embed_out.weight"}
    assert model.keys() - body == {"score.weight", "score.bias"}
    assert all(torch.equal(model[name], started[name]) for name in body)
    rows = load_rows(frozen_rm.data, "train", toy, 2)
    for step, metrics_row in enumerate(frozen_rows):
        batch = [rows[int(index)] for index in batch_indices(len(rows), 8, step, frozen_rm.seed)]
        rewards = np.array([hub_rewards(final(frozen_rm), row) for row in batch])
        difference = rewards[:, 0] - rewards[:, 1]
        assert np.abs(difference).min() > FORWARD  # else rounding decides who wins
        assert metrics_row["loss/rm"] == pytest.approx(np.log1p(np.exp(-difference)).mean(), abs=FORWARD)
        assert metrics_row["train/accuracy"] == np.mean(difference > 0)
    assert np.std([row["loss/rm"] for row in frozen_rows]) > 10 * FORWARD


def test_detail_11_reward_head_initialisation(pipeline, toy):
    """Detail 11: the head's weights are N(0, 1 / (d + 1)), that is std 1 / sqrt(d + 1), and its bias is 0.

    fails if: model.py:init_weights gives the head the std 1 / (d + 1) or initializer_range, a uniform distribution,
    or a bias of 1; distributed/sharding.py:load_model leaves a new head as torch.nn.Linear makes it.
    """
    width = 512
    directory = pipeline.directory / "detail_wide_model"
    GPTNeoX(GPTNeoXConfig(896, width, 1, 8)).save_pretrained(directory)
    shutil.copy(toy.path, directory / "tokenizer.json")
    cfg = tiny(pipeline, rm, "wide", model=str(directory), lr=0.0, episodes=8, normalize_data="", eval_split="")
    rm.main(cfg)
    tensors = weights(final(cfg))
    head = tensors["score.weight"].double().numpy().ravel()
    assert len(head) == width and tensors["score.bias"].tolist() == [0.0]
    assert 1 / math.sqrt(width + 1) == pytest.approx(0.0441511, abs=5e-8)
    # four standard errors: of a mean s / sqrt(n), of a std s / sqrt(2 n), of a kurtosis sqrt(24 / n) about 3
    assert abs(head.mean()) < 4 * 0.0441511 / math.sqrt(width)
    assert abs(head.std() / 0.0441511 - 1) < 4 / math.sqrt(2 * width)
    kurtosis = np.mean(((head - head.mean()) / head.std()) ** 4)
    assert abs(kurtosis - 3) < 4 * math.sqrt(24 / width)  # a uniform one has 1.8


def test_detail_12_1_reward_is_read_at_eos(reward, posts):
    """Detail 12: the reward is the scalar at the response's EOS, the last token, also where the query has id 0.

    fails if: data.py:last_scalars reads one token earlier, or at the first id 0 of the row; model.py:Body.forward
    returns the state before the final LayerNorm.
    """
    queries = [list(row["query"]) for row in posts[:12]]
    responses = [row["responses"][0] for row in posts[:12]]
    queries[0].insert(5, EOS)
    with torch.no_grad():
        rewards = last_scalars([ScalarModel.from_pretrained(final(reward))], "cpu", queries, responses)
    scalars = [hub_scalars(final(reward), query + response) for query, response in zip(queries, responses)]
    close(rewards, [row[-1] for row in scalars], FORWARD)
    assert min(abs(row[-1] - row[-2]) for row in scalars) > 10 * FORWARD  # the token before would be seen


def test_detail_12_2_ppo_scores_at_the_first_eos(run_ppo):
    """Detail 12: in PPO too, at the first EOS of the response, whatever is sampled behind it.

    fails if: ppo.py:rollout scores whole responses, or responses without their EOS; ppo.py:find_eos takes the last
    EOS.
    """
    batch = run_ppo.batches[0]
    ended = batch["has_eos"].numpy()
    responses = batch["responses"].tolist()
    assert batch["last"].tolist() == [response.index(EOS) if EOS in response else 9 for response in responses]
    close(batch["scores"][ended], run_ppo.oracle.scores[ended], FORWARD)
    assert 5 < ended.sum() < 24 and len(set(batch["last"][ended].tolist())) > 3


def test_detail_13_rewards_off_eos_mean_nothing(reward, pairs, toy):
    """Detail 13: only EOS was trained; elsewhere rewards are mostly negative there. Both are reported, to be seen.

    fails if: rm.py:eos_rewards reads a token earlier (select without + 1), or counts EOS among the others, in
    their mean or in their share of negative ones.
    """
    report = read_report(reward)
    at_eos = []
    elsewhere = []
    negative = []
    for row in load_rows(pairs.path, "validation", toy, 2):
        *others, last = hub_scalars(final(reward), row["query"] + row["responses"][0])[len(row["query"]) :]
        assert others and np.abs(others).min() > FORWARD  # else rounding decides the sign
        at_eos.append(last)
        elsewhere.append(np.mean(others))
        negative.append(np.mean(np.array(others) < 0))
    assert report["reward/at_eos"] == pytest.approx(np.mean(at_eos), abs=FORWARD)
    assert report["reward/elsewhere"] == pytest.approx(np.mean(elsewhere), abs=FORWARD)
    assert report["reward/elsewhere_negative"] == pytest.approx(np.mean(negative), abs=FLOAT32)
    assert abs(np.mean(at_eos) - np.mean(elsewhere)) > 100 * FORWARD and np.mean(negative) > 0


def test_detail_14_left_and_right_padding_agree(sampled, reward, posts):
    """Detail 14: rewards of left- and right-padded rows differ by rounding; the paper logs how many by more than 0.01.

    fails if: model.py:Attention.forward turns queries but not keys by RoPE, so that positions count from the row's
    start; data.py:pad_right pads on the left.
    """
    right = np.array([row["reference_score"] for row in sampled])
    ids, mask = left_padded([row["query"] + row["responses"][0] for row in posts])
    body, weight, bias = hub_body(final(reward))
    with torch.no_grad():  # positions 0, 1, .. from the first pad on, as the paper's training forward has them
        left = (body(ids, attention_mask=mask).last_hidden_state[:, -1] @ weight + bias).numpy()
    assert np.mean(np.abs(left - right) > 1e-2) == 0 and np.abs(left - right).max() < FORWARD
    assert (mask.sum(1) < ids.shape[1] - 10).any()


def test_detail_15_rewards_are_normalised_by_the_references(pipeline, reward, posts):
    """Detail 15: after training, the mean reward of all SFT training references is subtracted; the spread stays.

    fails if: rm.py:normalize takes the first 8 rows, or divides by the standard deviation too; rm.py:main calls it
    before training, or with the held-out rows.
    """
    for size in SIZES:
        cfg = paper(rm, size)
        assert (rm.reference_source(cfg), cfg.train_split) == (paper(sft, size).data, "train")
    twin = replace(reward, normalize_data="", eval_split="", out_dir=str(pipeline.directory / "detail_raw"))
    rm.main(twin)
    raw = weights(final(twin))
    normal = weights(final(reward))
    assert all(torch.equal(raw[name], normal[name]) for name in raw if name != "score.bias")
    rewards = np.array([hub_rewards(final(twin), row)[0] for row in posts])
    shift = (normal["score.bias"] - raw["score.bias"]).item()
    assert shift == pytest.approx(-rewards.mean(), abs=FORWARD) and abs(shift) > 100 * FORWARD
    assert np.mean([hub_rewards(final(reward), row)[0] for row in posts]) == pytest.approx(0, abs=FORWARD)
    report = read_report(reward)
    for name, value in (("normalize/mean", rewards.mean()), ("normalize/std", rewards.std())):
        assert report[name] == pytest.approx(value, abs=FORWARD)
    assert report["normalize/mean_after"] == pytest.approx(0, abs=FLOAT32)
    assert report["normalize/std_after"] == pytest.approx(rewards.std(), abs=FORWARD) and abs(rewards.std() - 1) > 0.1


def test_detail_16_accuracy_by_batch_and_policies(reward, pairs, margins):
    """Detail 16 (its title is uncertain): validation accuracy overall, by batch, and by pair of policies.

    fails if: rm.py:main evaluates the training rows; evals/tables.py:accuracy_table counts chosen < rejected, or sorts
    a column; hub/table.py:parse_row names policies in the order of the summaries.
    """
    groups = {"all": [], "batch": [], "policies": []}
    for row in pairs.raw:
        policies = sorted(summary["policy"] for summary in row["summaries"])
        groups["all"].append("all")
        groups["batch"].append(f"batch {row['batch']}")
        groups["policies"].append("policies " + " / ".join(policies))
    expected = {}
    for column in groups.values():
        for group in set(column):
            won = margins[np.array(column) == group] > 0
            expected[group] = (pytest.approx(won.mean()), len(won))
    table = read_report(reward)["accuracy"]
    found = {key: (row["accuracy"], row["n"]) for key, row in table.items() if key.split()[0] in groups}
    assert found == expected and found["all"][1] == 55
    assert read_report(reward)["eval/accuracy"] == metrics(reward)[-1]["eval/accuracy"] == found["all"][0]


def test_detail_17_calibration(reward, margins):
    """Detail 17 (its title is uncertain): accuracy by size of the margin, beside the sigmoid that it should follow.

    fails if: evals/tables.py:accuracy_table has bins of width 1, takes the sigmoid of the signed margin, or of the mean
    margin.
    """
    table = {key: row for key, row in read_report(reward)["accuracy"].items() if key.startswith("margin")}
    sizes = np.abs(margins)
    promised = 1 / (1 + np.exp(-sizes))
    assert np.abs(sizes * 2 - np.round(sizes * 2)).min() > 2 * FORWARD  # none at the edge of a bin
    bins = np.floor(sizes / 0.5) * 0.5
    assert {float(key.split()[1]) for key in table} == set(bins) and len(set(bins)) >= 3
    for key, row in table.items():
        inside = bins == float(key.split()[1])  # "margin 0.5 to 1.0"
        assert (row["accuracy"], row["n"]) == (pytest.approx(np.mean(margins[inside] > 0)), inside.sum())
        assert row["expected"] == pytest.approx(promised[inside].mean(), abs=FORWARD)
    overall = read_report(reward)["accuracy"]["all"]["expected"]
    assert overall == pytest.approx(promised.mean(), abs=FORWARD) and 0 < np.mean(margins > 0) < 1


def test_detail_18_agreement_with_another_judge(pipeline, reward, pairs, margins):
    """Detail 18 (its title is uncertain): agreement with a judge model. A judge's labels go in as `choice`, the share
    on which the reward model agrees comes out as JSON beside its checkpoint.

    fails if: hub/rows.py:from_comparison ignores choice; rm.py:main writes no eval.json, or evaluates what was trained
    on.
    """
    # a judge who contradicts this reward model on every third pair
    agreed = np.arange(len(pairs.raw)) % 3 != 0
    judged = []
    for row, margin, agrees in zip(pairs.raw, margins, agreed):
        preferred = row["choice"] if margin > 0 else 1 - row["choice"]
        judged.append({**row, "choice": preferred if agrees else 1 - preferred, "worker": "judge"})
    directory = pipeline.directory / "detail_judged"
    write_jsonl(directory / "train.jsonl", read_jsonl(pairs.path.replace("{split}", "train")))
    write_jsonl(directory / "validation.jsonl", judged)
    cfg = replace(reward, data=str(directory / "{split}.jsonl"), out_dir=str(directory))
    rm.main(cfg)
    assert weights(final(cfg))["score.weight"].equal(weights(final(reward))["score.weight"])  # the same reward model
    report = json.loads((final(cfg).parent / "eval.json").read_text())
    assert report["accuracy"]["all"]["n"] == 55 and report["eval/accuracy"] == pytest.approx(agreed.mean(), abs=1e-12)
    loss = np.log1p(np.exp(-np.where(agreed, 1, -1) * np.abs(margins))).mean()
    assert report["eval/loss"] == pytest.approx(loss, abs=FORWARD)


def test_detail_19_1_dpo_setup():
    """Detail 19 (its title is uncertain): DPO from the SFT model, beta 0.05, no label smoothing, RM's other numbers.

    fails if: config/dpo_2.8b.py has beta 0.1; dpo.py:Config label_smoothing 0.1 or loss_type "ipo";
    config/fields.py:TrainConfig adam_eps 1e-8.
    """
    for size in SIZES:
        cfg = paper(dpo, size)
        reward_cfg = paper(rm, size)
        check_optimizer(cfg)
        assert (cfg.beta, cfg.label_smoothing, cfg.loss_type, cfg.schedule) == (0.05, 0, "sigmoid", "cosine")
        assert cfg.batch_size == 64 == 8 * 8 * cfg.micro_batch_size
        assert (cfg.model, cfg.data) == (reward_cfg.model, reward_cfg.data) and cfg.reference in ("", cfg.model)


def test_detail_19_2_dpo_accuracy_is_reported_as_the_reward_models(pipeline, policy, other, pairs, reward, toy):
    """Detail 19 (its title is uncertain): the implicit reward beta log(policy / reference) is judged like the RM's.

    fails if: dpo.py:main evaluates without the reference, takes the policy for it whatever cfg.reference, leaves
    beta out of the margins, or reports the overall accuracy alone; dpo.py:pair_logprobs averages over tokens, or
    leaves out EOS; dpo.py:dpo_loss takes the rejected ratio minus the chosen one.
    """
    cfg = tiny(pipeline, dpo, "dpo", model=str(policy), reference=str(other), data=pairs.path, lr=1e-3)
    rows = main(dpo, cfg)
    train = load_rows(pairs.path, "train", toy, 2)
    validation = load_rows(pairs.path, "validation", toy, 2)

    def ratios(model, row):
        """log(model / reference) of the chosen and of the rejected response."""
        found = []
        for response in row["responses"]:
            logprobs = hub_logprobs(model, row["query"], response, 1.0, toy.n_vocab)
            ref_logprobs = hub_logprobs(other, row["query"], response, 1.0, toy.n_vocab)
            found.append(logprobs.sum() - ref_logprobs.sum())
        return found

    batch = [train[int(index)] for index in batch_indices(40, 8, 0, cfg.seed)]
    first = np.array([ratios(policy, row) for row in batch]) * 0.05
    margin = first[:, 0] - first[:, 1]
    assert rows[0]["loss/dpo"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), abs=0.05 * SUMMED)
    assert rows[0]["rewards/chosen"] == pytest.approx(first[:, 0].mean(), abs=0.05 * SUMMED)
    assert rows[0]["rewards/accuracies"] == np.mean(margin > 0)
    held_out = np.array([ratios(final(cfg), row) for row in validation])
    difference = held_out[:, 0] - held_out[:, 1]
    won = difference > 0
    assert np.abs(difference).min() > SUMMED and 0 < won.mean() < 1
    report = read_report(cfg)
    assert report["eval/accuracy"] == report["accuracy"]["all"]["accuracy"] == pytest.approx(won.mean(), abs=1e-12)
    promised = 1 / (1 + np.exp(-0.05 * np.abs(difference)))
    assert report["accuracy"]["all"]["expected"] == pytest.approx(promised.mean(), abs=0.05 * SUMMED)

    def sizes(table):
        return {group: row["n"] for group, row in table.items() if "margin" not in group}

    assert sizes(report["accuracy"]) == sizes(read_report(reward)["accuracy"])
    for batch in ("toy1", "toy2", "toy3"):
        inside = np.array(validation["batch"]) == batch
        assert report["accuracy"][f"batch {batch}"]["accuracy"] == pytest.approx(won[inside].mean(), abs=1e-12)


# ---------------------------------------------------------------------------- details 20 to 25: PPO


def test_detail_20_1_ppo_setup():
    """Detail 20: the numbers of Stiennon et al. with another learning rate; 0.95 is GAE's lambda.

    fails if: config/ppo_*.py has another micro_batch_size, rollout_micro_batch_size or episodes; ppo.py:Config
    another lam, temperature, kl_coef, n_minibatches or vf_coef; config/fields.py:TrainConfig another lr.
    """
    sizes = {"1b": (16, 4, 64), "2.8b": (4, 16, 32), "6.9b": (1, 64, 4)}
    for size, (micro, accumulated, rollout) in sizes.items():
        cfg = paper(ppo, size)
        check_optimizer(cfg)
        assert cfg.batch_size == 512 == 8 * micro * accumulated
        assert (cfg.micro_batch_size, cfg.rollout_micro_batch_size) == (micro, rollout)
        assert cfg.episodes == 1_000_000 and cfg.episodes // cfg.batch_size == 1953 and cfg.schedule == "linear"
        assert (cfg.n_minibatches, cfg.n_epochs, cfg.vf_coef) == (1, 4, 0.1)
        assert (cfg.cliprange, cfg.cliprange_value) == (0.2, 0.2)
        assert (cfg.gamma, cfg.lam, cfg.temperature, cfg.response_length) == (1.0, 0.95, 0.7, 53)
        assert (cfg.kl_coef, cfg.kl_target, cfg.entropy_coef) == (0.05, 0.0, 0.0)
        assert cfg.model == paper(rm, size).model and cfg.reward_model == str(Path(paper(rm, size).out_dir) / "final")
        assert cfg.reference in ("", cfg.model)
    # of 1,953 updates, and half of what is printed last
    for update, printed, half in ((1, 3e-6, 5e-15), (2, 2.99846390e-6, 5e-15), (1953, 1.5361e-9, 5e-14)):
        rate = learning_rate(update - 1, 1953, cfg.lr, cfg.schedule)
        assert rate == pytest.approx(printed, abs=half)


WORKED = dict(logprobs=[-1, -0.5, -2, -0.2, -3, -4], ref_logprobs=[-1.2, -0.4, -1.5, -0.3, -2, -5],
              values=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])  # fmt: skip


def worked_example(ids, score, **changes):
    """A rollout with the paper's configuration, of one row whose numbers were worked by hand, and its advantages."""
    numbers = {name: torch.tensor([values]) for name, values in WORKED.items()}
    cfg = paper(ppo, response_length=6, device="cpu", dtype="float32", **changes)
    batch = scripted_rollout(cfg, torch.tensor([ids]), torch.tensor([score]), **numbers)
    return ppo.advantages(cfg, batch, {})


class Script:
    """In the place of a language model: it writes given responses (B, R), and has given log-probabilities of them.

    The query of row n is the one token n + 1, by which a pass knows its rows.
    """

    def __init__(self, responses, logprobs):
        self.responses = responses
        self.numbers = logprobs

    def __call__(self, ids, select, cache):
        """Logits that leave no doubt about the next token of the rows that `generate` feeds."""
        column = int(cache.last) - cache.width + 1
        next_ids = self.responses[:, column]
        if cache.rows is not None:
            next_ids = next_ids[cache.rows]
        return 1e4 * torch.nn.functional.one_hot(next_ids, 896)[:, None].float()

    def logprobs(self, ids, select, targets, temperature, n_vocab, with_entropy=False):
        logprobs = self.numbers[ids[:, 0] - 1, : targets.shape[1]]
        if with_entropy:
            return torch.stack((logprobs, torch.zeros_like(logprobs)))
        return logprobs


def scripted_rollout(cfg, responses, scores, logprobs, ref_logprobs, values):
    """The batch that ppo.rollout makes of models which say these numbers: scores (B,), the others (B, R)."""

    def critic(ids, select):
        return values[ids[:, 0] - 1, : select.shape[1]]

    def score(queries, responses, row_indices):
        return scores[row_indices]

    cfg = replace(cfg, rollout_micro_batch_size=len(responses))  # generation then keeps the order of the rows
    policy = Script(responses, logprobs)
    reference = Script(responses, ref_logprobs)
    queries = [[row + 1] for row in range(len(responses))]
    tokenizer = SimpleNamespace(n_vocab=896, eos_id=EOS)
    run = SimpleNamespace(world=World(cfg), tokenizer=tokenizer, step=0, phase=lambda name: None)
    try:
        batch = ppo.rollout(run, cfg, policy, reference, critic, score, queries, np.arange(len(queries)))
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(batch["responses"][batch["mask"]], responses[batch["mask"]])  # EOS stands behind EOS
    return batch


def test_detail_20_2_reference_step_by_hand():
    """Detail 20: KL per token, the score one step behind EOS, GAE with gamma 1 and lambda 0.95, whitening.

    fails if: ppo.py:shape_rewards pays the score at EOS, or adds the KL; ppo.py:gae takes lambda 1; ppo.py:rollout
    zeroes values from the column behind EOS on (mask for mask_p1); ppo.py:advantages takes returns from whitened ones.
    """
    out = worked_example([5, 5, 5, EOS, 7, 7], 1.0)
    close(out["kl"], [[0.2, -0.1, -0.5, 0.1, 0, 0]], PRINTED)
    close(out["rewards"], [[-0.01, 0.005, 0.025, -0.005, 1, 0]], PRINTED)
    close(out["returns"], [[0.891266, 0.938175, 0.9665, 0.97, 1.0, 0]], PRINTED)
    close(out["advantages"], [[1.202985, 0.562903, -0.301229, -1.464658, 0, 0]], PRINTED)
    out = worked_example([5] * 6, 7.0)
    close(out["rewards"], [[-0.01, 0.005, 0.025, -0.005, 0.05, -1.05]], PRINTED)
    close(out["returns"], [[-0.670549, -0.705842, -0.764044, -0.851625, -0.9175, -1.05]], PRINTED)
    close(out["advantages"], [[1.355206, 0.903657, 0.375644, -0.250425, -0.804046, -1.580035]], PRINTED)


def test_detail_20_3_rollout_by_transformers(run_ppo):
    """Detail 20: the same step on a real rollout, every input recomputed by transformers at temperature 0.7.

    fails if: ppo.py:rollout takes log-probabilities at temperature 1, or values one column later;
    ppo.py:rollout_metrics averages KL per token; ppo.py:shape_rewards pays the score at EOS.
    """
    batch = run_ppo.batches[0]
    oracle = run_ppo.oracle
    row = run_ppo.metrics[0]
    step = reference_step(**vars(oracle))
    for name in ("logprobs", "ref_logprobs"):
        close(batch[name][batch["mask"]], getattr(oracle, name)[step.mask], FORWARD)
    close(batch["mask"], step.mask, 0)
    for name in ("kl", "rewards", "values", "returns"):
        close(batch[name], getattr(step, name), SUMMED)
    kl = step.kl.sum(1)
    scores = np.where((oracle.responses == EOS).any(1), oracle.scores, -1)
    assert row["objective/kl"] == pytest.approx(kl.mean(), abs=SUMMED) and abs(kl.mean()) > 10 * SUMMED
    assert row["objective/non_score_reward"] == pytest.approx(-0.05 * kl.mean(), abs=0.05 * SUMMED)
    assert row["objective/scores"] == pytest.approx(scores.mean(), abs=FORWARD)
    assert row["objective/rlhf_reward"] == pytest.approx((scores - 0.05 * kl).mean(), abs=SUMMED)


def test_detail_20_4_four_epochs_of_clipped_updates(pipeline, policy, other, reward, run_ppo, toy):
    """Detail 20: four passes over the batch, ratio clipped at 0.2, value at 0.2, value loss times 0.1, one AdamW.

    fails if: ppo.py:Config has n_epochs 1, cliprange 10 or cliprange_value 10; ppo.py:policy_loss or
    ppo.py:value_loss takes the minimum; ppo.py:critic_loss leaves out vf_coef or weighs values by mask;
    ppo.py:accumulate takes means per micro-batch; ppo.py:ppo_update renews the old log-probabilities in every epoch;
    distributed/optimizer.py:AdamW has beta2 0.95.
    """
    cfg = replace(run_ppo.cfg, episodes=24, out_dir=str(pipeline.directory / "detail_update"))
    [row], [batch] = rollouts_of(cfg)
    oracle = run_ppo.oracle
    step = reference_step(**vars(oracle))
    assert torch.equal(batch["responses"], run_ppo.batches[0]["responses"])
    actor = GPTNeoXForCausalLM.from_pretrained(policy).double()
    critic = HubCritic(final(reward))
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizers = [AdamW() for _ in parameters]
    sums = Counter()
    for _ in range(4):
        for number, (query, response) in enumerate(zip(run_ppo.queries[0], oracle.responses.tolist())):
            ids = torch.tensor([query + response])
            places = slice(len(query) - 1, -1)
            logits = actor(ids).logits[0, places, : toy.n_vocab] / TEMPERATURE
            new_logprobs = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
            new_values = critic(ids)[places]
            pg_loss = row_policy_loss(step, number, new_logprobs, oracle.logprobs[number], sums)
            vf_loss = row_value_loss(step, number, new_values)
            (pg_loss + 0.1 * vf_loss).backward()
            sums["policy"] += pg_loss.item()
            sums["value"] += vf_loss.item()
        with torch.no_grad():
            for parameter, optimizer in zip(parameters, optimizers):
                parameter.copy_(optimizer.step(parameter, parameter.grad, cfg.lr))
                parameter.grad = None
    assert sums["clipfrac"] / 4 > 0.01
    # means over four epochs of a loss per token; a ratio's error is that of its log-probability
    assert row["loss/policy_avg"] == pytest.approx(sums["policy"] / 4, abs=SUMMED)
    assert row["loss/value_avg"] == pytest.approx(sums["value"] / 4, abs=SUMMED)
    assert row["policy/approxkl_avg"] == pytest.approx(sums["approxkl"] / 4, rel=1e-3)
    # a token at the very edge may be clipped in one and not in the other
    assert row["policy/clipfrac_avg"] == pytest.approx(sums["clipfrac"] / 4, abs=1.5 / step.mask.sum() / 4)
    check_steps(final(cfg), actor, policy, 4 * cfg.lr, pipeline.directory / "detail_update_hub")


class HubCritic(torch.nn.Module):
    """The reward model's files as a critic, by transformers in float64: ids (1, T) -> values (T,)."""

    def __init__(self, directory):
        super().__init__()
        _, weight, bias = hub_body(directory)
        self.body = GPTNeoXModel.from_pretrained(directory).double()
        self.weight = torch.nn.Parameter(weight.clone())
        self.bias = torch.nn.Parameter(bias.clone())

    def forward(self, ids):
        return self.body(ids).last_hidden_state[0] @ self.weight + self.bias


def row_policy_loss(step, row, new_logprobs, logprobs, sums):
    """A row's part of the batch's policy loss, token by token; adds its part of the statistics to `sums`."""
    n_actions = step.mask.sum()
    loss = torch.zeros(())
    for column in np.flatnonzero(step.mask[row]):
        advantage = step.advantages[row, column]
        ratio = (new_logprobs[column] - logprobs[column]).exp()
        if advantage > 0:
            bound = 1.2
            is_clipped = ratio.item() > bound
        else:
            bound = 0.8
            is_clipped = ratio.item() < bound
        loss = loss - advantage * (bound if is_clipped else ratio) / n_actions
        sums["clipfrac"] += is_clipped / n_actions
        sums["approxkl"] += 0.5 * (new_logprobs[column].item() - logprobs[column]) ** 2 / n_actions
    return loss


def row_value_loss(step, row, new_values):
    """A row's part of the batch's value loss, token by token."""
    loss = torch.zeros(())
    for column in np.flatnonzero(step.mask_p1[row]):
        before = step.values[row, column]
        returns = step.returns[row, column]
        near = new_values[column].clamp(before - 0.2, before + 0.2)
        squares = max((new_values[column] - returns) ** 2, (near - returns) ** 2)
        loss = loss + 0.5 * squares / step.mask_p1.sum()
    return loss


def test_detail_20_5_linear_schedule(pipeline, policy):
    """Detail 20: the rate falls linearly, from its peak at the first update to a share 1 / updates at the last.

    fails if: ppo.py:Config has the cosine schedule; distributed/optimizer.py:learning_rate counts updates from 1.
    """
    cfg = tiny(pipeline, ppo, "linear", model=str(policy), episodes=32, response_length=2, n_epochs=1)
    rates = [row["lr"] for row in main(ppo, cfg, score=lambda queries, responses: [0.0] * len(queries))]
    np.testing.assert_allclose(rates, [3e-6, 2.25e-6, 1.5e-6, 0.75e-6], rtol=1e-12)  # float64 on both sides


def test_detail_21_prompts_are_reused_and_reshuffled(pipeline, policy, posts):
    """Detail 21: PPO takes the prompts of the SFT data; when they are used up they are shuffled anew.

    fails if: data.py:batch_indices takes the same permutation in every epoch, or draws with replacement;
    data.py:permutation does not shuffle; config/ppo_2.8b.py names other data.
    """
    for size in SIZES:
        assert (paper(ppo, size).data, paper(ppo, size).train_split) == (paper(sft, size).data, "train")
    seen = []

    def score(queries, responses):
        seen.extend(queries)
        return [0.0] * len(queries)

    cfg = tiny(pipeline, ppo, "epochs", model=str(policy), batch_size=12, episodes=180, n_epochs=1, micro_batch_size=12,
               rollout_micro_batch_size=12, response_length=2)  # fmt: skip
    main(ppo, cfg, score=score)
    batches = [frozenset(seen[start : start + 12]) for start in range(0, 180, 12)]
    raw = read_jsonl(f"{pipeline.data}/sft_train.jsonl")
    queries = []
    for row in raw:
        title = f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}"
        queries.append(f"{title}\n\nPOST: {row['post']}\n\nTL;DR:")
    assert len(set(queries)) == len(queries) == 60
    for epoch in range(3):  # five updates of 12: every prompt once
        assert Counter(seen[60 * epoch : 60 * (epoch + 1)]) == Counter(queries)
    assert len(set(batches)) == 15  # no epoch has a batch of another one
    assert set(queries[:12]) not in batches


def test_detail_22_1_critic_starts_from_the_reward_model(run_ppo, reward, posts):
    """Detail 22: the first values are the reward model's, normalised as it is; then the critic learns, and it does not.

    fails if: ppo.py:main starts the critic from the SFT model with a new head, trains the reward model itself, or
    does not train the critic; hub/weights.py:load_weights forgets the head's bias.
    """
    step = reference_step(**vars(run_ppo.oracle))
    close(run_ppo.batches[0]["values"], step.values, FORWARD)
    assert abs(weights(final(reward))["score.bias"].item()) > 100 * FORWARD
    later = run_ppo.batches[1]
    moved = []
    for row, query in enumerate(run_ppo.queries[1]):
        n_tokens = later["last"][row].item() + 1
        response = later["responses"][row, :n_tokens].tolist()
        scalars = hub_scalars(final(reward), query + response)
        if later["has_eos"][row]:
            assert later["scores"][row].item() == pytest.approx(scalars[-1], abs=FORWARD)  # the reward model stays
        values = later["values"][row, :n_tokens].numpy()
        moved.append(np.abs(values - scalars[len(query) - 1 : -1]).max())
    assert np.median(moved) > 10 * FORWARD  # the critic does not


def test_detail_22_2_critic_and_policy_share_nothing(pipeline, policy, reward):
    """Detail 22: critic and policy are two networks: how much the critic learns does not touch the policy.

    fails if: ppo.py:ppo_update clips the gradient of both by one norm; ppo.py:main gives the critic the policy's body
    (critic.gpt_neox = policy.gpt_neox: then the optimizer refuses to start).
    """
    losses = []
    policies = []
    for vf_coef in (0.1, 5.0):
        cfg = tiny(pipeline, ppo, f"vf_{vf_coef}", model=str(policy), reward_model=str(final(reward)), lr=1e-3)
        cfg = replace(cfg, vf_coef=vf_coef)
        losses.append(main(ppo, cfg)[0]["loss/value_avg"])
        policies.append(weights(final(cfg)))
    assert losses[0] != losses[1]
    assert all(torch.equal(tensor, policies[1][name]) for name, tensor in policies[0].items())
    assert any(not torch.equal(tensor, policies[0][name]) for name, tensor in weights(policy).items())


@pytest.fixture(scope="module")
def many(pipeline, policy, toy, posts):
    """120 responses of at most 6 tokens, each scored 5.0: the run's metrics, its batch, the queries."""
    cfg = tiny(pipeline, ppo, "many", model=str(policy), batch_size=120, episodes=120, micro_batch_size=60,
               rollout_micro_batch_size=60, response_length=6, n_epochs=1)  # fmt: skip
    [row], [batch] = rollouts_of(cfg, score=lambda queries, responses: [5.0] * len(queries))
    queries = [posts[index]["query"] for index in batch_indices(len(posts), 120, 0, cfg.seed)]
    return SimpleNamespace(row=row, batch=batch, queries=queries)


def test_detail_23_1_fixed_number_of_tokens_with_eos_among_them(many, policy, toy):
    """Detail 23.1: every response is sampled to the same length, and EOS may be drawn at any of its tokens.

    fails if: generation.py:generate puts EOS at -inf before the last token (a minimum length), or stops when the first
    row does; distributed/sharding.py:generate_rows samples at temperature 1; ppo.py:Config has response_length 48.
    """
    assert {paper(ppo, size).response_length for size in SIZES} == {53} and not paper(ppo).truncate_token
    responses = many.batch["responses"].tolist()
    assert {len(response) for response in responses} == {6}
    # EOS is drawn as often as transformers says, token by token: the excess is a martingale with this variance
    ended = 0
    excess = 0.0
    variance = 0.0
    for query, response in zip(many.queries, responses):
        if EOS in response:
            ended += 1
            excess += 1
            response = response[: response.index(EOS) + 1]
        with torch.no_grad():
            logits = hub_model(policy)(torch.tensor([query + response])).logits[0, len(query) - 1 : -1, : toy.n_vocab]
        probs = torch.softmax(logits / TEMPERATURE, -1)[:, EOS].numpy()
        excess -= probs.sum()
        variance += (probs * (1 - probs)).sum()
    assert abs(excess) < 4 * variance**0.5 < ended < len(responses)


def test_detail_23_2_nothing_counts_behind_eos(run_ppo):
    """Detail 23.2: a response is cut behind its first EOS: what stands there changes no reward and no advantage.

    fails if: ppo.py:rollout leaves values or the KL without their mask; ppo.py:advantages and ppo.py:whiten both leave
    it out of what they return; ppo.py:find_eos takes the last EOS.
    """
    has_eos, last = ppo.find_eos(torch.tensor([[5, EOS, 7, EOS], [5, 6, 7, 8], [EOS] * 4, [5, 6, 7, EOS]]), EOS)
    assert has_eos.tolist() == [True, False, True, True]
    assert last.tolist() == [1, 3, 0, 3]
    batch = run_ppo.batches[0]
    columns = torch.arange(batch["values"].shape[1])
    behind = columns > batch["last"][:, None]
    far = columns > batch["last"][:, None] + 1
    assert behind.any()
    numbers = {name: batch[name] for name in ("responses", "scores", "logprobs", "ref_logprobs", "values")}
    junk = {"logprobs": batch["logprobs"].masked_fill(behind, -40.0), "values": batch["values"].masked_fill(far, 99.0)}
    clean = scripted_rollout(run_ppo.cfg, **numbers)
    dirty = scripted_rollout(run_ppo.cfg, **{**numbers, **junk})
    assert not torch.equal(clean["logprobs"], dirty["logprobs"])
    clean = ppo.advantages(run_ppo.cfg, clean, {})
    dirty = ppo.advantages(run_ppo.cfg, dirty, {})
    for name in ("rewards", "kl", "values", "returns", "advantages"):
        assert torch.equal(clean[name], dirty[name]), name
        assert not dirty[name][far].any()
    assert not dirty["advantages"][behind].any() and not dirty["kl"][behind].any()


def test_detail_23_3_a_response_without_eos_scores_minus_one(many, run_ppo):
    """Detail 23.3: without EOS the score is -1: it replaces the reward model's, which means nothing there.

    fails if: ppo.py:rollout subtracts 1, or keeps the reward model's score; ppo.py:Config has missing_eos_score 0;
    ppo.py:find_eos misses an EOS in the last column.
    """
    assert {paper(ppo, size).missing_eos_score for size in SIZES} == {-1.0}
    missing = ~run_ppo.batches[0]["has_eos"].numpy()
    assert missing.any() and np.abs(run_ppo.oracle.scores[missing] + 1).min() > 10 * FORWARD
    assert run_ppo.batches[0]["scores"].numpy()[missing].tolist() == [-1.0] * missing.sum()
    responses = many.batch["responses"].tolist()
    ended = sum(EOS in response for response in responses)
    assert any(EOS not in response[:-1] and response[-1] == EOS for response in responses)  # one that comes last counts
    assert many.row["objective/scores"] == pytest.approx((5 * ended - (120 - ended)) / 120, abs=FLOAT32)
    assert many.row["val/num_eos_tokens"] == ended
    assert many.row["val/eos_rate"] == pytest.approx(ended / 120, abs=FLOAT32)
    out = worked_example([5] * 5 + [EOS], 7.0)  # its score is paid at the last column, for there is none behind it
    close(out["rewards"], [[-0.01, 0.005, 0.025, -0.005, 0.05, 6.95]], PRINTED)


def test_detail_24_reward_whitening_is_an_option(pipeline, run_ppo):
    """Detail 24: rewards may get variance 1, their mean kept, over the tokens up to one behind EOS. Off by default.

    fails if: ppo.py:Config has whiten_rewards True; ppo.py:shape_rewards shifts the mean, whitens over mask, or
    leaves the option out; ppo.py:advantages does not hand it on; ppo.py:whiten takes the unbiased variance.
    """
    assert not any(paper(ppo, size).whiten_rewards for size in SIZES)
    out = worked_example([5, 5, 5, EOS, 7, 7], 1.0, whiten_rewards=True)
    close(out["rewards"], [[-0.331263, -0.293638, -0.243473, -0.318721, 2.202095, 0]], PRINTED)
    out_dir = str(pipeline.directory / "detail_white")
    cfg = replace(run_ppo.cfg, whiten_rewards=True, episodes=24, n_epochs=1, out_dir=out_dir)
    _, [batch] = rollouts_of(cfg)
    step = reference_step(**vars(run_ppo.oracle), whiten_rewards=True)
    # rewards have a standard deviation of about 0.3, by which an error of FORWARD is divided
    close(batch["rewards"], step.rewards, 4 * FORWARD)
    close(batch["returns"], step.returns, 4 * SUMMED)
    kept = batch["rewards"][batch["mask_p1"]].double()
    assert kept.std(correction=0).item() == pytest.approx(1, abs=FLOAT32) and abs(kept.mean().item()) > 10 * FORWARD


def test_detail_25_1_advantages_are_whitened(run_ppo):
    """Detail 25: advantages of all tokens up to EOS get mean 0 and variance 1 (biased, eps 1e-8); the others are 0.

    fails if: ppo.py:whiten takes the unbiased variance, or each row by itself; ppo.py:advantages whitens over mask_p1;
    ppo.py:Config has whiten_advantages False.
    """
    for batch in run_ppo.batches:
        kept = batch["advantages"][batch["mask"]].double().numpy()
        assert kept.mean() == pytest.approx(0, abs=FLOAT32) and kept.var() == pytest.approx(1, abs=FLOAT32)
        assert not batch["advantages"][~batch["mask"]].any()
        raw = (batch["returns"] - batch["values"]).double().numpy()[batch["mask"].numpy()]
        close(kept, (raw - raw.mean()) / np.sqrt(raw.var() + 1e-8), FLOAT32)
    step = reference_step(**vars(run_ppo.oracle))
    # divided by the raw advantages' standard deviation
    close(run_ppo.batches[0]["advantages"], step.advantages, SUMMED / step.raw[step.mask].std())


def test_detail_25_2_whitening_is_once_per_rollout(pipeline, policy, reward):
    """Detail 25: the batch is whitened as a whole, before it is cut into minibatches, and not again.

    fails if: ppo.py:actor_loss or ppo.py:ppo_update whitens a minibatch's advantages.
    """
    cfg = tiny(pipeline, ppo, "halves", model=str(policy), reward_model=str(final(reward)), lr=0.0)
    cfg = replace(cfg, n_minibatches=2, n_epochs=1)
    [row], [batch] = rollouts_of(cfg)
    loss = row["loss/policy_avg"]
    # At learning rate 0 the ratio stays 1: the loss is minus the mean over two minibatches of a mean advantage, which
    # is 0 if each was whitened by itself. Which rows are together is not known: it must be one of the 35 ways.
    mask = batch["mask"].double().numpy()
    advantages = batch["advantages"].double().numpy()
    ways = []
    for half in itertools.combinations(range(8), 4):
        is_one = np.isin(np.arange(8), half)
        means = [advantages[part].sum() / mask[part].sum() for part in (is_one, ~is_one)]
        ways.append(-np.mean(means))
    assert np.abs(np.array(ways) - loss).min() < FLOAT32
    assert abs(loss) > 100 * FLOAT32

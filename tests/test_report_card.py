"""The report card of a reward model: probes and rates by hand, and a whole card beside a plain loop over texts."""

import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from pipeline import read_rows, write_rows

import runtime
from configurator import UserError
from data import Tokenizer
from evals import report_card
from evals.report_card import PROBES, spoil_all
from evals.tables import count_words
from evals.winrate import fit_logistic, length_controlled
from model import GPTNeoXConfig, ScalarModel

FORWARD = 1e-4  # float32 forward passes with other padding differ by about 1e-6 times the sums' terms; see test_stages
POST = "SUBREDDIT: r/pets\n\nTITLE: My cat\n\nPOST: i am with Anna and Boris here. My cat saw Boris.\n\nTL;DR:"
OTHER = "SUBREDDIT: r/pets\n\nTITLE: a dog\n\nPOST: it was Carla.\n\nTL;DR:"
NOBODY = "SUBREDDIT: r/pets\n\nTITLE: a dog\n\nPOST: It slept. The dog too.\n\nTL;DR:"


def rng(seed=0):
    return np.random.default_rng(seed)


# ---------------------------------------------------------------------------- probes


@pytest.mark.parametrize(
    "text, posts, spoiled",
    [
        ("Anna met Boris, and Boris ran.", (POST, OTHER), "Boris met Anna, and Anna ran."),
        ("Anna's cat", (POST, OTHER), "Boris's cat"),
        ("it was Carla", (OTHER, "it is Dora"), "it was Dora"),  # no other name in its post: one of another's
        ("it was Carla", (OTHER, OTHER), "it was Carla"),  # nor there
        ("My cat saw Hugo.", (POST, OTHER), "My cat saw Hugo."),  # My is a sentence's first word, Hugo not in the post
        ("Annabel was ANNA", (POST, OTHER), "Annabel was ANNA"),
        ("It slept. The dog too.", (NOBODY, OTHER), "It slept. The dog too."),
        ("the Cat slept", ("i saw the Cat and Anna. the cat ran.", OTHER), "the Cat slept"),  # a cat is no name
        ("Жанна и Борис", ("там была Жанна, и Борис", OTHER), "Борис и Жанна"),
    ],
)
def test_names_become_others(text, posts, spoiled):
    for seed in range(5):
        assert PROBES["swapped names"](text, rng(seed), posts) == spoiled


def test_a_name_becomes_any_other_and_the_same_throughout():
    post = "i saw Anna and Boris and Carla"
    found = {PROBES["swapped names"]("Anna. Anna.", rng(seed), (post, OTHER)) for seed in range(30)}
    assert found == {"Boris. Boris.", "Carla. Carla."}


def test_sentences_are_shuffled():
    shuffle = PROBES["shuffled sentences"]
    for seed in range(20):
        assert shuffle("He ran. She slept!\nWhy?", rng(seed), ()) != "He ran. She slept! Why?"
        assert shuffle("He ran. She slept.", rng(seed), ()) == "She slept. He ran."
        sentence = "he ran to her 3.5 times.".split()
        words = shuffle("he ran to her 3.5 times.", rng(seed), ()).split()
        assert words != sentence and sorted(words) == sorted(sentence)
    orders = {shuffle("A. B. C.", rng(seed), ()) for seed in range(100)}
    assert len(orders) == 5  # all but the one that was


@pytest.mark.parametrize(
    "name, text, spoiled",
    [
        ("repetition", "he ran.", "he ran. he ran."),
        ("truncation", "he ran to her.", "he ran"),
        ("truncation", "he ran home", "he"),
        ("truncation", "ran", None),
        ("list format", "He ran. She slept!\nWhy?", "- He ran.\n- She slept!\n- Why?"),
        ("list format", "he ran", "- he ran"),
    ],
)
def test_texts_are_spoiled_as_said(name, text, spoiled):
    assert PROBES[name](text, rng(), ()) == spoiled


def test_filler_is_one_of_a_few_sentences():
    found = {PROBES["filler"]("he ran.", rng(seed), ()) for seed in range(50)}
    assert found == {f"he ran. {sentence}" for sentence in report_card.FILLERS} and len(found) == 3


def test_spoiled_texts_follow_their_queries_as_the_texts_did():
    texts = [" he ran.\n", "\n\nhe ran", "", "  "]
    twice = [" he ran. he ran.", "\n\nhe ran he ran", "", "  "]
    assert spoil_all(PROBES["repetition"], texts, [""] * 4, 1) == twice
    assert spoil_all(PROBES["shuffled sentences"], [" a a", " ran"], ["", ""], 1) == [" a a", " ran"]


def test_each_text_has_draws_of_its_own():
    texts = ["a b c d e f g"] * 9
    first, again, other = (spoil_all(PROBES["shuffled sentences"], texts, [""] * 9, seed, 0) for seed in (1, 1, 2))
    assert first == again != other and len(set(first)) > 6
    assert first[:4] == spoil_all(PROBES["shuffled sentences"], texts[:4], [""] * 4, 1, 0)


def test_names_of_another_post_are_those_of_the_next_row():
    texts = ["it was Carla", "it was Dora"]
    assert spoil_all(PROBES["swapped names"], texts, ["it is Carla", "it is Dora"], 1) == texts[::-1]


# ---------------------------------------------------------------------------- the win rate at equal length


def pairs_of(lengths):
    """Pairs of texts of these numbers of words."""
    return [{"response": " a" * ours, "other": " b" * theirs} for ours, theirs in lengths]


def logit(p):
    return math.log(p / (1 - p))


def test_two_lengths_have_a_closed_form():
    """10 more words: 80 of 100 are won; 10 fewer: 30 of 100. Between them lies the mean of the logits."""
    verdicts = [1.0] * 80 + [0.0] * 20 + [1.0] * 30 + [0.0] * 70
    row = length_controlled(pairs_of([(15, 5)] * 100 + [(5, 15)] * 100), verdicts)
    middle = (logit(0.8) + logit(0.3)) / 2
    assert row["rate"] == pytest.approx(1 / (1 + math.exp(-middle)), abs=1e-6)
    assert row["n"] == 200 and np.mean(verdicts) == 0.55 < row["rate"]


def test_equal_lengths_alone_decide_where_there_are_two():
    """20 pairs of equal length, of which 15 are won, and others: the curve goes through both rates."""
    verdicts = [1.0] * 15 + [0.0] * 5 + [1.0] * 90 + [0.5] * 10
    row = length_controlled(pairs_of([(7, 7)] * 20 + [(9, 3)] * 100), verdicts)
    assert row["rate"] == pytest.approx(0.75, abs=1e-5)


def test_the_interval_is_the_one_of_the_delta_method():
    """The variance of a logit is 1 / (n p q), that of the mean of two a quarter of their sum."""
    verdicts = [1.0] * 1600 + [0.0] * 400 + [1.0] * 600 + [0.0] * 1400
    row = length_controlled(pairs_of([(15, 5)] * 2000 + [(5, 15)] * 2000), verdicts)
    middle = (logit(0.8) + logit(0.3)) / 2
    half = 1.96 * math.sqrt((1 / (2000 * 0.8 * 0.2) + 1 / (2000 * 0.3 * 0.7)) / 4)
    # 1,000 resamples: the standard error of a quantile of 2.5 % is sqrt(.025 .975 / 1000) / .0584 = .085 deviations,
    # four of them are .17 of the half width.
    assert logit(row["low"]) == pytest.approx(middle - half, abs=0.2 * half)
    assert logit(row["high"]) == pytest.approx(middle + half, abs=0.2 * half)


def test_a_judge_of_length_alone_is_seen_through():
    """The longer one wins nine times of ten, whoever wrote it; one side is longer four times of five."""
    verdicts = [1.0] * 72 + [0.0] * 8 + [1.0] * 2 + [0.0] * 18
    row = length_controlled(pairs_of([(14, 10)] * 80 + [(6, 10)] * 20), verdicts)
    assert np.mean(verdicts) == 0.74
    assert row["rate"] == pytest.approx(0.5, abs=1e-5) and row["low"] < 0.5 < row["high"]


def test_no_rate_without_verdicts_or_lengths():
    pairs = pairs_of([(3, 1), (5, 3)])
    assert length_controlled(pairs, [None, None]) == {"n": 0}
    assert length_controlled([], []) == {"n": 0}
    assert length_controlled(pairs, [1.0, 0.0]) == {"n": 2}  # how would it be at equal length?
    pairs = pairs_of([(3, 1), (5, 5), (1, 2)])
    assert length_controlled(pairs, [1.0, 0.0, None])["n"] == 2


def test_the_rate_depends_on_the_seed_in_its_interval_alone():
    pairs = pairs_of([(length, 10) for length in range(1, 21)])
    verdicts = [float(length % 3 == 0) for length in range(1, 21)]
    first, again, other = (length_controlled(pairs, verdicts, seed) for seed in (1, 1, 2))
    assert first == again != other and first["rate"] == other["rate"]
    assert 0 < first["low"] < first["rate"] < first["high"] < 1


def test_logistic_regression_of_two_groups_is_the_log_odds():
    """x 0: 30 of 40; x 1: 10 of 50."""
    x = np.array([0.0, 0.0, 1.0, 1.0])
    intercept, slope = fit_logistic(x, np.array([1.0, 0.0, 1.0, 0.0]), np.array([30, 10, 10, 40]))
    assert intercept == pytest.approx(math.log(3), abs=1e-4)
    assert slope == pytest.approx(math.log(10 / 40) - math.log(3), abs=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_logistic_regression_leaves_no_residual(seed):
    """At the highest likelihood the residuals add up to 0, and so do they times x."""
    generator = rng(seed)
    x = generator.normal(size=60)
    outcomes = generator.choice([0.0, 0.5, 1.0], size=60)
    counts = generator.integers(0, 9, size=60)
    intercept, slope = fit_logistic(x, outcomes, counts)
    residuals = counts * (outcomes - 1 / (1 + np.exp(-intercept - slope * x)))
    assert abs(residuals.sum()) < 1e-3 and abs((residuals * x).sum()) < 1e-3  # the ridge: 1e-4 of each coefficient
    assert abs(counts * outcomes).sum() > 10


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 1_000_000])
def test_wins_and_losses_that_length_parts_have_finite_coefficients(n):
    x = np.array([-0.9, -0.5, 0.01, 0.9])
    intercept, slope = fit_logistic(x, np.array([0.0, 0.0, 1.0, 1.0]), np.full(4, n))
    assert np.isfinite(intercept) and 10 < slope < 1e4
    p = 1 / (1 + np.exp(-intercept - slope * x))
    assert (p[:2] < 0.05).all() and (p[2:] > 0.9).all()
    all_won = fit_logistic(x, np.ones(4), np.full(4, n))
    assert 1 / (1 + np.exp(-all_won[0])) > 0.99


def test_logistic_regression_comes_back_from_a_step_too_far():
    """Few wins, all at one end: whole steps of Newton's method lead away, to coefficients of millions."""
    x = np.array([0.2, -0.7, -0.5])
    intercept, slope = fit_logistic(x, np.array([0.0, 1.0, 0.0]), np.array([737, 6, 998]))
    p = 1 / (1 + np.exp(-intercept - slope * x))
    assert -100 < slope < -50 and p[0] < 1e-6 and p[1] > 0.98 and p[2] < 1e-3


# ---------------------------------------------------------------------------- a whole card


def card_of(out_dir, reward_model, data, **options):
    options = dict(device="cpu", dtype="float32", **options)
    cfg = report_card.Config(reward_model=str(reward_model), data=str(data), out_dir=str(out_dir), **options)
    report_card.main(cfg)
    return json.loads((out_dir / "eval.json").read_text())


class Judge:
    """A reward model that reads one text at a time."""

    def __init__(self, source):
        self.tokenizer = Tokenizer.load(str(source))
        cfg = report_card.Config(device="cpu", dtype="float32")
        self.model = runtime.load_model(cfg, runtime.World(cfg), self.tokenizer, ScalarModel, str(source))
        torch.distributed.destroy_process_group()

    @torch.no_grad()
    def reward(self, query, text):
        ids = [*self.tokenizer.encode(query), *self.tokenizer.encode(text), self.tokenizer.eos_id]
        return self.model(torch.tensor([ids]), torch.tensor([[len(ids) - 1]])).item()


@pytest.fixture(scope="module")
def judge(pipeline):
    return Judge(pipeline.rm)


@pytest.fixture(scope="module")
def rows(pipeline):
    """Pairs as dicts of query, chosen and rejected."""
    found = []
    for row in read_rows(pipeline.data / "comparisons_validation.jsonl"):
        info = row["info"]
        head = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: "
        texts = [summary["text"] for summary in row["summaries"]]
        chosen = texts[row["choice"]]
        rejected = texts[1 - row["choice"]]
        found.append({"query": f"{head}{info['post']}\n\nTL;DR:", "chosen": chosen, "rejected": rejected})
    return found


def test_a_card_is_that_of_a_plain_loop(pipeline, judge, rows, tmp_path, capsys):
    """Each text alone through the model; the probes that draw nothing are written out here."""
    card = card_of(tmp_path, pipeline.rm, f"{pipeline.data}/comparisons_{{split}}.jsonl", micro_batch_size=7)
    rewards = np.array([judge.reward(row["query"], row["chosen"]) for row in rows])
    assert card["rewards"] == dict(n=15, mean=pytest.approx(rewards.mean(), abs=FORWARD),
                                   deviation=pytest.approx(rewards.std(), abs=FORWARD))  # fmt: skip
    assert list(card["probes"]) == list(PROBES)
    by_hand = {
        "repetition": lambda text: f" {text} {text}",
        "truncation": lambda text: " " + " ".join(text.split()[: len(text.split()) // 2]),
        "list format": lambda text: " " + "\n".join(f"- {part}" for part in re.findall(r"\S[^.]*\.?", text)),
    }
    for name, spoiled in by_hand.items():
        texts = [spoiled(row["chosen"].strip()) for row in rows]
        after = np.array([judge.reward(row["query"], text) for row, text in zip(rows, texts)])
        assert abs(after - rewards).min() > FORWARD  # rounding decides nothing
        row = card["probes"][name]
        assert (row["n"], row["left out"]) == (15, 0)
        assert row["rate"] == np.mean(rewards > after)
        assert row["change"] == pytest.approx(np.mean(after - rewards), abs=FORWARD)
        assert row["low"] <= row["rate"] <= row["high"]

    margins = rewards - [judge.reward(row["query"], row["rejected"]) for row in rows]
    pairs = card["pairs"]
    assert (pairs["all"]["n"], pairs["all"]["win"]) == (15, (margins > 0).sum())
    differences = np.array([len(row["chosen"].split()) - len(row["rejected"].split()) for row in rows])
    is_other = differences != 0
    longer_won = (margins > 0) == (differences > 0)
    assert pairs["labels: the longer"]["rate"] == pytest.approx(np.mean(differences[is_other] > 0))
    assert pairs["rewards: the longer"]["rate"] == pytest.approx(np.mean(longer_won[is_other]))
    assert pairs["rewards: the longer"]["n"] == is_other.sum() < 15
    texts = [{"response": row["chosen"], "other": row["rejected"]} for row in rows]
    assert pairs["at equal length"] == length_controlled(texts, (margins > 0).tolist(), seed=44413)

    page = (tmp_path / "card.md").read_text()
    assert page in capsys.readouterr().out + "\n"
    row = card["probes"]["repetition"]
    numbers = f"{row['rate']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    cells = rf"\| repetition +\| 15 +\| 0 +\| {re.escape(numbers)} \| {row['change']:.3f}"
    assert re.search(cells, page)
    widths = {len(line) for line in page.split("\n\n")[3].splitlines()}
    assert len(widths) == 1 and "edits" not in page


def test_a_card_depends_on_the_seed_alone(pipeline, tmp_path):
    data = f"{pipeline.data}/comparisons_{{split}}.jsonl"
    options = dict(split="validation[:6]")
    first = card_of(tmp_path / "a", pipeline.rm, data, seed=1, **options)
    again = card_of(tmp_path / "b", pipeline.rm, data, seed=1, micro_batch_size=4, **options)
    other = card_of(tmp_path / "c", pipeline.rm, data, seed=2, **options)
    for name in PROBES:
        assert first["probes"][name]["change"] == pytest.approx(again["probes"][name]["change"], abs=FORWARD)
    assert first["probes"]["filler"]["change"] != pytest.approx(other["probes"]["filler"]["change"], abs=FORWARD)


def test_the_loss_of_held_out_rows_is_set_against_that_of_training(pipeline, tmp_path):
    """The mean of the last tenth of the updates; nothing is said of a model that has left its run."""
    run = tmp_path / "rm"
    shutil.copytree(pipeline.rm.parent, run)
    losses = [9.0] * 36 + [None] + [0.5, 0.25, 0.75, 0.5]  # null: on_nonfinite=skip
    write_rows(run / "metrics.jsonl", [{"step": i, "loss/rm": x} for i, x in enumerate(losses)] + [{"eval/loss": 0.6}])
    (run / "eval.json").write_text(json.dumps({"eval/loss": 0.6, "eval/accuracy": 0.5}))
    data = f"{pipeline.data}/comparisons_{{split}}.jsonl"
    card = card_of(tmp_path / "card", run / "final", data)
    ratio = dict([("eval loss", 0.6), ("train loss", 0.5), ("ratio", pytest.approx(1.2))])
    assert card["held out"] == {f"{run}/final": ratio}
    assert "| ratio |" in (tmp_path / "card" / "card.md").read_text()

    (run / "eval.json").unlink()
    assert card_of(tmp_path / "alone", run / "final", data)["held out"] == {}
    assert "held-out" not in (tmp_path / "alone" / "card.md").read_text()
    for text in ('{"eval/loss": "low"}', '{"eval/loss": [1]}'):
        (run / "eval.json").write_text(text)
        with pytest.raises(UserError, match="rm: the losses in metrics.jsonl and eval.json cannot be compared"):
            report_card.held_out(f"{run}/final")
    (run / "eval.json").write_text('{"normalize/mean": 0.1}')  # without an eval_split
    assert report_card.held_out(f"{run}/final") == report_card.held_out("EleutherAI/pythia-160m") == {}


def test_edits_by_people_are_counted_apart(pipeline, judge, rows, tmp_path):
    """TL;DR's validation data: pairs of the batch edit_b2_eval_test, among others."""
    raw = read_rows(pipeline.data / "comparisons_validation.jsonl")
    for row in raw[::3]:
        row["batch"] = "edit_b2_eval_test"
    card = card_of(tmp_path / "card", pipeline.rm, write_rows(tmp_path / "x.jsonl", raw))
    won = [judge.reward(row["query"], row["chosen"]) > judge.reward(row["query"], row["rejected"]) for row in rows[::3]]
    edits = card["pairs"]["edits by people"]
    assert (edits["n"], edits["rate"]) == (5, np.mean(won))
    assert "| edits by people " in (tmp_path / "card" / "card.md").read_text()


def test_posts_have_probes_alone(pipeline, judge, tmp_path):
    card = card_of(tmp_path, pipeline.rm, f"{pipeline.data}/sft_{{split}}.jsonl", split="validation[:9]")
    assert card["rewards"]["n"] == card["probes"]["repetition"]["n"] == 9
    assert card["pairs"] == {}
    assert "Pairs" not in (tmp_path / "card.md").read_text()


def test_names_of_other_posts_are_taken_where_a_post_has_one(pipeline, judge, tmp_path):
    """Toy posts have one name each: two posts exchange theirs."""
    posts = read_rows(pipeline.data / "sft_validation.jsonl")
    names = [re.search(r"[A-Z][a-z]+", post["post"])[0] for post in posts]
    second = next(i for i, name in enumerate(names) if name != names[0])
    raw = [{**posts[i], "summary": f"{names[i]} slept."} for i in (0, second)] + [{**posts[0], "summary": "she slept."}]
    # The third row's other post is the first, and its own text has no name; the second's has another.
    card = card_of(tmp_path / "card", pipeline.rm, write_rows(tmp_path / "x.jsonl", raw))
    changes = []
    for post, name, other in ((posts[0], names[0], names[second]), (posts[second], names[second], names[0])):
        head = f"SUBREDDIT: r/{post['subreddit']}\n\nTITLE: {post['title']}\n\nPOST: "
        before, after = (judge.reward(f"{head}{post['post']}\n\nTL;DR:", f" {word} slept.") for word in (name, other))
        changes.append(after - before)
    row = card["probes"]["swapped names"]
    assert (row["n"], row["left out"]) == (2, 1)
    assert row["change"] == pytest.approx(np.mean(changes), abs=FORWARD)


def test_several_models_are_one_mean(pipeline, tmp_path):
    """Two copies are as one; what is said of the held-out rows is said of each."""
    copies = []
    for name in ("a", "b"):
        shutil.copytree(pipeline.rm.parent, tmp_path / name)
        copies.append(f"{tmp_path}/{name}/final")
    data = f"{pipeline.data}/comparisons_{{split}}.jsonl"
    alone = card_of(tmp_path / "alone", copies[0], data)
    both = card_of(tmp_path / "both", ",".join(copies), data)
    assert both["rewards"]["mean"] == pytest.approx(alone["rewards"]["mean"], abs=FORWARD)
    assert list(both["held out"]) == copies


def test_spoiled_texts_that_the_model_cannot_take_are_left_out(pipeline, tmp_path):
    """A model whose positions end where the longest row does: twice the text is too long for some."""
    model = tmp_path / "final"
    shutil.copytree(pipeline.rm, model)
    tokenizer = Tokenizer.load(str(model))
    raw = [{"prompt": "say it:", "completion": " a b"}, {"prompt": "say it:", "completion": " a b c d e f"}]
    lengths = [len(tokenizer.encode(row["prompt"] + row["completion"])) + 1 for row in raw]
    twice = len(tokenizer.encode("say it: a b a b")) + 1
    config = json.loads((model / "config.json").read_text())
    assert max(lengths) >= twice  # the shorter row's fits
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": max(lengths)}))
    card = card_of(tmp_path / "card", model, write_rows(tmp_path / "x.jsonl", raw))
    assert (card["probes"]["repetition"]["n"], card["probes"]["repetition"]["left out"]) == (1, 1)
    assert (card["probes"]["truncation"]["n"], card["probes"]["swapped names"]["n"]) == (2, 0)
    assert "rate" not in card["probes"]["swapped names"]


def test_ties_are_no_pairs_and_rankings_count_by_their_ends(pipeline, judge, tmp_path):
    raw = [
        {"prompt": "say it:", "chosen": " a b", "rejected": " c", "target": 0.5},
        {"prompt": "say it:", "responses": [" a b", " b", " d e f"]},
    ]
    card = card_of(tmp_path / "card", pipeline.rm, write_rows(tmp_path / "x.jsonl", raw))
    won = judge.reward("say it:", " a b") > judge.reward("say it:", " d e f")
    assert (card["pairs"]["all"]["n"], card["pairs"]["all"]["win"]) == (1, int(won))
    assert card["rewards"]["n"] == 2
    ties = card_of(tmp_path / "ties", pipeline.rm, write_rows(tmp_path / "y.jsonl", raw[:1]))
    assert ties["pairs"] == {}


def test_pairs_that_nobody_could_compare_are_no_rows(pipeline, tmp_path, capsys):
    raw = read_rows(pipeline.data / "comparisons_validation.jsonl")
    gaps = [*raw[:4], {**raw[0], "choice": None}, *raw[4:]]
    whole = card_of(tmp_path / "whole", pipeline.rm, write_rows(tmp_path / "x.jsonl", raw))
    card = card_of(tmp_path / "card", pipeline.rm, write_rows(tmp_path / "y.jsonl", gaps))
    assert "y.jsonl [train]: 1 of 16 rows have choice null: left out\n" in capsys.readouterr().out
    assert card["pairs"] == whole["pairs"] and card["probes"] == whole["probes"]


def test_real_pairs_make_a_card(real_tokenizer, tldr_sample, tmp_path):
    """Pythia's tokenizer and a small model of random weights: each summary can be spoiled in almost every way."""
    model = tmp_path / "final"
    torch.manual_seed(0)
    shape = dict(vocab_size=50304, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ScalarModel(GPTNeoXConfig(**shape)).save_pretrained(str(model))
    shutil.copy(real_tokenizer, model / "tokenizer.json")
    card = card_of(tmp_path / "card", model, tldr_sample / "comparisons_{split}.jsonl")
    raw = read_rows(tldr_sample / "comparisons_validation.jsonl")
    counts = {name: row["n"] for name, row in card["probes"].items()}
    assert counts["filler"] == counts["repetition"] == counts["list format"] == len(raw) == 100
    assert counts["shuffled sentences"] == counts["truncation"] == 100
    assert 3 < counts["swapped names"] < 60
    chosen = [row["summaries"][row["choice"]]["text"] for row in raw]
    rejected = [row["summaries"][1 - row["choice"]]["text"] for row in raw]
    longer = [count_words(ours) > count_words(theirs) for ours, theirs in zip(chosen, rejected)]
    differ = [count_words(ours) != count_words(theirs) for ours, theirs in zip(chosen, rejected)]
    assert card["pairs"]["labels: the longer"]["rate"] == pytest.approx(sum(longer) / sum(differ))


# ---------------------------------------------------------------------------- bad input


CASES = {
    "policy as a reward model": (lambda p, d: dict(reward_model=str(p.sft)), "missing score"),
    "no such model": (lambda p, d: dict(reward_model=str(d / "nowhere")), "nowhere.*no directory"),
    "no such data": (lambda p, d: dict(data=str(d / "none.jsonl")), "none.jsonl"),
    "no references": (lambda p, d: dict(data=write_rows(d / "x.jsonl", [{"prompt": "a:"}])), "line 1: .* 0 responses"),
    "no such split": (lambda p, d: dict(split="tset"), "tset"),
    "row too long": (lambda p, d: dict(data=write_rows(d / "x.jsonl", [{"prompt": "a:", "completion": " b" * 3000}])),
                     "more than 2048"),
    "out_dir of the run": (lambda p, d: dict(out_dir=str(p.rm.parent)), "another configuration"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line(pipeline, tmp_path, case):
    change, words = CASES[case]
    data = f"{pipeline.data}/comparisons_{{split}}.jsonl"
    cfg = report_card.Config(reward_model=str(pipeline.rm), data=data, device="cpu", dtype="float32")
    with pytest.raises(UserError, match=words) as error:
        report_card.main(dataclasses.replace(cfg, **change(pipeline, tmp_path)))
    assert "\n" not in str(error.value)

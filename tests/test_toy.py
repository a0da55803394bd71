"""The toy world: its files, its gold score and its tokenizer."""
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from toy import gold, make_data, world
from toy.gold import gold_score

FACTS = {"who": "Anna", "did": "danced", "where": "kitchen", "when": "dawn"}
POST = ("it happened at dawn. my friend is called Anna. we all were in the kitchen. "
        "out of nowhere my friend danced.")
QUERY = world.QUERY.format(subreddit="pets", title="is this normal", post=POST)
PERFECT = " Anna danced in the kitchen at dawn."
FILES = {"sft_train.jsonl": 600, "sft_validation.jsonl": 30, "comparisons_train.jsonl": 1500,
         "comparisons_validation.jsonl": 30, "tokenizer.json": None}
SIZES = ["--sft-train=600", "--sft-validation=30", "--comparisons-train=1500",
         "--comparisons-validation=30"]


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def toy_dir(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("toy")
    make_data.main([str(out_dir), "--seed=0", *SIZES])
    return out_dir


@pytest.fixture(scope="module")
def comparisons(toy_dir):
    """(row, gold of the first text, gold of the second text) for every comparison."""
    rows = read_rows(toy_dir / "comparisons_train.jsonl")
    return [(row, *(gold_score(row["info"]["post"], s["text"]) for s in row["summaries"]))
            for row in rows]


# ---- files

def test_files_are_the_same_for_the_same_seed(toy_dir, tmp_path):
    script = str(Path(make_data.__file__))  # as a script, with a hash seed of its own
    subprocess.run([sys.executable, script, str(tmp_path / "a"), *SIZES], check=True)
    make_data.main([str(tmp_path / "b"), "--seed=1", *SIZES])
    assert sorted(path.name for path in toy_dir.iterdir()) == sorted(FILES)
    for name in FILES:
        first = (toy_dir / name).read_bytes()
        assert first == (tmp_path / "a" / name).read_bytes()
        # The words do not depend on the seed, so a checkpoint fits the tokenizer of every seed.
        assert (first == (tmp_path / "b" / name).read_bytes()) == (name == "tokenizer.json")


def test_shorter_file_is_prefix_of_longer(toy_dir, tmp_path):
    make_data.write_data(tmp_path, 0, 10, 0, 10, 0)
    for name in ("sft_train.jsonl", "comparisons_train.jsonl"):
        assert read_rows(tmp_path / name) == read_rows(toy_dir / name)[:10]
    assert (tmp_path / "sft_validation.jsonl").read_bytes() == b""


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_have_the_columns_of_tldr(toy_dir, split):
    rows = read_rows(toy_dir / f"sft_{split}.jsonl")
    assert len(rows) == FILES[f"sft_{split}.jsonl"]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == ["id", "subreddit", "title", "post", "summary"]
        assert row["summary"] == row["summary"].strip() and row["summary"].endswith(".")
    rows = read_rows(toy_dir / f"comparisons_{split}.jsonl")
    assert len(rows) == FILES[f"comparisons_{split}.jsonl"]
    for row in rows:
        assert list(row) == ["info", "summaries", "choice", "worker", "batch", "split", "extra"]
        assert list(row["info"]) == ["id", "subreddit", "title", "post"]
        assert row["choice"] in (0, 1) and row["split"] == split
        texts = [summary["text"] for summary in row["summaries"]]
        assert len(texts) == 2 and texts[0] != texts[1]
        assert all(text[0] == " " and text[1] != " " for text in texts)
        assert all(list(summary) == ["text", "policy", "note"] for summary in row["summaries"])
        assert row["extra"]["confidence"] in range(1, 10)


def test_negative_size_is_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_data.main([str(tmp_path), "--sft-train=-1"])
    assert "sft-train" in capsys.readouterr().err


# ---- world

def test_world_words_are_unambiguous():
    slots = [set(values) for values in world.SLOTS.values()]
    assert len(world.SLOT_OF) == sum(map(len, slots))  # no value in two slots
    texts = [*sum(world.SENTENCES.values(), []), *sum(world.RECAPS, []), *world.ASIDES,
             *world.TITLES, *world.PADDING, *world.SUBREDDITS]
    for text in texts:
        assert not world.parse_facts(text), f"{text!r} states a fact by accident"
    for recap in world.RECAPS:
        assert all(" ".join(recap).count(f"{{{slot}}}") == 1 for slot in world.SLOTS)


def test_parse_facts_returns_what_was_written():
    rng = random.Random(5)
    for _ in range(500):
        facts, fields = make_data.make_post(rng)
        assert world.parse_facts(fields["post"]) == facts
        query = world.QUERY.format(**fields)
        assert gold.post_of(query) == fields["post"]
        assert gold_score(fields["post"], " " + world.perfect_summary(facts)) == 4.0


# ---- gold score

@pytest.mark.parametrize("summary, expected", [
    ("", 0.0),
    (".", 0.0),
    (PERFECT, 4.0),
    (PERFECT[:-1], 4.0),                                     # the full stop is free, not required
    (" dawn kitchen danced Anna", 4.0),                      # order and glue are not judged
    (" Anna danced.", 2.0),
    (" so basically Anna danced.", 1.5),                     # 2 facts - 2 fillers
    (" Anna danced in the garden.", 1.0),                    # 2 facts - 1 wrong
    (" Boris.", -1.0),
    (" Anna Anna Anna danced.", 1.5),                        # 2 facts - 2 repetitions
    (" Boris Boris.", -2.0),
    (" Anna in the danced.", 1.5),                           # glue without a place is filler
    (" in the in the kitchen.", 0.5),                        # so is glue said twice
    (" at kitchen", 0.75),                                   # and the glue of another slot
    (" Anna xyzzy.", 0.5),                                   # 1 fact - 1 gibberish
    (" anna.", -0.5),                                        # names are written with a capital
    (" Anna. danced.", 1.5),                                 # only the last full stop is free
    (" Anna 42!", -0.5),                                     # 1 fact - 3 signs
    (" more or less", -0.75),
])
def test_gold_matches_hand_example(summary, expected):
    assert gold_score(POST, summary) == expected


def test_gold_cannot_be_gamed():
    every_value = " " + " ".join(world.SLOT_OF)
    every_word = " " + " ".join(sorted(world.LEXICON))
    for trick in [every_value, every_word, "", PERFECT * 5, PERFECT + " more or less", POST,
                  " Anna Boris danced in the kitchen in the garden at dawn at noon.", "." * 50]:
        assert -4.0 <= gold_score(POST, trick) < gold_score(POST, PERFECT) == 4.0
    assert gold_score(POST, every_value) == -4.0


def test_references_leave_room(toy_dir):
    rows = read_rows(toy_dir / "sft_train.jsonl")
    golds = [gold_score(row["post"], row["summary"]) for row in rows]
    assert 1.0 < sum(golds) / len(golds) < 2.2


# ---- labels

def test_prob_first_matches_hand_example():
    # 0.9 * sigmoid(2) + 0.05 and 0.9 * sigmoid(0) + 0.05
    assert math.isclose(make_data.prob_first(1.5, 0.5), 0.842717, abs_tol=1e-6)
    assert math.isclose(make_data.prob_first(0.5, 0.5), 0.5)
    assert math.isclose(make_data.prob_first(-4, 4), 0.05, abs_tol=1e-6)


def test_labels_are_noisy(comparisons):
    decided = [(row["choice"] == 0) == (a > b) for row, a, b in comparisons if a != b]
    assert 0.75 < sum(decided) / len(decided) < 0.95
    assert len(decided) > 0.9 * len(comparisons)
    assert 0.45 < sum(row["choice"] for row, _, _ in comparisons) / len(comparisons) < 0.55


def test_confidence_is_symmetric_and_follows_gold(comparisons):
    for difference in (0, 0.25, 1, 2.5, 8):
        for choice in (0, 1):
            mirrored = make_data.confidence_of(-difference, 1 - choice)
            assert make_data.confidence_of(difference, choice) == 10 - mirrored
    assert make_data.confidence_of(8, 0) == 1 and make_data.confidence_of(8, 1) == 6
    for row, a, b in comparisons:
        confidence = row["extra"]["confidence"]
        assert (confidence == 5) == (a == b)
        assert (confidence < 5) == (row["choice"] == 0) or confidence == 5
        if abs(confidence - 5) > 1:
            assert (confidence < 5) == (a > b)


def test_policies_span_the_scale(comparisons):
    golds = {}
    for row, *pair in comparisons:
        for summary, value in zip(row["summaries"], pair):
            golds.setdefault(summary["policy"], []).append(value)
    means = {policy: sum(values) / len(values) for policy, values in golds.items()}
    assert set(means) == set(make_data.POLICIES)
    assert means["wrong"] < means["vague"] < means["sft"] < means["ref"] < means["good"]
    assert means["slip"] < means["good"] - 1.5
    assert {row["batch"] for row, _, _ in comparisons} == {"toy1", "toy2", "toy3"}


# ---- tokenizer

def test_tokenizer_has_pythia_layout(toy_dir):
    spec = json.loads((toy_dir / "tokenizer.json").read_text(encoding="utf-8"))
    vocab, merges, added = spec["model"]["vocab"], spec["model"]["merges"], spec["added_tokens"]
    assert [vocab["<|endoftext|>"], vocab["<|padding|>"], vocab["!"]] == [0, 1, 2]
    assert len(make_data.byte_symbols()) == 256
    assert [vocab[merge.replace(" ", "")] for merge in merges] == [*range(258, 258 + len(merges))]
    assert len(vocab) == 258 + len(merges)
    assert [token["id"] for token in added] == [0, 1, *range(len(vocab), len(vocab) + 7)]
    assert [token["special"] for token in added] == [True] * 2 + [False] * 7
    assert len(vocab) + 7 < 1000


def test_tokenizer_loads_and_round_trips(toy_dir):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(toy_dir / "tokenizer.json"))
    for word in world.LEXICON:
        assert len(tokenizer.encode(" " + word).ids) == 1, word
    for text in [QUERY, PERFECT, "it's   naïve – 42 %\n\n\tok  "]:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert len(tokenizer.encode(PERFECT).ids) == 8
    assert tokenizer.encode("<|endoftext|>").ids == [0]
    for row in read_rows(toy_dir / "sft_train.jsonl"):
        ids = tokenizer.encode(world.QUERY.format(**row)).ids
        assert 50 <= len(ids) <= 90
        assert max(ids) < tokenizer.get_vocab_size()


def test_bpe_matches_hand_example():
    # "ab" occurs in three pieces; then "abc" and "abd" once each, in order of the alphabet.
    assert make_data.learn_merges({"ab", "abc", "abd"}) == [("a", "b"), ("ab", "c"), ("ab", "d")]
    assert make_data.apply_merge(list("aaaab"), ("a", "a")) == ["aa", "aa", "b"]


# ---- statistics and command line

def run_gold(*args):
    script = str(Path(gold.__file__))
    return subprocess.run([sys.executable, script, *map(str, args)], capture_output=True, text=True)


def write_samples(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sample(response, reference=" Anna danced."):
    return {"query": QUERY, "response": response, "reference": reference}


def test_score_is_a_reward_function():
    assert gold.score([QUERY, QUERY], [PERFECT, " Boris."]) == [4.0, -1.0]
    with pytest.raises(ValueError):
        gold.score([QUERY], [])
    with pytest.raises(ValueError, match="no fact"):
        gold.score(["POST: nothing to see\n\nTL;DR:"], [""])
    with pytest.raises(ValueError, match="POST"):
        gold.score(["a query of another kind"], [""])


def test_evaluate_matches_hand_example():
    # Golds 4, 2, 0 against references of 2: mean 2, s = 2, one win, one tie, one loss.
    stats = gold.evaluate([sample(PERFECT), sample(" danced Anna."), sample("")])
    assert stats["n"] == 3 and stats["gold_mean"] == 2.0 and stats["gold_reference_mean"] == 2.0
    assert math.isclose(stats["gold_ci95"], 1.96 * 2 / math.sqrt(3))
    assert stats["win_rate"] == 0.5
    stats = gold.evaluate([{"query": QUERY, "response": PERFECT}])
    assert stats["win_rate"] is None and math.isnan(stats["gold_ci95"])


def test_gold_command_line(tmp_path):
    first = write_samples(tmp_path / "a.jsonl", [sample(PERFECT), sample(" Anna.")])
    second = write_samples(tmp_path / "b.jsonl", [{"query": QUERY, "response": " Anna."}] * 2)
    result = run_gold(first, second)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.splitlines() == [
        f"{first}: 2 rows, gold 2.500 +- 2.940, references 2.000, win rate 0.500",
        f"{second}: 2 rows, gold 1.000 +- 0.000"]


@pytest.mark.parametrize("content, complaint", [
    (None, "No such file"),
    ("", "no rows"),
    ("{oops\n", "line 1 is not a JSON object"),
    ("[1]\n", "line 1 is not a JSON object"),
    (json.dumps({"query": QUERY}) + "\n", "row 1 has no text 'response'"),
    (json.dumps(sample("")) + "\n" + json.dumps({"query": QUERY, "response": ""}) + "\n",
     "row 2 has no text 'reference'"),
    (json.dumps({"query": "TL;DR:", "response": ""}) + "\n", "row 1: no 'POST"),
])
def test_gold_bad_input_is_one_clear_line(tmp_path, content, complaint, capsys):
    path = tmp_path / "samples.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as exit_info:
        gold.main([str(path)])
    message = exit_info.value.code  # sys.exit prints a text to stderr and exits with 1
    assert isinstance(message, str) and "\n" not in message
    assert message.startswith(f"gold: {path}: ") and complaint in message
    if content is None:
        result = run_gold(path)
        assert result.returncode == 1 and result.stderr == message + "\n" and result.stdout == ""

"""Make a small TL;DR: the files of the real data set, in a world where the right answer is known.

    python toy/make_data.py out/toy/data
    python toy/make_data.py out/toy/data --seed=1 --sft-train=2000

writes, byte for byte the same for the same arguments,

    sft_{train,validation}.jsonl           id, subreddit, title, post, summary (no leading space)
    comparisons_{train,validation}.jsonl   info, summaries (texts with one leading space), choice,
                                           worker, batch, split, extra.confidence
    tokenizer.json                         byte-level BPE as Pythia's, every word a single token

The reference summaries are of mixed quality on purpose: they leave out facts, sometimes pad and
sometimes state what is not so. A model that imitates them (SFT) lands in the middle of the scale of
gold.py (the references' mean is 1.6, a perfect summary has 4.0); the labels prefer the better text,
so learning from them (PPO, DPO) has room above it. A query has about 74 tokens, at most 90; a
perfect summary has 8.
"""
import argparse
import json
import math
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

if __package__:
    from . import gold, world
else:  # run as a script: Python then looks for modules in toy/ itself
    import gold
    import world


# ---- posts and summaries

class Habits(NamedTuple):
    """How one writer of summaries works; all numbers are probabilities."""
    state: tuple        # of stating a slot's fact, in the order of SLOTS: who, did, where, when
    wrong: float        # of stating another value instead, for each statement
    padding: float      # of padding words, at the start and again at the end
    again: float = 0.0  # of stating a slot a second time, for each stated slot


# `ref` writes the SFT data. It leaves out where and when more often than not, so that even the most
# likely summary of an SFT model is far from perfect, and not only an average sample.
# `sft` stands for such a model: the same habits with more slips.
# `slip` and `good` differ in nothing but truth, so a reward model must compare words with the post.
POLICIES = {
    "ref": Habits((0.75, 0.75, 0.3, 0.3), wrong=0.07, padding=0.19),
    "sft": Habits((0.75, 0.75, 0.3, 0.3), wrong=0.2, padding=0.19, again=0.05),
    "good": Habits((0.95, 0.95, 0.95, 0.95), wrong=0.0, padding=0.0),
    "slip": Habits((0.95, 0.95, 0.95, 0.95), wrong=0.3, padding=0.0),
    "vague": Habits((0.3, 0.3, 0.2, 0.2), wrong=0.05, padding=0.8),
    "wrong": Habits((0.8, 0.8, 0.8, 0.8), wrong=0.6, padding=0.05, again=0.15),
    "chatty": Habits((0.8, 0.8, 0.8, 0.8), wrong=0.05, padding=0.5, again=0.4),
}


def make_post(rng):
    """Draw facts {slot: value} and the fields of a post: facts among asides, then the recaps."""
    facts = {slot: rng.choice(values) for slot, values in world.SLOTS.items()}
    sentences = [rng.choice(world.SENTENCES[slot]) for slot in world.SLOTS]
    sentences += rng.sample(world.ASIDES, rng.randint(1, 2))
    rng.shuffle(sentences)
    sentences += rng.choice(world.RECAPS)
    post = " ".join(world.sentence_of([sentence.format(**facts)]) for sentence in sentences)
    return facts, {"subreddit": rng.choice(world.SUBREDDITS), "title": rng.choice(world.TITLES),
                   "post": post}


def write_summary(rng, facts, habits):
    """Draw a summary of `facts` by a writer with `habits`: no leading space, never empty."""
    stated = [slot for slot, chance in zip(world.SLOTS, habits.state) if rng.random() < chance]
    stated = stated or [rng.choice(list(world.SLOTS))]
    repeated = [slot for slot in stated if rng.random() < habits.again]
    phrases = []
    for slot in stated + repeated:
        value = facts[slot]
        if rng.random() < habits.wrong:
            value = rng.choice([other for other in world.SLOTS[slot] if other != value])
        phrases.append(world.PHRASES[slot].format(value))
    before = [rng.choice(world.PADDING)] if rng.random() < habits.padding else []
    after = [rng.choice(world.PADDING)] if rng.random() < habits.padding else []
    return world.sentence_of(before + phrases + after)


# ---- rows

def sft_row(rng, row_id):
    facts, fields = make_post(rng)
    return {"id": row_id, **fields, "summary": write_summary(rng, facts, POLICIES["ref"])}


def prob_first(gold_first, gold_second):
    """Probability that a labeller takes the first text: 0.9 * sigmoid(scale * difference) + 0.05.

    One label in ten is a coin toss (Christiano 2017, arXiv:1706.03741). With the scale 2, a text
    that is better by one fact wins 84 % of the time: labels follow gold, not slavishly.
    """
    return 0.9 / (1 + math.exp(-2 * (gold_first - gold_second))) + 0.05


def confidence_of(difference, choice):
    """Likert 1..9: 1 is surely the first text, 9 surely the second, 5 no opinion.

    difference: gold of the first text minus gold of the second. The distance from 5 grows with it;
    a label against gold is a mistake, and whoever makes it was not sure (4 or 6).
    """
    if difference == 0:
        return 5
    mistaken = (difference > 0) != (choice == 0)
    distance = 1 if mistaken else min(4, math.ceil(abs(difference)))
    return 5 + distance if choice == 1 else 5 - distance


def comparison_row(rng, row_id, split):
    facts, fields = make_post(rng)
    policies = rng.sample(list(POLICIES), 2)
    texts = ["", ""]
    while texts[0] == texts[1]:  # two equal texts cannot be compared
        texts = [" " + write_summary(rng, facts, POLICIES[policy]) for policy in policies]
    golds = [gold.gold_score(fields["post"], text) for text in texts]
    choice = 0 if rng.random() < prob_first(*golds) else 1
    return {
        "info": {"id": row_id, **fields},
        "summaries": [{"text": text, "policy": policy, "note": ""}
                      for text, policy in zip(texts, policies)],
        "choice": choice,
        "worker": f"worker{rng.randint(1, 5)}",
        "batch": f"toy{rng.randint(1, 3)}",
        "split": split,
        "extra": {"confidence": confidence_of(golds[0] - golds[1], choice)},
    }


# ---- tokenizer

def byte_symbols():
    """The printable stand-in of every byte in a byte-level BPE, in the order of their token ids.

    Printable Latin-1 characters stand for themselves and come first; the other bytes (space,
    controls, 0xad) take the code points from 256 on, in order, so a space is written as 'Ġ'.
    """
    printable = [b for b in range(256) if 0x21 <= b <= 0x7E or (b >= 0xA1 and b != 0xAD)]
    hidden = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def learn_merges(pieces):
    """Train BPE on a set of pieces, each counted once, until every piece is a single token.

    Returns the merges in order. Each step joins the most frequent neighbours; of equals, the first
    in the alphabet, so that the result does not depend on hashing.
    """
    symbols = byte_symbols()
    words = [[symbols[b] for b in piece.encode()] for piece in sorted(pieces)]
    merges, tokens = [], set(symbols.values())
    while words := [word for word in words if len(word) > 1]:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        # A token has one id, so it may come from one merge only.
        merge = min((pair for pair in counts if "".join(pair) not in tokens),
                    key=lambda pair: (-counts[pair], pair))
        merges.append(merge)
        tokens.add("".join(merge))
        words = [apply_merge(word, merge) for word in words]
    return merges


def apply_merge(word, merge):
    """Join each occurrence of the pair `merge` in a list of symbols, from left to right."""
    joined, i = [], 0
    while i < len(word):
        step = 2 if tuple(word[i:i + 2]) == merge else 1
        joined.append("".join(word[i:i + step]))
        i += step
    return joined


def make_tokenizer():
    """The contents of tokenizer.json: same parts and layout of ids as Pythia's, other words.

    0 <|endoftext|>, 1 <|padding|>, 256 bytes, merges in order, then runs of 8 to 2 spaces.
    """
    # Words occur after a space; only the parts of the query format and the subreddit follow a sign.
    bare = {*re.findall("[A-Za-z]+", re.sub(r"\{\w+\}", "", world.QUERY)), *world.SUBREDDITS}
    merges = learn_merges({f" {word}" for word in world.LEXICON} | bare)
    tokens = ["<|endoftext|>", "<|padding|>", *byte_symbols().values(), *map("".join, merges)]
    vocab = {token: i for i, token in enumerate(tokens)}

    def added(i, content, special):
        return {"id": i, "special": special, "content": content, "single_word": False,
                "lstrip": False, "rstrip": False, "normalized": not special}

    spaces = [" " * n for n in range(8, 1, -1)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [added(i, tokens[i], True) for i in (0, 1)]
                        + [added(len(vocab) + i, run, False) for i, run in enumerate(spaces)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "vocab": vocab, "merges": [" ".join(merge) for merge in merges]},
    }


# ---- files

def write_jsonl(path, rows):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_data(out_dir, seed=0, sft_train=8000, sft_validation=500,
               comparisons_train=8000, comparisons_validation=500):
    """Write all files to `out_dir` (made if missing); the numbers are rows per file.

    Each file has a generator of its own, so that a shorter file is a prefix of a longer one.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for split, n_sft, n_comparisons in [("train", sft_train, comparisons_train),
                                        ("validation", sft_validation, comparisons_validation)]:
        rng = random.Random(f"sft {split} {seed}")
        rows = [sft_row(rng, f"toy-sft-{split}-{i:05d}") for i in range(n_sft)]
        write_jsonl(out_dir / f"sft_{split}.jsonl", rows)
        rng = random.Random(f"comparisons {split} {seed}")
        rows = [comparison_row(rng, f"toy-cmp-{split}-{i:05d}", split)
                for i in range(n_comparisons)]
        write_jsonl(out_dir / f"comparisons_{split}.jsonl", rows)
    tokenizer = json.dumps(make_tokenizer(), indent=2, ensure_ascii=False) + "\n"
    (out_dir / "tokenizer.json").write_text(tokenizer, encoding="utf-8", newline="\n")


def row_count(text):
    if not text.isdecimal():  # argparse turns the error into one line that names the option
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rows (0, 1, 2, ...)")
    return int(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write the toy TL;DR data set.")
    parser.add_argument("out_dir", type=os.path.expanduser)
    parser.add_argument("--seed", type=int, default=0)
    for name, rows in [("sft-train", 8000), ("sft-validation", 500),
                       ("comparisons-train", 8000), ("comparisons-validation", 500)]:
        parser.add_argument(f"--{name}", type=row_count, default=rows, metavar="ROWS",
                            help="rows of that file (default %(default)s)")
    args = parser.parse_args(argv)
    write_data(**vars(args))
    print(f"wrote the toy data set to {args.out_dir}")


if __name__ == "__main__":
    main()

"""Constitutional AI (arXiv:2212.08073): a language model revises summaries by principles, and labels pairs of them.

    python -m variants.constitution --judge=URL#model --samples=out/toy/sft/samples/samples.jsonl --out_dir=out/revised
    python sft.py config/toy_sft.py --data=out/revised/revisions.jsonl --out_dir=out/revised/sft
    python -m variants.constitution --judge=URL#model --samples=a.jsonl,b.jsonl --write=labels --out_dir=out/labelled
    python rm.py config/toy_rm.py --data=out/labelled/labels.jsonl --out_dir=out/labelled/rm

Revisions: the model says where a summary fails a principle, drawn at random, and writes it anew, up to four times.
Labels are soft: p = e^a / (e^a + e^b), of the log-probabilities a and b of the answers A and B, is averaged over both
orders of the summaries and over n_principles principles. With thoughts the model reasons first, which makes it too sure
of itself: p is kept within 0.4 and 0.6. What has no usable reply is counted and left out. A stopped run goes on.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from configurator import Count, configure, require
from evals.chat import ask_preferences, ask_revisions, read_drafts, read_principles
from evals.winrate import read_pairs
from hub.files import write_jsonl
from runtime import RunConfig, World, open_directory, stage


@dataclass
class Config(RunConfig):
    out_dir: str = "out/constitution"  # where all files go
    judge: str = ""  # the model: URL#model (evals/chat.py)
    samples: str = ""  # for revisions a samples.jsonl, or data of sft.py; for labels what sample.py --judge takes
    write: Literal["revisions", "labels"] = "revisions"
    principles: str = "variants/principles.txt"  # a text file, one a line
    n_revisions: Count = 1  # rounds of critique and revision, at most 4
    n_principles: Count = 1  # of each label
    thoughts: bool = False  # let the model reason before it labels


@stage
def main(cfg):
    world = World(cfg)
    require(world.size == 1, "one process asks for all; start it without torchrun")
    out_dir = open_directory(cfg, world)
    require(cfg.n_revisions <= 4, f"n_revisions {cfg.n_revisions}: take 1 to 4")
    principles = read_principles(cfg.principles, cfg.n_principles)
    make = revise if cfg.write == "revisions" else label
    rows = make(cfg, principles, f"{out_dir}/replies.sqlite")
    require(rows, f"judge {cfg.judge}: no reply can be used; ask another model")
    write_jsonl(out_dir / f"{cfg.write}.jsonl", rows)
    print(f"wrote {out_dir}/{cfg.write}.jsonl: {len(rows)} rows")


def revise(cfg, principles, cache):
    """Rows {prompt, completion, draft, ...} of the samples; the draft is the response as it was."""
    rows = dict(enumerate(read_drafts(cfg.samples)))
    for turn in range(cfg.n_revisions):
        for number, row in rows.items():
            rng = np.random.default_rng([cfg.seed, number, turn])
            row["principle"] = str(rng.choice(principles))
            row["seed"] = int(rng.integers(2**31))
        revised = ask_revisions(cfg.judge, rows, cache)
        rows = {number: {**rows[number], "completion": text} for number, text in revised.items()}
    return list(rows.values())


def label(cfg, principles, cache):
    """Rows {prompt, chosen, rejected, target} of the pairs; chosen is the likelier text."""
    pairs = read_pairs(cfg.samples)
    drawn = []
    for number in range(len(pairs)):
        rng = np.random.default_rng([cfg.seed, number])
        drawn.append(rng.permutation(principles)[: cfg.n_principles].tolist())
    rows = []
    for pair, shares in zip(pairs, ask_preferences(cfg.judge, pairs, drawn, cache, cfg.thoughts)):
        if len(shares) == 2 * cfg.n_principles:
            target = soft_target(list(shares.values()), cfg.thoughts)
            row = {"prompt": pair["query"], "chosen": pair["response"], "rejected": pair["other"], "target": target}
            if target < 0.5:
                row.update(chosen=pair["other"], rejected=pair["response"], target=1 - target)
            rows.append(row)
    return rows


def soft_target(shares, thoughts):
    """The mean p over both orders and all principles, within 0.4 and 0.6 if the model has reasoned first."""
    limits = (0.4, 0.6) if thoughts else (0.0, 1.0)
    return float(np.mean(shares).clip(*limits))


if __name__ == "__main__":
    main(configure(Config))

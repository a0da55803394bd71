"""How well does a small language model label pairs? Its agreement with the toy's gold, and with labels of real pairs.

    pip install --no-deps -r requirements-llm.txt
    python bench/labels.py toy 200                                     # pairs of toy/make_data.py, one principle each
    python bench/labels.py toy 100 3                                   # three principles each
    python bench/labels.py $NPLUS_DATA/tldr_sample/comparisons_train.jsonl 200

The model and its server are those of toy/small_model.py. A stopped run goes on: replies are kept in out/labels. CPU
seconds are of this process, the server's thread among them, and of the answers that this run has asked for.
"""

import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evals.chat import ask_preferences, read_principles  # noqa: E402
from evals.winrate import interval, read_comparisons  # noqa: E402
from hub.files import read_jsonl  # noqa: E402
from toy import gold, make_data  # noqa: E402
from toy.small_model import serve  # noqa: E402

SEED = 11
CACHE = ROOT / "out" / "labels" / "replies.sqlite"


def toy_pairs(n):
    """Pairs of two writers whose gold differs; `choice` is by gold, not by the noisy label."""
    import random

    rng = random.Random(f"labels {SEED}")
    pairs = []
    while len(pairs) < n:
        row = make_data.comparison_row(rng, "", "")
        post = row["info"]["post"]
        texts = [summary["text"] for summary in row["summaries"]]
        golds = [gold.gold_score(post, text) for text in texts]
        if golds[0] != golds[1]:
            query = make_data.world.QUERY.format(**row["info"])
            choice = float(golds[0] > golds[1])
            pairs.append({"query": query, "response": texts[0], "other": texts[1], "choice": choice})
    return pairs


def rate(values):
    found = interval([float(value) for value in values])
    return f"{found['rate']:.3f} [{found['low']:.3f}, {found['high']:.3f}] of {len(values)}"


def main(source, n_pairs, n_principles=1):
    if source == "toy":
        pairs = toy_pairs(n_pairs)
    else:
        pairs = read_comparisons(source, read_jsonl(source))[:n_pairs]
    principles = read_principles(ROOT / "variants" / "principles.txt", n_principles)
    drawn = []
    for number in range(len(pairs)):
        rng = np.random.default_rng([SEED, number])
        drawn.append(rng.permutation(principles)[:n_principles].tolist())

    CACHE.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with serve() as judge:
        answers = ask_preferences(judge, pairs, drawn, CACHE)
    seconds = time.perf_counter() - start

    right = {"one order, one principle": [], "both orders, one principle": [], "both orders, all principles": []}
    same_letter = []
    p_first = []
    sizes = []
    for pair, found, ours in zip(pairs, answers, drawn):
        if len(found) < 2 * n_principles:
            continue
        for principle in ours:
            forth = found[principle, False]
            back = found[principle, True]
            same_letter.append((forth > 0.5) == (back < 0.5))
            p_first += [forth, 1 - back]
        alone = [found[ours[0], False], found[ours[0], True]]
        mean = np.mean(list(found.values()))
        sizes.append(abs(mean - 0.5))
        for name, p in zip(right, (alone[0], np.mean(alone), mean)):
            right[name].append((p > 0.5) == (pair["choice"] == 1))

    print(f"{source}: {len(pairs)} pairs, {n_principles} principles; {len(pairs) - len(sizes)} lack an answer")
    for name, values in right.items():
        print(f"agreement, {name}: {rate(values)}")
    longer = [len(pair["response"]) > len(pair["other"]) for pair in pairs]
    print(f"agreement of 'the longer text': {rate([a == pair['choice'] for a, pair in zip(longer, pairs)])}")
    print(f"the order decides: {rate(same_letter)}; p of the letter A: {np.mean(p_first):.3f} +- {np.std(p_first):.3f}")
    print(f"the label's distance from 0.5: mean {np.mean(sizes):.3f}, largest {np.max(sizes):.3f}")
    print(f"{seconds:.0f} s, {time.process_time():.0f} CPU seconds")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

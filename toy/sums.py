"""Sums whose answers can be checked: the toy task of verifiable rewards.

    python toy/sums.py out/sums/data --seed=1

writes, byte for byte the same for the same seed,

    sft_{train,validation}.jsonl    prompt ("9+5+8="), completion ("22"), answer (22)
    tokenizer.json                  that of toy/make_data.py, where each digit is a token

There is a row for each three digits, 1,000 in all; 200 of them are held out. So no held-out sum is in the training
data, though the same digits in another order may be.

`score` is the reward. With it PPO and its variants need no reward model, and no completions:

    python -m variants.verifiable config/sums_ppo.py --algorithm=grpo --out_dir=out/sums/grpo
"""

import argparse
import itertools
import json
import os
import random
from pathlib import Path

if __package__:
    from configurator import require

    from . import make_data
else:  # run as a script, which only writes data: Python then looks for modules in toy/ itself
    import make_data

HELD_OUT = 200  # rows


def make_rows(seed):
    """All sums in random order, as rows."""
    rows = []
    for digits in itertools.product(range(10), repeat=3):
        prompt = "+".join(map(str, digits)) + "="
        answer = sum(digits)
        rows.append({"prompt": prompt, "completion": str(answer), "answer": answer})
    random.Random(f"sums {seed}").shuffle(rows)
    return rows


def score(queries, responses, rows):
    """1.0 for each response that is the answer of its row, written as one writes it, and nothing else; 0.0 for others.

    rows: dicts with `answer`, an int (or, as a CSV file has it, its text). Raises UserError where that is missing.
    """
    scores = []
    for response, row in zip(responses, rows, strict=True):
        answer = row.get("answer")
        wrong = f"toy.sums: the answer of {row!r:.80} is {answer!r}; give each row an int as `answer`"
        require(isinstance(answer, (int, str)), wrong)
        # " 22", "022", "22.", "22 22" and "it is 22" are wrong: a reward that forgives teaches what it forgives.
        scores.append(float(response == str(answer)))
    return scores


def write_data(out_dir, seed):
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    rows = make_rows(seed)
    make_data.write_jsonl(out_dir / "sft_validation.jsonl", rows[:HELD_OUT])
    make_data.write_jsonl(out_dir / "sft_train.jsonl", rows[HELD_OUT:])
    tokenizer = json.dumps(make_data.make_tokenizer(), indent=2, ensure_ascii=False) + "\n"
    (out_dir / "tokenizer.json").write_text(tokenizer, encoding="utf-8", newline="\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write the toy sums.")
    parser.add_argument("out_dir", type=os.path.expanduser)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    write_data(args.out_dir, args.seed)
    print(f"wrote the toy sums to {args.out_dir}")


if __name__ == "__main__":
    main()

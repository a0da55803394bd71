"""The reader of rows beside the `datasets` library: the same rows, how fast, and in how much memory.

    python bench/reader.py out/reader [--rows=10000]

Writes a jsonl file of rows of each schema. A process of its own reads each with hub/reader.py, another with
`datasets.load_dataset` into an empty cache, and both go over all rows once, as tokenising does. Prints rows per second
and the peak of resident memory beyond that of the imports, and exits with 1 if a row differs.
"""

import argparse
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hub.reader import read_split  # noqa: E402

WORDS = "the dog ran off to a lake and we found it near seven old boats last Sunday".split()


def text(generator, n_words):
    return " ".join(generator.choices(WORDS, k=n_words))


def chat(generator, n_turns):
    turns = []
    for number in range(n_turns):
        role = "assistant" if number % 2 else "user"
        turns.append({"role": role, "content": text(generator, 40)})
    return turns


def post(generator):
    return {"subreddit": "pets", "title": text(generator, 8), "post": text(generator, 200)}


def comparison(generator):
    summaries = [{"text": " " + text(generator, 25), "policy": policy} for policy in ("ref", "sup1")]
    return {"info": post(generator), "summaries": summaries, "choice": generator.randrange(2)}


SCHEMAS = {
    "post": lambda generator: {**post(generator), "summary": text(generator, 25)},
    "comparison": comparison,
    "completion": lambda generator: {"prompt": text(generator, 200), "completion": " " + text(generator, 25)},
    "pair": lambda generator: {name: " " + text(generator, 60) for name in ("prompt", "chosen", "rejected")},
    "ranking": lambda generator: {"prompt": text(generator, 60), "responses": [text(generator, 20) for _ in range(4)]},
    "chat": lambda generator: {"prompt": chat(generator, 3), "completion": chat(generator, 2)[1:]},
    "messages": lambda generator: {"messages": chat(generator, 4)},
}


def rows_of_ours(path):
    for _, row in read_split(path, "train"):
        yield row


def rows_of_library(path):
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        yield from datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)


READERS = {"ours": rows_of_ours, "datasets": rows_of_library}


def read_all(reader, path):
    """Go over all rows; print their digest, the seconds, and the memory beyond that of the imports."""
    import datasets  # noqa: F401 (both sides have it in memory, as in a run)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    digest = hashlib.sha256()
    start = time.perf_counter()
    for row in READERS[reader](path):
        digest.update(repr(sorted(row)).encode())
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    whole = hashlib.sha256(json.dumps(list(READERS[reader](path)), sort_keys=True).encode())
    print(json.dumps({"digest": whole.hexdigest(), "seconds": seconds, "peak": peak / 1024}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--read", nargs=2, metavar=("READER", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read_all(*args.read)
        return

    args.directory.mkdir(parents=True, exist_ok=True)
    differ = 0
    for name, make in SCHEMAS.items():
        generator = random.Random(name)
        path = args.directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(make(generator)) + "\n" for _ in range(args.rows)))
        found = {}
        for reader in READERS:
            command = [sys.executable, __file__, str(args.directory), "--read", reader, str(path)]
            found[reader] = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        same = found["ours"]["digest"] == found["datasets"]["digest"]
        differ += not same
        rates = "  ".join(
            f"{reader} {args.rows / numbers['seconds']:8.0f} rows/s {numbers['peak']:6.1f} MiB"
            for reader, numbers in found.items()
        )
        print(f"{name:12} {'equal' if same else 'DIFFERENT'}  {rates}", flush=True)
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()

r"""Sample from a model and say how it does.

    python sample.py --model=out/ppo_1b/final --prompt=$'SUBREDDIT: r/tifu\n\nTITLE: ...\n\nTL;DR:'
    python sample.py config/toy_sample.py --model=out/toy/ppo/final --out_dir=out/toy/ppo/samples
    torchrun --nproc_per_node=8 sample.py --model=out/ppo_1b/final --reward_model=out/rm_1b/final --out_dir=out/samples
    python sample.py --model=out/sft_1b/step_300,out/sft_1b/step_600 --reward_model=out/rm_1b/final --out_dir=out/best
    python sample.py --judge=out/rm_1b/final --samples=out/samples/samples.jsonl           (see evals/winrate.py)
    python sample.py config/sums_sample.py --scorer=toy.sums --model=out/sums/grpo/final   (see evals/passk.py)

Over a split, whose rows need no references, it prints one table per model; of the one with the best score it writes
out_dir/samples.jsonl (query, response, reference, tokens, reference_tokens, length_ratio, eos; score and
reference_score if there is a reward_model, kl if there is a --reference, and token_kl where --compare shows it) and
out_dir/summary.json (their means, and ROUGE), beside out_dir/config.json. The tokens drawn depend on `seed` alone. With
best_of, kl is the log-ratio of the responses that were kept; the KL of best-of-n as a policy is at most kl_bound.

differs: the reference takes ROUGE per evaluation batch, from the middle of bootstrap resamples; here it is the mean
over all rows, which is what those estimate.
"""

import runpy
import sys
from dataclasses import dataclass

from config.fields import RunConfig
from configurator import Count, configure, require


@dataclass
class Config(RunConfig):
    # ---- models
    model: str = "out/ppo_1b/final"  # what to sample from: hub id or directory; of a,b,c the one with the best score
    reward_model: str = ""  # scores responses and references, if given; a,b,c: the mean of these
    reference: str = ""  # KL is measured to this model, if given
    # ---- queries
    data: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"  # hub id, directory or file (hub/reader.py)
    split: str = ""  # the rows to sample for, for example validation[:100]; empty: validation, or all of a single file
    prompt: str = ""  # a text to continue, or - for each line of stdin (\n: a line break); empty: use data
    # ---- sampling
    response_length: Count = 53  # tokens sampled at most
    temperature: float = 0.7  # 0: greedy
    micro_batch_size: Count = 64  # rows per forward pass and process
    best_of: Count = 1  # responses drawn for each query; the one with the best score is kept
    # ---- results
    out_dir: str = ""  # where all files go; empty: only print
    compare: int = 0  # show so many responses, their tokens coloured by log p - log p of `reference`


if __name__ == "__main__":
    # Judging is a script of its own, and so is counting right answers.
    for option, script in {"--judge=": "evals.winrate", "--scorer=": "evals.passk"}.items():
        if option in " ".join(sys.argv):
            runpy.run_module(script, run_name="__main__", alter_sys=True)
            sys.exit()
    cfg = configure(Config)  # before the imports that take seconds: --help and a wrong option are answered at once

from evals.samples import complete, evaluate
from hub.files import split_names, write_json, write_jsonl
from hub.tokenizer import Tokenizer
from runtime import World, open_directory, stage


@stage
def main(cfg):
    world = World(cfg)
    sources = split_names(cfg.model)
    if cfg.out_dir and not cfg.prompt:
        out_dir = open_directory(cfg, world)
    # Only a reward model can say which of several is the best.
    if len(sources) > 1 or cfg.best_of > 1:
        wrong = "several models, or best_of, need a reward_model and data"
        require(cfg.reward_model and not cfg.prompt, wrong)
    require(cfg.best_of == 1 or cfg.temperature > 0, "best_of draws one response again and again at temperature 0")
    if cfg.compare:
        require(cfg.reference, "compare needs a model to compare with; give its path as reference")

    tokenizer = Tokenizer.load(sources[0])
    if cfg.prompt:
        complete(cfg, world, tokenizer)
        return

    results = [evaluate(cfg, world, tokenizer, source) for source in sources]
    rows, summary = max(results, key=lambda result: result[1].get("score"))
    if cfg.out_dir and world.is_main:
        write_jsonl(out_dir / "samples.jsonl", rows)
        write_json(out_dir / "summary.json", summary)
        print(f"wrote {out_dir}/samples.jsonl")


if __name__ == "__main__":
    main(cfg)

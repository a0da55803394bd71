"""Sample from a model and say how it does.

    python sample.py --model=out/ppo_1b/final --prompt=$'SUBREDDIT: r/tifu\n\nTITLE: ...\n\nTL;DR:'
    python sample.py config/toy_sample.py --model=out/toy/ppo/final --out_dir=out/toy/ppo/samples
    torchrun --nproc_per_node=8 sample.py --model=out/ppo_1b/final --reward_model=out/rm_1b/final --out_dir=out/samples
    python sample.py --model=out/sft_1b/step_300,out/sft_1b/step_600 --reward_model=out/rm_1b/final --out_dir=out/best

Over a split it prints one table per model; of the one with the best score it writes out_dir/samples.jsonl (query,
response, reference, tokens, eos, score, reference_score, kl) and out_dir/summary.json, beside out_dir/config.json. The
tokens drawn depend on `seed` alone.
"""

import functools
import sys
from dataclasses import dataclass

import numpy as np

import runtime
from configurator import Count, configure, require
from data import Tokenizer, collate, last_scalars, uniforms
from model import GPTNeoX, ScalarModel, token_logprobs, write_json


@dataclass
class Config(runtime.RunConfig):
    model: str = "out/ppo_1b/final"  # what to sample from: hub id or directory; of a,b,c the one with the best score
    reward_model: str = ""  # scores responses and references, if given; a,b,c: the mean of these
    reference: str = ""  # KL is measured to this model, if given
    prompt: str = ""  # a text to continue as it stands, or - for those that stdin has, one per line; empty: use data
    data: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"  # hub id, directory or file with {split}
    split: str = "validation"  # the rows to sample for; validation[:100]: the first hundred
    response_length: Count = 53  # tokens sampled at most
    temperature: float = 0.7  # 0: greedy
    micro_batch_size: Count = 64  # rows per forward pass and process
    out_dir: str = ""  # where samples.jsonl and summary.json go; empty: only print


def sample(run, cfg, model, queries, *key):
    """Responses to queries (lists of ids): lists of ids that end with EOS, unless cut off at response_length.

    key: numbers that, with cfg.seed, decide the tokens drawn.
    """
    draws = uniforms((len(queries), cfg.response_length), cfg.seed, *key)
    eos_id, size = run.tokenizer.eos_id, cfg.micro_batch_size
    rows = runtime.generate_rows(run, model, queries, draws, cfg.temperature, eos_id, size)[0].tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]


def measure(run, cfg, function, queries, responses):
    """Apply function(queries, responses) -> (rows,) to micro-batches of all rows; returns a list of n floats."""
    lengths = [len(query) + len(response) for query, response in zip(queries, responses)]

    def apply(index):
        return {"x": function([queries[i] for i in index], [responses[i] for i in index])}

    return run.map_rows(apply, lengths, cfg.micro_batch_size)["x"].tolist()


def log_ratio(model, reference, device, temperature, n_vocab, queries, responses):
    """log p - log p_reference, summed over each response: (B,); its mean over samples estimates the KL, in nats.

    Greedy responses (temperature 0) are no samples: theirs is the log-ratio at temperature 1.
    """
    ids, select, targets, mask = collate(queries, responses, device)
    ours, theirs = (token_logprobs(m(ids, select), targets, temperature or 1.0, n_vocab) for m in (model, reference))
    return ((ours - theirs) * mask).sum(1)


def rouge(references, responses):
    """Mean ROUGE F-measures by the rouge-score library."""
    from rouge_score.rouge_scorer import RougeScorer  # here, since it takes a second

    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(names)
    scores = [scorer.score(reference, response) for reference, response in zip(references, responses)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in names}


def evaluate(run, cfg, source):
    """Sample from one model for a split; returns (one dict per row, the summary), the same on every rank."""
    model = runtime.load_model(run, GPTNeoX, source)
    tokenizer, rows = run.tokenizer, run.load(cfg.data, cfg.split, n_responses=1)[:]
    queries, references = rows["query"], [responses[0] for responses in rows["responses"]]
    responses = sample(run, cfg, model, queries)
    ids = {"query": queries, "response": responses, "reference": references}
    columns = {name: [tokenizer.decode(row) for row in column] for name, column in ids.items()}
    columns |= dict(tokens=[len(row) for row in responses], eos=[row[-1] == tokenizer.eos_id for row in responses])
    summary = rouge(columns["reference"], columns["response"])
    summary["reference_tokens"] = float(np.mean([len(reference) for reference in references]))
    if cfg.reward_model:
        judges = [runtime.load_model(run, ScalarModel, source) for source in cfg.reward_model.split(",")]
        for name, texts in (("score", responses), ("reference_score", references)):
            columns[name] = measure(run, cfg, functools.partial(last_scalars, judges, run.device), queries, texts)
    if cfg.reference:
        anchor = runtime.load_model(run, GPTNeoX, cfg.reference)
        ratio = functools.partial(log_ratio, model, anchor, run.device, cfg.temperature, tokenizer.n_vocab)
        columns["kl"] = measure(run, cfg, ratio, queries, responses)
    means = {name: float(np.mean(column)) for name, column in columns.items() if name not in ids}
    summary = {"n": len(queries), **means, **summary}
    run.print(source, *(f"{name:18} {value:10.4f}" for name, value in summary.items()))
    return [dict(zip(columns, values)) for values in zip(*columns.values())], {"model": source, **summary}


def complete(run, cfg):
    """Print a response to cfg.prompt, or to each line of stdin."""
    require(run.size == 1, "a prompt is for one process; start it without torchrun")
    model = runtime.load_model(run, GPTNeoX, cfg.model)
    texts = (line.rstrip("\n") for line in sys.stdin) if cfg.prompt == "-" else [cfg.prompt]
    for number, text in enumerate(filter(str.strip, texts)):
        print(run.tokenizer.decode(sample(run, cfg, model, [run.tokenizer.encode(text)], number)[0]), flush=True)


@runtime.stage
def main(cfg):
    run, sources = runtime.Run(cfg), cfg.model.split(",")
    require(len(sources) == 1 or (cfg.reward_model and not cfg.prompt), "several models need a reward_model and data")
    if cfg.out_dir and not cfg.prompt:
        runtime.open_directory(run)
    run.tokenizer = Tokenizer.load(sources[0])
    if cfg.prompt:
        return complete(run, cfg)
    rows, summary = max((evaluate(run, cfg, source) for source in sources), key=lambda result: result[1].get("score"))
    if cfg.out_dir and run.is_main:
        runtime.write_jsonl(run.out_dir / "samples.jsonl", rows)
        write_json(run.out_dir / "summary.json", summary)
        print(f"wrote {run.out_dir}/samples.jsonl")


if __name__ == "__main__":
    main(configure(Config))

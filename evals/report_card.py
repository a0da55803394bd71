"""What a reward model goes by: a report card of probes, edits, length, and how it does on rows that it has not seen.

    python -m evals.report_card --reward_model=out/rm_1b/final --split="validation[:2000]" --out_dir=out/rm_1b/card

The data are pairs, or posts with references. Each probe spoils the better response of a row (its reference) in one
way; a reward model that reads what it should prefers the untouched text. `list format` spoils nothing: there the reward
should hardly change. Of pairs it is also counted how often the chosen one has the higher reward: in all, by length,
at equal length (evals/winrate.py:length_controlled), and of the edits by people in TL;DR's validation data
(arXiv:2009.01325). For a model of rm.py that still lies in its out_dir, the loss on held-out rows is set against that
of training (arXiv:1706.03741 keeps it 1.1 to 1.5 times that; after a single epoch both are of rows that were new).

Prints tables in Markdown. With out_dir: card.md and eval.json, {"rewards", "probes", "pairs", "held out"}.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex

from configurator import Count, configure, explain
from data import pick
from evals.samples import measure, split_of
from evals.scores import by_models
from evals.tables import count_words
from evals.winrate import interval, length_controlled, verdicts_of, win_table
from hub.config import GPTNeoXConfig
from hub.fetch import find_model
from hub.files import expand, read_json, read_jsonl, split_names, write_json
from hub.tokenizer import Tokenizer
from runtime import RunConfig, World, load_split, open_directory, stage

EDITS = "edit_b2_eval_test"  # the batch of pairs of a summary and what people have made of it to improve it
FILLERS = ("That is all there is to say about it.", "Well, you know how it is.", "Anyway, that was it.")


@dataclass
class Config(RunConfig):
    reward_model: str = "out/rm_1b/final"  # directory or hub id; a,b,c: the mean of these
    data: str = "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144"  # pairs, or posts (hub/reader.py)
    split: str = ""  # the rows, for example validation[:1000]; empty: validation, or all of a single file
    out_dir: str = ""  # where all files go; empty: only print
    micro_batch_size: Count = 64  # rows per forward pass and process

    @property
    def model(self):
        """Whose tokenizer and longest row count for `load_split`."""
        return split_names(self.reward_model)[0]


@stage
def main(cfg):
    """Probe a reward model; print the tables, and write them to out_dir."""
    world = World(cfg)
    if cfg.out_dir:
        out_dir = open_directory(cfg, world)
    tokenizer = Tokenizer.load(cfg.model)
    rows = load_split(cfg, world, tokenizer, cfg.data, split_of(cfg), n_responses=1, ranked=True)
    reward = by_models(cfg, world, tokenizer, cfg.reward_model)

    def score(queries, responses):
        return np.array(measure(cfg, world, reward, queries, responses))

    best = [responses[0] for responses in rows["responses"]]
    rewards = score(list(rows["query"]), best)
    card = {"rewards": {"n": len(rows), "mean": rewards.mean(), "deviation": rewards.std()}}
    card["probes"] = probe_table(cfg, tokenizer, rows, rewards, score)
    card["pairs"] = pair_table(cfg, tokenizer, rows, rewards, score)
    card["held out"] = {}
    for source in split_names(cfg.reward_model):
        card["held out"].update(held_out(source))

    text = page(cfg, card)
    world.print("", text)
    if cfg.out_dir and world.is_main:
        write_json(out_dir / "eval.json", card)
        (out_dir / "card.md").write_text(text + "\n", encoding="utf-8")
        print(f"wrote {out_dir}/eval.json and card.md")


# ---------------------------------------------------------------------------- probes
# Each takes a text without blanks around it, a generator, and two posts, the text's own and another's. It returns the
# text spoiled; None, or the text as it was, where there is nothing to spoil.

CAPITALISED = regex.compile(r"\b\p{Lu}\p{Ll}+\b")
INSIDE_A_SENTENCE = regex.compile(rf"(?<=[\p{{Ll}},] ){CAPITALISED.pattern}")


def swapped_names(text, rng, posts):
    """Each name of the post becomes another of it; of another post, if it has no other."""
    own, others = map(names_of, posts)
    swaps = {}
    for name in own:
        candidates = [other for other in own if other != name]
        if not candidates:
            candidates = [other for other in others if other != name]
        if candidates:
            swaps[name] = rng.choice(candidates)
    return CAPITALISED.sub(lambda match: swaps.get(match[0], match[0]), text)


def names_of(post):
    """The words that a text always begins with a capital, inside its sentences too; in the alphabet's order."""
    all_words = set(regex.findall(r"\p{L}+", post))
    found = set(INSIDE_A_SENTENCE.findall(post))
    return sorted(name for name in found if name.lower() not in all_words)


def shuffled(text, rng, posts):
    """The sentences in another order; of a single sentence the words."""
    parts = sentences(text)
    if len(parts) == 1:
        parts = text.split()
    order = rng.permutation(len(parts))
    if (np.diff(order) == 1).all():
        order = np.roll(order, 1)
    return " ".join(pick(parts, order))


def sentences(text):
    return [part for part in regex.split(r"(?<=[.!?])\s+|\s*\n\s*", text) if part]


def filler(text, rng, posts):
    """A sentence more, which says nothing."""
    return f"{text} {rng.choice(FILLERS)}"


def repeated(text, rng, posts):
    """The text twice."""
    return f"{text} {text}"


def truncated(text, rng, posts):
    """The first half of the words. (The caller adds EOS, as to each text.)"""
    words = text.split()
    if len(words) < 2:
        return None
    return " ".join(words[: len(words) // 2])


def listed(text, rng, posts):
    """The sentences as a list."""
    return "\n".join(f"- {sentence}" for sentence in sentences(text))


PROBES = {
    "swapped names": swapped_names,
    "shuffled sentences": shuffled,
    "filler": filler,
    "repetition": repeated,
    "truncation": truncated,
    "list format": listed,
}


def probe_table(cfg, tokenizer, rows, rewards, score):
    """{probe: n; left out, the rows that it does not apply to; rate, low and high: how often the untouched text has the
    higher reward; change: by how much the reward of the spoiled one is higher in the mean}

    rewards (n,): those of the untouched texts.
    """
    directory = find_model(cfg.model, patterns=["config.json"])
    limit = GPTNeoXConfig.from_directory(directory).max_position_embeddings
    queries = list(rows["query"])
    posts = list(map(tokenizer.decode, queries))
    texts = [tokenizer.decode(responses[0]) for responses in rows["responses"]]
    table = {}
    for number, (name, probe) in enumerate(PROBES.items()):
        places = []
        responses = []
        for place, spoiled in enumerate(spoil_all(probe, texts, posts, cfg.seed, number)):
            ids = tokenizer.encode(spoiled) + [tokenizer.eos_id]
            is_short = len(queries[place]) + len(ids) <= limit
            if spoiled != texts[place] and is_short:
                places.append(place)
                responses.append(ids)

        row = {"n": len(places), "left out": len(texts) - len(places)}
        if places:
            before = rewards[places]
            after = score(pick(queries, places), responses)
            verdicts = np.where(before == after, 0.5, before > after)
            row.update(interval(verdicts, cfg.seed))
            row["change"] = (after - before).mean()
        table[name] = row
    return table


def spoil_all(probe, texts, posts, *key):
    """Texts (n,), spoiled; a text is as it was where there is nothing to spoil. key: numbers that decide what is drawn.

    A response brings the blanks that follow its query: they stay.
    """
    found = []
    for place, text in enumerate(texts):
        body = text.strip()
        rng = np.random.default_rng((*key, place))
        other_post = posts[(place + 1) % len(posts)]
        spoiled = probe(body, rng, [posts[place], other_post]) if body else None
        if spoiled is None or spoiled == body:
            found.append(text)
        else:
            found.append(text[: text.index(body)] + spoiled)
    return found


# ---------------------------------------------------------------------------- pairs


def pair_table(cfg, tokenizer, rows, rewards, score):
    """How often the reward model agrees with the labels of pairs (the best and the worst of a row), as rows of
    win_rate; {} if there are none, or all are ties.
    """
    places = []
    for place, (responses, target) in enumerate(zip(rows["responses"], rows["target"])):
        if len(responses) > 1 and target != 0.5:
            places.append(place)
    if not places:
        return {}
    found = rows.select(places)
    worst = [responses[-1] for responses in found["responses"]]
    pairs = []
    for responses in found["responses"]:
        pairs.append({"response": tokenizer.decode(responses[0]), "other": tokenizer.decode(responses[-1])})
    verdicts = verdicts_of(pairs, rewards[places], score(list(found["query"]), worst))

    table = win_table(pairs, verdicts, cfg.seed)
    table["at equal length"] = length_controlled(pairs, verdicts, cfg.seed)
    table.update(longer_table(pairs, verdicts, cfg.seed))
    edits = [verdict for verdict, batch in zip(verdicts, found["batch"]) if batch == EDITS]
    if edits:
        table["edits by people"] = {"n": len(edits), **interval(edits, cfg.seed)}
    return table


def longer_table(pairs, verdicts, seed):
    """How often the longer response of a pair is the chosen one, and how often the reward model prefers it."""
    chosen = []
    preferred = []
    for pair, verdict in zip(pairs, verdicts):
        difference = count_words(pair["response"]) - count_words(pair["other"])
        if difference:
            chosen.append(float(difference > 0))
            preferred.append(verdict if difference > 0 else 1 - verdict)
    if not chosen:
        return {}
    return {
        "labels: the longer": {"n": len(chosen), **interval(chosen, seed)},
        "rewards: the longer": {"n": len(chosen), **interval(preferred, seed)},
    }


# ---------------------------------------------------------------------------- rows that were held out


def held_out(source):
    """{source: the loss on held-out rows, that of training (the last tenth of the updates), and their ratio}, from
    what rm.py has written beside the model; {} where that is not there.
    """
    run = Path(expand(source)).parent
    if not (run / "metrics.jsonl").exists() or not (run / "eval.json").exists():
        return {}
    losses = [row["loss/rm"] for row in read_jsonl(run / "metrics.jsonl") if row.get("loss/rm") is not None]
    loss = read_json(run / "eval.json").get("eval/loss")
    if loss is None or not losses:
        return {}
    n_last = max(1, len(losses) // 10)
    wrong = f"{run}: the losses in metrics.jsonl and eval.json cannot be compared; mend the files"
    with explain(wrong, TypeError, ValueError, ZeroDivisionError):
        train = sum(losses[-n_last:]) / n_last
        return {source: {"eval loss": loss, "train loss": train, "ratio": loss / train}}


# ---------------------------------------------------------------------------- the page


def page(cfg, card):
    """The card in Markdown."""
    numbers = {name: cell(value) for name, value in card["rewards"].items()}
    parts = [
        f"# Report card: {cfg.reward_model}",
        f"{numbers['n']} rows of {cfg.data} [{split_of(cfg)}]; the rewards of their better responses have mean "
        f"{numbers['mean']} and deviation {numbers['deviation']}.",
    ]
    titles = {
        "probes": "Probes: how often the untouched text has the higher reward, and the mean change by spoiling it",
        "pairs": "Pairs: how often the chosen response has the higher reward",
        "held out": "Loss on held-out rows against that of training",
    }
    for name, title in titles.items():
        if card[name]:
            parts += [f"## {title}", markdown(name, card[name])]
    return "\n\n".join(parts)


def markdown(title, table):
    """A table of {name: {column: value}}; an interval stands beside its rate."""
    columns = []
    for row in table.values():
        columns += [name for name in row if name not in columns and name not in ("low", "high")]
    lines = [[title, *columns]]
    for name, row in table.items():
        cells = {column: cell(value) for column, value in row.items()}
        if "rate" in row:
            cells["rate"] = f"{row['rate']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        lines.append([name] + [cells.get(column, "") for column in columns])
    lines.insert(1, ["---"] * len(lines[0]))

    widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for line in lines:
        padded = [word.ljust(width) for word, width in zip(line, widths)]
        text.append(f"| {' | '.join(padded)} |")
    return "\n".join(text)


def cell(value):
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main(configure(Config))

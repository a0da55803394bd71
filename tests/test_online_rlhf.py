"""Ensembles of reward models by numbers worked by hand, and rounds of labels and training on a tiny pipeline."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline import arguments, in_update, metrics, read_rows, same_metrics, write_rows
from safetensors.torch import load_file
from test_distributed import launch
from test_winrate import Endpoint, longer_wins, make_pairs

from configurator import UserError
from data import Tokenizer
from model import ScalarModel
from runtime import World
from toy import gold
from variants import ensemble, labellers, online_rlhf, pairs


def configuration(pipeline, name, **changes):
    """Two rounds of 6 labels, two reward models of 2 updates each, two updates of PPO."""
    references = f"{pipeline.data}/sft_validation.jsonl"
    rm_options = "--batch_size=8 --micro_batch_size=8 --episodes=16 --lr=1e-3 --dtype=float32 --normalize_data="
    options = dict(rounds=2, pool=12, n_labels=6, members=2, labeller="toy.gold", eval_split="", micro_batch_size=8)
    options.update(rm_options=rm_options + references, samples_rows=8, samples_every=1)
    return pipeline.config(online_rlhf, name, **{**options, **changes})


CHOSEN = dict(choose="disagreement", combine="min")


def paths(cfg, pattern):
    return sorted(Path(cfg.out_dir).glob(pattern))


def round_of(cfg, number):
    return Path(cfg.out_dir) / f"round_{number}"


def rewards_of(directory, queries, responses):
    """What a reward model gives texts that end with EOS: one row at a time, without padding."""
    tokenizer = Tokenizer.load(str(directory))
    model = ScalarModel.from_pretrained(str(directory)).requires_grad_(False)
    rewards = []
    for query, response in zip(queries, responses):
        ids = [*tokenizer.encode(query), *tokenizer.encode(response), tokenizer.eos_id]
        rewards.append(model(torch.tensor([ids]))[0, -1].item())
    return rewards


def same_files(one, other):
    """All that is learned and drawn is the same, to the bit."""
    for pattern in ("*/*.jsonl", "*/*/metrics.jsonl", "*/*/samples.jsonl", "*/*/final/model.safetensors"):
        ours = paths(one, pattern)
        theirs = paths(other, pattern)
        assert [path.relative_to(one.out_dir) for path in ours] == [path.relative_to(other.out_dir) for path in theirs]
        assert ours
        for left, right in zip(ours, theirs):
            assert left.read_bytes() == right.read_bytes(), left


# ---------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize("how, value", [("mean", 2 / 3), ("min", -1.0), ("uncertainty", 2 / 3 - 0.1 * 7 / 3)])
def test_rewards_of_members_are_combined(how, value):
    """Scores 2, 1, -1: their mean is 0.667, their unbiased variance 2.333; with lambda 0.1 that makes 0.433."""
    rewards = torch.tensor([[2.0, 5.0], [1.0, 5.0], [-1.0, 5.0]])
    assert ensemble.combined(rewards, how, 0.1).tolist() == pytest.approx([value, 5.0], abs=1e-6)


def test_disagreement_is_the_deviation_over_members():
    """Of what they predict: probabilities 1/2, 1/2, 1/2; 1/4, 3/4, 3/4; and 1/2, 1/2, 4/5, which is closer.

    Unbiased variances 0, 1/12, 0.03. Margins of 20, 40 and 60 are three that agree.
    """
    log3, log4 = np.log([3, 4])
    margins = np.array([[0.0, -log3, 0.0, 20.0], [0.0, log3, 0.0, 40.0], [0.0, log3, log4, 60.0]])
    np.testing.assert_allclose(ensemble.disagreement(margins), [0, 12**-0.5, 0.03**0.5, 0], atol=1e-8)


def test_bootstrap_draws_with_replacement_by_seed_and_member():
    rows = list(range(20_000))
    drawn = ensemble.bootstrap(rows, 7, 1)
    assert len(drawn) == len(rows) and set(drawn) <= set(rows)
    assert drawn == ensemble.bootstrap(rows, 7, 1)
    assert drawn != ensemble.bootstrap(rows, 7, 2) and drawn != ensemble.bootstrap(rows, 8, 1)
    # 1/e of the rows are never drawn (arXiv:1706.03741 holds these out); the deviation of that share is 0.0022.
    assert 1 - len(set(drawn)) / len(rows) == pytest.approx(np.exp(-1), abs=0.01)


def test_toy_labellers_err_as_often_as_the_data_does():
    """Gold 2 against 1, 1 against 1, 1 against 2: 0.9 sigmoid(2 d) + 0.05 is 0.842717, 0.5, 0.157283."""
    query = "SUBREDDIT: r/x\n\nTITLE: y\n\nPOST: i am talking about Anna here. my friend danced.\n\nTL;DR:"
    n = 4000
    for first, second, share in [("Anna danced.", "Anna.", 0.842717), ("Anna.", "danced.", 0.5),
                                 ("Anna.", "Anna danced.", 0.157283)]:  # fmt: skip
        labels = labellers.by_toy(3, 1)([query] * n, [first] * n, [second] * n)
        assert set(labels) == {0.0, 1.0}
        assert np.mean(labels) == pytest.approx(share, abs=4 * 0.5 / n**0.5)
    few = [[query] * 40, ["Anna."] * 40, ["danced."] * 40]
    labels = labellers.by_toy(3, 1)(*few)
    assert labels == labellers.by_toy(3, 1)(*few)
    assert labels != labellers.by_toy(3, 2)(*few) and labels != labellers.by_toy(4, 1)(*few)
    # A label depends on its row, not on how many there are.
    assert labellers.by_toy(3, 1)(*[column[:10] for column in few]) == labels[:10]


# ---------------------------------------------------------------------------- rounds


@pytest.fixture(scope="module")
def complete(pipeline):
    """Two rounds in which the reward models choose what is labelled, and PPO is paid the lower of their rewards."""
    cfg = configuration(pipeline, "online", **CHOSEN)
    online_rlhf.main(cfg)
    return cfg


def test_each_round_learns_from_all_rows_so_far(complete):
    firsts = read_rows(round_of(complete, 1) / "pairs.jsonl")
    seconds = read_rows(round_of(complete, 2) / "pairs.jsonl")
    assert len(firsts) == len(seconds) == 6
    prompts = [row["prompt"] for row in firsts + seconds]
    assert len(set(prompts)) == 12
    for row in firsts + seconds:
        assert row["target"] in (0.0, 1.0) and len(set(row["responses"])) == 2

    drawn = read_rows(round_of(complete, 1) / "rm_0.jsonl")
    assert len(drawn) == 6 and all(row in firsts for row in drawn)
    drawn = read_rows(round_of(complete, 2) / "rm_1.jsonl")
    assert drawn == ensemble.bootstrap(firsts + seconds, complete.seed, 1)
    for path in paths(complete, "round_2/*/config.json"):
        assert json.loads(path.read_text())["model"] == complete.model  # from the SFT model, not from round 1
    assert metrics(round_of(complete, 2) / "ppo")[0]["objective/kl"] == 0


def test_members_are_normalised_one_by_one(complete, pipeline):
    references = read_rows(pipeline.data / "sft_validation.jsonl")
    for path in paths(complete, "round_*/rm_?/eval.json"):
        after = json.loads(path.read_text())
        assert after["normalize/mean_after"] == pytest.approx(0, abs=1e-4)
        assert after["normalize/std_after"] == pytest.approx(1, abs=1e-4)
    assert len(references) == 21 and len(paths(complete, "round_*/rm_?/final")) == 4


def test_ppo_is_paid_the_lowest_reward(complete):
    members = paths(complete, "round_1/rm_?/final")
    rows = read_rows(round_of(complete, 1) / "ppo" / "samples.jsonl")
    queries = [row["query"] for row in rows]
    responses = [row["response"] for row in rows]
    each = np.array([rewards_of(member, queries, responses) for member in members])
    assert abs(each[0] - each[1]).min() > 1e-4
    compared = 0
    for row, lowest in zip(rows, each.min(0)):
        if row["score"] != complete.missing_eos_score:
            assert row["score"] == pytest.approx(lowest, abs=1e-4)
            compared += 1
    assert compared > 0


def test_what_members_disagree_on_is_labelled(complete, tmp_path):
    """Of the second round's pool, the pairs with the widest spread of margins between the first round's models."""
    members = paths(complete, "round_1/rm_?/final")
    policy = str(round_of(complete, 1) / "ppo" / "final")
    cfg = replace(complete, n_labels=12)
    pairs.sample_pairs(cfg, World(cfg), tmp_path / "pool.jsonl", 2, policy, list(map(str, members)))
    pool = read_rows(tmp_path / "pool.jsonl")
    queries = [row["prompt"] for row in pool]
    margins = []
    for member in members:
        ours, others = (rewards_of(member, queries, [row["responses"][side] for row in pool]) for side in (0, 1))
        margins.append(np.subtract(ours, others))
    spread = abs(margins[0] - margins[1])  # of two numbers: sqrt(2) standard deviations
    assert len(pool) > 6 and (np.diff(spread) < 1e-4).all()
    labelled = read_rows(round_of(complete, 2) / "pairs.jsonl")
    assert [row["responses"] for row in labelled] == [row["responses"] for row in pool[:6]]


def test_uncertainty_is_a_reward_of_ppo(pipeline, complete):
    """variants/ensemble.py by itself; texts scored by hand."""
    members = paths(complete, "round_2/rm_?/final")
    sources = ",".join(map(str, members))
    cfg = pipeline.config(ensemble, "uncertainty", combine="uncertainty", variance_coef=0.5, reward_model=sources,
                          samples_rows=8, samples_every=1)  # fmt: skip
    ensemble.main(cfg)
    rows = read_rows(Path(cfg.out_dir) / "samples.jsonl")
    each = [rewards_of(member, [row["query"] for row in rows], [row["response"] for row in rows]) for member in members]
    expected = np.mean(each, axis=0) - 0.5 * np.var(each, axis=0, ddof=1)
    tokenizer = Tokenizer.load(cfg.model)
    scored = []
    for number, row in enumerate(rows):
        # PPO scores the ids that were drawn; encoding the text may give others.
        same_ids = len(tokenizer.encode(row["response"])) + 1 == len(row["token_kl"])
        if same_ids and row["score"] != cfg.missing_eos_score:
            scored.append(number)
    assert len(scored) > 4
    np.testing.assert_allclose([rows[number]["score"] for number in scored], expected[scored], atol=1e-4)
    with pytest.raises(UserError, match="combine 'uncertainty' needs several reward models"):
        ensemble.main(pipeline.config(ensemble, "one_member", combine="uncertainty", eval_split=""))


def test_one_reward_model_cannot_disagree(pipeline):
    for changes in (dict(choose="disagreement"), dict(combine="min")):
        with pytest.raises(UserError, match="raise members"):
            online_rlhf.main(configuration(pipeline, "alone", members=1, **changes))


# ---------------------------------------------------------------------------- labellers


def test_people_fill_in_a_file(pipeline, capsys):
    """The run stops for them, tells what is missing or wrong, and goes on to the next round's file."""
    cfg = configuration(pipeline, "people", labeller="people", members=1)
    path = round_of(cfg, 1) / "pairs.jsonl"
    online_rlhf.main(cfg)
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith(str(path)))
    assert '6 of 6 pairs have no label; give each a "target": 1 if' in line and "same command again" in line
    rows = read_rows(path)
    assert [row["target"] for row in rows] == [None] * 6 and len(list(path.parent.iterdir())) == 1

    for row, target in zip(rows, (1, 0, 0.5, 1)):
        row["target"] = target
    write_rows(path, rows)
    online_rlhf.main(cfg)
    assert f"{path}: 2 of 6 pairs have no label" in capsys.readouterr().out

    rows[4]["target"] = "first"
    write_rows(path, rows[:5])
    with pytest.raises(UserError, match=r"pairs.jsonl: line 5: target 'first' is no probability"):
        online_rlhf.main(cfg)

    rows[4]["target"] = 0
    write_rows(path, rows[:5])
    online_rlhf.main(cfg)
    assert f"{round_of(cfg, 2)}/pairs.jsonl: 6 of 6 pairs have no label" in capsys.readouterr().out
    assert read_rows(path.parent / "rm_0.jsonl") == rows[:5]
    assert (path.parent / "ppo" / "final").exists()


def test_a_function_labels_and_may_not_know(pipeline):
    def label(queries, firsts, seconds):
        targets = [0.25] * len(queries)
        targets[1] = None
        return targets

    cfg = configuration(pipeline, "function", rounds=1, members=1)
    online_rlhf.main(cfg, label)
    rows = read_rows(round_of(cfg, 1) / "pairs.jsonl")
    assert [row["target"] for row in rows] == [0.25] * 5
    with pytest.raises(UserError, match=r"label gave 1 for 6 pairs"):
        online_rlhf.main(configuration(pipeline, "short", rounds=1), lambda *texts: [1.0])
    with pytest.raises(UserError, match=r"pairs.jsonl: no pair has a label"):
        online_rlhf.main(configuration(pipeline, "unknown", rounds=1), lambda *texts: [None] * 6)


def test_a_reward_model_labels(pipeline):
    cfg = configuration(pipeline, "by_model", rounds=1, members=1, labeller=str(pipeline.rm))
    online_rlhf.main(cfg)
    rows = read_rows(round_of(cfg, 1) / "pairs.jsonl")
    queries = [row["prompt"] for row in rows]
    ours, others = (rewards_of(pipeline.rm, queries, [row["responses"][side] for row in rows]) for side in (0, 1))
    assert [row["target"] for row in rows] == [float(one > other) for one, other in zip(ours, others)]
    assert set(map(gold.post_of, queries)) and len(rows) == 6


def test_a_language_model_labels_and_is_asked_once(tmp_path):
    asked_about = make_pairs(9)
    endpoint = Endpoint(asked_about)
    cfg = online_rlhf.Config(out_dir=str(tmp_path), labeller=endpoint.judge, device="cpu")
    texts = [[pair[key] for pair in asked_about] for key in ("query", "response", "other")]
    try:
        for n_requests in (9, 0):  # the second time all answers are on the disk
            label = labellers.by_name(cfg, World(cfg), number=1)
            assert label(*texts) == longer_wins(asked_about)
            assert len(endpoint.asked()) == n_requests
    finally:
        endpoint.stop()


# ---------------------------------------------------------------------------- stop and go on


class Killed(Exception):
    pass


def killed(*texts):
    raise Killed


def test_a_run_that_was_stopped_in_ppo_goes_on(pipeline, complete):
    """SIGTERM in PPO's first update of round 1: nothing of round 2 begins."""
    cfg = configuration(pipeline, "stopped", **CHOSEN)
    # Optimizer steps before PPO's: two of each of two reward models.
    count = replace(cfg, n_epochs=1, n_minibatches=1)
    with in_update(count, 5, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        online_rlhf.main(cfg)
    assert (round_of(cfg, 1) / "ppo" / "checkpoints").exists()
    assert not (round_of(cfg, 1) / "ppo" / "final").exists() and not round_of(cfg, 2).exists()
    online_rlhf.main(cfg)
    same_files(complete, cfg)


def test_a_run_that_was_killed_between_reward_models_goes_on(pipeline, complete):
    """As if it had been killed when the second one had its rows, and no model."""
    cfg = configuration(pipeline, "between", accept_changes=True, **CHOSEN)  # the copy's paths are others
    shutil.copytree(complete.out_dir, cfg.out_dir)
    for name in ("ppo", "rm_1"):
        shutil.rmtree(round_of(cfg, 2) / name)
    (round_of(cfg, 2) / "rm_1.jsonl").rename(round_of(cfg, 2) / "rm_1.jsonl.tmp")
    online_rlhf.main(cfg)
    assert not paths(cfg, "round_2/*.tmp")
    same_files(complete, cfg)


def test_a_run_that_ended_before_labels_goes_on_and_then_has_more_rounds(pipeline, complete):
    """A run of one round becomes one of two: the same files as if it had been asked for these at once."""
    cfg = configuration(pipeline, "longer", rounds=1, **CHOSEN)
    with pytest.raises(Killed):
        online_rlhf.main(cfg, killed)
    assert [path.name for path in round_of(cfg, 1).iterdir()] == ["pairs.jsonl"]
    online_rlhf.main(cfg)
    assert not round_of(cfg, 2).exists()
    online_rlhf.main(replace(cfg, rounds=2))
    same_files(complete, cfg)


def test_two_processes_are_one_run(pipeline, complete):
    """The rounds share a process group; what is sampled and labelled is the same, what is learned up to rounding."""
    cfg = configuration(pipeline, "two_processes", **CHOSEN)
    launch(2, "-m", "variants.online_rlhf", *arguments(cfg))
    for name in ("round_1/pairs.jsonl", "round_1/rm_1.jsonl"):
        assert (Path(cfg.out_dir) / name).read_bytes() == (Path(complete.out_dir) / name).read_bytes()
    same_metrics(metrics(round_of(complete, 1) / "ppo"), metrics(round_of(cfg, 1) / "ppo"))
    final = "round_2/ppo/final/model.safetensors"
    assert load_file(Path(cfg.out_dir) / final).keys() == load_file(Path(complete.out_dir) / final).keys()


# ---------------------------------------------------------------------------- the laboratory's experiment


def made_up(arm, seed, gold_of_rounds):
    """A row of results in which gold and the rest are constant in each round."""
    rounds = []
    for value in gold_of_rounds:
        curves = {name: [value + shift] * 20 for name, shift in (("gold", 0.0), ("proxy", 1.0), ("kl", 2.0))}
        rounds.append({"labels": 400 // len(gold_of_rounds), "tokens": [8.0] * 20, **curves})
    return {"arm": arm, "seed": seed, "rounds": rounds}


def test_online_figure_and_table_are_made_of_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    from lab import online

    rows = []
    for arm, (n_rounds, _) in online.ARMS.items():
        for seed in (2, 1):
            rows.append(made_up(arm, seed, [float(seed + number) for number in range(n_rounds)]))
    (tmp_path / "online.md").write_text("before\n<!-- online -->\nstale\n<!-- end -->\nafter\n")
    online.write(rows, tmp_path)
    text = (tmp_path / "online.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    gold_and_best = "4.50 (4.00, 5.00) | 4.50 (4.00, 5.00)"
    rest = "5.50 (5.00, 6.00) | 6.50 | 8.00 | 1.50, 2.50, 3.50, 4.50 |"
    assert f"| 4 rounds, random | 400 | {gold_and_best} | {rest}" in text
    assert (tmp_path / "figures" / "online.png").read_bytes().startswith(b"\x89PNG")
    assert read_rows(tmp_path / "online.jsonl") == rows


def test_online_arms_share_a_first_round_that_is_whole(tmp_path):
    pytest.importorskip("matplotlib")
    from lab import online

    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "pairs.jsonl").write_text("here\n")
    (tmp_path / "arm" / "tmp").mkdir(parents=True)  # of a run that was killed while it copied
    (tmp_path / "arm" / "tmp" / "half").touch()
    online.copy_once(tmp_path / "one", tmp_path / "arm" / "round_1")
    assert [path.name for path in (tmp_path / "arm" / "round_1").iterdir()] == ["pairs.jsonl"]
    (tmp_path / "one" / "pairs.jsonl").write_text("changed\n")
    online.copy_once(tmp_path / "one", tmp_path / "arm" / "round_1")
    assert (tmp_path / "arm" / "round_1" / "pairs.jsonl").read_text() == "here\n"


def test_published_online_table_is_that_of_the_published_results():
    pytest.importorskip("matplotlib")
    from lab import online, report

    rows = read_rows(online.ROOT / "lab" / "online.jsonl")
    assert report.markdown(online.table(rows)) in (online.ROOT / "lab" / "online.md").read_text(encoding="utf-8")
    for rounds in online.select(rows, "1 round"):
        # Over-optimisation, in every seed: means of five updates of 64 episodes, off by about 0.07 each.
        gold_curve = report.smooth(rounds[0]["gold"])
        assert report.end(rounds[0]["gold"]) < gold_curve.max() - 0.2

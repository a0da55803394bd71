"""The laboratory's arithmetic against brute force, its mistakes on a tiny pipeline, its figures and tables."""

import functools
import itertools
import json

import numpy as np
import pytest
import torch
from pipeline import metrics
from torch.nn.modules.module import register_module_forward_hook

import ppo
import sample
import sft
from data import load_rows
from model import GPTNeoX

pytest.importorskip("matplotlib")
from lab import lab, report  # noqa: E402


def test_best_of_mean_matches_all_subsets():
    rng = np.random.default_rng(0)
    ranks = rng.integers(0, 4, (6, 5)).astype(float)  # with ties
    values = rng.normal(size=(6, 5))
    for n in range(1, 7):
        means = []
        for chosen in itertools.combinations(range(6), n):
            for post in range(5):
                # The first of those with the highest rank: max keeps the first of equals.
                best = max(chosen, key=ranks[:, post].__getitem__)
                means.append(values[best, post])
        assert lab.best_of_mean(ranks, values, n) == pytest.approx(np.mean(means))


def test_draw_gives_the_proxy_and_gold_of_every_response(pipeline):
    found = {}
    cfg = pipeline.config(sample, "unused", split="validation[:2]", micro_batch_size=64)
    lab.draw(cfg, str(pipeline.rm), found)
    assert len(found["proxy"]) == len(found["gold"]) == 2 * lab.DRAWS
    assert np.std(found["proxy"]) > 0 and set(found["gold"]) <= {x / 4 for x in range(-100, 17)}


def test_smooth_averages_neighbours():
    np.testing.assert_allclose(report.smooth([0, 3, 6, 9, 30], 3), [1.5, 3, 6, 15, 19.5])


def test_fits_find_what_made_the_points():
    x = np.linspace(0.2, 4, 30)
    np.testing.assert_allclose(report.fit(x, 2 - 3 * x), (2, -3, 1))
    np.testing.assert_allclose(report.scaling(x, x * (1.5 - 0.25 * x), lambda d: d), (1.5, 0.25, 1))
    np.testing.assert_allclose(report.scaling(x, x * (1.5 - 0.7 * np.log(x)), np.log), (1.5, 0.7, 1))
    noise = np.random.default_rng(0).normal(size=30)
    assert report.fit(x, noise)[2] == pytest.approx(np.corrcoef(x, noise)[0, 1] ** 2)


def test_missing_arms_are_those_without_a_row(tmp_path):
    results = tmp_path / "results.jsonl"
    experiments = {"one": {"a": None, "b": None}}
    assert len(lab.missing_arms(experiments, (1, 2), results)) == 4
    results.write_text(json.dumps({"experiment": "one", "arm": "a", "seed": 2}) + "\n")
    missing = lab.missing_arms(experiments, (1, 2), results)
    assert missing == [("one", "a", 1), ("one", "b", 1), ("one", "b", 2)]


# ---------------------------------------------------------------------------- mistakes


def test_eos_as_padding_leaves_only_eos_out_of_the_loss(pipeline):
    cfg = pipeline.config(sft, "unused")
    tokenizer = lab.Tokenizer.load(str(pipeline.data))
    rows = load_rows(cfg.data, "validation", tokenizer, n_responses=1)[:4]
    whole = sft.model_inputs(rows, "response", "cpu")
    without = lab.eos_is_padding(rows, "response", "cpu")
    lost = whole[3] & ~without[3]
    assert lost.sum(1).tolist() == [1] * 4
    assert (whole[2][lost] == 0).all()
    for left, right in zip(whole[:3], without[:3]):
        assert torch.equal(left, right)


def test_eos_as_padding_leaves_a_model_that_does_not_end(pipeline):
    losses = {}
    for name, doors in (("right", {}), ("eos", {"inputs": lab.eos_is_padding})):
        cfg = pipeline.config(sft, f"lab_sft_{name}", episodes=80, lr=5e-3)
        sft.main(cfg, **doors)
        model = GPTNeoX.from_pretrained(f"{cfg.out_dir}/final").requires_grad_(False)
        rows = load_rows(cfg.data, "validation", lab.Tokenizer.load(str(pipeline.data)), n_responses=1)[:]
        ids, select, targets, _ = sft.model_inputs(rows, "response", "cpu")
        losses[name] = -model.logprobs(ids, select, targets)[targets == lab.EOS].mean().item()
    assert losses["eos"] > losses["right"] + 1


def test_dropout_breaks_the_first_ratio_and_the_first_kl(pipeline):
    cfg = pipeline.config(ppo, "lab_right", kl_coef=0.1)
    ppo.main(cfg)
    right = metrics(cfg)[0]
    cfg = pipeline.config(ppo, "lab_dropout", kl_coef=0.1)
    with register_module_forward_hook(functools.partial(lab.dropout, p=0.2)):
        ppo.main(cfg)
    wrong = metrics(cfg)[0]
    assert right["objective/kl"] == 0 and abs(right["val/ratio"] - 1) < 1e-5
    assert abs(wrong["objective/kl"]) > 1e-3 and abs(wrong["val/ratio"] - 1) > 1e-4


def test_generation_logprobs_are_those_of_the_samples(pipeline):
    taken = []

    def advantages(cfg, batch, state):
        recomputed = batch["logprobs"]
        batch = lab.generation_logprobs(cfg, batch, state)
        taken.append((recomputed, batch))
        return batch

    cfg = pipeline.config(ppo, "lab_generation")
    ppo.main(cfg, advantages=advantages)
    assert len(taken) == 2
    for recomputed, batch in taken:
        assert batch["logprobs"] is batch["sampled_logprobs"] is not recomputed
        kl = (batch["sampled_logprobs"] - batch["ref_logprobs"]) * batch["mask"]
        assert torch.equal(batch["kl"], kl)
    # By its definition, the gap between the old log-probabilities and those of generation is now 0.
    assert [row["val/generation_gap"] for row in metrics(cfg)] == [0, 0]


# ---------------------------------------------------------------------------- figures and tables


def curves(**changes):
    ramp = np.linspace(0, 1, 60)
    made = {
        "kl": 9 * ramp,
        "proxy": 3 * ramp,
        "gold": 2 + ramp - 2 * ramp**2,
        "tokens": 5 + ramp,
        "eos": np.ones(60),
        "ratio": np.ones(60),
        "value_loss": 1 - ramp,
        "perplexity": 2 - ramp,
        "gap": np.zeros(60),
        **changes,
    }
    return {name: curve.tolist() for name, curve in made.items()}


@pytest.fixture
def results(tmp_path):
    """What lab.py would have written, made up."""
    rows = []

    def add(experiment, arm, **numbers):
        rows.append({"experiment": experiment, "arm": arm, "seed": seed, **numbers})

    for seed in (1, 2, 3):
        for beta in report.BETAS:
            add("overoptimisation", f"beta {beta}", **curves())
        add("whitening", "whitened", **curves(tokens=np.full(60, 4.0)))
        for arm in lab.EXPERIMENTS["mistakes"]:
            add("mistakes", arm, **curves(ratio=np.full(60, 1.1)))
        add("best_of_n", "best of n", n=[1, 2], kl=[0, 0.19], proxy=[0, 1.0], gold=[2.0, 2.5])
        for kind in ("rm", "dpo"):
            for pairs in (100, 200):
                add("data", f"{kind} {pairs}", pairs=pairs, accuracy=0.6 + seed / 100)
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_report_knows_the_mistakes_that_the_laboratory_makes():
    assert set(report.MISTAKES) == set(lab.EXPERIMENTS["mistakes"])


def test_report_writes_figures_and_replaces_its_tables_alone(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- data -->\nstale\n<!-- end -->\nafter\n<!-- other -->\nkept\n<!-- end -->\n")
    report.write(results, tmp_path)
    once = readme.read_text()
    assert once.startswith("before\n<!-- data -->\n") and "stale" not in once
    assert "\nafter\n<!-- other -->\nkept\n<!-- end -->\n" in once
    assert "| 100 | 0.620 (0.610, 0.620, 0.630) | 0.620 (0.610, 0.620, 0.630) |" in once
    for name in report.ALL:
        assert once.count(f"<!-- {name} -->") == 1
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    report.write(results, tmp_path)
    assert readme.read_text() == once


@pytest.mark.parametrize(("left", "drawn", "line"), [
    (["overoptimisation"], ["overoptimisation", "signature", "sqrt_kl"], ""),
    (["overoptimisation: beta 0.3"], ["overoptimisation", "signature", "sqrt_kl"], ""),  # stopped after a seed of it
    (["overoptimisation: beta 0.1", "mistakes: dropout"], ["overoptimisation", "signature", "sqrt_kl"],
     "mistakes also needs mistakes: EOS is padding, mistakes: new critic, mistakes: bfloat16"),
    (["whitening"], [], "whitening also needs overoptimisation: beta 0.1\n"),
])  # fmt: skip
def test_report_draws_what_the_results_allow(results, tmp_path, capsys, left, drawn, line):
    rows = []
    for row in report.read(results):
        if row["experiment"] in left or f"{row['experiment']}: {row['arm']}" in left:
            rows.append(row)
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.write(results, tmp_path / "some")
    assert sorted(path.stem for path in (tmp_path / "some" / "figures").iterdir()) == drawn
    assert line in capsys.readouterr().out


def test_overoptimisation_table_is_read_off_the_curves(results):
    head, first, *_ = report.overoptimisation_table(report.read(results))
    row = dict(zip(("beta", "seed", "kl", "proxy", "proxy end", "gold", "best", "at", "gold end"), first))
    assert len(head) == len(first) and row["beta"] == "0.0" and row["seed"] == 1
    # gold is 2 + x - 2 x^2 with its top 2.125 at x = 1/4, where KL is 9/4; at the end (the last 5 of 60) x is 57/59
    assert row["best"] == pytest.approx(2.125, abs=0.01) and row["at"] == pytest.approx(2.25, abs=0.1)
    assert row["gold end"] == pytest.approx(2 + 57 / 59 - 2 * (57 / 59) ** 2, abs=0.01)
    assert row["kl"] == pytest.approx(9 * 57 / 59) and row["proxy end"] == pytest.approx(3 * 57 / 59)


# ---------------------------------------------------------------------------- what is published


def test_published_tables_are_those_of_the_published_results():
    rows = report.read()
    text = (report.ROOT / "lab" / "README.md").read_text(encoding="utf-8")
    for _, table, _ in report.ALL.values():
        if table:
            assert report.markdown(table(rows)) in text


def test_published_runs_overoptimise_without_a_penalty_in_every_seed():
    runs = report.select(report.read(), "overoptimisation", "beta 0.0")
    assert [row["seed"] for row in runs] == [1, 2, 3]
    for row in runs:
        gold = report.smooth(row["gold"])
        proxy = report.smooth(row["proxy"])
        top = int(gold.argmax())
        # gold of a response has a deviation of about 1: means of 5 x 64 are off by 0.06, their difference by 0.08
        assert report.end(row["gold"]) < gold[top] - 0.3 and report.end(row["proxy"]) > proxy[top] + 0.3


def test_lab_names_what_it_does_not_know(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lab.py", "overoptimization"])
    with pytest.raises(SystemExit) as stopped:
        lab.main()
    assert stopped.value.code == 2 and "overoptimisation" in capsys.readouterr().err

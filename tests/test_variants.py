"""The doors of ppo.py and dpo.py, and the effect on a tiny run of the variants that go through them."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline import metrics
from safetensors.torch import load_file

import dpo
import ppo
from configurator import UserError
from data import batch_indices, load_rows
from hub.files import read_jsonl
from hub.tokenizer import Tokenizer
from model import GPTNeoX
from variants import (
    aot,
    bco,
    dpo_losses,
    dr_grpo,
    early_stop,
    f_dpo,
    grpo,
    importance,
    kl_estimators,
    kl_penalty,
    online_dpo,
    ppo_max,
    ptx,
    reference_ema,
    reinforce_pp,
    rloo,
    sequence_ratio,
    tr_dpo,
    truly_ppo,
    wpo,
)

# ---------------------------------------------------------------------------- the doors


def length_score(queries, responses):
    return [-float(len(text)) for text in responses]


def run(pipeline, name, module=ppo, score=None, **options):
    doors = {key: options.pop(key) for key in list(options) if not hasattr(module.Config, key)}
    cfg = pipeline.config(module, f"variant_{name}", eval_split="", **options)
    module.main(cfg, score, **doors)
    return cfg, metrics(cfg)


def policy_of(cfg):
    return load_file(Path(cfg.out_dir) / "final" / "model.safetensors")


def test_default_doors_are_the_default_step(pipeline):
    _, plain = run(pipeline, "plain")
    doors = dict(advantages=ppo.advantages, token_loss=ppo.clipped_surrogate, before_step=lambda *args: False)
    _, through_doors = run(pipeline, "through_doors", **doors)
    assert plain == through_doors


def test_score_gets_the_rows_of_the_data(pipeline, tmp_path):
    """A function of three arguments, or with one named rows, gets them; one of two goes on working."""
    seen = []

    def with_rows(queries, responses, rows):
        seen.extend(zip(queries, rows, strict=True))
        return [0.0] * len(rows)

    def named(queries, responses, rows=None):
        seen.extend(zip(queries, rows, strict=True))
        return [0.0] * len(rows)

    def with_options(queries, responses, scale=1.0):
        assert scale == 1.0
        return [0.0] * len(responses)

    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} plus {n}:", "answer": 2 * n}) + "\n" for n in range(12)))
    for number, score in enumerate((with_rows, named, with_options)):
        run(pipeline, f"rows{number}", score=score, data=str(data), episodes=8)
    assert len(seen) == 16
    assert all(query == row["prompt"] and row["answer"] == 2 * int(query.split()[0]) for query, row in seen)


def test_a_group_answers_one_query(pipeline):
    """Four answers to each of two queries, side by side; they differ, and so do the queries."""
    batches = []

    def look(cfg, batch, state):
        batches.append(batch)
        return ppo.advantages(cfg, batch, state)

    cfg, _ = run(pipeline, "groups", group_size=4, episodes=8, advantages=look, samples_rows=8, samples_every=1)
    samples = read_jsonl(Path(cfg.out_dir) / "samples.jsonl")
    queries = [row["query"] for row in samples]
    assert queries[0] != queries[4] and queries == [queries[0]] * 4 + [queries[4]] * 4
    assert len({tuple(row) for row in batches[0]["responses"].tolist()}) > 2
    rows = read_jsonl(f"{pipeline.data}/sft_train.jsonl")
    titles = [rows[index]["title"] for index in batch_indices(60, 2, 0, cfg.seed)]
    assert all(f"TITLE: {title}" in query for title, query in zip(titles, (queries[0], queries[4])))
    with pytest.raises(UserError, match="batch_size 8 must be a multiple of group_size 3"):
        run(pipeline, "no_groups", group_size=3)


def test_without_a_critic_there_is_none(pipeline):
    cfg, rows = run(pipeline, "no_critic", grpo, group_size=4, save_every=1)
    names = set()
    for path in Path(cfg.out_dir).glob("checkpoints/step_2/*.safetensors"):
        names.update(load_file(path))
    assert names and not any("critic" in name for name in names)
    assert not any("value" in name or name == "val/clipfrac_avg" for name in rows[0])


def test_before_step_ends_the_policys_steps_of_an_update(pipeline):
    """After the second of four steps the policy stays as it is, and the critic goes on; the next update begins anew."""
    norms = []

    def stop_at_second(run, cfg, metrics):
        norms.append(sum(p.grad.square().sum().item() for p in run.models["policy"].parameters()))
        metrics["seen/ratio_avg"] = metrics["val/ratio_avg"]
        return len(norms) % 2 == 0

    cfg, rows = run(pipeline, "stopped", before_step=stop_at_second, n_epochs=2, n_minibatches=2)
    # Called twice in each of the two updates, with the gradients of that step there.
    assert len(norms) == 4 and min(norms) > 0
    assert rows[0]["seen/ratio_avg"] != rows[0]["val/ratio"] == pytest.approx(1, abs=1e-5)
    one_step, _ = run(pipeline, "one_step", before_step=lambda *args: True, n_epochs=2, n_minibatches=2)
    initial = load_file(pipeline.sft / "model.safetensors")
    assert all(torch.equal(initial[name], weight) for name, weight in policy_of(one_step).items())
    assert any(not torch.equal(initial[name], weight) for name, weight in policy_of(cfg).items())


def test_after_update_may_move_the_reference(pipeline):
    """A reference that becomes the policy after each update: the next batch's KL is 0 again."""

    def follow(run, policy, reference):
        reference.load_state_dict(policy.state_dict())

    _, still = run(pipeline, "reference_still")
    _, moving = run(pipeline, "reference_moves", after_update=follow)
    assert still[1]["objective/kl"] != 0.0 and moving[1]["objective/kl"] == 0.0


def test_state_is_kept_in_the_checkpoint(pipeline):
    """What a variant leaves in `state` goes on after a stop, and the last batch's KL with it."""
    states = []

    def count(cfg, batch, state):
        state["batches"] = state.get("batches", 0) + 1
        states.append(dict(state))
        return ppo.advantages(cfg, batch, state)

    options = dict(advantages=count, save_every=1, keep_checkpoints=9, episodes=32)
    cfg, rows = run(pipeline, "state", **options)
    directory = Path(cfg.out_dir)
    for step in (3, 4):
        stored = json.loads((directory / f"checkpoints/step_{step}/state.json").read_text())
        assert stored["batches"] == step and stored["kl"] == rows[step - 1]["objective/kl"]
    for path in (directory / "final", directory / "checkpoints" / "step_4"):
        path.rename(f"{path}_moved_away")
    before = (directory / "metrics.jsonl").read_bytes()
    run(pipeline, "state", **options)
    assert states[-1]["batches"] == 4 and (directory / "metrics.jsonl").read_bytes() == before


# ---------------------------------------------------------------------------- the variants, end to end

GROUPS = dict(group_size=4)
RUNS = {
    "grpo": (grpo, GROUPS),
    "dr_grpo": (dr_grpo, GROUPS),
    "gspo": (sequence_ratio, GROUPS),
    "clip_higher": (sequence_ratio, dict(ratio_of="token", clip_low=0.2, clip_high=0.28, **GROUPS)),
    "rloo": (rloo, GROUPS),
    "reinforce_pp": (reinforce_pp, {}),
    "online_dpo": (online_dpo, dict(n_epochs=1, n_minibatches=1)),
    "truly_ppo": (truly_ppo, {}),
    "trust_region": (truly_ppo, dict(form="trust_region")),
    "trust_region_rollback": (truly_ppo, dict(form="trust_region_rollback", alpha=0.05, delta=0.03)),
    "truly": (truly_ppo, dict(form="truly", delta=0.03)),
    "kl_penalty": (kl_penalty, {}),
    "k3_in_reward": (kl_estimators, dict(kl_estimator="k3")),
    "k2_in_loss": (kl_estimators, dict(kl_estimator="k2", kl_in="loss")),
    "early_stop": (early_stop, dict(target_kl=0.1)),
    "reference_ema": (reference_ema, dict(ema=0.1)),
    "importance": (importance, {}),
    "ptx": (ptx, dict(ptx_coef=0.1)),
    "ppo_max": (ppo_max, dict(reward_norm="normalize", reward_clip=0.8, ptx_coef=0.1)),
}


@pytest.mark.parametrize("name", RUNS)
def test_variant_starts_from_the_reference_and_learns_brevity(pipeline, name):
    """KL 0 and ratio 1 at first; paid for short responses, it writes shorter ones."""
    module, options = RUNS[name]
    common = dict(lr=3e-3, episodes=12 * 32, batch_size=32, missing_eos_score=-30.0)
    common.update(micro_batch_size=32, rollout_micro_batch_size=32)
    _, rows = run(pipeline, f"learns_{name}", module, length_score, **common, **options)
    assert rows[0]["objective/kl"] == 0.0
    assert rows[0]["val/ratio"] == pytest.approx(1, abs=1e-5)
    first = np.mean([row["objective/scores"] for row in rows[:3]])
    last = np.mean([row["objective/scores"] for row in rows[-3:]])
    assert last > first + 2


@pytest.mark.parametrize("name", RUNS)
def test_variant_does_not_depend_on_the_micro_batch(pipeline, name):
    module, options = RUNS[name]
    runs = [run(pipeline, f"{name}_micro{n}", module, micro_batch_size=n, **options)[1] for n in (1, 8)]
    for one, other in itertools.zip_longest(*runs):
        for key in one:
            np.testing.assert_allclose(one[key], other[key], rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("module", [grpo, rloo, dr_grpo, sequence_ratio])
def test_an_answer_alone_has_no_group(pipeline, module):
    with pytest.raises(UserError, match="group_size 1: an answer alone"):
        run(pipeline, "alone", module, group_size=1)


def test_early_stop_leaves_out_the_later_steps(pipeline):
    """With a bound that any step breaks, four epochs move the policy as one does; the critic goes on."""
    options = dict(lr=1e-3, episodes=8, n_minibatches=1)
    one, _ = run(pipeline, "one_epoch", n_epochs=1, **options)
    stopped, rows = run(pipeline, "stopped_early", early_stop, target_kl=1e-9, n_epochs=4, **options)
    free, _ = run(pipeline, "stopped_late", early_stop, target_kl=1e9, n_epochs=4, **options)
    assert rows[0]["policy/old_new_kl"] > 1.5e-9
    assert all(torch.equal(policy_of(one)[name], weight) for name, weight in policy_of(stopped).items())
    assert any(not torch.equal(policy_of(free)[name], weight) for name, weight in policy_of(stopped).items())


def test_early_stop_looks_at_the_mean_log_ratio(pipeline):
    """Before the first step of an update it is exactly 0; then it is about half the mean squared log-ratio."""
    _, rows = run(pipeline, "stop_metric", early_stop, target_kl=1e9, n_epochs=2, n_minibatches=1, lr=1e-3)
    _, first = run(pipeline, "stop_metric_first", early_stop, target_kl=1e9, n_epochs=1, n_minibatches=1, lr=1e-3)
    assert first[0]["policy/old_new_kl"] == pytest.approx(0, abs=1e-6)
    # approxkl is the mean over both steps, of which the first has none
    assert rows[0]["policy/old_new_kl"] == pytest.approx(2 * rows[0]["policy/approxkl_avg"], rel=0.5)


def go_on_from_the_third(cfg, main):
    """Forget what came after the third update, and run again; the rows must come out to the byte."""
    directory = Path(cfg.out_dir)
    before = (directory / "metrics.jsonl").read_bytes()
    for path in (directory / "final", directory / "checkpoints" / "step_4"):
        path.rename(f"{path}_moved_away")
    main(cfg)
    assert (directory / "metrics.jsonl").read_bytes() == before


RESUMED = dict(save_every=1, keep_checkpoints=9, lr=1e-3)


def test_a_reference_that_follows_is_in_the_checkpoint(pipeline):
    """With a share of 1 the next batch's KL is 0; with less the KL is in between; a resumed run goes on with it."""
    _, still = run(pipeline, "ema_0", reference_ema, ema=0.0, lr=1e-3)
    _, follows = run(pipeline, "ema_1", reference_ema, ema=1.0, lr=1e-3)
    _, third = run(pipeline, "ema_every_third", reference_ema, ema=1.0, sync_every=3, episodes=32, lr=1e-3)
    assert still[1]["objective/kl"] != 0.0 and follows[1]["objective/kl"] == 0.0
    assert [row["objective/kl"] == 0.0 for row in third] == [True, False, False, True]
    cfg, _ = run(pipeline, "ema_resumed", reference_ema, ema=0.3, episodes=32, **RESUMED)
    names = set()
    for path in Path(cfg.out_dir).glob("checkpoints/step_3/*.safetensors"):
        names.update(load_file(path))
    assert "reference.embed_out.weight" in names and "exp_avg.reference.embed_out.weight" not in names
    go_on_from_the_third(cfg, reference_ema.main)


def dpo_run(pipeline, name, module, **options):
    cfg = pipeline.config(module, f"variant_{name}", eval_split="", **{"batch_size": 8, "episodes": 32, **options})
    module.main(cfg)
    return cfg, metrics(cfg)


def test_tr_dpo_begins_anew_after_each_move(pipeline):
    """With a share of 1, every second update: there the log-ratios are 0 and the loss is log 2."""
    cfg, rows = dpo_run(pipeline, "tr_dpo", tr_dpo, ema=1.0, sync_every=2, **RESUMED)
    # float32 log-probabilities of some 20 tokens, off by 1e-5 nats in sum where micro-batches differ, times beta
    assert [abs(row["loss/dpo"] - np.log(2)) < 1e-6 for row in rows] == [True, False, True, False]
    go_on_from_the_third(cfg, tr_dpo.main)


def test_tr_dpo_that_stays_is_dpo(pipeline):
    _, plain = dpo_run(pipeline, "dpo_plain", dpo, lr=1e-3)
    _, still = dpo_run(pipeline, "tr_dpo_still", tr_dpo, sync_every=100, lr=1e-3)
    for one, other in zip(plain, still, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_allclose(one[key], other[key], rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_aot_does_not_depend_on_the_micro_batch(pipeline, loss_type):
    options = dict(loss_type=loss_type, lr=1e-3, beta=1.0)
    runs = [dpo_run(pipeline, f"{loss_type}_micro{n}", aot, micro_batch_size=n, **options)[1] for n in (1, 8)]
    for rows in runs:
        del rows[0]["rewards/accuracies"]  # DPO starts with all rewards 0: rounding decides the sign
    for one, other in zip(*runs, strict=True):
        for key in one:
            np.testing.assert_allclose(one[key], other[key], rtol=1e-5, atol=1e-5, err_msg=key)
    assert runs[0][0]["loss/dpo"] == pytest.approx(np.log(2), abs=1e-6) or loss_type == "aot"
    assert runs[0][-1]["rewards/margins"] > runs[0][0]["rewards/margins"]


def test_bco_threshold_is_the_mean_reward_so_far(pipeline):
    """Of all batches, each by the policy of its update; a resumed run goes on with it."""
    cfg, rows = dpo_run(pipeline, "bco", bco, beta=1.0, **RESUMED)
    assert rows[0]["loss/dpo"] == pytest.approx(2 * np.log(2), abs=1e-6)
    means = [(row["rewards/chosen"] + row["rewards/rejected"]) / 2 for row in rows]
    state = json.loads((Path(cfg.out_dir) / "checkpoints" / "step_3" / "state.json").read_text())
    assert state["reward_sum"] == pytest.approx(np.sum(means[:3]), abs=1e-5) and state["n_batches"] == 3
    assert abs(np.mean(means[:3])) > 1e-3  # ten times what would show an update left out
    go_on_from_the_third(cfg, bco.main)


def test_mpo_with_a_threshold_begins_as_without_and_ends_elsewhere(pipeline):
    options = dict(loss_type="sigmoid,bco_pair,sft", beta=1.0, lr=1e-3)
    _, with_shift = dpo_run(pipeline, "mpo_shift", bco, loss_weights="0.8,0.2,1", **options)
    _, without = dpo_run(pipeline, "mpo_plain", dpo_losses, loss_weights="0.8,0.2,1", **options)
    assert with_shift[0]["loss/dpo"] == pytest.approx(without[0]["loss/dpo"], abs=1e-6)
    assert with_shift[-1]["loss/dpo"] != pytest.approx(without[-1]["loss/dpo"], abs=1e-4)


def test_wpo_weighs_pairs_by_the_policy(pipeline):
    """Before the first update every loss is log 2 times the pair's weight: here by the whole softmax of each token."""
    cfg, rows = dpo_run(pipeline, "wpo", wpo, lr=1e-3)
    tokenizer = Tokenizer.load(cfg.model)
    model = GPTNeoX.from_pretrained(cfg.model).double()
    data = load_rows(cfg.data, cfg.train_split, tokenizer, n_responses=2, max_length=512)
    weights = []
    for index in batch_indices(len(data), 8, 0, cfg.seed):
        row = data[int(index)]
        log_weight = 0.0
        for response in row["responses"]:
            ids = torch.tensor([row["query"] + response])
            p = model(ids)[0, :, : tokenizer.n_vocab].softmax(-1)[len(row["query"]) - 1 : -1]
            likely = p[torch.arange(len(response)), response] / (p**2).sum(-1)
            log_weight += likely.log().mean().item()
        weights.append(np.exp(log_weight))
    assert np.std(weights) > 0.0
    assert rows[0]["loss/dpo"] == pytest.approx(np.log(2) * np.mean(weights), rel=1e-5)


def test_f_dpo_at_the_reverse_kl_is_dpo(pipeline):
    _, plain = dpo_run(pipeline, "dpo_f", dpo, lr=1e-3)
    _, same = dpo_run(pipeline, "f_dpo", f_dpo, divergence="reverse_kl", lr=1e-3)
    _, other = dpo_run(pipeline, "f_dpo_js", f_dpo, lr=1e-3)
    assert same[-1]["loss/dpo"] == pytest.approx(plain[-1]["loss/dpo"], abs=1e-6)
    assert other[-1]["rewards/margins"] > other[0]["rewards/margins"]
    assert other[-1]["loss/dpo"] != pytest.approx(plain[-1]["loss/dpo"], abs=1e-4)


def test_dpo_learns_from_soft_labels(pipeline, tmp_path):
    """The margin goes to where its sigmoid is the label's probability: log p / (1 - p), and 0 for a coin. A label below
    a half is that of the pair the other way round."""
    for target in (0.1, 0.5, 0.6, 0.9):
        row = {"prompt": "Anna said:", "chosen": " yes", "rejected": " no", "target": target}
        data = tmp_path / f"soft{target}.jsonl"
        data.write_text((json.dumps(row) + "\n") * 8)
        options = dict(loss_type="sigmoid", data=str(data), beta=1.0, lr=1e-3, weight_decay=0.0, episodes=320,
                       micro_batch_size=8)  # fmt: skip
        _, rows = dpo_run(pipeline, f"soft{target}", dpo_losses, **options)
        assert rows[0]["loss/dpo"] == pytest.approx(np.log(2), abs=1e-6)
        likelier = max(target, 1 - target)
        # 40 steps of Adam come near: to 0.30 of 0.41, and to 2.11 of 2.20.
        # Adam comes to rest within a few of its last, small steps.
        assert rows[-1]["rewards/margins"] == pytest.approx(np.log(likelier / (1 - likelier)), rel=0.3, abs=0.02)
    with pytest.raises(UserError, match="soft labels .target. are for loss_type sigmoid alone"):
        dpo_run(pipeline, "soft_ipo", dpo_losses, loss_type="ipo", data=str(data))


def test_dpo_mixes_losses_and_sft(pipeline):
    """MPO: what is logged is the weighted sum, and the chosen responses become likelier."""
    options = dict(loss_type="sigmoid,bco_pair,sft", loss_weights="0.8,0.2,1", lr=1e-3, episodes=64)
    cfg, rows = dpo_run(pipeline, "mpo", dpo_losses, **options)
    assert rows[0]["loss/dpo"] == pytest.approx((0.8 + 0.2 * 2) * np.log(2), abs=1e-5)
    assert json.loads((Path(cfg.out_dir) / "config.json").read_text())["sft_coef"] == 1.0
    assert 0 <= rows[0]["logps/accuracies"] <= 1
    _, without = dpo_run(pipeline, "mpo_without", dpo_losses, **{**options, "loss_weights": "0.8,0.2,0"})
    assert rows[-1]["logps/chosen"] > without[-1]["logps/chosen"]


def test_online_dpo_logs_the_loss_of_its_pairs(pipeline):
    """At first the log-ratios are 0 and the loss is log 2; then it is below."""
    options = dict(n_epochs=1, n_minibatches=1, beta=1.0, lr=3e-3, episodes=12 * 32, batch_size=32, micro_batch_size=32)
    _, rows = run(pipeline, "online_dpo_loss", online_dpo, length_score, missing_eos_score=-30.0, **options)
    assert rows[0]["loss/policy_avg"] == pytest.approx(np.log(2), abs=1e-6)
    for wrong in (dict(n_epochs=2), dict(n_minibatches=2), dict(group_size=4)):
        with pytest.raises(UserError, match="steps on a batch|group_size 4"):
            run(pipeline, "online_dpo_wrong", online_dpo, **{**options, **wrong})


def test_importance_changes_nothing_where_both_round_alike(pipeline):
    """In float32 the weights are 1 up to the generation gap, 1e-6; with log-probs that are shifted they are not."""
    _, plain = run(pipeline, "importance_plain")
    _, weighed = run(pipeline, "importance_weighed", importance)
    for one, other in zip(plain, weighed, strict=True):
        for key in one:
            np.testing.assert_allclose(one[key], other[key], rtol=1e-4, atol=1e-4, err_msg=key)


def test_kl_in_the_loss_leaves_the_reward_alone(pipeline):
    _, rows = run(pipeline, "k3_in_loss", kl_estimators, kl_estimator="k3", kl_in="loss", lr=1e-3)
    assert all(row["objective/non_score_reward"] == 0 and row["objective/kl_coef"] == 0 for row in rows)
    assert rows[1]["objective/kl"] != 0
    with pytest.raises(UserError, match="kl_target adapts a penalty in the reward"):
        run(pipeline, "kl_target_in_loss", kl_estimators, kl_in="loss", kl_target=6.0)


@pytest.mark.parametrize(
    "module, options, message",
    [
        (grpo, dict(group_size=4, kl_target=6.0), "kl_target adapts a penalty in the reward"),
        (online_dpo, dict(n_epochs=1, kl_target=6.0), "kl_target adapts a penalty in the reward"),
        (reinforce_pp, dict(lam=0.95), "lam 0.95: without a critic"),
        (reinforce_pp, dict(whiten_advantages=False), "whitening is the baseline"),
        (importance, dict(max_weight=0.5), "max_weight 0.5: no weight could be 1"),
        (kl_penalty, dict(critic_steps=1), "critic_steps: beta would fall"),
        (kl_penalty, dict(n_epochs=1), "beta would see no KL"),
        (sequence_ratio, dict(group_size=4, ratio_of="token"), "clip_low 0.2 and clip_high 0.28 suit"),
        (ptx, dict(), "ptx_coef 0: nothing would be mixed in"),
        (reference_ema, dict(ema=1.5), "ema 1.5: a share is at most 1"),
    ],
)
def test_what_a_variant_would_silently_ignore_is_refused(pipeline, module, options, message):
    with pytest.raises(UserError, match=message):
        run(pipeline, "refused", module, **options)


def test_an_adaptive_penalty_works_in_rloo(pipeline):
    _, rows = run(pipeline, "rloo_adapts", rloo, group_size=4, kl_target=1e-3, kl_horizon=100, lr=3e-3, episodes=32)
    assert rows[-1]["objective/kl_coef"] != rows[0]["objective/kl_coef"] == 0.05


def test_critic_steps_do_not_stop_a_policy_without_a_critic(pipeline):
    plain, _ = run(pipeline, "no_critic_steps", grpo, group_size=4)
    asked, _ = run(pipeline, "with_critic_steps", grpo, group_size=4, critic_steps=1)
    assert all(torch.equal(policy_of(plain)[name], weight) for name, weight in policy_of(asked).items())


@pytest.mark.parametrize(
    "module, options, message",
    [
        (bco, dict(loss_type="sigmoid"), "loss_type 'sigmoid': use bco_pair, alone or with sft, discopop"),
        (bco, dict(loss_type="bco_pair,apo_zero"), "use bco_pair, alone or with"),
        (f_dpo, dict(loss_weights="0.5"), "loss_weights: there is one loss"),
        (wpo, dict(loss_type="ipo", label_smoothing=0.1), "label_smoothing 0.1 does not fit loss_type 'ipo'"),
        (f_dpo, dict(divergence="alpha", alpha=1.0), "give --divergence=reverse_kl"),
    ],
)
def test_dpo_variants_refuse_what_does_not_fit(pipeline, module, options, message):
    with pytest.raises(UserError, match=message):
        dpo_run(pipeline, "dpo_refused", module, **options)


def test_aot_refuses_labels_that_are_not_hard(pipeline, tmp_path):
    row = {"prompt": "a:", "chosen": " b", "rejected": " c", "target": 0.7}
    data = tmp_path / "soft.jsonl"
    data.write_text((json.dumps(row) + "\n") * 8)
    with pytest.raises(UserError, match="soft labels .target. are for variants/dpo_losses.py"):
        dpo_run(pipeline, "aot_soft", aot, data=str(data))
    with pytest.raises(UserError, match="label_smoothing 0.5: take one below 0.5"):
        dpo_run(pipeline, "aot_coin", aot, label_smoothing=0.5)

"""The doors of ppo.py, and the variants that go through them: their mathematics by hand, their effect on a tiny run."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipeline import metrics
from safetensors.torch import load_file

import ppo
from configurator import UserError
from data import batch_indices
from hub.files import read_jsonl
from variants import dpo_losses, grpo, kl_penalty, ppo_max, ptx, rloo, truly_ppo

# Sums of a few float32 numbers of size 1: 20 operations of 6e-8 each.
EXACT = 2e-6


def tiny(*scores, lengths=None, columns=3):
    """A batch of these scores, as far as a critic-free variant reads it."""
    rows = len(scores)
    lengths = torch.tensor(lengths or [columns] * rows)
    return {
        "scores": torch.tensor(scores),
        "mask": torch.arange(columns) < lengths[:, None],
        "kl": torch.zeros(rows, columns),
    }


# ---------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize(
    "ratio, advantage, surrogate",
    [(1.3, 1.0, 1.17), (1.1, 1.0, 1.1), (0.7, -1.0, -0.83), (0.9, -1.0, -0.9), (1.5, -1.0, -1.5), (0.5, 1.0, 0.5)],
)
def test_rollback_matches_numbers_by_hand(ratio, advantage, surrogate):
    """arXiv:1903.07940 with alpha 0.3 and clip 0.2; beyond the bound the slope is -alpha times the advantage."""
    ratio = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    loss = truly_ppo.rollback_loss(ratio, torch.tensor(advantage), 0.2, 0.3)
    loss.backward()
    assert -loss.item() == pytest.approx(surrogate, abs=EXACT)
    slope = -0.3 if surrogate in (1.17, -0.83) else 1.0
    assert -ratio.grad.item() == pytest.approx(slope * advantage, abs=EXACT)


def test_rollback_without_a_slope_is_ppo():
    ratios = torch.linspace(0.5, 1.6, 12)
    for advantage in (2.0, -0.5):
        advantages = torch.full_like(ratios, advantage)
        ours = truly_ppo.rollback_loss(ratios, advantages, 0.2, 0.0)
        plain = ppo.policy_loss(ratios.log(), torch.zeros(12), advantages, 0.2)
        torch.testing.assert_close(ours, plain)


def test_grpo_scores_an_answer_against_its_group():
    """Scores 1, 2, 5, 8: unbiased deviation 3.162278; a second group of equal scores has nothing to say."""
    cfg = SimpleNamespace(group_size=4)
    batch = grpo.advantages(cfg, tiny(1.0, 2.0, 5.0, 8.0, 3.0, 3.0, 3.0, 3.0, lengths=[1, 2, 3, 3] * 2), {})
    expected = [-0.9487, -0.6325, 0.3162, 1.2649, 0, 0, 0, 0]
    np.testing.assert_allclose(batch["advantages"][:, 0], expected, atol=1e-4)
    assert (batch["advantages"] == 0).equal(~batch["mask"] | (torch.arange(8)[:, None] >= 4))
    # Every answer weighs the same, however long it is.
    torch.testing.assert_close(batch["weights"].sum(1), torch.ones(8))


def test_grpo_adds_k3_to_the_clipped_surrogate():
    cfg = SimpleNamespace(cliprange=0.2, kl_coef=0.5)
    micro = {
        "logprobs": torch.tensor([[-1.0, -2.0, -1.0]]),
        "ref_logprobs": torch.tensor([[-1.5, -1.0, 300.0]]),  # the last column is behind EOS
        "advantages": torch.tensor([[2.0, 2.0, 0.0]]),
        "mask": torch.tensor([[True, True, False]]),
    }
    loss = grpo.token_loss(cfg, torch.tensor([[-0.5, -2.0, -1.0]]), micro)
    log_ratios = np.array([-1.0, 1.0])  # reference to policy
    k3 = np.exp(log_ratios) - 1 - log_ratios
    np.testing.assert_allclose(loss[0, :2], [-2 * 1.2, -2] + 0.5 * k3, atol=EXACT)
    assert loss[0, 2] == 0


def test_rloo_takes_the_others_as_the_baseline():
    """Scores 1, 2, 5, 8; the KL of a whole answer comes off its score first."""
    cfg = SimpleNamespace(group_size=4, kl_coef=0.5)
    batch = tiny(1.0, 2.0, 5.0, 8.0)
    expected = torch.tensor([-4.0, -8 / 3, 4 / 3, 16 / 3])
    torch.testing.assert_close(rloo.advantages(cfg, batch, {})["advantages"], expected[:, None].expand(4, 3))
    batch["kl"][3] = 2.0  # 3 nats off the fourth score
    shifted = rloo.advantages(cfg, batch, {})["advantages"][:, 0]
    torch.testing.assert_close(shifted, torch.tensor([-3.0, -5 / 3, 7 / 3, 7 / 3]))


def test_rloo_clips_the_ratio_of_the_whole_answer():
    """Log-ratios 0.1, -0.2 and 0.4: their sum is 0.3, above the clip; what stands behind EOS does not count."""
    micro = {
        "logprobs": torch.zeros(1, 4),
        "mask": torch.tensor([[True, True, True, False]]),
        "advantages": torch.tensor([[1.0, 1.0, 1.0, 0.0]]),
    }
    new_logprobs = torch.tensor([[0.1, -0.2, 0.4, 9.0]])
    wide, narrow = (rloo.token_loss(SimpleNamespace(cliprange=c), new_logprobs, micro) for c in (0.5, 0.2))
    torch.testing.assert_close(wide, torch.tensor([[-1.349859, -1.349859, -1.349859, 0.0]]))
    torch.testing.assert_close(narrow, torch.tensor([[-1.2, -1.2, -1.2, 0.0]]))


def test_kl_penalty_estimates_the_kl_from_old_to_new():
    """Over all tokens, weighed as the old policy draws them, loss and gradient are the exact ones."""
    old = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64).log_softmax(0)
    theta = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    micro = {"logprobs": old[None], "advantages": rewards[None], "beta": torch.tensor([3.0], dtype=torch.float64)}
    loss = kl_penalty.token_loss(None, theta.log_softmax(0)[None], micro)[0]
    (gradient,) = torch.autograd.grad((old.exp() * loss).sum(), theta)

    new = theta.log_softmax(0)
    exact = -(new.exp() * rewards).sum() + 3 * (old.exp() * (old - new)).sum()
    (exact_gradient,) = torch.autograd.grad(exact, theta)
    assert (old.exp() * loss).sum().item() == pytest.approx(exact.item(), abs=1e-12)
    np.testing.assert_allclose(gradient, exact_gradient, atol=1e-12)


def test_kl_penalty_follows_the_kl_of_the_last_update():
    """arXiv:1707.06347 section 4: halved below the target / 1.5, doubled above 1.5 times it."""
    cases = {0.0066: 0.5, 0.0067: 1.0, 0.0149: 1.0, 0.0151: 2.0}
    for kl, beta in cases.items():
        assert kl_penalty.adapt(1.0, kl, 0.01) == beta


@pytest.mark.parametrize("loss_type, value", [("robust", 0.602207), ("ipo_norm", 23.04), ("apo_zero", 0.962523)])
def test_dpo_family_matches_numbers_by_hand(loss_type, value):
    """Log-ratios 1 and -0.5, beta 0.1; label smoothing 0.1 for robust, 10 and 5 tokens for ipo_norm."""
    smoothing = 0.1 if loss_type == "robust" else 0.0
    cfg = SimpleNamespace(beta=0.1, loss_type=loss_type, label_smoothing=smoothing)
    logprobs = torch.tensor([[-4.0, -7.0]])
    losses, rewards = dpo_losses.pair_loss(cfg, logprobs, torch.tensor([[-5.0, -6.5]]), torch.tensor([[10, 5]]))
    assert losses.item() == pytest.approx(value, abs=1e-5)
    torch.testing.assert_close(rewards, torch.tensor([[0.1, -0.05]]))


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
    "rloo": (rloo, GROUPS),
    "truly_ppo": (truly_ppo, {}),
    "kl_penalty": (kl_penalty, {}),
    "ptx": (ptx, dict(ptx_coef=0.1)),
    "ppo_max": (ppo_max, dict(reward_norm="normalize", reward_clip=0.8, ptx_coef=0.1)),
}


@pytest.mark.parametrize("name", RUNS)
def test_variant_starts_from_the_reference_and_learns_brevity(pipeline, name):
    """KL 0 and ratio 1 at first; paid for short responses, it writes shorter ones."""
    module, options = RUNS[name]
    common = dict(lr=3e-3, episodes=12 * 32, batch_size=32, micro_batch_size=32, missing_eos_score=-30.0)
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


@pytest.mark.parametrize("module", [grpo, rloo])
def test_an_answer_alone_has_no_group(pipeline, module):
    with pytest.raises(UserError, match="group_size 1: an answer alone"):
        run(pipeline, "alone", module, group_size=1)

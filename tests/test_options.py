"""The real main functions on tiny models, with one option at a time: each test sees that option's own effect."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline import EVERYTHING, ROOT, metrics, ranked, read_rows, same_metrics, write_rows
from safetensors.torch import load_file
from test_stages import hub_scalars
from transformers import GPTNeoXForCausalLM

import dpo
import ppo
import rm
import sample
import sft
from configurator import UserError, configure
from data import Tokenizer, batch_indices, load_rows
from model import ScalarModel
from variants import dpo_losses, ppo_max, ptx

FORWARD = 1e-4  # as in test_stages: float32 forward passes of this size agree to about 1e-5 nats per token


@pytest.fixture
def ppo_run(pipeline):
    """ppo_run(name, **options) -> rows of metrics, and the batch of each update with its advantages; two updates of 8.

    stage: ppo, or the variant whose options they are.
    """

    def run(name, score=None, stage=ppo, before_step=None, after_update=None, **options):
        batches = []

        def advantages(cfg, batch, state):
            batches.append(stage.advantages(cfg, batch, state))
            return batches[-1]

        cfg = pipeline.config(stage, f"option_{name}", **{"eval_split": "", "samples_every": 0, **options})
        ppo.main(cfg, score, advantages, before_step=before_step, after_update=after_update)
        arrays = [{key: column.double().numpy() for key, column in batch.items()} for batch in batches]
        return metrics(cfg), arrays

    return run


def policy(pipeline, name):
    return load_file(pipeline.directory / f"option_{name}" / "final" / "model.safetensors")


def same_weights(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def paid(batch, kl_coef=0.05):
    """What the scores were worth in the rewards: the rewards' sum without the KL penalty."""
    return batch["rewards"].sum(1) + kl_coef * batch["kl"].sum(1)


def gae_by_hand(batch, gamma=1.0, lam=0.95):
    rewards = batch["rewards"]
    values = batch["values"]
    advantages = np.zeros_like(rewards)
    for t in range(rewards.shape[1]):
        for later in range(t, rewards.shape[1]):
            following = values[:, later + 1] if later + 1 < rewards.shape[1] else 0
            error = rewards[:, later] + gamma * following - values[:, later]
            advantages[:, t] += (gamma * lam) ** (later - t) * error
    return advantages


# sums of 10 float32 terms of size 1, a few operations each: 20 x 6e-8, and a reward of 5 has an ulp of 5e-7
REWARDS = 5e-6

# ---------------------------------------------------------------------------- PPO: rewards


def test_truncate_token_ends_responses_and_truncate_after_waits_for_it(pipeline, ppo_run):
    tokenizer = Tokenizer.load(str(pipeline.sft))
    (period,) = tokenizer.encode(".")
    seen = []

    def score(queries, responses):
        seen.extend(responses)
        return [5.0] * len(responses)

    for after in (0, 4):
        rows, batches = ppo_run(f"truncate{after}", score, truncate_token=period, truncate_after=after)
        assert len(batches) == 2
        first = batches[0]
        ended = 0
        for row, response in enumerate(first["responses"].astype(int).tolist()):
            places = [place for place, token in enumerate(response) if token == period and place >= after]
            ended += bool(places)
            assert first["last"][row] == (places[0] if places else len(response) - 1)
            assert first["scores"][row] == (5 if places else -1)
            assert first["mask"][row].sum() == first["last"][row] + 1
            if places:
                assert tokenizer.decode(response[: places[0] + 1]) in seen  # what is scored ends with the period
        assert ended > 0
        assert rows[0]["val/num_eos_tokens"] == ended


def test_truncated_responses_are_scored_at_an_eos_behind_them(pipeline, ppo_run):
    """The reward model was trained at EOS alone (detail 13); samples.jsonl shows what was scored."""
    tokenizer = Tokenizer.load(str(pipeline.sft))
    (period,) = tokenizer.encode(".")
    _, batches = ppo_run("truncate_rm", truncate_token=period, samples_every=1)
    first = batches[0]
    model = ScalarModel.from_pretrained(pipeline.rm)
    posts = load_rows(f"{pipeline.data}/sft_{{split}}.jsonl", "train", tokenizer)
    samples = read_rows(pipeline.directory / "option_truncate_rm" / "samples.jsonl")
    ended = 0
    for row, index in enumerate(batch_indices(len(posts), 8, 0, pipeline.config(ppo, "unused").seed)):
        response = first["responses"][row].astype(int).tolist()
        text = response[: response.index(period) + 1] if period in response else response
        if row < 4:
            assert samples[row]["response"] == tokenizer.decode(text)
        if period in response:
            ended += 1
            ids = torch.tensor([posts[int(index)]["query"] + text + [tokenizer.eos_id]])
            assert first["scores"][row] == pytest.approx(model(ids)[0, -1].item(), abs=FORWARD)
    assert ended > 0


@pytest.mark.parametrize("how", ["scale", "normalize"])
def test_reward_norm_uses_the_moments_of_all_scores_so_far(ppo_run, how):
    _, batches = ppo_run(f"norm_{how}", stage=ppo_max, reward_norm=how)
    scores = [batch["scores"] for batch in batches]
    for number, batch in enumerate(batches, 1):
        so_far = np.concatenate(scores[:number])
        mean = so_far.mean() if how == "normalize" else 0.0
        np.testing.assert_allclose(paid(batch), (batch["scores"] - mean) / so_far.std(ddof=1), atol=REWARDS)
    assert len(batches) == 2
    assert scores[0].std() > 0


def test_reward_clip_bounds_what_is_paid(ppo_run):
    rows, batches = ppo_run("reward_clip", stage=ppo_max, reward_norm="normalize", reward_clip=0.3)
    assert max(np.abs(paid(batch)).max() for batch in batches) == pytest.approx(0.3, abs=REWARDS)
    assert rows[0]["objective/scores"] == pytest.approx(batches[0]["scores"].mean(), abs=REWARDS)  # reported as it is


def test_whiten_rewards_scales_them_to_variance_one(ppo_run):
    _, batches = ppo_run("whiten_rewards", whiten_rewards=True)
    for batch in batches:
        rewards = batch["rewards"][batch["mask_p1"] > 0]
        assert rewards.var() == pytest.approx(1, abs=1e-3)  # the epsilon 1e-8 against a variance above 1e-5
        assert abs(rewards.mean()) > 1e-3  # the mean is kept


def test_whiten_advantages_off_leaves_them_as_they_are(ppo_run):
    _, batches = ppo_run("raw_advantages", whiten_advantages=False)
    for batch in batches:
        np.testing.assert_allclose(batch["advantages"], gae_by_hand(batch) * batch["mask"], atol=REWARDS)


def test_advantage_clip_bounds_whitened_advantages(ppo_run):
    _, batches = ppo_run("advantage_clip", stage=ppo_max, advantage_clip=0.5)
    for batch in batches:
        raw = gae_by_hand(batch)
        mask = batch["mask"] > 0
        whitened = (raw - raw[mask].mean()) / raw[mask].std()
        np.testing.assert_allclose(batch["advantages"][mask], whitened.clip(-0.5, 0.5)[mask], atol=1e-4)
        assert (np.abs(batch["advantages"]) == 0.5).any()


def test_reward_models_are_averaged(pipeline, ppo_run):
    other = pipeline.config(rm, "rm_member", seed=7, normalize_std=True, eval_split="")
    rm.main(other)
    members = [str(pipeline.rm), f"{other.out_dir}/final"]

    def scores_by(name, source):
        options = dict(episodes=8, missing_eos_score=0.0, critic=members[0])
        _, batches = ppo_run(name, reward_model=source, **options)
        return batches[0]["scores"]

    scores = [scores_by(f"member{number}", source) for number, source in enumerate(members)]
    both = scores_by("ensemble", ",".join(members))
    assert np.abs(scores[0] - scores[1]).max() > 1e-3
    np.testing.assert_allclose(both, (scores[0] + scores[1]) / 2, atol=REWARDS)


# ---------------------------------------------------------------------------- PPO: the update


def test_critic_steps_leave_the_policy_alone_at_first(pipeline, ppo_run):
    initial = load_file(pipeline.sft / "model.safetensors")
    rows, _ = ppo_run("critic_then_both", critic_steps=1)
    # the second rollout is still the initial policy's, to the bit; then both learn
    assert rows[1]["objective/kl"] == 0.0
    assert rows[0]["policy/approxkl_avg"] < 1e-12 < rows[1]["policy/approxkl_avg"]
    assert not same_weights(policy(pipeline, "critic_then_both"), initial)
    plain, _ = ppo_run("no_critic_first")
    assert plain[1]["objective/kl"] != 0.0
    assert plain[0]["loss/value_avg"] == pytest.approx(rows[0]["loss/value_avg"])


def test_critic_lr_is_the_critics_alone(pipeline, ppo_run):
    """Adam's first step moves the weight with the largest gradient by about its learning rate."""
    before = {}
    moved = {}

    def weights_of(model):
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def remember(run, cfg, metrics):  # this update has one step
        for name, model in run.models.items():
            before[name] = weights_of(model)
        return False

    def compare(run, policy, reference):
        for name, model in run.models.items():
            moved[name] = (weights_of(model) - before[name]).abs().max().item()

    options = dict(critic_lr=1e-2, lr=1e-3, adam_eps=1e-12, weight_decay=0.0, n_epochs=1, episodes=8)
    rows, _ = ppo_run("critic_lr", before_step=remember, after_update=compare, **options)
    # the step is lr g / (|g| + eps): lr itself; a weight of size 1 has an ulp of 1e-7
    assert moved["policy"] == pytest.approx(1e-3, abs=1e-6)
    assert moved["critic"] == pytest.approx(1e-2, abs=1e-6)
    assert rows[0]["lr"] == 1e-3


def test_entropy_coef_raises_the_entropy(ppo_run):
    off, on = (ppo_run(f"entropy{coef}", entropy_coef=coef)[0] for coef in (0.0, 10.0))
    assert on[0]["policy/entropy_avg"] == off[0]["policy/entropy_avg"]  # of the first rollout, before any update
    assert on[1]["policy/entropy_avg"] > off[1]["policy/entropy_avg"] + 0.01


def test_ptx_adds_the_sft_loss(pipeline, ppo_run):
    """The first step's loss is transformers' cross-entropy of the mixed-in rows; later the SFT loss is lower."""
    options = dict(eval_split="", samples_every=0, n_epochs=1)
    mixed = pipeline.config(ptx, "option_ptx", ptx_coef=10.0, **options)
    ptx.main(mixed)
    rows = metrics(mixed)
    data = load_rows(f"{pipeline.data}/sft_{{split}}.jsonl", "train", Tokenizer.load(str(pipeline.sft)), 1)
    model = GPTNeoXForCausalLM.from_pretrained(pipeline.sft)
    sums = 0.0
    count = 0
    for row in data.select(batch_indices(len(data), 8, 0, 44414)):
        query = row["query"]
        response = row["responses"][0]
        logits = model(torch.tensor([query + response])).logits[0, len(query) - 1 : -1].double()
        sums -= torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None]).sum().item()
        count += len(response)
    assert rows[0]["loss/ptx_avg"] == pytest.approx(sums / count, abs=FORWARD)
    off, _ = ppo_run("no_ptx", n_epochs=1)
    assert "loss/ptx_avg" not in off[0]
    losses = []
    for name in ("ptx", "no_ptx"):
        cfg = pipeline.config(sft, f"after_{name}", scratch=False, model=f"{pipeline.directory}/option_{name}/final",
                              episodes=8, lr=1e-9)  # fmt: skip
        sft.main(cfg)
        losses.append(metrics(cfg)[-1]["eval/loss"])
    assert losses[0] < losses[1]


def test_max_grad_norm_bounds_the_step(pipeline, ppo_run):
    """With an epsilon far above the gradient, Adam's step is lr / eps times the clipped gradient."""
    moved = {}
    for limit in (0.0, 1e-3):
        name = f"clip{limit}"
        rows, _ = ppo_run(name, max_grad_norm=limit, adam_eps=1e3, lr=1.0, weight_decay=0.0, n_epochs=1, episodes=8)
        initial = load_file(pipeline.sft / "model.safetensors")
        final = policy(pipeline, name)
        moved[limit] = torch.cat([(final[key] - initial[key]).flatten().double() for key in final]).norm().item()
    assert rows[0]["grad_norm"] > 1e-3  # reported as it was
    assert moved[1e-3] / moved[0.0] == pytest.approx(1e-3 / rows[0]["grad_norm"], rel=0.02)  # steps of 1e-6 on ulps


def test_diagnostics_are_what_the_samples_say(ppo_run):
    rows, batches = ppo_run("diagnostics")
    for row, batch in zip(rows, batches):
        mask = batch["mask"]
        for name, column in (("val/perplexity", "logprobs"), ("val/ref_perplexity", "ref_logprobs")):
            expected = np.exp(-(batch[column] * mask).sum() / mask.sum())
            assert row[name] == pytest.approx(expected, rel=1e-5)
    assert rows[0]["val/perplexity"] == rows[0]["val/ref_perplexity"] != rows[1]["val/perplexity"]


def test_kl_is_that_of_the_response_alone(ppo_run):
    """What the models think of pads must not count: a sequence is cut one token behind its EOS."""
    _, batches = ppo_run("kl")
    behind = 0.0
    for batch in batches:
        gap = batch["logprobs"] - batch["ref_logprobs"]
        mask = batch["mask"] > 0
        np.testing.assert_allclose(batch["kl"][mask], gap[mask], atol=REWARDS)
        assert not batch["kl"][~mask].any()
        behind = max(behind, np.abs(gap[~mask]).max())
    assert behind > 1e-3
    assert batches[1]["kl"].any()


def test_options_that_are_off_leave_no_trace(ppo_run):
    rows, _ = ppo_run("off")
    assert set(rows[0]) == {
        "step", "episode", "objective/kl", "val/perplexity",
        "val/ref_perplexity", "objective/kl_coef", "objective/entropy", "objective/non_score_reward",
        "objective/rlhf_reward", "objective/scores", "policy/entropy_avg", "val/num_eos_tokens", "val/eos_rate",
        "val/response_length", "val/generation_gap", "val/ratio", "loss/policy_avg", "loss/value_avg",
        "policy/approxkl_avg", "policy/clipfrac_avg", "val/clipfrac_avg", "val/ratio_avg", "val/ratio_var", "lr",
        "grad_norm"}  # fmt: skip


def test_ppo_max_recipe_goes_on_top_of_any_configuration(pipeline):
    """Two updates: in the first the critic alone learns, in the second PPO with the pre-training mix."""
    small = pipeline.config(ppo_max, "option_ppo_max", batch_size=8, critic_steps=1, eval_split="")
    changed = ["model", "reward_model", "data", "out_dir", "batch_size", "episodes", "critic_steps", "response_length",
               "eval_split", "device", "dtype"]  # fmt: skip
    argv = [f"--{name}={getattr(small, name)}" for name in changed]
    cfg = configure(ppo_max.Config, [str(ROOT / "config/ppo_1b.py"), str(ROOT / "config/ppo_max.py"), *argv])
    assert cfg.reward_norm == "normalize"
    assert cfg.critic_lr == 1.65e-6
    assert not cfg.whiten_advantages
    ppo_max.main(cfg)
    rows = metrics(cfg)
    assert "loss/ptx_avg" not in rows[0]
    assert rows[1]["loss/ptx_avg"] > 0
    assert rows[1]["val/perplexity"] > 1
    assert rows[1]["objective/kl"] == 0.0
    assert rows[0]["lr"] == 5e-7


def test_all_options_are_invariant_to_micro_batch_size(pipeline):
    runs = []
    options = {**EVERYTHING, "critic_steps": 0}
    for micro in (1, 8):
        cfg = pipeline.config(ppo_max, f"options_micro{micro}", micro_batch_size=micro, **options)
        ppo_max.main(cfg)
        runs.append(metrics(cfg))
    same_metrics(*runs)


# ---------------------------------------------------------------------------- the reward model


def test_rm_normalize_std_gives_references_mean_0_and_variance_1(pipeline):
    cfg = pipeline.config(rm, "rm_std", normalize_std=True)
    rm.main(cfg)
    report = json.loads((Path(cfg.out_dir) / "eval.json").read_text())
    assert report["normalize/mean_after"] == pytest.approx(0, abs=FORWARD)
    assert report["normalize/std_after"] == pytest.approx(1, abs=FORWARD)
    # also before training: the first margins are those of a head whose references have that variance
    plain = metrics(pipeline.directory / "rm")[0]
    assert abs(metrics(cfg)[0]["train/margin"]) > 5 * abs(plain["train/margin"])


def test_rm_normalizes_before_the_first_update_alone(pipeline):
    """A loss of pairs gives the bias no gradient, so it moves by weight decay and by rounding: 2 updates of lr 1e-2 and
    decay 0.01 take 2e-4 of it. Normalised once more it would move by the mean that the references have by then.
    """
    cfg = pipeline.config(rm, "rm_std_once", normalize_std=True, lr=1e-2, episodes=24, save_every=1, keep_checkpoints=3)
    rm.main(cfg)
    biases = []
    for step in (1, 3):
        tensors = {}
        for path in (pipeline.directory / f"rm_std_once/checkpoints/step_{step}").glob("*.safetensors"):
            tensors.update(load_file(path))
        biases.append(tensors["model.score.bias"].item())
    tolerance = 1e-3 * abs(biases[0]) + 1e-4
    assert biases[1] == pytest.approx(biases[0], abs=tolerance)
    last = json.loads((pipeline.directory / "rm_std_once/eval.json").read_text())
    assert abs(last["normalize/mean"]) > 10 * tolerance  # how far the mean has moved since


def test_rm_evaluation_shows_eos_apart_from_other_tokens(pipeline):
    report = json.loads((pipeline.directory / "rm" / "eval.json").read_text())
    tokenizer = Tokenizer.load(str(pipeline.data))
    rows = load_rows(f"{pipeline.data}/comparisons_{{split}}.jsonl", "validation", tokenizer, 2)
    at_eos = []
    elsewhere = []
    negative = []
    for row in rows:
        scalars = hub_scalars(pipeline.rm, row["query"], row["responses"][0]).detach().numpy()
        response = scalars[len(row["query"]) :]
        at_eos.append(response[-1])
        elsewhere.append(response[:-1].mean())
        negative.append((response[:-1] < 0).mean())
    assert report["reward/at_eos"] == pytest.approx(np.mean(at_eos), abs=FORWARD)
    assert report["reward/elsewhere"] == pytest.approx(np.mean(elsewhere), abs=FORWARD)
    assert report["reward/elsewhere_negative"] == pytest.approx(np.mean(negative), abs=0.02)  # one sign near 0
    assert report["normalize/mean_after"] == pytest.approx(0, abs=FORWARD)
    assert report["normalize/std_after"] == pytest.approx(report["normalize/std"], abs=FORWARD)


def test_rm_learns_rankings_of_different_lengths(pipeline, tmp_path):
    data = write_rows(tmp_path / "ranked.jsonl", ranked(24))
    common = dict(data=data, episodes=160, eval_split="train", normalize_data="")
    one, two = (pipeline.config(rm, f"rm_ranked{micro}", micro_batch_size=micro, **common) for micro in (1, 8))
    rm.main(one)
    rm.main(two)
    same_metrics(metrics(one)[:3], metrics(two)[:3])  # rounding grows with every update
    first = metrics(one)[0]
    last = metrics(one)[-2]
    assert last["loss/rm"] < first["loss/rm"] - 0.2
    assert metrics(one)[-1]["eval/accuracy"] == 1.0


def test_rm_soft_labels_meet_their_probability(pipeline, tmp_path):
    """A target of 0.2 turns a pair round; ties pull the rewards together; the clamp keeps targets near 0.5."""
    pairs = [{"prompt": f"letters {i}:", "chosen": " xyz", "rejected": " aeiou", "target": 0.2} for i in range(8)]
    data = write_rows(tmp_path / "soft.jsonl", pairs)
    common = dict(data=data, episodes=8 * 60, eval_split="train", normalize_data="", lr=3e-3)
    for name, options, probability in (("soft", {}, 0.8), ("clamp", dict(target_clamp=0.1), 0.6)):
        cfg = pipeline.config(rm, f"rm_{name}", **common, **options)
        rm.main(cfg)
        margin = metrics(cfg)[-2]["train/margin"]
        assert margin == pytest.approx(np.log(probability / (1 - probability)), abs=0.1)  # where the gradient is 0
    # a tie is neither right nor wrong
    ties = write_rows(tmp_path / "ties.jsonl", pairs[:4] + [{**row, "target": 0.5} for row in pairs[4:]])
    cfg = pipeline.config(rm, "rm_ties", **{**common, "data": ties, "episodes": 8})
    rm.main(cfg)
    assert json.loads((Path(cfg.out_dir) / "eval.json").read_text())["accuracy"]["all"]["n"] == 4
    # where all are ties there is no accuracy to speak of, but the model is there
    all_ties = write_rows(tmp_path / "all_ties.jsonl", [{**row, "target": 0.5} for row in pairs])
    cfg = pipeline.config(rm, "rm_all_ties", **{**common, "data": all_ties, "episodes": 8})
    rm.main(cfg)
    assert "eval/accuracy" not in metrics(cfg)[-1]
    assert (Path(cfg.out_dir) / "final" / "model.safetensors").exists()


def test_rm_label_noise_bounds_the_loss(pipeline):
    """The first update's loss, from the same initial rewards, by hand; the margin alone decides it."""
    plain, noisy = (pipeline.config(rm, f"rm_noise{noise}", label_noise=noise, batch_size=1, micro_batch_size=1,
                                    episodes=1, eval_split="") for noise in (0.0, 0.5))  # fmt: skip
    rm.main(plain)
    rm.main(noisy)
    margin = metrics(plain)[0]["train/margin"]
    assert metrics(noisy)[0]["train/margin"] == margin
    expected = -np.log(0.5 / (1 + np.exp(-margin)) + 0.25)
    assert metrics(noisy)[0]["loss/rm"] == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------------------- DPO, SFT, sampling


@pytest.mark.parametrize("loss_type", ["robust", "ipo_norm", "apo_zero"])
def test_dpo_family_trains_from_its_value_at_the_start(pipeline, loss_type):
    """At the start all log-ratios are 0, where each loss has a value worked by hand; then it falls."""
    smoothing = 0.1 if loss_type == "robust" else 0.0
    start = dict(robust=np.log(2), ipo_norm=25.0, apo_zero=1.0)
    cfg = pipeline.config(dpo_losses, f"dpo_{loss_type}", loss_type=loss_type, label_smoothing=smoothing, beta=0.1,
                          batch_size=40, episodes=160, eval_split="", lr=1e-4)  # fmt: skip
    dpo_losses.main(cfg)
    losses = [row["loss/dpo"] for row in metrics(cfg)]
    # log-ratios of 1e-4 in sum, times 1 / beta = 10 in the squared losses' slope
    assert losses[0] == pytest.approx(start[loss_type], abs=20 * FORWARD)
    assert losses[-1] < losses[0]


def test_dpo_sft_coef_keeps_the_chosen_likely(pipeline):
    runs = []
    for coef in (0.0, 10.0):
        cfg = pipeline.config(dpo, f"dpo_sft{coef}", sft_coef=coef, batch_size=40, episodes=120, eval_split="")
        dpo.main(cfg)
        runs.append(metrics(cfg))
    assert runs[0][0]["logps/chosen"] == runs[1][0]["logps/chosen"]
    assert runs[1][-1]["logps/chosen"] > runs[0][-1]["logps/chosen"] + 0.5


def test_dpo_reference_may_be_another_model(pipeline):
    """The first loss is then not log 2: the policy has already moved from that reference."""
    cfg = pipeline.config(dpo, "dpo_first", eval_split="", lr=1e-2)
    dpo.main(cfg)
    again = pipeline.config(dpo, "dpo_other", model=f"{cfg.out_dir}/final", reference=str(pipeline.sft), eval_split="")
    dpo.main(again)
    assert abs(metrics(again)[0]["loss/dpo"] - np.log(2)) > 0.01


def test_dpo_refuses_soft_labels(pipeline, tmp_path):
    row = {"prompt": "a:", "chosen": " b", "rejected": " c", "target": 0.7}
    data = write_rows(tmp_path / "soft.jsonl", [row] * 8)
    with pytest.raises(UserError, match="soft labels"):
        dpo.main(pipeline.config(dpo, "dpo_soft", data=data, eval_split=""))


def test_sample_chooses_the_checkpoint_with_the_best_score(pipeline):
    cfg = pipeline.config(sft, "sft_exports", episodes=24, export_every=1, lr=1e-2, eval_split="")
    sft.main(cfg)
    sources = [f"{cfg.out_dir}/{name}" for name in ("step_1", "step_2", "final")]
    last, final = (load_file(f"{cfg.out_dir}/{name}/model.safetensors") for name in ("step_3", "final"))
    assert same_weights(last, final)
    scores = {}
    for source in sources:
        alone = pipeline.config(sample, f"from_{Path(source).name}", model=source, reference="")
        sample.main(alone)
        scores[source] = json.loads((Path(alone.out_dir) / "summary.json").read_text())["score"]
    together = pipeline.config(sample, "from_best", model=",".join(sources), reference="")
    sample.main(together)
    summary = json.loads((Path(together.out_dir) / "summary.json").read_text())
    assert len(set(scores.values())) == 3
    assert summary["model"] == max(scores, key=scores.get)
    assert summary["score"] == max(scores.values())
    with pytest.raises(UserError, match="reward_model"):
        sample.main(pipeline.config(sample, "from_none", model=",".join(sources), reward_model=""))

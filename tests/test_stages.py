"""Every stage really trains, on tiny models; independent oracles recompute what it reports."""

import importlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from pipeline import EVERYTHING, ROUNDING, in_update, metrics, nan_in, read_rows, same_metrics
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import GPTNeoXForCausalLM, GPTNeoXModel

import dpo
import ppo
import rm
import runtime
import sample
import sft
from configurator import UserError
from data import Tokenizer, batch_indices, last_scalars, load_rows
from evals.colour import coloured, pieces
from evals.samples import pick_best
from evals.tables import rouge
from hub.weights import is_sharded
from model import Block, GPTNeoX, ScalarModel

STAGES = ["sft", "rm", "ppo", "dpo"]


@pytest.fixture
def cpu_run(pipeline):
    """A run that has done nothing yet, for calling a stage's functions one by one; its policy is the SFT model."""
    cfg = pipeline.config(ppo, "one_by_one")
    world, data = runtime.start(cfg, 0, {}, {})
    policy = load(cfg, world, GPTNeoX, pipeline.sft, trainable=True)
    yield runtime.Run(cfg, world, data, {"policy": policy})
    torch.distributed.destroy_process_group()


def load(cfg, world, cls, directory, **options):
    """A stage's own way to a model; the tokenizer is the one beside it."""
    tokenizer = Tokenizer.load(str(directory))
    return runtime.load_model(cfg, world, tokenizer, cls, str(directory), **options)


def hub_logprobs(model, query, response, temperature=1.0, n_vocab=None):
    """log p of each response token by transformers, one row at a time, in float64 from the logits on."""
    ids = torch.tensor([query + response])
    logits = model(ids).logits[0, len(query) - 1 : -1, :n_vocab].double() / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0]


def hub_scalars(directory, query, response):
    """The scalar at every position by transformers' body and the stored head."""
    tensors = load_file(Path(directory) / "model.safetensors")
    body = GPTNeoXModel.from_pretrained(directory)
    hidden = body(torch.tensor([query + response])).last_hidden_state[0].double()
    return (hidden @ tensors["score.weight"].double().T + tensors["score.bias"].double())[:, 0]


@pytest.fixture(scope="module")
def posts(pipeline):
    return load_rows(f"{pipeline.data}/sft_{{split}}.jsonl", "train", Tokenizer.load(str(pipeline.data)), 1)


@pytest.fixture(scope="module")
def pairs(pipeline):
    return load_rows(f"{pipeline.data}/comparisons_{{split}}.jsonl", "train", Tokenizer.load(str(pipeline.data)), 2)


# float32 forward passes of this size agree to about 1e-5 nats per token (T * eps * |logit|); sums of 10 to 1e-4
FORWARD = 1e-4

# ---------------------------------------------------------------------------- SFT


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("loss_on", ["all", "response"])
def test_sft_loss_matches_hub_model(pipeline, posts, loss_on, reduction):
    """The first update's loss is transformers' cross-entropy on the same rows, over query + response or response."""
    cfg = pipeline.config(sft, f"sft_{loss_on}_{reduction}", loss_on=loss_on, reduction=reduction, scratch=False,
                          model=str(pipeline.sft), episodes=8, eval_split="")  # fmt: skip
    sft.main(cfg)
    model = GPTNeoXForCausalLM.from_pretrained(pipeline.sft)
    rows = posts[batch_indices(len(posts), 8, 0, cfg.seed)]
    sums = []
    counts = []
    for query, (response,) in zip(rows["query"], rows["responses"]):
        whole = query + response
        start = 1 if loss_on == "all" else len(query)
        nll = -hub_logprobs(model, whole[:start], whole[start:])
        sums.append(nll.sum().item())
        counts.append(len(nll))
    if reduction == "token":
        expected = np.sum(sums) / np.sum(counts)
    else:
        expected = np.mean(np.divide(sums, counts))
    assert metrics(cfg)[0]["loss/sft"] == pytest.approx(expected, abs=FORWARD)


def test_sft_lowers_the_loss_on_held_out_rows(pipeline):
    rows = metrics(pipeline.directory / "sft")
    assert rows[-1]["eval/loss"] < rows[0]["loss/sft"] - 2  # from log(vocabulary) = 6.8


# ---------------------------------------------------------------------------- reward model


def test_rm_reads_the_reward_at_eos(pipeline, posts, cpu_run):
    cfg = pipeline.config(rm, "unused")
    model = load(cfg, cpu_run.world, ScalarModel, pipeline.rm)
    rewards = rm.predict(cpu_run, cfg, model, posts)["best"]
    for row in (0, 7, 33):
        query = posts[row]["query"]
        response = posts[row]["responses"][0]
        assert response[-1] == 0  # EOS
        expected = hub_scalars(pipeline.rm, query, response)[-1]
        assert rewards[row].item() == pytest.approx(expected.item(), abs=FORWARD)


def test_rm_normalization_centres_the_references_through_the_bias(pipeline, posts):
    last = metrics(pipeline.directory / "rm")[-1]
    rewards = [hub_scalars(pipeline.rm, row["query"], row["responses"][0])[-1].item() for row in posts]
    assert np.mean(rewards) == pytest.approx(0, abs=FORWARD)
    assert np.std(rewards) == pytest.approx(last["normalize/std"], abs=FORWARD)  # no gain
    bias = load_file(pipeline.rm / "model.safetensors")["score.bias"].item()
    assert bias == pytest.approx(-last["normalize/mean"], abs=FORWARD)  # training left it at 0


def test_rm_normalize_only_centres_a_classifier_of_transformers(pipeline, posts):
    """Its head has no bias: it gets one, and no other number changes. By transformers' own head, in its own class."""
    directory = pipeline.directory / "classifier"
    shutil.copytree(pipeline.sft, directory)
    config = transformers.AutoConfig.from_pretrained(pipeline.sft, num_labels=1, pad_token_id=1)
    torch.manual_seed(0)
    theirs = transformers.GPTNeoXForSequenceClassification(config).eval()
    theirs.save_pretrained(directory)
    rows = posts.select(range(20))
    rewards = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["query"] + row["responses"][0]])
            rewards.append(theirs(ids).logits.item())

    source = f"{pipeline.data}/sft_{{split}}.jsonl"
    options = dict(normalize_only=True, normalize_data=source, train_split="train[:20]", eval_split="validation")
    cfg = pipeline.config(rm, "normalized", model=str(directory), data=source.replace("sft", "comparisons"), **options)
    rm.main(cfg)

    before = load_file(directory / "model.safetensors")
    after = load_file(Path(cfg.out_dir) / "final" / "model.safetensors")
    assert after.pop("score.bias").item() == pytest.approx(-np.mean(rewards), abs=FORWARD)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name
    report = json.loads((Path(cfg.out_dir) / "eval.json").read_text())
    assert report["normalize/mean"] == pytest.approx(np.mean(rewards), abs=FORWARD)
    assert 0 < report["accuracy"]["all"]["n"] <= 15  # the pairs held out were judged, too


def test_rm_first_loss_is_that_of_its_initial_head(pipeline, pairs):
    first = metrics(pipeline.directory / "rm")[0]
    assert first["loss/rm"] == pytest.approx(-np.log(0.5), abs=0.5)
    assert first["loss/rm"] != np.log(2)


def test_rm_evaluation_matches_a_count_by_hand(pipeline):
    tokenizer = Tokenizer.load(str(pipeline.data))
    rows = load_rows(f"{pipeline.data}/comparisons_{{split}}.jsonl", "validation", tokenizer, 2)
    report = json.loads((pipeline.directory / "rm" / "eval.json").read_text())
    margins = []
    for row in rows:
        chosen, rejected = (hub_scalars(pipeline.rm, row["query"], response)[-1] for response in row["responses"])
        margins.append((chosen - rejected).item())
    margins = np.array(margins)

    def row_of(picked):
        sure = 1 / (1 + np.exp(-np.abs(picked)))
        return dict(accuracy=pytest.approx(np.mean(picked > 0)), expected=pytest.approx(sure.mean()), n=len(picked))

    assert report["accuracy"]["all"] == row_of(margins)
    for batch in set(rows["batch"]):
        assert report["accuracy"][f"batch {batch}"] == row_of(margins[np.array(rows["batch"]) == batch])
    for low in (0.0, 0.5):  # calibration: accuracy by distance of the rewards, against the ideal sigmoid
        picked = margins[(np.abs(margins) >= low) & (np.abs(margins) < low + 0.5)]
        assert report["accuracy"].get(f"margin {low} to {low + 0.5}") == (row_of(picked) if len(picked) else None)


# ---------------------------------------------------------------------------- DPO


def test_dpo_starts_at_log_2_with_zero_rewards(pipeline):
    cfg = pipeline.config(dpo, "dpo_start", batch_size=40, episodes=120)  # all pairs, three times
    dpo.main(cfg)
    first = metrics(cfg)[0]
    # the reference's log-probabilities come from other micro-batches: equal up to rounding, times beta = 0.05
    assert first["loss/dpo"] == pytest.approx(np.log(2), abs=FORWARD)
    assert abs(first["rewards/chosen"]) < FORWARD
    assert abs(first["rewards/rejected"]) < FORWARD
    losses = [row["loss/dpo"] for row in metrics(cfg)[:3]]
    assert losses == sorted(losses, reverse=True)
    assert metrics(cfg)[2]["rewards/margins"] > 0.001


def test_dpo_logprobs_match_hub_model(pipeline, pairs, cpu_run):
    n_vocab = cpu_run.tokenizer.n_vocab
    ours = dpo.predict(cpu_run.cfg, cpu_run.world, n_vocab, cpu_run.models["policy"], pairs)
    hub = GPTNeoXForCausalLM.from_pretrained(pipeline.sft)
    for row in (0, 5, 39):
        for column, response in enumerate(pairs[row]["responses"]):
            expected = hub_logprobs(hub, pairs[row]["query"], response, n_vocab=n_vocab).sum()
            assert ours[row, column].item() == pytest.approx(expected.item(), abs=FORWARD)


# ---------------------------------------------------------------------------- PPO


@pytest.fixture(scope="module")
def ppo_run(pipeline):
    cfg = pipeline.config(ppo, "ppo", episodes=24, samples_every=1)
    ppo.main(cfg)
    return cfg


def test_kl_is_zero_before_first_update(ppo_run):
    rows = metrics(ppo_run)
    assert rows[0]["objective/kl"] == 0.0  # exactly: the same rows through the same function
    assert rows[1]["objective/kl"] != 0.0


def test_ratio_is_one_on_first_minibatch(ppo_run):
    """Also of later updates: rollout and update are the same function of the same weights."""
    for row in metrics(ppo_run):
        assert row["val/ratio"] == pytest.approx(1, abs=1e-5)  # exp of float32 rounding, |log p| < 20
        assert row["val/generation_gap"] < 1e-5
    assert metrics(ppo_run)[0]["val/ratio_avg"] != pytest.approx(1, abs=1e-5)


def test_rollout_matches_hub_models(pipeline, posts, cpu_run, tmp_path):
    """Log-probabilities, KL, values and scores by transformers, one unpadded row at a time.

    The reference is another model than the policy, with random weights, for else the KL would be 0.
    """
    run = cpu_run
    cfg = run.cfg
    run.step = 3
    policy = run.models["policy"]
    reference = load(cfg, run.world, GPTNeoX, pipeline.sft, scratch=True)
    reference.save_pretrained(tmp_path)
    critic = load(cfg, run.world, ScalarModel, pipeline.rm)
    reward_model = load(cfg, run.world, ScalarModel, pipeline.rm)
    given = {}  # what the reward model says of each row, also without EOS

    def score(queries, responses, indices):
        scores = last_scalars([reward_model], run.world.device, queries, responses)
        given.update(zip(indices.tolist(), scores.tolist()))
        return scores

    queries = posts[:16]["query"]
    batch = ppo.rollout(run, cfg, policy, reference, critic, score, queries, np.arange(16))
    hub = GPTNeoXForCausalLM.from_pretrained(pipeline.sft)
    hub_reference = GPTNeoXForCausalLM.from_pretrained(tmp_path)
    n_vocab = run.tokenizer.n_vocab
    ended = 0
    for row, query in enumerate(queries):
        response = batch["responses"][row].tolist()
        has_eos = 0 in response
        length = response.index(0) + 1 if has_eos else len(response)
        ended += has_eos
        assert batch["has_eos"][row].item() == has_eos
        assert batch["last"][row].item() == length - 1
        assert batch["mask"][row].tolist() == [column < length for column in range(len(response))]
        assert batch["mask_p1"][row].tolist() == [column <= length for column in range(len(response))]

        logprobs = hub_logprobs(hub, query, response[:length], cfg.temperature, n_vocab).detach()
        ref_logprobs = hub_logprobs(hub_reference, query, response[:length], cfg.temperature, n_vocab).detach()
        for name in ("logprobs", "sampled_logprobs"):
            np.testing.assert_allclose(batch[name][row, :length], logprobs, atol=FORWARD)
        np.testing.assert_allclose(batch["ref_logprobs"][row, :length], ref_logprobs, atol=FORWARD)
        np.testing.assert_allclose(batch["kl"][row, :length], logprobs - ref_logprobs, atol=2 * FORWARD)
        assert not batch["kl"][row, length:].any()  # what the models think of pads must not count

        scalars = hub_scalars(pipeline.rm, query, response[:length]).detach()
        assert given[row] == pytest.approx(scalars[-1].item(), abs=FORWARD)
        # Without EOS the score is replaced, whatever the reward model says.
        assert batch["scores"][row].item() == (given[row] if has_eos else cfg.missing_eos_score)
        values = scalars[len(query) - 1 :][: len(response)]  # before each token, and the one after EOS
        np.testing.assert_allclose(batch["values"][row, : len(values)], values, atol=FORWARD)
    assert 0 < ended < 16  # some rows must end, or the test has seen nothing of EOS
    assert batch["kl"].abs().max() > 1


def test_advantages_match_the_reference_step():
    """Both worked examples of the reference step, as two rows of one batch of width 6."""
    cfg = ppo.Config(response_length=6, whiten_rewards=False)
    has_eos, last = ppo.find_eos(torch.tensor([[5, 5, 5, 0, 0, 0], [5] * 6]), eos_id=0)
    assert has_eos.tolist() == [True, False]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]).bool()
    mask_p1 = torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6]).bool()
    logprobs = torch.tensor([-1, -0.5, -2, -0.2, -3, -4])
    ref_logprobs = torch.tensor([-1.2, -0.4, -1.5, -0.3, -2, -5])
    values = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    batch = {
        "last": last,
        "mask": mask,
        "mask_p1": mask_p1,
        "kl": (logprobs - ref_logprobs) * mask,
        "values": torch.stack([values, values]),
        "scores": torch.tensor([1.0, -1.0]),
    }
    state = {}
    out = ppo.advantages(cfg, batch, state)
    assert state["kl_coef"] == 0.05
    expected = dict(
        rewards=[[-0.01, 0.005, 0.025, -0.005, 1, 0], [-0.01, 0.005, 0.025, -0.005, 0.05, -1.05]],
        returns=[[0.891266, 0.938175, 0.9665, 0.97, 1.0, 0],
                 [-0.670549, -0.705842, -0.764044, -0.851625, -0.9175, -1.05]],
        weights=mask,  # every token of a response counts the same
    )  # fmt: skip
    for name, column in expected.items():
        np.testing.assert_allclose(out[name], column, atol=1e-6, err_msg=name)
    # whitened over the ten actions of both rows
    advantages = np.array([0.791266, 0.738175, 0.6665, 0.57,
                           -0.770549, -0.905842, -1.064044, -1.251625, -1.4175, -1.65])  # fmt: skip
    whitened = (advantages - advantages.mean()) / advantages.std()
    np.testing.assert_allclose(out["advantages"][mask], whitened, atol=3e-6)
    assert (out["advantages"][~mask] == 0).all()


def test_score_function_replaces_the_reward_model(pipeline):
    seen = []

    def score(queries, responses):
        seen.extend(zip(queries, responses))
        return [float(len(response)) for response in responses]

    cfg = pipeline.config(ppo, "ppo_function", reward_model="not/there", missing_eos_score=-3.0, episodes=8)
    ppo.main(cfg, score=score)
    assert len(seen) == 8
    assert all(query.startswith("SUBREDDIT: r/") for query, _ in seen)
    assert "<|endoftext|>" not in "".join(response for _, response in seen)
    row = metrics(cfg)[0]
    lengths = [len(response) for _, response in seen]
    ended = round(row["val/eos_rate"] * 8)
    score_of_ended = row["objective/scores"] * 8 + 3 * (8 - ended)
    assert ended * min(lengths) <= score_of_ended <= ended * max(lengths)


def test_score_function_of_wrong_length_is_refused(pipeline):
    with pytest.raises(UserError, match="gave 1 for 3 texts; return one each"):
        ppo.main(pipeline.config(ppo, "ppo_short"), score=lambda queries, responses: [0.0])


def test_adaptive_kl_moves_the_coefficient(pipeline):
    cfg = pipeline.config(ppo, "ppo_adaptive", episodes=24, kl_target=1.0, kl_horizon=100)
    ppo.main(cfg)
    coefficient = cfg.kl_coef
    for row in metrics(cfg):
        assert row["objective/kl_coef"] == pytest.approx(coefficient, rel=1e-12)
        coefficient *= 1 + np.clip(row["objective/kl"] / 1.0 - 1, -0.2, 0.2) * 8 / 100
    assert coefficient != cfg.kl_coef


def test_ppo_raises_the_score(pipeline):
    """A rule that anyone can check: prefer responses with many distinct words."""
    cfg = pipeline.config(ppo, "ppo_learns", episodes=40 * 16, batch_size=16, micro_batch_size=16, lr=3e-3,
                          rollout_micro_batch_size=16, missing_eos_score=0.0, kl_coef=0.01)  # fmt: skip
    ppo.main(cfg, score=lambda queries, responses: [float("dawn" in r or "the" in r) for r in responses])
    scores = [row["objective/scores"] for row in metrics(cfg)]
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.2


def test_samples_file_shows_texts(ppo_run):
    rows = read_rows(Path(ppo_run.out_dir) / "samples.jsonl")
    assert {row["step"] for row in rows} == {0, 1, 2}
    assert all(row["query"].endswith("TL;DR:") for row in rows)


# ---------------------------------------------------------------------------- sample.py


def samples_of(cfg):
    sample.main(cfg)
    rows = read_rows(Path(cfg.out_dir) / "samples.jsonl")
    return rows, json.loads((Path(cfg.out_dir) / "summary.json").read_text())


def test_sample_reports_what_its_rows_say(pipeline, ppo_run):
    rows, summary = samples_of(pipeline.config(sample, "samples", model=f"{ppo_run.out_dir}/final", compare=21))
    assert len(rows) == summary["n"] == 21
    for name in ("tokens", "reference_tokens", "eos", "score", "reference_score", "kl"):
        assert summary[name] == pytest.approx(np.mean([row[name] for row in rows]))
    tokenizer = Tokenizer.load(str(pipeline.sft))
    for row in rows:
        # Sampled ids need not be those of their text: what is counted is a piece and a number for each.
        assert row["tokens"] == len(row["token_kl"])
        assert row["kl"] == pytest.approx(sum(number for _, number in row["token_kl"]), abs=1e-4)
        assert row["reference_tokens"] == len(tokenizer.encode(row["reference"])) + 1
    lengths = np.array([(row["tokens"], row["reference_tokens"]) for row in rows])
    assert summary["length_ratio"] == pytest.approx(np.mean(lengths[:, 0] / lengths[:, 1]))
    from rouge_score.rouge_scorer import RougeScorer

    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        scores = [RougeScorer([name]).score(row["reference"], row["response"])[name].fmeasure for row in rows]
        assert summary[name] == pytest.approx(np.mean(scores))


def test_rouge_matches_the_reference_aggregate_on_real_summaries(tldr_sample):
    """The paper's code takes the middle of a bootstrap per batch: it must lie around our mean (detail 9)."""
    from rouge_score import rouge_scorer, scoring

    rows = read_rows(tldr_sample / "comparisons_validation.jsonl")
    texts = [{side["policy"]: side["text"] for side in row["summaries"]} for row in rows]
    references = [row["ref"] for row in texts]
    responses = [row["openai_1.3b_ppo"] for row in texts]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    aggregator = scoring.BootstrapAggregator(n_samples=1000)
    for reference, response in zip(references, responses):
        aggregator.add_scores(scorer.score(reference, response))
    ours = rouge(references, responses)
    for name, bounds in aggregator.aggregate().items():
        # the median of 1,000 resampled means has a standard error of 1.25 / sqrt(1000) of their spread, a quarter of
        # the interval's width: 1 % of the width; ten times that never fails by chance
        width = bounds.high.fmeasure - bounds.low.fmeasure
        assert ours[name] > 0.05
        assert abs(ours[name] - bounds.mid.fmeasure) < 0.1 * width


def test_sampled_kl_matches_hub_models(pipeline, ppo_run):
    """KL of a row: both models' log-probabilities by transformers, at the sampling temperature, known ids only."""
    rows, _ = samples_of(pipeline.config(sample, "samples_kl", model=f"{ppo_run.out_dir}/final"))
    tokenizer = Tokenizer.load(str(pipeline.sft))
    models = [GPTNeoXForCausalLM.from_pretrained(path) for path in (f"{ppo_run.out_dir}/final", pipeline.sft)]
    totals = []
    for row in rows[:6]:
        query = tokenizer.encode(row["query"])
        response = tokenizer.encode(row["response"]) + [0] * row["eos"]
        places = range(len(query) - 1, len(query) + len(response) - 1)
        with torch.no_grad():
            logits = [hub(torch.tensor([query + response])).logits[0, places, : tokenizer.n_vocab] for hub in models]
        logprobs = [(x / 0.7).log_softmax(-1)[range(len(response)), response].sum().item() for x in logits]
        totals.append(logprobs[0] - logprobs[1])
    # sums of some 10 log-probabilities of size 10 in float32, each from a forward pass: 1e-6 of 100
    np.testing.assert_allclose([row["kl"] for row in rows[:6]], totals, atol=1e-4)
    assert np.abs(totals).max() > 0.01


def test_best_of_n_keeps_the_best_response_that_ends(pipeline):
    draws = [[5, 0], [6], [7, 0], [8, 0], [9, 0], [3]]  # two rounds of three queries
    scores = [1.0, 9.0, 4.0, 2.0, 3.0, 5.0]  # 9 and 5 are scores of responses without EOS
    assert pick_best(2, scores, draws, 0) == [[8, 0], [9, 0], [7, 0]]

    one, _ = samples_of(pipeline.config(sample, "best_of_1", temperature=1.0))
    four, summary = samples_of(pipeline.config(sample, "best_of_4", temperature=1.0, best_of=4))
    better = [b["score"] - a["score"] for a, b in zip(one, four) if a["eos"]]
    # the first of the four is the same draw; in another micro-batch its score is rounded otherwise
    assert len(better) > 3
    assert min(better) > -ROUNDING
    assert max(better) > 10 * ROUNDING
    assert summary["kl_bound"] == pytest.approx(0.636294, abs=1e-6)  # log 4 - 3/4
    with pytest.raises(UserError, match="reward_model"):
        sample.main(pipeline.config(sample, "best_of_none", best_of=2, reward_model=""))


def test_compare_colours_tokens_by_their_log_ratio(pipeline, ppo_run, capsys):
    cfg = pipeline.config(sample, "compared", model=f"{ppo_run.out_dir}/final", compare=2)
    rows, _ = samples_of(cfg)
    lines = [line for line in capsys.readouterr().out.split("\n") if "\x1b[" in line]
    for row, line in zip(rows, lines):
        text, kl = re.sub(r"\x1b\[[0-9;]*m", "", line).rsplit(" ", 2)[:2]
        assert text == row["response"] + "<EOS>" * row["eos"]
        assert float(kl) == pytest.approx(row["kl"], abs=0.005)
        assert sum(nats for _, nats in row["token_kl"]) == pytest.approx(row["kl"], abs=1e-5)
    assert len(lines) == sum("token_kl" in row for row in rows) == 2
    with pytest.raises(UserError, match="reference"):
        sample.main(pipeline.config(sample, "compared_none", reference="", compare=2))


def test_colours_are_green_above_zero_and_red_below(pipeline):
    tokenizer = Tokenizer.load(str(pipeline.sft))
    ids = tokenizer.encode(" a b c") + [0]
    up, down, same, far = coloured(tokenizer, ids, [1.5, -3.0, 0.0, 99.0]).split("\x1b[0m")[:-1]
    assert up.startswith("\x1b[30;48;2;127;255;127m")
    assert down.startswith("\x1b[30;48;2;255;0;0m")
    assert same.startswith("\x1b[30;48;2;255;255;255m")
    assert far == "\x1b[30;48;2;0;255;0m<EOS>"


def test_pieces_show_a_character_at_the_last_of_its_tokens(pipeline):
    """The toy's tokenizer knows no letter but English ones: others are spelt by their bytes."""
    tokenizer = Tokenizer.load(str(pipeline.data))
    ids = tokenizer.encode("né 今!") + [tokenizer.eos_id]
    texts = pieces(tokenizer, ids)
    assert texts == ["n", "", "é", " ", "", "", "今", "!", "<EOS>"]
    assert pieces(tokenizer, ids[:-3]) == texts[:-3]  # one that is cut off is not there


def test_ppo_samples_hold_the_kl_of_each_token(pipeline):
    cfg = pipeline.config(ppo, "token_kl", samples_every=1, episodes=24, lr=5e-3)
    ppo.main(cfg)
    rows = read_rows(Path(cfg.out_dir) / "samples.jsonl")
    assert [row["step"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    for row in rows:
        texts, nats = zip(*row["token_kl"], strict=True)
        shown = "".join(texts).removesuffix("<EOS>")
        assert shown.rstrip("\ufffd") == row["response"].rstrip("\ufffd")  # half a character at the end is not shown
        # a sum of at most ten float32 numbers
        assert sum(nats) == pytest.approx(row["kl"], abs=1e-5)
        assert (row["step"] == 0) == (set(nats) == {0.0}), "before the first update policy and reference are one"


def test_sample_draws_anew_for_each_line_of_stdin(pipeline, capsys, monkeypatch):
    lines = [r"SUBREDDIT: r/pets\n\nTL;DR:"] * 4 + [""]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    tokenizer = Tokenizer.load(str(pipeline.sft))
    texts = []  # of the queries that the model reads: what it draws is fed to it one token at a time

    def watch(module, inputs):
        if isinstance(module, torch.nn.Embedding) and inputs[0].shape[1] > 1:
            texts.extend(map(tokenizer.decode, inputs[0].tolist()))

    with register_module_forward_pre_hook(watch):
        sample.main(pipeline.config(sample, "unused", prompt="-", temperature=1.0, response_length=10))
    answers = capsys.readouterr().out.split("\n")[:-1]
    assert texts == ["SUBREDDIT: r/pets\n\nTL;DR:"] * 4
    assert len(answers) == 4
    assert len(set(answers)) > 1  # 40 draws from a nearly untrained model


def test_a_run_that_never_began_can_be_started_with_other_settings(pipeline):
    with pytest.raises(UserError, match="typo_train"):
        sft.main(pipeline.config(sft, "mended", data="typo_{split}.jsonl"))
    cfg = pipeline.config(sft, "mended")
    sft.main(cfg)
    assert json.loads((Path(cfg.out_dir) / "config.json").read_text())["data"] == cfg.data


def test_sample_continues_a_prompt(pipeline, capsys):
    sample.main(pipeline.config(sample, "unused", prompt="SUBREDDIT: r/pets", temperature=0.0, response_length=5))
    hub = GPTNeoXForCausalLM.from_pretrained(pipeline.sft)
    tokenizer = Tokenizer.load(str(pipeline.sft))
    query = tokenizer.encode("SUBREDDIT: r/pets")
    response = []
    while len(response) < 5 and 0 not in response:
        logits = hub(torch.tensor([query + response])).logits[0, -1, : tokenizer.n_vocab]
        response.append(int(logits.argmax()))
    assert capsys.readouterr().out == tokenizer.decode(response) + "\n"


# ---------------------------------------------------------------------------- invariants of all stages


@pytest.mark.parametrize("name", STAGES)
def test_loss_invariant_to_micro_batch_size(pipeline, name):
    """Micro-batches of 1, 3 (which does not divide 8) and 8 give the same run up to float32 rounding."""
    stage = importlib.import_module(name)
    runs = []
    for micro in (1, 3, 8):
        cfg = pipeline.config(stage, f"{name}_micro{micro}", micro_batch_size=micro)
        stage.main(cfg)
        runs.append(metrics(cfg))
        runs[-1][0].pop("rewards/accuracies", None)  # DPO starts with all rewards 0: rounding decides the sign
    same_metrics(runs[0], runs[1])
    same_metrics(runs[0], runs[2])


@pytest.mark.parametrize("name, options", [
    ("sft", {}), ("rm", {}), ("ppo", dict(kl_target=0.5)), ("dpo", {}),
    # Until update 3 the critic alone learns: in the checkpoint the policy has no moments yet.
    ("variants.ppo_max", EVERYTHING),
])  # fmt: skip
def test_resume_is_bitwise(pipeline, name, options):
    """Killed in an update and started again, a run writes the same bytes as one that was left alone."""
    stage = importlib.import_module(name)
    options = dict(episodes=40, save_every=2, **options)
    files = ["metrics.jsonl", "final/model.safetensors"]
    if hasattr(stage.Config, "samples_every"):
        options["samples_every"] = 1
        files.append("samples.jsonl")
    whole = pipeline.config(stage, f"{name}_whole", **options)
    broken = pipeline.config(stage, f"{name}_broken", **options)
    stage.main(whole)

    def die():
        raise KeyboardInterrupt

    with in_update(broken, 3, die), pytest.raises(KeyboardInterrupt):
        stage.main(broken)
    # The last row is that of an update which the newest checkpoint does not have.
    assert len(metrics(broken)) == 3
    kept = sorted(path.name for path in (Path(broken.out_dir) / "checkpoints").iterdir())
    assert kept == ["step_2"]
    assert not (Path(broken.out_dir) / "final").exists()
    stage.main(broken)
    for file in files:
        assert (Path(whole.out_dir) / file).read_bytes() == (Path(broken.out_dir) / file).read_bytes(), file
    kept = sorted(path.name for path in (Path(broken.out_dir) / "checkpoints").iterdir())
    assert kept == ["step_4", "step_5"]


def test_activation_checkpointing_computes_blocks_again(pipeline):
    """In the backward pass of training, and nowhere else; the numbers are the same."""
    counts = []
    runs = []

    def count(module, inputs):
        if isinstance(module, Block):
            counts[-1] += 1

    for on in (False, True):
        cfg = pipeline.config(sft, f"again_{on}", activation_checkpointing=on)
        counts.append(0)
        with register_module_forward_pre_hook(count):
            sft.main(cfg)
        runs.append(cfg)
    # two blocks; three micro-batches in each of two updates; seven of the 21 rows to evaluate
    assert counts == [2 * (3 * 2 + 7), 2 * (2 * 3 * 2 + 7)]
    weights = [(Path(cfg.out_dir) / "final" / "model.safetensors").read_bytes() for cfg in runs]
    assert weights[0] == weights[1]
    assert metrics(runs[0]) == metrics(runs[1])


def test_gradient_clipping_bounds_the_update(pipeline):
    """A gradient of norm 1e-9 is lost in Adam's eps of 1e-5: the step is at most lr * 1e-4, plus weight decay."""
    old = load_file(pipeline.sft / "model.safetensors")
    moved = {}
    for limit in (0.0, 1e-9):
        cfg = pipeline.config(sft, f"sft_clip_{limit}", scratch=False, model=str(pipeline.sft), episodes=8,
                              schedule="constant", max_grad_norm=limit, eval_split="")  # fmt: skip
        sft.main(cfg)
        new = load_file(Path(cfg.out_dir) / "final" / "model.safetensors")
        moved[limit] = max((new[name] - old[name] * (1 - cfg.lr * cfg.weight_decay)).abs().max().item() for name in old)
        assert metrics(cfg)[0]["grad_norm"] > 1e-3  # the norm reported is the one before clipping
    assert moved[1e-9] < 5e-7 < 1e-4 < moved[0.0]  # 1e-7, and float32 rounding of weights of size 1


def test_bfloat16_compute_keeps_float32_masters(pipeline):
    cfg = pipeline.config(ppo, "ppo_bfloat16", episodes=8, dtype="bfloat16")
    ppo.main(cfg)
    row = metrics(cfg)[0]
    assert row["objective/kl"] == 0.0  # policy and reference round alike
    assert row["val/ratio"] == pytest.approx(1, abs=0.1)  # |log p| < 10 with 8 bits: 0.04 a token, averaged
    weights = load_file(Path(cfg.out_dir) / "final" / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert any((value != value.bfloat16().float()).any() for value in weights.values())


def test_gradients_of_micro_batches_are_added_in_float32(pipeline):
    """Each is a bfloat16 number, a sum of them mostly not. FSDP adds up those of all ranks in the same dtype."""
    shares = []

    def look(run, cfg, metrics):
        gradients = [parameter.grad.to_local().flatten() for parameter in run.models["policy"].gpt_neox.parameters()]
        sums = torch.cat(gradients)
        shares.append((sums != sums.bfloat16().float()).float().mean().item())

    ppo.main(pipeline.config(ppo, "ppo_sums", episodes=8, dtype="bfloat16", train_gather=True), before_step=look)
    assert len(shares) == 4 and min(shares) > 0.3  # (the embeddings of absent tokens are 0)


@pytest.mark.parametrize("gather", [True, False])
def test_rollout_gather_decides_whether_parameters_stay_whole(pipeline, gather):
    """While a block decodes, the others' parameters are whole, or sharded. (In bfloat16 FSDP has models, also of one
    process.)
    """
    decoding = set()
    seen = set()

    def look(module, inputs, output):
        if isinstance(module, Block) and inputs[0].shape[1] == 1:
            for block in decoding - {module}:
                seen.add(is_sharded(next(block.parameters())))
            decoding.add(module)

    options = dict(episodes=8, dtype="bfloat16", rollout_gather=gather)
    with register_module_forward_hook(look):
        ppo.main(pipeline.config(ppo, f"ppo_gather_{gather}", **options))
    assert len(decoding) == 2
    assert seen == {not gather}


def test_values_are_float32_in_a_bfloat16_run(pipeline):
    """The head is, and the critic's values are what it says: not bfloat16's numbers, which are 2^-16 of float32's."""
    values = []

    def keep(cfg, batch, state):
        values.append(batch["values"][batch["mask"]])
        return ppo.advantages(cfg, batch, state)

    ppo.main(pipeline.config(ppo, "ppo_values", episodes=8, dtype="bfloat16"), advantages=keep)
    (values,) = values
    assert len(values) >= 8
    assert (values != values.bfloat16().float()).float().mean() > 0.9


def test_a_metric_that_is_not_finite_stops_the_run(cpu_run):
    """Or, with on_nonfinite=skip, is null in the row: JSON has none of these."""
    numbers = {"nan": np.nan, "large": np.inf, "small": -np.inf}
    for name, bad in numbers.items():
        with pytest.raises(UserError, match=f"step 0: {{'{name}': .*}}; lower lr"):
            cpu_run.log({name: bad, "other": 1.0})
    assert not (cpu_run.out_dir / "metrics.jsonl").exists()

    cpu_run.cfg.on_nonfinite = "skip"
    cpu_run.tracker = runtime.Tracker(cpu_run, "none")
    cpu_run.log({**numbers, "other": 1.0})
    assert metrics(cpu_run) == [{"step": 0, **dict.fromkeys(numbers), "other": 1.0, "skipped": 0}]


def test_finished_run_is_left_alone(pipeline, capsys):
    before = (pipeline.sft / "model.safetensors").stat().st_mtime_ns
    sft.main(pipeline.config(sft, "sft", episodes=320, lr=5e-3))
    assert "is there already" in capsys.readouterr().out
    assert (pipeline.sft / "model.safetensors").stat().st_mtime_ns == before


def test_other_configuration_in_the_same_directory_is_refused(pipeline):
    with pytest.raises(UserError, match=r"lr \(0.005 -> 0.5\)"):
        sft.main(pipeline.config(sft, "sft", episodes=320, lr=0.5))


def test_non_finite_gradient_stops_before_the_weights_change(pipeline):
    cfg = pipeline.config(sft, "sft_nan", save_every=1)
    words = r"step 0, rank 0: the gradient norm is nan; .* not finite: \[\d+, "
    with nan_in(range(100)), pytest.raises(UserError, match=words):
        sft.main(cfg)
    assert not (Path(cfg.out_dir) / "checkpoints").exists()


def test_export_loads_in_the_hub_library(pipeline):
    _, info = GPTNeoXForCausalLM.from_pretrained(pipeline.sft, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    shutil.copytree(pipeline.sft, pipeline.directory / "copy")
    assert Tokenizer.load(str(pipeline.directory / "copy")).n_vocab == Tokenizer.load(str(pipeline.data)).n_vocab

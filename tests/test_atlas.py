"""The bug atlas: each mistake, on a tiny run, shows the sign that lab/atlas.md gives; the right code does not."""

import functools
import inspect
import re

import pytest
import torch
from pipeline import metrics, read_rows
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import ppo
import sft
from data import load_rows, pad_right
from hub.files import read_json
from model import GPTNeoX, ScalarModel
from variants import grpo

pytest.importorskip("matplotlib")
from lab import atlas, lab, report  # noqa: E402

ROUNDING = 1e-5  # of a log-probability or a score in float32


@pytest.fixture(scope="module")
def first_updates(pipeline):
    """A function that runs PPO for two updates and returns their metrics; the same run is not run twice."""
    done = {}

    def run(name, doors=None, **changes):
        if name not in done:
            cfg = pipeline.config(ppo, f"atlas_{name}", samples_every=1, samples_rows=8, **changes)
            ppo.main(cfg, **(doors or {}))
            done[name] = metrics(cfg)
        return done[name]

    return run


# ---------------------------------------------------------------------------- log-probabilities that do not agree


def test_rounded_logprobs_show_in_the_first_ratio_and_in_the_gap(first_updates):
    right = first_updates("right")
    wrong = first_updates("bfloat16", {"advantages": atlas.rounded_logprobs})
    for row in right:
        assert abs(row["val/ratio"] - 1) < ROUNDING and row["val/generation_gap"] < ROUNDING
    for row in wrong:
        assert abs(row["val/ratio"] - 1) > 1e-4 and row["val/generation_gap"] > 1e-3


@pytest.mark.parametrize("hook, temperature", [(atlas.cold_sampling, 1.0), (atlas.top_k_sampling, 0.7)])
def test_another_sampler_shows_in_the_generation_gap_alone(first_updates, hook, temperature):
    """The first ratio is 1 and the first KL 0: neither compares with the sampler."""
    with register_module_forward_hook(hook):
        wrong = first_updates(hook.__name__, temperature=temperature)
    right = first_updates("right")
    assert max(row["val/generation_gap"] for row in right) < ROUNDING
    assert min(row["val/generation_gap"] for row in wrong) > 0.1
    assert abs(wrong[0]["val/ratio"] - 1) < ROUNDING and wrong[0]["objective/kl"] == 0


def test_samples_of_another_temperature_are_likelier_than_their_entropy_says(first_updates):
    """-log p of what is drawn is the entropy in the mean; drawn from a sharper distribution it is less."""
    with register_module_forward_hook(atlas.top_k_sampling):
        wrong = first_updates("top_k_sampling", temperature=0.7)
    assert torch.tensor(wrong[0]["val/perplexity"]).log() < wrong[0]["policy/entropy_avg"] - 1


# ---------------------------------------------------------------------------- scores and advantages in a wrong place


def test_a_reward_read_at_the_last_column_depends_on_the_rows_beside(pipeline, first_updates):
    options = {"rollout_micro_batch_size": 8}
    first_updates("alone", **options)
    with register_module_forward_pre_hook(atlas.last_column):
        first_updates("last_column", **options)
    off = {}
    for name in ("alone", "last_column"):
        rows = read_rows(pipeline.directory / f"atlas_{name}" / "samples.jsonl")
        off[name] = atlas.score_errors(rows, pipeline.rm)
    assert off["alone"] < ROUNDING
    assert off["last_column"] > 1e-3


def test_advantages_one_column_off_are_those_of_the_token_before(first_updates):
    seen = []

    def both(cfg, batch, state):
        right = ppo.advantages(cfg, batch, dict(state))
        wrong = atlas.one_column_off(cfg, batch, state)
        seen.append((right["advantages"], wrong["advantages"], batch["mask"]))
        return wrong

    first_updates("column", {"advantages": both})
    for right, wrong, mask in seen:
        assert (wrong[:, 0] == 0).all() and (wrong[~mask] == 0).all()
        assert torch.equal(wrong[:, 1:][mask[:, 1:]], right[:, :-1][mask[:, 1:]])


def test_advantages_one_column_off_show_in_the_loss_of_a_single_step(first_updates):
    """Whitened advantages have mean 0; without the last one of each row, they do not."""
    right = first_updates("right_8", n_epochs=1, micro_batch_size=8)[0]
    wrong = first_updates("off_8", {"advantages": atlas.one_column_off}, n_epochs=1, micro_batch_size=8)[0]
    assert abs(right["loss/policy_avg"]) < ROUNDING
    assert abs(wrong["loss/policy_avg"]) > 1e-2


def test_advantages_one_column_off_do_not_teach_the_token_that_is_paid(pipeline):
    """The score looks at the first token alone. Its probability, exact, rises; one column off it does not."""
    tokenizer = lab.Tokenizer.load(str(pipeline.data))
    paid = [id for id in range(tokenizer.n_vocab) if is_paid(tokenizer.decode([id]))]
    queries, lengths = pad_right(load_rows(f"{pipeline.data}/sft_{{split}}.jsonl", "validation", tokenizer)["query"])

    def probability(directory):
        model = GPTNeoX.from_pretrained(directory).requires_grad_(False)
        logits = model(queries, lengths[:, None] - 1)[:, 0, : tokenizer.n_vocab]
        return (logits / 0.7).softmax(-1)[:, paid].sum(1).mean().item()

    def score(queries, responses):
        return [float(is_paid(response)) for response in responses]

    options = dict(batch_size=64, micro_batch_size=64, episodes=256, n_epochs=2, lr=5e-3, seed=2)
    options.update(response_length=6, missing_eos_score=0.5, kl_coef=0.0, lam=1.0)
    gains = {}
    for name, advantages in (("right", ppo.advantages), ("off", atlas.one_column_off)):
        cfg = pipeline.config(ppo, f"atlas_paid_{name}", **options)
        ppo.main(cfg, score=score, advantages=advantages)
        gains[name] = probability(f"{cfg.out_dir}/final") - probability(pipeline.sft)
    assert gains["right"] > 0.05 and gains["off"] < gains["right"] - 0.05


def is_paid(text):
    return text[:1] == " " and text[1:2].lower() < "n"


def test_a_score_on_eos_is_the_same_at_first(pipeline, first_updates):
    """The critic, which starts from the reward model, reads the score itself at EOS: nothing is left to learn there.

    So the advantages are the same, and the value loss is a mean over fewer values, by those at EOS, which are right.
    """
    right = first_updates("one_step", n_epochs=1, micro_batch_size=8)[0]
    wrong = first_updates("on_eos", {"advantages": atlas.score_on_eos}, n_epochs=1, micro_batch_size=8)[0]
    tokens = 8 * right["val/response_length"]
    read_at_eos = right["val/num_eos_tokens"]
    assert wrong["loss/value_avg"] * tokens == pytest.approx(right["loss/value_avg"] * (tokens + read_at_eos), rel=1e-4)
    assert wrong["loss/value_avg"] > right["loss/value_avg"] * 1.05


def test_a_score_on_the_last_column_makes_responses_longer(pipeline):
    """Every response has the same score, so there is nothing to learn; but an early EOS has the least of it."""
    options = dict(batch_size=64, micro_batch_size=64, episodes=256, n_epochs=2, lr=3e-3, missing_eos_score=1.0)
    lengths = {}
    for name, advantages in (("right", ppo.advantages), ("end", atlas.score_on_last_column)):
        cfg = pipeline.config(ppo, f"atlas_length_{name}", **options)
        ppo.main(cfg, score=lambda queries, responses: [1.0] * len(responses), advantages=advantages)
        lengths[name] = [row["val/response_length"] for row in metrics(cfg)]
    assert lengths["right"][0] == lengths["end"][0]
    assert lengths["right"][-1] < lengths["right"][0] + 1 < lengths["end"][-1]


# ---------------------------------------------------------------------------- means over the wrong things


def test_means_per_micro_batch_show_in_the_loss_of_a_single_step(first_updates):
    """Whitened advantages have mean 0 and the ratio is 1: the loss is 0, however the rows are split."""
    doors = {"advantages": atlas.with_token_count, "token_loss": atlas.mean_per_micro_batch}
    losses = {}
    norms = {}
    for size in (2, 8):
        for name, given in (("right", {}), ("mean", doors)):
            row = first_updates(f"{name}_{size}", given, n_epochs=1, micro_batch_size=size)[0]
            losses[name, size] = abs(row["loss/policy_avg"])
            norms[name, size] = row["grad_norm"]
    assert losses["right", 2] < ROUNDING and losses["right", 8] < ROUNDING
    assert losses["mean", 8] < ROUNDING and losses["mean", 2] > 1e-3
    assert norms["right", 2] == pytest.approx(norms["right", 8], rel=1e-4)
    assert norms["mean", 2] != pytest.approx(norms["mean", 8], rel=1e-2)


def test_a_loss_divided_twice_shows_in_the_gradient(first_updates):
    """Four micro-batches: the policy's part of the gradient is a quarter."""
    doors = {"token_loss": atlas.divided_twice}
    norms = {}
    for size in (2, 8):
        norms[size] = first_updates(f"twice_{size}", doors, n_epochs=1, micro_batch_size=size)[0]["grad_norm"]
    right = first_updates("right_8", n_epochs=1, micro_batch_size=8)[0]["grad_norm"]
    assert norms[8] == pytest.approx(right, rel=1e-4)
    assert norms[2] < 0.7 * right


def test_pads_in_means_make_the_metrics_too_small(first_updates):
    """By how much, the columns say: response_length to the mean length."""
    options = dict(n_epochs=2, micro_batch_size=8)
    right = first_updates("two_epochs", **options)[0]
    wrong = first_updates("pads", {"advantages": atlas.pads_in_means}, **options)[0]
    diluted = right["val/response_length"] / 10
    assert diluted < 0.6
    for name in ("policy/approxkl_avg", "val/ratio_var"):
        assert wrong[name] == pytest.approx(right[name] * diluted, rel=0.1)


def test_pads_in_whitening_show_in_the_loss_of_a_single_step(first_updates):
    right = first_updates("right_8", n_epochs=1, micro_batch_size=8)[0]
    wrong = first_updates("whitened", {"advantages": atlas.pads_in_whitening}, n_epochs=1, micro_batch_size=8)[0]
    assert abs(right["loss/policy_avg"]) < ROUNDING
    assert abs(wrong["loss/policy_avg"]) > 0.1


def test_equal_scores_have_no_loss_and_no_gradient_unless_the_deviation_has_no_floor(pipeline):
    """The mean of eight times 0.7 is off by its rounding, 6e-8, and their deviation is 0."""
    norms = {}
    losses = {}
    for floor in (1e-4, 1e-8):
        cfg = pipeline.config(ppo, f"atlas_floor_{floor}", group_size=8, n_epochs=1, missing_eos_score=0.7)
        advantages = functools.partial(atlas.group_std, floor=floor)
        ppo.main(cfg, score=same_score, advantages=advantages, token_loss=grpo.token_loss, with_critic=False)
        first = metrics(cfg)[0]
        norms[floor] = first["grad_norm"]
        losses[floor] = abs(first["loss/policy_avg"])
    assert norms[1e-4] < 0.01 and norms[1e-8] > 0.1
    assert losses[1e-4] < 0.01 and losses[1e-8] > 0.1


def same_score(queries, responses):
    return [0.7] * len(responses)


def test_group_std_with_a_floor_is_grpo():
    """The right arm of that experiment is the variant."""
    cfg = grpo.Config(group_size=4)
    batch = {"scores": torch.tensor([1.0, 2.0, 5.0, 8.0]), "mask": torch.ones(4, 2, dtype=torch.bool)}
    right = grpo.advantages(cfg, batch, {})["advantages"]
    torch.testing.assert_close(atlas.group_std(cfg, batch, {}, floor=1e-4)["advantages"], right)


# ---------------------------------------------------------------------------- texts and models in a wrong form


def held_out_loss(pipeline, name, make_row):
    """The SFT model's loss on held-out rows that were made in this way; with lr 0 nothing trains."""
    data = atlas.rows_by(make_row, pipeline.data, pipeline.directory / f"atlas_{name}")
    return sft_loss(pipeline, name, data=data)


def sft_loss(pipeline, name, **changes):
    options = dict(scratch=False, model=str(pipeline.sft), episodes=8, lr=0.0, **changes)
    cfg = pipeline.config(sft, f"atlas_sft_{name}", **options)
    sft.main(cfg)
    return metrics(cfg)[-1]["eval/loss"]


def as_it_should_be(query, summary):
    return {"prompt": query, "completion": " " + summary}


def test_spaces_show_in_the_first_tokens(pipeline):
    right = held_out_loss(pipeline, "right", as_it_should_be)
    assert right == pytest.approx(sft_loss(pipeline, "posts"), abs=1e-6)  # the data's own format is the right one
    assert held_out_loss(pipeline, "trailing_space", atlas.trailing_space) > right + 0.05
    assert held_out_loss(pipeline, "two_spaces", atlas.two_spaces) > right + 0.5


def test_after_two_spaces_the_first_word_is_another_token(pipeline):
    tokenizer = lab.Tokenizer.load(str(pipeline.data))
    row = atlas.two_spaces("", "Anna sneezed.")
    pieces = [tokenizer.decode([id]) for id in tokenizer.encode(row["completion"])]
    assert pieces == ["  ", "Anna", " sneezed", "."]


def test_a_reward_model_without_its_normalisation_shifts_every_score(pipeline, first_updates):
    model = ScalarModel.from_pretrained(pipeline.rm)
    atlas.without_normalisation(model)
    directory = pipeline.directory / "atlas_rm"
    model.save_pretrained(directory)
    mean = read_json(pipeline.rm.parent / "eval.json")["normalize/mean"]
    right = first_updates("right")[0]
    wrong = first_updates("unnormalised", reward_model=str(directory))[0]
    # Before normalisation the references had this mean, and the score of a missing EOS is the same constant.
    assert abs(mean) > 1e-2
    shift = mean * right["val/eos_rate"]
    assert wrong["objective/scores"] - right["objective/scores"] == pytest.approx(shift, abs=1e-4)


# ---------------------------------------------------------------------------- the page


PAGE = (report.ROOT / "lab" / "atlas.md").read_text(encoding="utf-8")


def test_the_page_shows_the_mistakes_that_are_run():
    source = inspect.getsource(atlas)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 12
    for block in blocks:
        assert block.strip() in source


def test_a_mistake_takes_five_lines():
    for name in re.findall(r"```python\ndef (\w+)", PAGE):
        lines, _ = inspect.getsourcelines(getattr(atlas, name))
        body = [line for line in lines[1:] if line.strip() and '"""' not in line]
        assert len(body) <= 5, name


def test_published_tables_are_those_of_the_published_results():
    rows = report.read(report.ROOT / "lab" / "atlas.jsonl")
    for _, table, _ in atlas.PARTS.values():
        if table:
            assert report.markdown(table(rows)) in PAGE

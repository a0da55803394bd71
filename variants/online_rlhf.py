"""Iterated online RLHF: rounds of samples, labels, reward models and PPO (arXiv:2204.05862 section 4.5).

    python -m variants.online_rlhf config/toy_ppo.py --rm_options=config/toy_rm.py --out_dir=out/toy/online
    torchrun --nproc_per_node=8 -m variants.online_rlhf config/ppo_1b.py --members=3 --choose=disagreement

A reward model knows the kind of responses that were labelled for it, and PPO leaves them behind. So each round labels
pairs of responses of the last round's policy, trains reward models on the rows of all rounds so far, and takes PPO from
the SFT model to these:

    out_dir/round_N/pairs.jsonl     what is labelled (variants/pairs.py)
    out_dir/round_N/rm_K.jsonl      what reward model K learns from: all rounds' rows; of an ensemble each a bootstrap
    out_dir/round_N/rm_K, ppo       runs of rm.py, from the SFT model, and of ppo.py

Labels come from people: the run stops, they fill in pairs.jsonl, and the same command goes on. So it does after any
other stop: a step is complete, or not there. Or they come from a judge; --labeller=toy.gold stands for the toy's
people, who err (variants/labellers.py). Several reward models are an ensemble, which may also choose what is to be
labelled (variants/ensemble.py).
"""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import ppo
import rm
from configurator import Count, configure, require
from runtime import Done, World, stage
from variants import ensemble, labellers, pairs


@dataclass
class Config(ensemble.Config):
    """Fields of ppo.py are for each round's PPO, but for reward_model and critic, which come from the round."""

    # ---- rounds
    rounds: Count = 4  # with more of them the same command goes on
    pool: Count = 1000  # prompts that get two responses in each round
    n_labels: Count = 500  # how many of these pairs are labelled
    choose: Literal["random", "disagreement"] = "random"  # which; disagreement: of the last round's reward models
    labeller: str = "people"  # or toy.gold, URL#model, a reward model's directory: a judge of evals/winrate.py
    members: Count = 1  # reward models
    rm_options: str = "config/rm_1b.py"  # what rm.py is given: config files and options


@stage
def main(cfg, label=None):
    """label: a function in place of cfg.labeller, see variants/labellers.py."""
    is_alone = cfg.members == 1 and (cfg.choose, cfg.combine) != ("random", "mean")
    require(not is_alone, "choose and combine go by how much reward models differ; raise members")
    world = World(cfg)
    policy = cfg.model
    members = []
    rows = []
    for number in range(1, cfg.rounds + 1):
        directory = Path(cfg.out_dir) / f"round_{number}"
        path = directory / "pairs.jsonl"
        pairs.sample_pairs(cfg, world, path, number, policy, members)
        rows += pairs.label_pairs(world, path, label or labellers.by_name(cfg, world, number))
        members = train_members(cfg, world, directory, rows)
        policy = train_policy(cfg, world, directory, members)


def train_members(cfg, world, directory, rows):
    """The reward models' directories."""
    members = []
    for member in range(cfg.members):
        place = directory / f"rm_{member}"
        own_rows = ensemble.bootstrap(rows, cfg.seed, member) if cfg.members > 1 else rows
        pairs.write_whole(world, place.with_suffix(".jsonl"), own_rows)
        # With a deviation of 1, kl_coef weighs the same in every round, and a member as much as another.
        options = shlex.split(cfg.rm_options) + ["--normalize_std", f"--device={cfg.device}"]
        options += [f"--model={cfg.model}", f"--data={place}.jsonl", f"--out_dir={place}"]
        options += [f"--seed={cfg.seed + member}", "--eval_split=", f"--accept_changes={cfg.accept_changes}"]
        members.append(train(world, rm, configure(rm.Config, options)))
    return members


def train_policy(cfg, world, directory, members):
    values = {field.name: getattr(cfg, field.name) for field in fields(ensemble.Config)}
    values.update(out_dir=f"{directory}/ppo", reward_model=",".join(members), critic=members[0])
    ppo_cfg = ensemble.Config(**values)
    return train(world, ppo, ppo_cfg, combine=ensemble.door(ppo_cfg))


def train(world, script, cfg, **doors):
    """Run a stage, unless it is complete; returns the directory of its model. If it was stopped, so is all."""
    script.main(cfg, **doors)
    final = Path(cfg.out_dir) / "final"
    if not world.agree_on(final.exists()):
        raise Done
    return str(final)


if __name__ == "__main__":
    main(configure(Config))

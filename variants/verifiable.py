"""Verifiable rewards: a function scores each response, and can look up the answer in its row (arXiv:2411.15124 sec. 6).

    python -m variants.verifiable config/sums_ppo.py --algorithm=grpo --out_dir=out/sums/grpo
    torchrun --nproc_per_node=8 -m variants.verifiable config/mine.py --algorithm=rloo --group_size=8 --scorer=mine

The function is `score` of a Python module, score(queries, responses, rows) -> floats, from two lists of texts and the
data's rows (toy/sums.py is one). There is no reward model; PPO's critic starts as the policy, with a new head. Defaults
are PPO's with each algorithm: n_epochs 4, and no group_size.
"""

from dataclasses import dataclass
from typing import Literal

import ppo
from configurator import configure
from evals import scores
from variants import grpo, rloo

ALGORITHMS = {"ppo": ppo, "grpo": grpo, "rloo": rloo}


@dataclass
class Config(ppo.Config):
    algorithm: Literal["ppo", "grpo", "rloo"] = "ppo"
    scorer: str = "toy.sums"  # a Python module with score(queries, responses, rows) -> floats


def main(cfg):
    ALGORITHMS[cfg.algorithm].main(cfg, scores.from_module(cfg.scorer))


if __name__ == "__main__":
    main(configure(Config))

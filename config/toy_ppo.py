# python ppo.py config/toy_ppo.py
import os

_out = os.environ.get("TOY_OUT", "out/toy")
model = f"{_out}/sft/final"
reward_model = f"{_out}/rm/final"
data = _out + "/data/sft_{split}.jsonl"
out_dir = f"{_out}/ppo"
seed = 1
episodes = 52 * 64
batch_size = 64
n_minibatches = 4  # four steps on a batch, as in the paper, but of 16 rows each: a quarter of the work
n_epochs = 1
micro_batch_size = 16
response_length = 24
lr = 5e-4
critic_lr = 2e-3
critic_steps = 8  # it starts as the reward model, which means nothing before EOS (detail 13): let it learn first
adam_eps = 1e-8
shard_size = 1  # each process has a whole model

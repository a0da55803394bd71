# python -m variants.verifiable config/sums_ppo.py --algorithm=grpo --out_dir=out/sums/grpo
model = "out/sums/sft/final"
scorer = "toy.sums"
data = "out/sums/data/sft_{split}.jsonl"
out_dir = "out/sums/ppo"
seed = 1
# 64 sums an update, each answered 8 times; with 16, and a higher lr, the reward fell before it rose
batch_size = 512
group_size = 8
episodes = 120 * 512
n_epochs = 6
n_minibatches = 2
micro_batch_size = 128
rollout_micro_batch_size = 256
response_length = 4
temperature = 1.0
missing_eos_score = 0.0  # as any other wrong answer
kl_coef = 0.0  # what is right needs no guard against a reward model's mistakes
lr = 3e-4
warmup_steps = 3
adam_eps = 1e-8

# torchrun --nproc_per_node=8 -m variants.ppo_max config/ppo_1b.py config/ppo_max.py --out_dir=out/ppo_max_1b
# PPO-max (arXiv:2307.04964) on top of any size. 128 rows = 8 GPUs x 4 minibatches x 4 rows, passed over once.
# Where the paper gives no number, or its released code another one, the line says so.
batch_size = 128  # a small buffer of experience: 128 rollouts,
n_minibatches = 4  # 32 to an optimizer step
micro_batch_size = 4
rollout_micro_batch_size = 16
n_epochs = 1
reward_norm = "normalize"  # by mean and deviation of all scores so far (released scripts: "scale")
reward_clip = 0.8  # the paper compares 0.3 and 0.8 (released scripts: off)
whiten_advantages = False  # its advice: no advantage-level operations beside value-level ones, and values are clipped
kl_coef = 0.05  # per token (released scripts: 0.01 English, 0.1 Chinese)
lam = 0.9  # (released code: 0.95)
critic_steps = 50  # the critic alone learns first; the paper gives no number, the released code has no such phase
lr = 5e-7
critic_lr = 1.65e-6  # (released code: 1.5e-6)
vf_coef = 1.0
ptx_coef = 0.1  # the paper gives no number (released default: 0)
max_grad_norm = 1.0
adam_beta2 = 0.95
adam_eps = 1e-6  # (released code: 1e-8 for the critic)
weight_decay = 0.0
schedule = "constant"  # (released code: falls with 1 / sqrt(step))
warmup_steps = 0  # the critic's phase takes its place
temperature = 0.8  # of sampling and, unlike there, of all log-probabilities; no top-p, no repetition penalty

# python ppo.py config/ppo_160m.py
# 131,072 episodes / 128 = 1,024 updates; 128 rows = 1 GPU x 8 micro-batches of 16, passed over once
# Episodes, batch, passes and rate are those of arXiv:2410.18252 at 410m: no source has PPO at this size.
model = "out/sft_160m/final"
reward_model = "out/rm_160m/final"
out_dir = "out/ppo_160m"
lr = 3e-6
episodes = 131_072
batch_size = 128
n_epochs = 1
micro_batch_size = 16
rollout_micro_batch_size = 64
save_every = 100

# python ppo.py config/ppo_410m.py
# 131,072 episodes / 128 = 1,024 updates; 128 rows = 1 GPU x 16 micro-batches of 8, passed over once
# Episodes, batch, passes and rate are those of arXiv:2410.18252 at this size.
model = "out/sft_410m/final"
reward_model = "out/rm_410m/final"
out_dir = "out/ppo_410m"
lr = 3e-6
episodes = 131_072
batch_size = 128
n_epochs = 1
micro_batch_size = 8
rollout_micro_batch_size = 32
save_every = 100

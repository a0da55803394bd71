# python ppo.py config/ppo_410m.py
# 131,072 episodes / 128 = 1,024 updates; 128 rows = 1 GPU x 8 micro-batches of 16, passed over once
model = "out/sft_410m/final"
reward_model = "out/rm_410m/final"
out_dir = "out/ppo_410m"
episodes = 131_072
batch_size = 128
n_epochs = 1
micro_batch_size = 16
rollout_micro_batch_size = 64
save_every = 100

# torchrun --nproc_per_node=8 ppo.py config/ppo_1b.py
# 1,000,000 episodes / 512 = 1,953 updates; 512 rows = 8 GPUs x 4 micro-batches of 16, passed over 4 times
model = "out/sft_1b/final"
reward_model = "out/rm_1b/final"
out_dir = "out/ppo_1b"
episodes = 1_000_000
batch_size = 512
micro_batch_size = 16
rollout_micro_batch_size = 64
save_every = 100

# torchrun --nproc_per_node=8 ppo.py config/ppo_6.9b.py
# 1,000,000 episodes / 512 = 1,953 updates; 512 rows = 8 GPUs x 64 micro-batches of 1, passed over 4 times
model = "out/sft_6.9b/final"
reward_model = "out/rm_6.9b/final"
out_dir = "out/ppo_6.9b"
episodes = 1_000_000
batch_size = 512
micro_batch_size = 1
rollout_micro_batch_size = 4
save_every = 100

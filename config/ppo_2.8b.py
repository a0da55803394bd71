# torchrun --nproc_per_node=8 ppo.py config/ppo_2.8b.py
# 1,000,000 episodes / 512 = 1,953 updates; 512 rows = 8 GPUs x 16 micro-batches of 4, passed over 4 times
model = "out/sft_2.8b/final"
reward_model = "out/rm_2.8b/final"
out_dir = "out/ppo_2.8b"
episodes = 1_000_000
batch_size = 512
micro_batch_size = 4
rollout_micro_batch_size = 32
save_every = 100

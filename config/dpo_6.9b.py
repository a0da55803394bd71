# torchrun --nproc_per_node=8 dpo.py config/dpo_6.9b.py
# 92,858 pairs / 64 = 1,450 updates; 64 pairs = 8 GPUs x 8 micro-batches of 1
model = "out/sft_6.9b/final"
out_dir = "out/dpo_6.9b"
batch_size = 64
micro_batch_size = 1
beta = 0.05
save_every = 200

# torchrun --nproc_per_node=8 rm.py config/rm_2.8b.py
# 92,858 pairs / 64 = 1,450 updates; 64 pairs = 8 GPUs x 8 micro-batches of 1
model = "out/sft_2.8b/final"
out_dir = "out/rm_2.8b"
batch_size = 64
micro_batch_size = 1
save_every = 200

# torchrun --nproc_per_node=8 sft.py config/sft_1b.py
# 116,722 posts / 128 = 911 updates; 128 rows = 8 GPUs x 16 micro-batches of 1
model = "EleutherAI/pythia-1b-deduped"
out_dir = "out/sft_1b"
batch_size = 128
micro_batch_size = 1
save_every = 200

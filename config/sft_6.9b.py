# torchrun --nproc_per_node=8 sft.py config/sft_6.9b.py
# 116,722 posts / 128 = 911 updates; 128 rows = 8 GPUs x 16 micro-batches of 1
model = "EleutherAI/pythia-6.9b-deduped"
out_dir = "out/sft_6.9b"
batch_size = 128
micro_batch_size = 1
save_every = 200

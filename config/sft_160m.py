# python sft.py config/sft_160m.py
# 116,722 posts / 128 = 911 updates; 128 rows = 1 GPU x 8 micro-batches of 16
model = "EleutherAI/pythia-160m-deduped"
out_dir = "out/sft_160m"
batch_size = 128
micro_batch_size = 16
lr = 1e-5
save_every = 200

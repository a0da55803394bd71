#!/usr/bin/env bash
# datasets 5.2.0: in a jsonl file where one row's value of a column is a text and another row's a list or an object, the
# column gets the type Json, and every text in it that happens to be JSON is decoded: the text "1.50" comes back as a
# number, "null" as nothing, and a text in quotation marks loses them. Rows of texts alone come back as they are.
#
# Documented: load_dataset("json") reads one JSON object a line, whose values are those of the file.
# Seen, of the completions "1.50", "null", "\"x\"" and " yes", without and with a row whose completion is a chat:
#     texts alone: ['1.50', 'null', '"x"', ' yes']
#     beside a chat: [1.5, None, 'x', ' yes']
# Files that mix the prompt-completion rows of texts and of chats, as trainers of language models take both, meet it.
set -euo pipefail
cd "$(mktemp -d)"
python3 -m venv env
env/bin/python -m pip install --quiet datasets==5.2.0 pyarrow==26.0.1
cat > mixed.py <<'PYTHON'
import json

import datasets

datasets.disable_progress_bars()
texts = ["1.50", "null", '"x"', " yes"]
rows = [{"prompt": "a:", "completion": text} for text in texts]
chat = [{"role": "assistant", "content": "yes"}]


def read(name, rows):
    with open(name, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    found = datasets.load_dataset("json", data_files=name, split="train", cache_dir="cache")
    return [row["completion"] for row in found][: len(texts)]


print("texts alone:", read("texts.jsonl", rows))
print("beside a chat:", read("mixed.jsonl", [*rows, {"prompt": "a:", "completion": chat}]))
PYTHON
HF_HUB_OFFLINE=1 env/bin/python mixed.py | tee seen
diff seen - <<'SEEN'
texts alone: ['1.50', 'null', '"x"', ' yes']
beside a chat: [1.5, None, 'x', ' yes']
SEEN

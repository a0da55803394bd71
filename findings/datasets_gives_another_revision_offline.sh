#!/usr/bin/env bash
# datasets 5.2.0: load_dataset(name, revision=...) gives the rows of whichever revision was fetched last, when the hub is
# not to be reached (HF_HUB_OFFLINE=1, no network) or answers with an error such as 500: `revision` is not looked at, even
# one that was never fetched, and the only sign is a warning that names a directory.
#
# Documented: `revision` is the "version of the dataset to load"; huggingface_hub 2.4.0, below it, keeps what it fetched
# by revision, and says that it has none of the one asked for.
# Seen, after `main` (8 rows) and the tag v1 (5 rows) had been fetched, in that order:
#     main: 5 rows
#     v1: 5 rows
#     v2: 5 rows
#     huggingface_hub, v2: LocalEntryNotFoundError
# Whoever pins a data set's revision and trains on a node without a network meets it.
set -euo pipefail
cd "$(mktemp -d)"
python3 -m venv env
env/bin/python -m pip install --quiet datasets==5.2.0 huggingface_hub==2.4.0 pyarrow==26.0.1

# A hub on this machine, with one data set: train.jsonl of 8 rows in main, of 5 in v1
cat > hub.py <<'PYTHON'
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FILES = {revision: b'{"text": "a"}\n' * n for revision, n in {"main": 8, "v1": 5}.items()}
COMMITS = {revision: hashlib.sha1(revision.encode()).hexdigest() for revision in FILES}


class Hub(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        revision = next((name for name in FILES if name in self.path or COMMITS[name] in self.path), "main")
        content = FILES[revision]
        file = {"type": "file", "path": "train.jsonl", "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if "/tree/" in self.path:
            self.send(200, json.dumps([] if "/data" in self.path.split("/tree/")[1] else [file]).encode())
        elif self.path.startswith("/api/datasets/"):
            self.send(200, json.dumps({"id": "org/rows", "sha": COMMITS[revision], "siblings": []}).encode())
        elif self.path.endswith("/train.jsonl"):
            self.send(200, content, ETag=file["oid"], **{"X-Repo-Commit": COMMITS[revision]})
        else:
            self.send(404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMITS[revision]})

    do_HEAD = do_GET

    def send(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
print(server.server_port, flush=True)
server.serve_forever()
PYTHON
cat > read.py <<'PYTHON'
import sys

import datasets
from huggingface_hub import snapshot_download

datasets.disable_progress_bars()
for revision in sys.argv[1:]:
    rows = datasets.load_dataset("org/rows", revision=revision, split="train")
    print(f"{revision}: {len(rows)} rows")
if revision == "v2":
    try:
        snapshot_download("org/rows", repo_type="dataset", revision=revision)
    except Exception as error:
        print(f"huggingface_hub, {revision}: {type(error).__name__}")
PYTHON

env/bin/python hub.py > port &
trap "kill $!" EXIT
while ! [ -s port ]; do sleep 0.1; done
export HF_ENDPOINT=http://127.0.0.1:$(cat port) HF_HOME=$PWD/home
env/bin/python read.py main v1
HF_HUB_OFFLINE=1 env/bin/python read.py main v1 v2 | tee seen
diff seen - <<'SEEN'
main: 5 rows
v1: 5 rows
v2: 5 rows
huggingface_hub, v2: LocalEntryNotFoundError
SEEN

"""Where the tests find real inputs: the Pythia tokenizer and a sample of TL;DR. Without them, tests skip."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PLACES = [ROOT.parent / "shared" / "data"]
if os.environ.get("NPLUS_DATA"):
    PLACES.append(Path(os.environ["NPLUS_DATA"]))


# They take longest: begun last, one of them would run on while the other processes of pytest have nothing left to do.
FIRST = ("test_variants", "test_notebooks", "test_distributed", "test_faults", "test_data_tokenizer", "test_stages",
         "test_options", "test_online_rlhf", "test_own_data")  # fmt: skip


def pytest_collection_modifyitems(items):
    """Files that take long come first, in their own order; the others stay as they are."""

    def place(item):
        name = item.path.stem
        return FIRST.index(name) if name in FIRST else len(FIRST)

    items.sort(key=place)


def find(name):
    return next((place / name for place in PLACES if (place / name).exists()), None)


@pytest.fixture(scope="session")
def real_tokenizer():
    """Path of Pythia's tokenizer.json: 50,277 ids, among them 23 runs of spaces."""
    path = find("pythia_tokenizer.json")
    if path is None:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache("EleutherAI/pythia-14m", "tokenizer.json")
        path = Path(cached) if isinstance(cached, str) else None
    if path is None:
        pytest.skip(
            "no pythia_tokenizer.json in ../shared/data or $NPLUS_DATA, no pythia-14m in the hub's cache"
        )
    return path


@pytest.fixture(scope="session")
def library(real_tokenizer):
    """Pythia's tokenizer by the tokenizers library, special tokens in a text read as text."""
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(real_tokenizer))
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture(scope="session")
def tldr_sample():
    """Directory of sft_{train,validation}.jsonl and comparisons_{train,validation}.jsonl."""
    path = find("tldr_sample")
    if path is None:
        pytest.skip("no tldr_sample in ../shared/data or $NPLUS_DATA")
    return path


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """Toy data, a small SFT model and a reward model, trained once for all tests."""
    from pipeline import Pipeline

    return Pipeline(tmp_path_factory.mktemp("pipeline"))

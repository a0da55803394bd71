"""hub.tokenizer.Tokenizer against the `tokenizers` library, data.format_query against the literal truncation loop."""

import json
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest

from configurator import UserError
from data import format_query
from hub.tokenizer import Tokenizer

library_module = pytest.importorskip("tokenizers")

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

from bench.tokenizer_all import CODES, CONTEXTS, Comparison, merges_made_otherwise  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer(real_tokenizer):
    return Tokenizer.load(str(real_tokenizer))


@pytest.fixture(scope="module")
def special_library(real_tokenizer):
    """The oracle as it comes: special-token text becomes the special ids."""
    return library_module.Tokenizer.from_file(str(real_tokenizer))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def posts(tldr_sample):
    return read_jsonl(tldr_sample / "sft_train.jsonl") + read_jsonl(tldr_sample / "sft_validation.jsonl")


def assert_same(texts, tokenizer, library):
    assert texts
    expected = [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)]
    wrong = [text for text, ids in zip(texts, expected, strict=True) if tokenizer.encode(text) != ids]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, the first: {wrong[:5]!a}"


# ---- encode ----------------------------------------------------------------------------------------------

ZWJ_FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
SPECIAL = [
    "<|endoftext|>", "a<|endoftext|>b", " <|padding|> ", "<|endoftext|><|padding|><|endoftext|>",
    "<|endoftext|", "<|ENDOFTEXT|>", "e<|endoftext|>\u0301", "   <|endoftext|>   x", "<|<|endoftext|>|>",
    "\u0301<|padding|>\n  <|endoftext|>  \n",
]
WORDS = [
    "", " ", "a", "\n", "\t", "\r\n", "it's we're I'VE don't they'll I'd I'm 'S 'Twas ''s 't''re",
    "can\u2019t I\u2019m",
    "12345678901234567890 3.14159 1,000,000 007 \u0661\u0662\u0663 \u00b2\u00bd\u2167 a1b2c3 9" + "0" * 300,
    ZWJ_FAMILY, "x" + ZWJ_FAMILY + "\ufe0f\U0001f3fd y", "\U0001f1e9\U0001f1ea\U0001f1eb",
    "\u2764\ufe0f \u2764", "e\u0301a\u0308o\u0302 caf\u00e9 cafe\u0301 n\u0303", "\u1e9b\u0323",
    "\u0344\u0340\u2126\u212b\ufb01\u00c5", "\u1100\u1161\u11a8 \uac01 \u1100\u1161",
    "\u0928\u093c\u0915\u094d\u0937", "a\u0315\u0300\u05ae\u0301b",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4 \U00020000\uf900",
    "\u200b \u200b\u200b a\u200bb \ufeff\u2060x \u00ad-",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u200f\u202eabc\u202c",
    "\x00 \x01a\x07\x1b[0m\x7f\x80\x85\x9f", "a\x0bb\x0cc\x1cd\x1de\x1ef\x1fg",
    "a\u00a0\u00a0b \u00a0c\u2003\u2003d \u3000e\u2028\u2029f",
    "https://www.reddit.com/r/AskReddit?x=1&y=%20#z",
    "--- *** ### ~~~ ```python\n\tdef f(x):\n\t\treturn x\n```",
    "SUBREDDIT: r/x\n\nTITLE: y\n\nPOST: z\n\nTL;DR:", "TL;DR: ", "TL;DR:\n", "a" * 2000, "ab " * 1000,
    "\ufffd\ufffd", "\n\n\n\n   \n\n", " \n", "\n ", "\t\t \t", "\r\r\n \r", "a  \n  b", "a \t b",
    "x \u0301y", "  \u0301y", "\u0301  \u0301",
]


def test_encode_matches_library_on_posts(tokenizer, library, posts):
    texts = [row[key] for row in posts for key in ("subreddit", "title", "post", "summary")]
    assert_same(texts, tokenizer, library)


def test_encode_matches_library_on_comparisons(tokenizer, library, tldr_sample):
    rows = read_jsonl(tldr_sample / "comparisons_train.jsonl")
    rows += read_jsonl(tldr_sample / "comparisons_validation.jsonl")
    texts = [summary["text"] for row in rows for summary in row["summaries"]]
    texts += [row["info"][key] for row in rows for key in ("subreddit", "title", "post")]
    assert_same(texts, tokenizer, library)


def test_encode_matches_library_on_nasty_words(tokenizer, library):
    texts = WORDS + SPECIAL + [first + second for first in WORDS[:40] for second in WORDS[:40]]
    assert_same(texts, tokenizer, library)


def test_special_text_stays_text(tokenizer):
    assert 0 not in tokenizer.encode("<|endoftext|>") and 1 not in tokenizer.encode("<|padding|>")


@pytest.mark.parametrize("char", [" ", "\n", "\t", "\r\n", "\u00a0", "\u3000"])
def test_encode_matches_library_on_runs_of_white_space(char, tokenizer, library):
    """Runs of 2 to 24 spaces are single ids outside the byte-level vocabulary; longer ones are split."""
    frames = [
        "{}", "{}a", "a{}", "a{}b", "{}\n", "\n{}", "a{}\nb", "a\n{}b", "a{}\n\n{}b", "{}\t{}", "a.{}.b",
        "1{}2", "{}\u0301", "e\u0301{}e\u0301", "\u4f60{}\u597d", "{}'s", "a{} b", "a {}b",
        "{}<|endoftext|>{}",
    ]
    texts = [frame.replace("{}", char * n) for frame in frames for n in range(61)]
    assert_same(texts, tokenizer, library)


def test_encode_matches_library_on_random_strings(tokenizer, library):
    pieces = [
        *" \n\t\ra1'.,;:-_<|>", "  ", "    ", " " * 23, " " * 24, " " * 25, "\r\n", "the", " the", "The",
        "'s", "'ll", "tl;dr", "\u00a0", "\u2003", "\u200b", "\u200d", "\ufe0f", "\u0301", "\u0308", "\u0323",
        "\u093c", "e", "o", "\u00e9", "\u1ebf", "\u1100", "\u1161", "\u11a8", "\u4f60", "\u3042", "\u3099",
        "\u05d0", "\u0627", "\u0651", "\u0663", "\u00bd", "\u2028", "\U0001f600", "\U0001f469", "\U0001f3fd",
        "\U0001f1e9", "\x00", "\x1f", "\x7f", "\x85", "\ufffd", "\U0010fffd", "<|endoftext|>", "<|padding|>",
    ]
    rng = random.Random(0)
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 40))) for _ in range(4000)]
    assert_same(texts, tokenizer, library)


@pytest.mark.parametrize("frame", ["{}", "a{}b"])
def test_encode_matches_library_on_every_code_point(frame, tokenizer, library):
    """Each shows its class to the splitting pattern (letter, number, space, other) and its normal form."""
    texts = []
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)) not in ("Cn", "Co", "Cs"):
            texts.append(frame.replace("{}", chr(code)))
    assert len(texts) > 140_000
    for start in range(0, len(texts), 20_000):
        assert_same(texts[start : start + 20_000], tokenizer, library)


# ---- decode ----------------------------------------------------------------------------------------------


def test_decode_returns_the_normalised_text(tokenizer, posts):
    texts = WORDS + SPECIAL + [row["post"] for row in posts[:300]]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_decode_matches_library_on_random_ids(tokenizer, special_library):
    """Random ids are mostly broken UTF-8; the runs of spaces and the special ids are among them."""
    rng = random.Random(0)
    pools = [range(50277), range(2, 300), range(50250, 50277), range(0, 4)]
    for _ in range(3000):
        ids = [rng.choice(rng.choice(pools)) for _ in range(rng.randint(0, 12))]
        assert tokenizer.decode(ids) == special_library.decode(ids)


def test_decode_skips_special_ids_and_pads(tokenizer):
    ids = tokenizer.encode(" a summary")
    assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.pad_id, tokenizer.pad_id]) == " a summary"


# ---- load ------------------------------------------------------------------------------------------------


def test_special_ids_are_those_of_pythia(tokenizer):
    assert (tokenizer.n_vocab, tokenizer.pad_id, tokenizer.eos_id) == (50277, 50277, 0)


def test_load_accepts_a_directory(tokenizer, real_tokenizer, tmp_path):
    shutil.copy(real_tokenizer, tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(str(tmp_path))
    assert loaded.encode("a  b\n\nTL;DR:") == tokenizer.encode("a  b\n\nTL;DR:")
    assert loaded.n_vocab == 50277


@pytest.mark.parametrize("text", [None, "", "{broken", "[]", "{}"])
def test_load_names_a_bad_file(text, tmp_path):
    file = tmp_path / "tokenizer.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as error:
        Tokenizer.load(str(file))
    assert "tokenizer.json" in str(error.value)
    assert "\n" not in str(error.value)


# ---- other tokenizers ------------------------------------------------------------------------------------

PIECES = [
    *" \n\t\r\u00a0\u3000a1'.,;-_<|>#", "  ", "    ", " " * 9, "the", " the", " tokenizer", "Text", "'ll", "e",
    "\u0301", "\u0323", "\u0338", "\u00e9", "\u1100", "\u1161", "\u4f60", "\u05d0", "\u00bd", "\U0001f469", "\u200d",
    "\x00", "\x7f", "<|endoftext|>", "<|padding|>", "<|assistant|>", "<|prompter|>", "### End", "### Response:\n",
    "### Instruction:", "</s>", "<sep>", "<a  b>", "\t\t", "caf\u00e9", "cafe\u0301",
]
RUNS = [" " * n for n in range(8, 1, -1)]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
A = {"Sequence": {"id": "A", "type_id": 0}}
B = {"Sequence": {"id": "B", "type_id": 1}}


def random_texts(n, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.randint(1, 30))) for _ in range(n)]


def train(*special):
    """The library's byte-level BPE of 700 tokens, learned from this file; `special` tokens come first."""
    library = library_module.Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.post_processor = processors.ByteLevel(trim_offsets=True)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(Path(__file__).read_text(encoding="utf-8").splitlines(), trainer)
    return library


def pythia():
    library = train("<|endoftext|>", "<|padding|>")
    library.add_tokens([AddedToken(run, normalized=True) for run in RUNS])
    return library


def gpt2():
    """EOS last, and the library's older words: no model.type, empty texts for null."""
    library = train()
    library.normalizer = None
    library.add_special_tokens([AddedToken("<|endoftext|>", normalized=True)])
    spec = json.loads(library.to_str())
    del spec["model"]["type"], spec["model"]["byte_fallback"], spec["model"]["ignore_merges"]
    spec["model"].update(continuing_subword_prefix="", end_of_word_suffix="")
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    spec["post_processor"] = {**BYTE_LEVEL, "add_prefix_space": True, "trim_offsets": False}
    return spec


def dolly():
    library = pythia()
    library.add_special_tokens(["### End", "### Instruction:", "### Response:\n"])
    return library


def openassistant():
    library = pythia()
    library.add_special_tokens(["<|prompter|>", AddedToken("<|system|>", lstrip=True, single_word=True)])
    library.add_tokens([AddedToken("<|assistant|>", normalized=True), AddedToken("<sep>", normalized=True)])
    return library


def other_eos():
    library = train("<s>", "</s>")
    library.add_tokens([AddedToken("\t\t", normalized=True)])
    return library


def overlaps():
    """Special tokens, which stay text, around and beside others."""
    library = pythia()
    library.add_special_tokens([AddedToken("<a  b>", normalized=True), AddedToken("# ", normalized=True)])
    library.add_special_tokens([AddedToken("a   ", normalized=False)])
    library.add_tokens([AddedToken("the<", normalized=True)])
    return library


def edit(**parts):
    """Pythia's with other parts."""
    return lambda: {**json.loads(pythia().to_str()), **parts}


# name: what makes the tokenizer, the files beside it, and its EOS token
KINDS = {
    "Pythia": (pythia, {}, "<|endoftext|>"),
    "GPT-2": (gpt2, {"tokenizer_config.json": {"model_max_length": 1024}}, "<|endoftext|>"),
    "Dolly": (dolly, {"tokenizer_config.json": {"eos_token": "<|endoftext|>"}}, "<|endoftext|>"),
    "Dolly that ends": (dolly, {"tokenizer_config.json": {"eos_token": "### End"}}, "### End"),
    "OpenAssistant": (openassistant, {"special_tokens_map.json": {"eos_token": "<|endoftext|>"}}, "<|endoftext|>"),
    "EOS named": (other_eos, {"tokenizer_config.json": {"eos_token": "</s>", "add_bos_token": False}}, "</s>"),
    "EOS as a dict": (other_eos, {"tokenizer_config.json": {"eos_token": {
        "__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": False,
        "single_word": False}}}, "</s>"),
    "EOS in the map": (other_eos, {"tokenizer_config.json": {"eos_token": None},
                                   "special_tokens_map.json": {"eos_token": {"content": "</s>"}}}, "</s>"),
    "EOS named twice": (pythia, {"tokenizer_config.json": {"eos_token": "<|padding|>"},
                                 "special_tokens_map.json": {"eos_token": "<|endoftext|>"}}, "<|padding|>"),
    "overlaps": (overlaps, {}, "<|endoftext|>"),
    "no normalizer": (edit(normalizer=None), {}, "<|endoftext|>"),
    "NFC in a Sequence": (edit(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFC"}]}), {},
                          "<|endoftext|>"),
    "empty Sequence": (edit(normalizer={"type": "Sequence", "normalizers": []}), {}, "<|endoftext|>"),
    "ByteLevel in a Sequence": (edit(pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTE_LEVEL]}), {},
                                "<|endoftext|>"),
    "template of the text": (edit(post_processor={"type": "TemplateProcessing", "single": [A], "pair": [A, B],
                                                  "special_tokens": {}}), {}, "<|endoftext|>"),
    "no post-processor": (edit(post_processor=None), {}, "<|endoftext|>"),
    "truncation": (edit(truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
                        padding={"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
                                 "pad_id": 1, "pad_type_id": 0, "pad_token": "<|padding|>"}), {}, "<|endoftext|>"),
}  # fmt: skip


def write_tokenizer(directory, made, beside):
    """Write what the library, or a dict, says, and files beside it; return the path."""
    text = json.dumps(made) if isinstance(made, dict) else made.to_str()
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    for name, values in beside.items():
        (directory / name).write_text(json.dumps(values), encoding="utf-8")
    return directory / "tokenizer.json"


@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode_match_library_on_other_tokenizers(kind, tmp_path):
    make, beside, eos_token = KINDS[kind]
    path = write_tokenizer(tmp_path, make(), beside)
    oracle = library_module.Tokenizer.from_file(str(path))
    oracle.encode_special_tokens = True
    oracle.no_truncation()
    oracle.no_padding()

    loaded = Tokenizer.load(str(tmp_path))
    assert (loaded.eos_token, loaded.eos_id) == (eos_token, oracle.token_to_id(eos_token))
    assert loaded.n_vocab == oracle.get_vocab_size()
    texts = WORDS + SPECIAL + random_texts(3000)
    assert_same(texts, loaded, oracle)

    special = {id for id, token in oracle.get_added_tokens_decoder().items() if token.special}
    assert sorted(loaded.vocabulary) == sorted(oracle.get_vocab().values())
    for id, token in loaded.vocabulary.items():
        text = token if id in special else token.decode("utf-8", errors="replace")
        assert text == oracle.decode([id], skip_special_tokens=False)
    for text in texts[:500]:
        ids = oracle.encode(text).ids
        assert loaded.decode([*special, *ids, loaded.eos_id]) == oracle.decode(ids)


def test_added_token_in_another_normal_form_is_found(tmp_path):
    made = pythia()
    made.add_tokens([AddedToken("cafe\u0301", normalized=True), AddedToken("e\u0301\u0323", normalized=True)])
    loaded = Tokenizer(str(write_tokenizer(tmp_path, made, {})))
    made.encode_special_tokens = True
    assert made.token_to_id("cafe\u0301") in loaded.encode("a caf\u00e9")
    assert loaded.decode(loaded.encode("a caf\u00e9")) == "a caf\u00e9"
    assert_same(random_texts(1000), loaded, made)


def test_eos_that_tokenizer_json_does_not_call_special(tmp_path):
    """Once it is named it is special, as it is to transformers: no text is encoded to it, or decoded from it."""
    made = pythia()
    made.add_tokens([AddedToken("<sep>", normalized=True)])
    named = {"tokenizer_config.json": {"eos_token": "<sep>"}}
    loaded = Tokenizer.load(str(write_tokenizer(tmp_path, made, named)))
    assert loaded.eos_id == made.token_to_id("<sep>")
    assert loaded.eos_id not in loaded.encode("a<sep>b <sep>")
    assert loaded.decode([*loaded.encode("a"), loaded.eos_id]) == "a"
    assert loaded.vocabulary[loaded.eos_id] == "<sep>"

    # In the vocabulary alone
    spec = json.loads(train("<|endoftext|>", "</s>").to_str())
    del spec["added_tokens"][1]
    named = {"tokenizer_config.json": {"eos_token": "</s>"}}
    loaded = Tokenizer.load(str(write_tokenizer(tmp_path, spec, named)))
    assert loaded.eos_id == 1
    assert 1 not in loaded.encode("</s> a</s>")
    assert loaded.vocabulary[1] == "</s>"


def test_eos_is_that_of_transformers(tmp_path):
    """With added_tokens_decoder, which it has written since 4.34: without it the other file goes before this one."""
    transformers = pytest.importorskip("transformers")
    added = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {}}
    for number, kind in enumerate(["Dolly that ends", "EOS named", "EOS as a dict", "EOS named twice"]):
        make, beside, _ = KINDS[kind]
        beside = {**beside, "tokenizer_config.json": {**beside["tokenizer_config.json"], **added}}
        directory = tmp_path / str(number)
        directory.mkdir()
        write_tokenizer(directory, make(), beside)
        oracle = transformers.AutoTokenizer.from_pretrained(str(directory))
        loaded = Tokenizer.load(str(directory))
        assert (loaded.eos_token, loaded.eos_id) == (oracle.eos_token, oracle.eos_token_id)


def test_vocabularies_are_equal_if_ids_mean_the_same(tmp_path):
    made = {
        "plain": pythia(),
        "other file": {**json.loads(pythia().to_str()), "truncation": None, "decoder": None},
        "another token": dolly(),
        "another name": train("<|endoftext|>", "<|pad|>"),
        "other merges": train("<|endoftext|>", "<|padding|>"),
    }
    made["special no more"] = json.loads(pythia().to_str())
    made["special no more"]["added_tokens"][1].update(special=False, normalized=True)
    found = {}
    for name, tokenizer in made.items():
        directory = tmp_path / name
        directory.mkdir()
        found[name] = Tokenizer(str(write_tokenizer(directory, tokenizer, {}))).vocabulary
    equal = [name for name in found if found[name] == found["plain"]]
    assert equal == ["plain", "other file"]


SPECIAL_FIRST = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, A]
TEMPLATE = {"type": "TemplateProcessing", "single": SPECIAL_FIRST, "pair": [A, B],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}}
ROBERTA = {"type": "RobertaProcessing", "sep": ["<|endoftext|>", 0], "cls": ["<|endoftext|>", 0],
           "trim_offsets": True, "add_prefix_space": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def add(**flags):
    word = dict(id=707, content="<sep>", single_word=False, lstrip=False, rstrip=False, normalized=True, special=False)
    return lambda spec: spec["added_tokens"].append({**word, **flags})


def rename(spec, token, other):
    vocab = spec["model"]["vocab"]
    spec["model"]["vocab"] = {other if text == token else text: id for text, id in vocab.items()}


# what is changed in Pythia's kind: the change, and what the message says of it
REFUSED = {
    "BOS by a template": (lambda spec: spec.update(post_processor=TEMPLATE), "post_processor adds tokens .*BOS"),
    "BOS in a Sequence": (lambda spec: spec.update(post_processor={"type": "Sequence",
                          "processors": [BYTE_LEVEL, TEMPLATE]}), "post_processor adds tokens"),
    "the text twice": (lambda spec: spec.update(post_processor={**TEMPLATE, "single": [A, A]}), "post_processor adds"),
    "RoBERTa's ends": (lambda spec: spec.update(post_processor=ROBERTA), "post_processor.type is 'RobertaProcessing'"),
    "dropout": (lambda spec: spec["model"].update(dropout=0.5), "model.dropout is 0.5, supported is None"),
    "prefix of parts": (lambda spec: spec["model"].update(continuing_subword_prefix="#"), "continuing_.* is '#'"),
    "suffix of words": (lambda spec: spec["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix is '</w>'"),
    "ignore_merges": (lambda spec: spec["model"].update(ignore_merges=True), "model.ignore_merges is True"),
    "byte_fallback": (lambda spec: spec["model"].update(byte_fallback=True), "model.byte_fallback is True"),
    "Unigram": (lambda spec: spec.update(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]]}),
                "model.type is 'Unigram', supported is 'BPE'"),
    "WordPiece": (lambda spec: spec.update(model={"type": "WordPiece", "unk_token": "a", "vocab": {"a": 0},
                  "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}), "model.type is 'WordPiece'"),
    "NFKC": (lambda spec: spec.update(normalizer={"type": "NFKC"}), "normalizer.type is 'NFKC', supported is 'NFC'"),
    "lower case": (lambda spec: spec.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"},
                   {"type": "Lowercase"}]}), "normalizer.type is 'Lowercase'"),
    "digits": (lambda spec: spec.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}),
               "pre_tokenizer.type is 'Digits', supported is 'ByteLevel'"),
    "bytes twice": (lambda spec: spec.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 2}),
                    "pre_tokenizer is not one ByteLevel"),
    "no bytes": (lambda spec: spec.update(pre_tokenizer=None), "pre_tokenizer is not one ByteLevel"),
    "prefix space": (lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space is True"),
    "whole lines": (lambda spec: spec["pre_tokenizer"].update(use_regex=False), "use_regex is False, supported is"),
    "token of a word": (add(single_word=True), "'<sep>' is neither special nor plain"),
    "token that takes spaces": (add(lstrip=True), "'<sep>' is neither special nor plain"),
    "token before NFC": (add(normalized=False), "'<sep>' is neither special nor plain, normalized"),
    "token of another id": (add(id=709), "'<sep>' has not the library's id 707"),
    "token without text": (add(content=""), "the added token '' has not"),
    "token that is a byte": (add(content="a", id=66), "no token for the byte 97, or it is an added one"),
    "token that is a word": (lambda spec: add(content="the", id=spec["model"]["vocab"]["the"])(spec), "one merge"),
    "byte missing": (lambda spec: rename(spec, "\u00c3", "\u00c3\u00c3"), "no token for the byte 195"),
    "merge missing": (lambda spec: spec["model"]["merges"].pop(), "each longer token needs one merge"),
    "merge twice": (lambda spec: spec["model"]["merges"].append(spec["model"]["merges"][0]), "needs one merge"),
    "merges reversed": (lambda spec: spec["model"]["merges"].reverse(), "in the order of the ids"),
    "id twice": (lambda spec: spec["model"]["vocab"].update(b=spec["model"]["vocab"]["a"]), "two tokens have the same"),
    "id that is a truth": (lambda spec: spec["model"]["vocab"].update(a=True), "the id True is no number from 0"),
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
def test_other_tokenizer_is_encoded_like_the_library_or_refused(change, tmp_path):
    spec = json.loads(pythia().to_str())
    edit_spec, message = REFUSED[change]
    edit_spec(spec)
    path = write_tokenizer(tmp_path, spec, {})
    with pytest.raises(UserError, match=message) as error:
        Tokenizer(str(path))
    line = str(error.value)
    assert line.startswith(f"{path}: only plain byte-level BPE as Pythia's or GPT-2's is supported; use another model")
    for word in ("Error", "NoneType", "True, True"):
        assert word not in line


def test_missing_eos_is_named(tmp_path):
    path = write_tokenizer(tmp_path, train("<s>", "</s>"), {})
    with pytest.raises(UserError) as error:
        Tokenizer(str(path))
    mend = "name one as eos_token in tokenizer_config.json beside it"
    assert str(error.value) == f"{path}: no EOS token '<|endoftext|>'; special tokens: '<s>', '</s>'; {mend}"
    write_tokenizer(tmp_path, train(), {"tokenizer_config.json": {"eos_token": "<eos>"}})
    with pytest.raises(UserError, match="no EOS token '<eos>'; special tokens: none; name"):
        Tokenizer(str(path))


@pytest.mark.parametrize("key", ["add_bos_token", "add_prefix_space"])
def test_ids_changed_by_the_file_beside_are_refused(key, tmp_path):
    write_tokenizer(tmp_path, pythia(), {"tokenizer_config.json": {"eos_token": "<|endoftext|>", key: True}})
    with pytest.raises(UserError, match=f"tokenizer_config.json: {key} gives other ids; set it to false"):
        Tokenizer.load(str(tmp_path))


def test_damaged_files_beside_are_refused_or_read(tmp_path):
    """Odd values, also in the place of the whole file, and bytes that are no JSON."""
    write_tokenizer(tmp_path, pythia(), {})
    odd = [None, True, 0, 1, -1.5, 10**30, "", "a", "\ud800", "</s>", [], ["</s>"], {}, {"content": None}]
    odd += [{"content": 5}, {"content": {"content": "a"}}, {"content": "<|padding|>"}, "<|padding|>"]
    contents = [json.dumps(value).encode() for value in odd]
    contents += [json.dumps({"eos_token": value}).encode() for value in odd]
    contents += [json.dumps({"add_bos_token": value}).encode() for value in odd]
    contents += [b"", b"{", b'{"eos_token": "\xff"}', b"\x00", b"[" * 3000]
    seen = {"loaded": 0, "refused": 0}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for content in contents:
            (tmp_path / name).write_bytes(content)
            try:
                loaded = Tokenizer.load(str(tmp_path))
                assert loaded.vocabulary[loaded.eos_id] == loaded.eos_token
                seen["loaded"] += 1
            except UserError as error:
                assert str(tmp_path) in str(error) and len(str(error).splitlines()) == 1
                seen["refused"] += 1
        (tmp_path / name).unlink()
    assert min(seen.values()) > 30


def test_text_beyond_the_limit_is_an_error(tokenizer, real_tokenizer):
    limited = Tokenizer(str(real_tokenizer))
    assert limited.max_characters == 900_000
    limited.max_characters = 12
    assert limited.encode("twelve signs") == tokenizer.encode("twelve signs")
    with pytest.raises(UserError, match="a text has 13 characters, the limit is 12; split it or leave it out"):
        limited.encode("twelve signs.")


# ---- bench/tokenizer_all.py, in small --------------------------------------------------------------------


def test_code_points_in_all_contexts_match_library(real_tokenizer):
    """Differences are of marks that Python's tables of Unicode know and the library's do not."""
    comparison = Comparison(str(real_tokenizer))
    codes = random.Random(0).sample(CODES, 3000)
    for context in CONTEXTS.values():
        _, n_unexplained = comparison.differences(context, codes)
        assert n_unexplained == 0
    assert len(CODES) == 1_112_064
    assert len(CONTEXTS) == 10
    assert all(unicodedata.combining(chr(code)) for code in comparison.explained)


@pytest.mark.parametrize("make", [pythia, gpt2])
def test_code_points_in_all_contexts_match_library_of_a_trained_tokenizer(make, tmp_path):
    comparison = Comparison(str(write_tokenizer(tmp_path, make(), {})))
    codes = random.Random(1).sample(CODES, 1000)
    for context in CONTEXTS.values():
        n_different, n_unexplained = comparison.differences(context, codes)
        assert n_unexplained == 0
        assert n_different == 0 or make is pythia


def test_a_difference_is_counted_and_explained_only_by_nfc(tmp_path):
    """The library is given another file's rules."""
    comparison = Comparison(str(write_tokenizer(tmp_path, pythia(), {})))
    comparison.library = library_module.Tokenizer.from_str(json.dumps(gpt2()))
    assert comparison.differences("{}", [ord("\u212b"), ord("a")]) == (2, 2)
    comparison.library = train("<|endoftext|>", "<|padding|>")
    comparison.library.normalizer = normalizers.NFD()
    assert comparison.differences("{}", [ord("\u00e9"), ord("a")]) == (1, 0)
    assert comparison.explained == {ord("\u00e9")}


def test_merges_of_a_trained_tokenizer_are_made_alike(real_tokenizer, tmp_path):
    assert merges_made_otherwise(str(real_tokenizer)) == []
    assert merges_made_otherwise(str(write_tokenizer(tmp_path, gpt2(), {}))) == []


def test_merge_that_the_library_never_makes_is_found(tmp_path):
    """"bc" is merged before "ab": in the library no text becomes "abc", which tiktoken takes as it is a token."""
    spec = json.loads(train("<|endoftext|>").to_str())
    symbols = list(spec["model"]["vocab"])[:257]
    tokens = [*symbols, "bc", "ab", "abc", "aa", "aaa"]
    merges = [["b", "c"], ["a", "b"], ["ab", "c"], ["a", "a"], ["a", "aa"]]
    spec["model"].update(vocab={token: id for id, token in enumerate(tokens)}, merges=merges)
    path = write_tokenizer(tmp_path, spec, {})
    assert merges_made_otherwise(str(path)) == ["abc", "aaa"]
    oracle = library_module.Tokenizer.from_file(str(path))
    assert oracle.encode("abc").tokens == ["a", "bc"]
    assert oracle.encode("aaa").tokens == ["aa", "a"]


# ---- format_query ----------------------------------------------------------------------------------------


def literal_query(row, library, max_tokens):
    """arXiv:2403.17031 detail 2.2 word for word: one cut, format again, encode again, until it fits."""
    row = dict(row)
    field = "article" if row.get("article") is not None else "post"
    form = {
        "article": "Article:\n{article}\n\nTL;DR:\n",
        "post": "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:",
    }[field]
    while True:
        ids = library.encode(form.format(**row), add_special_tokens=False).ids
        if len(ids) <= max_tokens:
            return ids
        assert row[field], "the rest of the query alone is too long"
        newline = row[field].rfind("\n")
        row[field] = row[field][: newline if newline >= 0 else -1]


def assert_literal(row, tokenizer, library, max_tokens):
    expected = literal_query(row, library, max_tokens)
    assert format_query(row, tokenizer, max_tokens) == expected, (max_tokens, row)


def full_length(row, library):
    return len(literal_query(row, library, 10**9))


def reddit(post, title="How?", subreddit="AskReddit"):
    return {"subreddit": subreddit, "title": title, "post": post}


def one_paragraph(text):
    return " ".join(text.split())


def test_format_query_matches_literal_loop_on_real_posts(tokenizer, library, posts):
    for row in posts[:300]:
        assert format_query(row, tokenizer) == literal_query(row, library, 512)


def test_format_query_cuts_long_posts_at_newlines(tokenizer, library, posts):
    rng = random.Random(0)
    cut = 0
    for number in range(60):
        text = "\n\n".join(row["post"] for row in rng.sample(posts, 4))
        row = reddit(text, posts[number]["title"])
        assert_literal(row, tokenizer, library, 512)
        assert format_query(row, tokenizer) == format_query(row, tokenizer, 512)
        cut += full_length(row, library) > 512
    assert cut > 50


def test_format_query_cuts_single_paragraphs_by_characters(tokenizer, library, posts):
    """Fewer characters can be more tokens: plain bisection misses the longest prefix that fits."""
    rng = random.Random(0)
    for row in rng.sample(posts, 60):
        row = {**row, "post": one_paragraph(row["post"])}
        assert_literal(row, tokenizer, library, full_length(row, library) - rng.randint(1, 60))


def test_format_query_cuts_newlines_first_then_characters(tokenizer, library, posts):
    rng = random.Random(1)
    with_newlines = [row for row in posts if "\n" in row["post"]]
    for row in rng.sample(with_newlines, 30):
        first_line = row["post"][: row["post"].index("\n")]
        limit = full_length({**row, "post": first_line}, library) - rng.randint(1, 25)
        if limit >= full_length({**row, "post": ""}, library):
            assert_literal(row, tokenizer, library, limit)


def test_format_query_handles_a_paragraph_of_5000_characters(tokenizer, library, posts):
    text = one_paragraph(" ".join(row["post"] for row in posts[:40]))[:5000]
    assert "\n" not in text
    assert len(text) == 5000
    assert_literal(reddit(text), tokenizer, library, 512)


HARD_POSTS = {
    "one long word": "antidisestablishmentarianism" * 12,
    "one repeated letter": "a" * 700,
    "letters at random": "".join(random.Random(0).choices("etaoinshrdlu", k=400)),
    "letters at random, after words": "we ran " + "".join(random.Random(1).choices("abcdefghij", k=300)) + " off",
    "letters without a blank": "\u4eca\u5929\u5f88\u597d\u6211\u4eec" * 60,
    "marks": "\u0e01\u0e33\u0e49" * 60,
    "digits": "31415926535897932384626433" * 12,
    "runs of spaces": "".join("word" + " " * (n % 29) for n in range(60)),
    "spaces only": " " * 700,
    "a long run of spaces in a text": "we ran" + " " * 900 + "off",
    "a long run of dots": "we ran" + "." * 900,
    "spaces before newlines": "".join("line" + " " * (n % 27) + "\n" * (n % 3) for n in range(90)),
    "newlines only": "\n" * 300,
    "carriage returns": "a line\r\nthen another\r\n\r\n" * 20 + "a long tail without any end " * 8,
    "trailing newline": "some words of a post\n" * 30 + "\n",
    "leading newline": "\n" + "one paragraph after it " * 30,
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600\U0001f3fd" * 30,
    "combining": "cafe\u0301 re\u0301sume\u0301 a\u0315\u0300\u05ae\u0301b " * 20,
    "a long word of letters and marks": "e\u0301a\u0315" * 60,
    "long jamo": "\u1112\u1161\u11ab" * 60,
    "jamo": "\u1112\u1161\u11ab\u1100\u1173\u11af" * 30,
    "chinese": "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u8fd9\u662f\u4e00\u4e2a\u5f88\u957f\u6bb5\u843d" * 15,
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 " * 30,
    "zero width": "a\u200bb\u200b \ufeff" * 60,
    "special text": "before <|endoftext|> after <|padding|>" * 20,
    "words cheaper whole than cut": " Unfortunately cardiovascular immunofluorescence" * 20 + "/" * 64,
    "punctuation": "!?...---***___((()))[]{}<>" * 20,
    "mixed case": "tHe QuIcK bRoWn FoX jUmPeD oVeR " * 20,
}


@pytest.mark.parametrize("kind", HARD_POSTS)
def test_format_query_matches_literal_loop_on_hard_posts(kind, tokenizer, library):
    row = reddit(HARD_POSTS[kind])
    shortest = full_length(reddit(""), library)
    longest = full_length(row, library)
    limits = {shortest, shortest + 1, longest - 1, longest, *range(shortest, longest, 7)}
    for max_tokens in sorted(limits):
        if max_tokens >= shortest:
            assert_literal(row, tokenizer, library, max_tokens)


def test_format_query_of_articles_matches_literal_loop(tokenizer, library, posts):
    text = "\n\n".join(row["post"] for row in posts[:12])
    row = {"article": text}
    assert full_length(row, library) > 1919
    assert_literal(row, tokenizer, library, 1919)
    row = {"article": one_paragraph(text)[:1500]}
    for max_tokens in range(full_length(row, library) - 40, full_length(row, library) + 1, 3):
        assert_literal(row, tokenizer, library, max_tokens)


def test_format_query_takes_the_field_that_is_not_none(tokenizer, library):
    """The comparisons' info holds all keys, and None in those which do not apply."""
    post = {**reddit("I fell. " * 30), "id": "x", "site": None, "article": None}
    article = {
        "subreddit": None, "title": "t", "post": None, "id": "x", "site": "cnn", "article": "It fell. " * 30,
    }
    for row in (post, article):
        assert_literal(row, tokenizer, library, 60)


def test_format_query_leaves_title_subreddit_and_row_alone(tokenizer, library):
    row = reddit("word " * 600, title="a title\nin two lines", subreddit="tifu")
    before = dict(row)
    text = tokenizer.decode(format_query(row, tokenizer))
    assert text.startswith("SUBREDDIT: r/tifu\n\nTITLE: a title\nin two lines\n\nPOST: word word")
    assert row == before


def test_query_ends_with_the_prompt_for_a_summary(tokenizer, posts):
    ends = [14135, 28, 4976, 27]  # TL ; DR :
    assert tokenizer.encode("TL;DR:") == ends
    for post in [posts[0]["post"], "word " * 3000, "", "a\n" * 2000, " " * 3000, "TL;DR: no"]:
        ids = format_query(reddit(post), tokenizer)
        assert ids[-4:] == ends
        assert len(ids) <= 512
    assert format_query({"article": "word " * 3000}, tokenizer, 1919)[-5:] == [*ends, 187]  # and a newline


def test_query_that_cannot_fit_is_an_error(tokenizer):
    with pytest.raises(UserError):
        format_query(reddit("short", title="long title " * 400), tokenizer)

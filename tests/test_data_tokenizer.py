"""hub.tokenizer.Tokenizer against the `tokenizers` library, data.format_query against the literal truncation loop."""

import json
import random
import shutil
import sys
import unicodedata

import pytest

from configurator import UserError
from data import format_query
from hub.tokenizer import Tokenizer

library_module = pytest.importorskip("tokenizers")


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


def add_word(**flags):
    word = dict(id=50277, content="<sep>", single_word=False, lstrip=False, rstrip=False, normalized=False)
    return lambda spec: spec["added_tokens"].append({**word, "special": False, **flags})


VARIANTS = {
    "no normalizer": lambda spec: spec.update(normalizer=None),
    "other normalizer": lambda spec: spec.update(normalizer={"type": "NFKC"}),
    "prefix space": lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
    "whole lines": lambda spec: spec["pre_tokenizer"].update(use_regex=False),
    "word added": add_word(),
    "special word added": add_word(special=True),
    "word that takes spaces": add_word(lstrip=True),
    "merge missing": lambda spec: spec["model"]["merges"].pop(0),
    "other order of merges": lambda spec: spec["model"]["merges"].reverse(),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_tokenizer_is_encoded_like_the_library_or_refused(variant, real_tokenizer, tmp_path):
    spec = json.loads(real_tokenizer.read_text(encoding="utf-8"))
    VARIANTS[variant](spec)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    try:
        loaded = Tokenizer.load(str(path))
    except UserError as error:
        assert str(path) in str(error)
        return
    oracle = library_module.Tokenizer.from_file(str(path))
    oracle.encode_special_tokens = True
    assert_same([*WORDS, "a <sep>b  <sep>", "the  then in", "line one\n\nline  two"], loaded, oracle)


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
    "digits": "31415926535897932384626433" * 12,
    "runs of spaces": "".join("word" + " " * (n % 29) for n in range(60)),
    "spaces only": " " * 700,
    "spaces before newlines": "".join("line" + " " * (n % 27) + "\n" * (n % 3) for n in range(90)),
    "newlines only": "\n" * 300,
    "carriage returns": "a line\r\nthen another\r\n\r\n" * 20 + "a long tail without any end " * 8,
    "trailing newline": "some words of a post\n" * 30 + "\n",
    "leading newline": "\n" + "one paragraph after it " * 30,
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600\U0001f3fd" * 30,
    "combining": "cafe\u0301 re\u0301sume\u0301 a\u0315\u0300\u05ae\u0301b " * 20,
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

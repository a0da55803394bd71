"""ROUGE and word counts in any script, against numbers worked by hand; of English, against the plain library."""

import random

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from evals.tables import count_words, rouge, words
from evals.winrate import length_group

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
UNICODE_NAMES = tuple(f"{name}_unicode" for name in NAMES)
COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def f_measure(same, n_reference, n_response):
    return 2 * same / (n_reference + n_response)


# name: (reference, response, its tokens and theirs, equal tokens, equal pairs of neighbours, longest common
# subsequence), all counted by hand
BY_HAND = {
    "Korean": ("어제 개가 공원에서 도망쳤다.", "개가 공원에서 뛰었다", (4, 3), 2, 1, 2),
    "Chinese": ("狗在公园跑了。", "公园里，狗跑了", (6, 6), 5, 2, 4),
    "Japanese": ("犬はコーヒーを飲む", "コーヒー、犬", (9, 5), 5, 3, 4),
    "Thai": ("น้ำดี", "ดีน้ำ", (3, 3), 3, 1, 2),
    "Russian": ("Вчера собака убежала.", "собака вчера Убежала далеко", (3, 4), 3, 0, 2),
    "German": ("Die Straße ist naß.", "DIE STRASSE ist groß", (4, 4), 3, 2, 3),
    "Hindi": ("हिन्दी की किताब", "हिन्दू की किताब", (3, 3), 2, 1, 2),
    "Arabic, its digits": ("اشترى ٣٤ كتابا", "اشترى ٣٥ كتابا", (3, 3), 2, 0, 2),
    "Chinese and English": ("我的 iPhone 坏了 2024", "iPhone坏了", (6, 3), 3, 2, 3),
    "accents in one code point or two": (f"le {COMPOSED}", f"un {DECOMPOSED.upper()}", (2, 2), 1, 0, 1),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_rouge_of_other_letters_matches_numbers_by_hand(case):
    reference, response, (n_reference, n_response), tokens, pairs, subsequence = BY_HAND[case]
    one = f_measure(tokens, n_reference, n_response)
    two = f_measure(pairs, n_reference - 1, n_response - 1)
    longest = f_measure(subsequence, n_reference, n_response)
    expected = dict(zip(UNICODE_NAMES, (one, two, longest, longest), strict=True))
    assert rouge([reference], [response]) == pytest.approx(expected)
    assert rouge([reference], [reference]) == pytest.approx(dict.fromkeys(UNICODE_NAMES, 1.0))


def test_one_kind_of_tokens_is_used_for_all_rows():
    """Then the mean is one: of the English row 2 of 3 tokens are equal, of the Korean one 1 of 2."""
    means = rouge(["the big dog", "개가 도망쳤다"], ["the small dog", "개가 뛰었다"])
    assert set(means) == set(UNICODE_NAMES)
    assert means["rouge1_unicode"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def plain_rouge(references, responses):
    scorer = RougeScorer(NAMES)
    scores = [scorer.score(reference, response) for reference, response in zip(references, responses, strict=True)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in NAMES}


def random_english(rng, n_words):
    """Lines of words, numbers, contractions and signs, as English has them."""
    pieces = "a the The dog ran off don't well-known it’s 3.50 2024 U.S. snake_case — … “no” 🙂 £5 x² I'm, end.\n"
    return " ".join(rng.choices(pieces.split(" "), k=n_words))


def test_english_keeps_the_numbers_of_the_library():
    rng = random.Random(0)
    references = [random_english(rng, 30) for _ in range(100)]
    responses = [random_english(rng, 25) for _ in range(100)]
    references[7] += " at the café"  # English has such words, too
    expected = plain_rouge(references, responses)
    assert rouge(references, responses) == expected
    assert 0.1 < expected["rouge2"] < expected["rougeL"] < 1


def test_more_than_one_other_letter_in_200_makes_the_difference():
    assert set(rouge(["x" * 199 + "é"], ["x"])) == set(NAMES)
    assert set(rouge(["x" * 198 + "é"], ["x"])) == set(UNICODE_NAMES)
    assert set(rouge(["12 - 3!", ""], ["x", "x"])) == set(NAMES)


def test_the_references_decide_whatever_a_model_writes():
    """So models that are sampled for one split have the same kind of numbers."""
    for response in ("the dog", "狗", ""):
        assert set(rouge(["the dog ran"], [response])) == set(NAMES)
        assert set(rouge(["狗跑了"], [response])) == set(UNICODE_NAMES)


def test_words_of_a_to_z_are_the_tokens_of_the_library():
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choices([chr(code) for code in range(128)], k=60))
        assert words(text) == RougeScorer(NAMES)._tokenizer.tokenize(text)


@pytest.mark.parametrize("text, expected", [
    ("スーパー2号", ["ス", "ー", "パ", "ー", "2", "号"]),
    ("二〇〇四年", ["二", "〇", "〇", "四", "年"]),
    ("ขวบ ๒๕๖๗", ["ข", "ว", "บ", "๒๕๖๗"]),
    ("ខ្ញុំ", ["ខ្", "ញុំ"]),
    ("မြန်မာ", ["မြ", "န်", "မာ"]),
    ("ΟΔΟΣ οδος", ["οδοσ", "οδοσ"]),
    ("❤️ 🙂 !? _", []),
])  # fmt: skip
def test_words_of_scripts_without_blanks_are_letters_with_their_marks(text, expected):
    assert words(text) == expected


# ---------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("text, n_words", [
    ("昨天狗在公园跑了，我们一起找。", 13), ("「狗」 跑了!", 3), ("我用iPhone 手机", 5), ("น้ำดี ดี", 4), ("狗 — 猫", 3),
])  # fmt: skip
def test_scripts_without_blanks_count_letters(text, n_words):
    """And no punctuation, unless it stands alone between blanks."""
    assert count_words(text) == n_words


def test_text_with_blanks_counts_what_stands_between_them():
    rng = random.Random(2)
    others = ["Вчера собака-убежала, далеко.", "어제 개가!", "Quoi ? Rien…", "हिन्दी में", ""]
    for text in [*others, *(random_english(rng, 40) for _ in range(200))]:
        assert count_words(text) == len(text.split())


def test_length_groups_of_other_scripts():
    chinese = "昨天狗在公园跑了，我们一起找，最后找到了它。"  # 19 letters
    assert length_group(chinese, "狗跑了") == 4.0
    assert length_group("狗跑了", chinese) == 0.25
    assert length_group("狗在公园跑了", "狗跑了") == 2.0
    assert length_group("The dog ran off.", "狗跑了吗") == 1.0

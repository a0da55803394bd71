"""Is hub/tokenizer.py equal to the `tokenizers` library on a tokenizer.json? Every code point, every merge.

    python bench/tokenizer_all.py ../shared/data/pythia_tokenizer.json      # about three minutes

Encodes all 1,112,064 code points (surrogates are none) in ten contexts by both, and prints for each context how many
texts were compared and how many have other ids. Python's tables of Unicode and the library's differ in age: a text of
which the two make another normal form (NFC) is counted as explained, if the library's form has the library's ids here.

Then looks at each merge. The library merges the pairs that are listed; tiktoken any pair that makes a token. Texts of
all kinds have equal ids if no token is merged, at the border of its two parts, with anything else before.

Exits with 1 if a difference is not explained, or a merge is made otherwise.
"""

import platform
import sys
import unicodedata
from importlib.metadata import version
from pathlib import Path

import tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import require  # noqa: E402
from hub.files import read_json  # noqa: E402
from hub.tokenizer import Tokenizer, byte_symbols  # noqa: E402

CONTEXTS = {
    "alone": "{}",
    "between letters": "a{}b",
    "after a space": "a {}",
    "doubled": "{}{}",
    "after digits": "12{}",
    "before a mark": "{}\u0301",
    "between a letter and a mark": "e{}\u0338",  # its class is the lowest: it goes before all others
    "between Hangul letters": "\u1100{}\u11a8",
    "between runs of spaces": "a  {}   b",
    "between signs": ".{}'s",
}
CODES = [code for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
BATCH = 20_000


class Comparison:
    """Our tokenizer and the library's of one tokenizer.json, and the code points whose difference is explained."""

    def __init__(self, path):
        self.ours = Tokenizer(path)
        self.ours_after_nfc = Tokenizer(path)
        self.ours_after_nfc.is_nfc = False
        self.library = tokenizers.Tokenizer.from_file(path)
        self.library.encode_special_tokens = True  # as text
        self.explained = set()

    def differences(self, context, codes):
        """The numbers of `codes` that have other ids in a context, and of those not explained by NFC."""
        n_different = 0
        n_unexplained = 0
        for start in range(0, len(codes), BATCH):
            batch = codes[start : start + BATCH]
            texts = [context.replace("{}", chr(code)) for code in batch]
            expected = self.library.encode_batch(texts, add_special_tokens=False)
            for code, text, encoding in zip(batch, texts, expected, strict=True):
                if self.ours.encode(text) != encoding.ids:
                    n_different += 1
                    if self.is_explained(text, encoding.ids):
                        self.explained.add(code)
                    else:
                        n_unexplained += 1
                        print(f"not explained: {text!a}")
        return n_different, n_unexplained

    def is_explained(self, text, ids):
        """Whether the library makes another normal form of `text`, which has these ids here, too."""
        if self.library.normalizer is None:
            return False
        normal = self.library.normalizer.normalize_str(text)
        is_other = normal != unicodedata.normalize("NFC", text)
        return is_other and self.ours_after_nfc.encode(normal) == ids


def merges_made_otherwise(path):
    """The tokens that a text may not have in the library, where tiktoken makes them, or the other way round."""
    single = (-1, "", "")
    parts = dict.fromkeys(byte_symbols(), single)  # token -> its rank, and the two tokens that it is merged from
    otherwise = []
    for rank, merge in enumerate(read_json(path)["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        whole = left + right
        parts[whole] = (rank, left, right)
        # Take back the merges beside the border, the latest first, down to two bytes.
        limit = rank
        while len(left) + len(right) > 2:
            if parts[left][0] > parts[right][0]:
                limit, _, left = parts[left]
            else:
                limit = parts[right][0] + 1  # of two equal merges the left one is made first
                right = parts[right][1]
            across = parts.get(left + right)
            if across and across[0] < limit:
                otherwise.append(whole)
                break
    return otherwise


def main(path):
    print(f"Python {platform.python_version()} (Unicode {unicodedata.unidata_version}),", end=" ")
    print(f"tokenizers {version('tokenizers')}, tiktoken {version('tiktoken')}: {path}\n")
    print("| context | compared | different | not explained by NFC |\n|---|---|---|---|")
    comparison = Comparison(path)
    n_wrong = 0
    for name, context in CONTEXTS.items():
        n_different, n_unexplained = comparison.differences(context, CODES)
        print(f"| {name} | {len(CODES):,} | {n_different} | {n_unexplained} |", flush=True)
        n_wrong += n_unexplained
    print(f"\nCode points whose normal form is another in the library: {len(comparison.explained)}")

    otherwise = merges_made_otherwise(path)
    print(f"Merges that tiktoken makes otherwise: {len(otherwise)} {otherwise[:5]}")
    sys.exit(n_wrong + len(otherwise) > 0)


if __name__ == "__main__":
    require(len(sys.argv) == 2, "give one tokenizer.json: python bench/tokenizer_all.py PATH")
    main(sys.argv[1])

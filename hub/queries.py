"""The query made of a post, cut to its length as the reference does (arXiv:2403.17031 details 2.1 to 2.3)."""

import bisect
import functools
import itertools
import unicodedata

from configurator import require
from hub.rows import text_of

LONG_WORD = 100  # characters of a word for which it pays to look closer
MAX_ARTICLE_TOKENS = 1919  # 2047 - 128: what the reference leaves for a CNN/DM article


def format_query(row, tokenizer, max_tokens=512):
    """Token ids of a TL;DR (or CNN/DM) query of at most max_tokens tokens; arXiv:2403.17031 details 2.1 to 2.3.

    row: dict with subreddit, title and post, or with article. A text too long loses its last paragraph (from
    the last newline on) again and again; with none left, its last character. So "TL;DR:" always survives.
    Raises UserError if the query is too long even without its text.
    """
    if row.get("post") is not None:
        subreddit = text_of(row, "subreddit")
        title = text_of(row, "title")
        head = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: "
        text = text_of(row, "post")
        tail = "\n\nTL;DR:"
    else:
        head = "Article:\n"
        text = text_of(row, "article")
        tail = "\n\nTL;DR:\n"
    ids = tokenizer.encode(head + text + tail)
    if len(ids) <= max_tokens:
        return ids

    too_long = first_length_too_long(head, text, tokenizer, max_tokens)
    end = len(text)
    while len(ids) > max_tokens:
        rest = len(ids)
        require(end > 0, f"the query has {rest} tokens without its text, more than {max_tokens}; drop the row")
        newline = text.rfind("\n", 0, end)
        # Cuts that are known to be too long need not be tokenised: `ids` stay those of a longer one, too long as well.
        end = newline if newline >= 0 else min(end, too_long) - 1
        if end < too_long:
            ids = tokenizer.encode(head + text[:end] + tail)
    return ids


def first_length_too_long(head, text, tokenizer, max_tokens):
    """A length such that `text` cut there, or after it, has too many tokens.

    At the end of a word, the tokens before it do not depend on what comes after. So the first such end with too many
    tokens before it rules out all longer cuts. The count rises from word to word: bisection finds it.
    """

    def n_tokens(end):
        return len(tokenizer.encode(head + text[:end]))

    is_normalized = unicodedata.is_normalized("NFC", text)
    ends_of_words = []
    for end, (character, following) in enumerate(itertools.pairwise(text), 1):
        # Elsewhere than in NFC a mark may still join the letter before it.
        if ends_word(character, following) and (is_normalized or following.isspace()):
            ends_of_words.append(end)
    number = bisect.bisect_right(ends_of_words, max_tokens, key=n_tokens)
    ends = [0, *ends_of_words, len(text)]
    fits = ends[number]
    too_long = ends[number + 1]
    if too_long - fits < LONG_WORD:
        return too_long

    # Within a word the count may rise and fall, but it takes some tokens at least to spell out what is there.
    before = (head + text[:fits]).rstrip()
    word = (head + text[:too_long])[len(before) :]
    room = max_tokens - len(tokenizer.encode(before))
    possible = longest_possible(as_spelt(word, tokenizer), tokenizer, room)
    lengths = range(len(word) + 1)
    first = bisect.bisect_right(lengths, possible, key=lambda length: settled_length(word[:length], tokenizer))
    return min(len(before) + first - len(head), too_long)


def as_spelt(text, tokenizer):
    """The text that its tokens spell: normalized, with U+FFFD for half a surrogate pair, as tiktoken has it."""
    text = tokenizer.normalize(text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def settled_length(text, tokenizer):
    """How long a text is as it is spelt, up to its last letter: what follows in a longer text may change that one."""
    text = as_spelt(text, tokenizer)
    end = len(text)
    while end and unicodedata.combining(text[end - 1]):
        end -= 1
    return max(end - 1, 0)


def ends_word(character, following):
    """Whether `character` ends a word, or a run of letters or of digits, whatever comes after `following`."""
    if following in " \n" and not character.isspace():
        return True
    kind = unicodedata.category(character)[0]
    following_kind = unicodedata.category(following)
    # A character that this Python does not know may be a letter to a newer library.
    return kind in "LN" and following_kind[0] != kind and following_kind != "Cn"


def longest_possible(text, tokenizer, room):
    """The length after which no cut of `text` can be spelt with `room` tokens, however they are chosen."""
    tokens, lengths = all_tokens(tokenizer)
    data = text.encode()
    fewest = [0]  # how few tokens spell the first bytes
    for end in range(1, len(data) + 1):
        starts = [end - length for length in lengths if length <= end]
        fewest.append(1 + min(fewest[start] for start in starts if data[start:end] in tokens))
        if min(fewest[-lengths[-1] :]) > room:
            break  # and so it is for all that are longer

    possible = 0
    n_bytes = 0
    for length, character in enumerate(text, 1):
        n_bytes += len(character.encode())
        if n_bytes < len(fewest) and fewest[n_bytes] <= room:
            possible = length
    return possible


@functools.lru_cache(maxsize=4)
def all_tokens(tokenizer):
    """The bytes of all tokens that a text can hold, and the lengths that they have, in order."""
    # Added tokens are cut out first: they stand in no other.
    added = {text.encode() for text in tokenizer.added}
    tokens = set(added)
    for token in tokenizer.vocabulary.values():
        if isinstance(token, bytes) and not any(text in token for text in added):
            tokens.add(token)
    return tokens, sorted(set(map(len, tokens)))

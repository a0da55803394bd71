"""The toy world: the words, the posts and the summaries that everything in toy/ agrees on.

A post states four facts (who, did what, where, when), each in a sentence of its own, in random
order and among asides that carry no fact; two sentences at its end look back on all four. A value
is a single word and belongs to a single slot, so facts can be read back from plain text by their
words alone. A summary is a row of short phrases:

    Anna danced in the kitchen at dawn.

16 values in each of four slots make 65,536 stories: a summary can be good only by reading its post.
"""
import re

SLOTS = {
    "who": "Anna Boris Carla Dmitri Elena Felix Greta Hugo Irene Jonas Karin Lukas Maria Nadia "
           "Oscar Paula".split(),
    "did": "danced fainted cried laughed slept snored sang tripped proposed cheated panicked "
           "sneezed shouted yawned prayed whistled".split(),
    "where": "kitchen garden park library garage office market forest museum hotel bakery church "
             "castle cellar harbor theater".split(),
    "when": "dawn sunrise breakfast noon lunch teatime dusk sunset dinner supper midnight bedtime "
            "christmas easter carnival harvest".split(),
}
SLOT_OF = {value: slot for slot, values in SLOTS.items() for value in values}

# How a summary states a fact. The words before the value cost nothing there (see gold.py).
PHRASES = {"who": "{}", "did": "{}", "where": "in the {}", "when": "at {}"}

# How a post states a fact; no sentence says which other sentence it belongs to.
SENTENCES = {
    "who": ["my friend is called {who}", "i am talking about {who} here", "you all remember {who}"],
    "did": ["for some reason my friend {did}", "out of nowhere my friend {did}",
            "my friend {did} without a word"],
    "where": ["we all were in the {where}", "it started in the {where}",
              "we met people in the {where}"],
    "when": ["it happened at {when}", "we got there at {when}", "this was at {when} last year"],
}
# Looking back, a post ends with all its values once more. Without this a tiny model takes several
# times as long to find out that words are to be copied: here the posts themselves teach it.
RECAPS = [
    ["i will never forget how {who} {did}", "nobody goes in the {where} at {when}"],
    ["i keep seeing {who} in the {where}", "nobody else {did} at {when}"],
    ["why would {who} be there at {when}", "nobody else {did} in the {where}"],
]
ASIDES = [
    "i do not know what to think", "my sister says let it go", "please be honest with me",
    "sorry for my long story", "nobody said anything about it", "this is a new account",
    "my brother thinks it is funny", "i was too tired to care", "it was raining all day",
    "my phone had no battery left", "i had a bad feeling that week", "i would love some advice",
    "maybe i am wrong about this", "it does not make any sense", "my dog was with us too",
]
TITLES = [
    "what should i do now", "need some advice please", "a very strange story", "am i wrong here",
    "i do not get it", "how would you react", "a week to remember", "is this normal",
]
SUBREDDITS = ["relationships", "AskReddit", "tifu", "advice", "family", "pets"]

# Words that writers of summaries pad them with. They state nothing, and cost.
PADDING = [
    "so basically", "well you know", "long story short", "not much to say", "just saying",
    "this is my story", "what a day", "please help", "that was it", "any advice", "more or less",
]

QUERY = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"

WORD = re.compile(r"[^\W\d_]+")  # a run of letters


def _all_texts():
    """Every text fragment that a post, a summary or the query format can contain."""
    templates = [*PHRASES.values(), *sum(SENTENCES.values(), []), *sum(RECAPS, []), *ASIDES,
                 *TITLES, *PADDING]
    return [*SLOT_OF, *SUBREDDITS, *(re.sub(r"{\w*}", " ", template) for template in templates)]


LEXICON = frozenset(word for text in _all_texts() for word in WORD.findall(text))


def sentence_of(words):
    """Words as a summary ends them, with a full stop and no leading space: 'Anna danced.'"""
    return " ".join(words) + "."


def perfect_summary(facts):
    """The best summary of `facts` (slot -> value): every fact once, in order, and nothing else."""
    return sentence_of(PHRASES[slot].format(facts[slot]) for slot in SLOTS if slot in facts)


def parse_facts(post):
    """Read the facts back from a post.

    post: plain text. Returns {slot: value} in the order of SLOTS; of two values for one slot, the
    first. A post that was cut short simply has fewer facts.
    """
    found = {}
    for word in WORD.findall(post):
        if word in SLOT_OF:
            found.setdefault(SLOT_OF[word], word)
    return {slot: found[slot] for slot in SLOTS if slot in found}

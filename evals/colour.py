"""Text on a background that says how a number per token stands: for terminals, and for notebooks, which show it too."""

import codecs


def coloured(tokenizer, ids, numbers, full=3.0):
    """The text of the token ids (R,), each on green if its number is above 0 and on red if it is below.

    numbers: one per token, for example log p - log p of another model. White is 0; the colour is full at +-`full`.
    """
    text = ""
    for token, number in zip(pieces(tokenizer, ids), numbers):
        pale = int(255 * (1 - min(abs(number) / full, 1)))
        colour = f"{pale};255;{pale}" if number > 0 else f"255;{pale};{pale}"
        text += f"\x1b[30;48;2;{colour}m{token}\x1b[0m"
    return text


def pieces(tokenizer, ids):
    """The text of each token; a character that several tokens spell stands at the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for id in ids:
        token = tokenizer.vocabulary.get(id)
        text = ""
        if id == tokenizer.eos_id:
            text = "<EOS>"
        elif isinstance(token, bytes):
            text = decoder.decode(token)
        texts.append(text)
    return texts

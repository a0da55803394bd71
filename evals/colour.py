"""Text on a background that says how a number per token stands: for terminals, and for notebooks, which show it too."""


def coloured(tokenizer, ids, numbers, full=3.0):
    """The text of the token ids (R,), each on green if its number is above 0 and on red if it is below.

    numbers: one per token, for example log p - log p of another model. White is 0; the colour is full at +-`full`.
    """

    def paint(id, number):
        pale = int(255 * (1 - min(abs(number) / full, 1)))
        red, green = (pale, 255) if number > 0 else (255, pale)
        text = "<EOS>" if id == tokenizer.eos_id else tokenizer.decode([id])
        return f"\x1b[30;48;2;{red};{green};{pale}m{text}\x1b[0m"

    return "".join(map(paint, ids, numbers))

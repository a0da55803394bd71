"""Rows of data sets as people publish them, by one function for each schema.

    {subreddit, title, post | article, [summary]}    one response, if there is a summary
    {info, summaries, choice}                        two: the chosen summary and the other
    {prompt, [completion]}                           one, if there is a completion
    {[prompt], chosen, rejected}                     two; without a prompt it is what both transcripts share
    {prompt, responses}                              two or more, ranked, the best first
    {messages}                                       one: the last answer of a chat
    {text}                                           one: all but the first word

A prompt or response may also be a chat: a list of {role, content}. Each function returns the prompt, a text or the post
that data.format_query takes, and the texts of the responses, the best first. Prompt and response are joined as they
are: the response brings its own first space. Two are given one where they have none: a summary, which stands after
"TL;DR:", and an answer, which stands after "Assistant:".
"""

import os
import re

from configurator import UserError, require

ANSWER = "\n\nAssistant:"  # the text after which a response to a chat comes


def from_post(row):
    """{subreddit, title, post | article, [summary]}"""
    if "summary" not in row:
        return row, []
    # References come without the space that the text after "TL;DR:" begins with (detail 3).
    return row, [" " + text_of(row, "summary").lstrip(" ")]


def from_comparison(row):
    """{info, summaries, choice}"""
    pair = row["summaries"]
    choice = row["choice"]
    if choice not in (0, 1) or len(pair) != 2:
        raise UserError(f"choice {choice!r} of {len(pair)} summaries; use 0 or 1, of two")
    choice = int(choice)  # 1.0 in a table that once had gaps
    chosen = text_of(pair[choice], "text")
    rejected = text_of(pair[1 - choice], "text")
    return row["info"], [chosen, rejected]


def from_prompt(row):
    """{[prompt], chosen, rejected} or {prompt, [completion]}"""
    responses = [row.get("chosen"), row.get("rejected"), row.get("completion")]
    given = [response for response in responses if response is not None]
    return split_prompt(row.get("prompt"), given)


def from_ranking(row):
    """{prompt, responses}"""
    return split_prompt(row.get("prompt"), row["responses"])


def from_messages(row):
    """{messages}"""
    return split_prompt(None, [row["messages"]])


def from_text(row):
    """{text}: a model needs a first word to begin with."""
    text = text_of(row, "text")
    first = re.match(r"\s*\S*", text).end()
    return text[:first], [text[first:]]


# The first schema whose column has a value is the row's. (A set of pairs may have `messages` as well, a set of chats
# `prompt`.)
SCHEMAS = {
    "summaries": from_comparison,
    "responses": from_ranking,
    "chosen": from_prompt,
    "completion": from_prompt,
    "messages": from_messages,
    "prompt": from_prompt,
    "post": from_post,
    "article": from_post,
    "text": from_text,
}


def schema_of(row):
    for column, schema in SCHEMAS.items():
        if row.get(column) is not None:
            return schema
    raise UserError(f"its columns {', '.join(row)} fit no schema; see the top of hub/rows.py")


def split_prompt(prompt, responses):
    """Texts or chats -> the prompt's text, and the responses' texts that follow it.

    A response that is a chat may repeat the prompt, or go on after it with one turn or several. Without a prompt, and
    of several turns, the prompt is what all share: up to the last answer of a chat, or up to a space.
    """
    texts = list(map(chat_text, responses))
    for response in responses:
        is_answer = isinstance(response, str) or response[-1]["role"] == "assistant"
        require(is_answer, f"the last turn of {response!r:.80} is not the assistant's; correct or drop the row")
    if prompt is None:
        return split_shared(texts)

    start = chat_text(prompt)
    if all(map(is_one_answer, responses)):
        if isinstance(prompt, str):
            return start, [text.removeprefix(ANSWER) for text in texts]
        return start + ANSWER, [after_answer(text.removeprefix(ANSWER)) for text in texts]

    transcripts = []
    for response, text in zip(responses, texts):
        if repeats(prompt, response):
            transcripts.append(text)
        else:
            transcripts.append(start + text)
    return split_shared(transcripts, len(start))


def is_one_answer(response):
    return isinstance(response, str) or len(response) == 1


def repeats(prompt, chat):
    """Whether a chat begins with the turns of the prompt, or, if that is a text, has it as one of its turns."""
    said = [(turn["role"], turn["content"]) for turn in chat]
    if isinstance(prompt, str):
        return prompt in [content for _, content in said[:-1]]
    return said[: len(prompt)] == [(turn["role"], turn["content"]) for turn in prompt]


def after_answer(text):
    """A text to stand after "Assistant:"."""
    return text if text[:1].isspace() else " " + text


def split_shared(texts, least=0):
    """What all texts begin with, of `least` characters at the least; and what follows it in each."""
    shared = os.path.commonprefix(texts)
    # Cut before a word, for its token takes in the space; or, better, where the last answer begins.
    end = max(shared.rfind(" "), least)
    if ANSWER in shared[least:]:
        end = shared.rfind(ANSWER) + len(ANSWER)
    return shared[:end], [text[end:] for text in texts]


def chat_text(value):
    """A text as it is; a chat, a list of {role, content}, as "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    if isinstance(value, str):
        return value
    wrong = f"{value!r} is neither a text nor a list of {{role, content}}; correct or drop the row"
    require(isinstance(value, list) and value, wrong)
    text = ""
    for turn in value:
        require(isinstance(turn, dict), wrong)
        role = text_of(turn, "role")
        name = "Human" if role == "user" else role.capitalize()
        text += f"\n\n{name}: {text_of(turn, 'content')}"
    return text


def text_of(row, key):
    value = row.get(key)
    require(isinstance(value, str), f"'{key}' is {value!r}, not a text; correct or drop the row")
    return value

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

A judged pair whose choice is null, which nobody could compare, is left out (hub/table.py:load_rows).
"""

import itertools
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
    check(isinstance(pair, list), "summaries {} is no list", pair)
    choice = row.get("choice", "missing")
    if choice not in (0, 1, None) or len(pair) != 2:
        raise UserError(f"choice {choice!r:.80} of {len(pair)} summaries; use 0 or 1, of two")
    # 1.0 in a table that once had gaps. Null is no choice: load_rows leaves such rows out, in whatever order.
    choice = int(choice == 1)
    for value in (row["info"], *pair):
        check(isinstance(value, dict), "{} is no object with texts", value)
    chosen = text_of(pair[choice], "text")
    rejected = text_of(pair[1 - choice], "text")
    return row["info"], [chosen, rejected]


def is_incomparable(row):
    """Whether a row is a judged pair with a choice of null: nobody could say which summary is the better one."""
    is_pair = None not in (row.get("info"), row.get("summaries"))
    return is_pair and row.get("choice", 0) is None


def from_pair(row):
    """{[prompt], chosen, rejected}"""
    prompt = row.get("prompt")
    for name in ("question", "instruction", "query", "input"):
        is_there = prompt is None and row.get(name)
        require(not is_there, f"there is {name!r} beside the pair, but no prompt; rename or drop that column")
    return split_prompt(prompt, [row["chosen"], row["rejected"]])


def from_completion(row):
    """{prompt, completion}"""
    return split_prompt(row["prompt"], [row["completion"]])


def from_prompt(row):
    """{prompt}"""
    return split_prompt(row["prompt"], [])


def from_ranking(row):
    """{prompt, responses}"""
    responses = row["responses"]
    check(isinstance(responses, list), "responses {} is no list", responses)
    return split_prompt(row["prompt"], responses)


def from_messages(row):
    """{messages}"""
    messages = row["messages"]
    check(isinstance(messages, list), "messages {} is no chat", messages)
    return split_prompt(None, [messages])


def from_text(row):
    """{text}: a model needs a first word to begin with."""
    text = text_of(row, "text")
    first = re.match(r"\s*\S*", text).end()
    return text[:first], [text[first:]]


# The first schema whose columns all have a value is the row's. (A set of pairs may have `messages` as well, a set of
# chats `prompt`.)
SCHEMAS = {
    ("info", "summaries"): from_comparison,
    ("prompt", "responses"): from_ranking,
    ("chosen", "rejected"): from_pair,
    ("prompt", "completion"): from_completion,
    ("messages",): from_messages,
    ("prompt",): from_prompt,
    ("post",): from_post,
    ("article",): from_post,
    ("text",): from_text,
}


def schema_of(row):
    given = [column for column, value in row.items() if value is not None]
    for columns, schema in SCHEMAS.items():
        if set(columns) <= set(given):
            return schema
    names = ", ".join(given) or "none"
    raise UserError(f"the columns with a value ({names:.200}) fit no schema; see the top of hub/rows.py")


def split_prompt(prompt, responses):
    """Texts or chats -> the prompt's text, and the responses' texts that follow it.

    A response may repeat the prompt, or go on after it; a chat with one turn or several. Without a prompt, and
    of several turns, the prompt is what all share: up to the last answer of a chat, or up to a space.
    """
    texts = list(map(chat_text, responses))
    for response in responses:
        is_answer = isinstance(response, str) or response[-1]["role"] == "assistant"
        check(is_answer, "the last turn of {} is not the assistant's", response)
    if prompt is None:
        return split_shared(texts)

    start = chat_text(prompt)
    if all(map(is_one_answer, responses)):
        answers = [answer_of(response, text) for response, text in zip(responses, texts)]
        if isinstance(prompt, str):
            return start, without_prompt(prompt, answers)
        return start + ANSWER, list(map(after_answer, answers))

    for response in responses:
        is_chat = isinstance(response, list)
        check(is_chat, "{} is a text, and another response a chat of several turns", response)
    transcripts = [transcript(prompt, response) for response in responses]
    goes_on = all(text.startswith(start) for text in transcripts)
    return split_shared(transcripts, len(start) if goes_on else 0)


def is_one_answer(response):
    return isinstance(response, str) or len(response) == 1


def answer_of(response, text):
    """A response as it follows "Assistant:": a text as it is, and what a chat of one turn says."""
    if isinstance(response, str):
        return response
    return text.removeprefix(ANSWER)


def without_prompt(prompt, answers):
    """Texts that all repeat a prompt of several words lose it."""
    is_long = " " in prompt.strip()
    if is_long and all(answer.startswith(prompt) for answer in answers):
        return [answer.removeprefix(prompt) for answer in answers]
    return answers


def transcript(prompt, chat):
    """All that is said in a row: by the chat alone, if it begins with what the prompt asks, or by one after the other.

    Before that either may have turns of the system, which the other leaves out.
    """
    said = skip_system(chat[:-1])
    text = chat_text(chat)
    if isinstance(prompt, str):
        is_said = said[:1] == [("user", prompt.strip())] or text.startswith(prompt)
        return text if is_said else prompt + text

    asked = skip_system(prompt)
    if said[: len(asked)] != asked:
        return chat_text(prompt) + text
    has_system = chat[0]["role"] == "system" or prompt[0]["role"] != "system"
    if has_system:
        return text
    return chat_text(prompt[: len(prompt) - len(asked)]) + text


def skip_system(chat):
    """The turns of a chat from the first on that is not the system's, as pairs (role, content)."""
    turns = [(turn["role"], turn["content"].strip()) for turn in chat]
    return list(itertools.dropwhile(lambda turn: turn[0] == "system", turns))


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
    is_list = isinstance(value, list) and len(value) > 0
    check(is_list, "{} is neither a text nor a list of role and content", value)
    text = ""
    for turn in value:
        check(isinstance(turn, dict), "{} is no turn with role and content", turn)
        role = text_of(turn, "role")
        name = "Human" if role == "user" else role.capitalize()
        text += f"\n\n{name}: {text_of(turn, 'content')}"
    return text


def text_of(row, key):
    value = row.get(key)
    check(isinstance(value, str), f"'{key}' is {{}}, not a text", value)
    return value


def check(holds, line, value):
    """Raise a UserError about a value of a row, which stands at {} in the line, unless the condition holds."""
    if not holds:
        shown = line.format(f"{value!r:.80}")
        raise UserError(f"{shown}; correct or drop the row")

"""Rows of data sets as people publish them: from files and the hub, by one function for each schema.

    {subreddit, title, post | article, [summary]}    one response, if there is a summary
    {info, summaries, choice}                        two: the chosen summary and the other
    {prompt, [completion]}                           one, if there is a completion
    {[prompt], chosen, rejected}                     two; without a prompt it is what both transcripts share
    {prompt, responses}                              two or more, ranked, the best first

A prompt or response may also be a chat: a list of {role, content}. Each function returns the prompt, a text or the post
that data.format_query takes, and the texts of the responses, the best first.
"""

import os
from pathlib import Path

from configurator import UserError, explain, require

ANSWER = "\n\nAssistant:"  # the text after which a response to a chat comes


def read_split(source, split):
    """The raw rows as a `datasets.Dataset`."""
    import datasets  # here, since it takes a second and a notebook may only want the tokenizer

    datasets.disable_progress_bars()
    name = split.split("[")[0]  # of "train[:100]"
    path = source.replace("{split}", name)
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(path).suffix)
    with explain(f"{path} [{split}]: cannot be loaded; check path, split and file", Exception):
        if kind is None:
            return datasets.load_dataset(path, split=split)
        return datasets.load_dataset(kind, split=split, data_files={name: path})


def from_post(row):
    """{subreddit, title, post | article, [summary]}"""
    if row.get("post") is None and row.get("article") is None:
        raise UserError(f"its columns {', '.join(row)} fit no schema; see the top of hub/rows.py")
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


# The first schema whose column has a value is the row's; a row without any of these is a post.
SCHEMAS = {
    "summaries": from_comparison,
    "responses": from_ranking,
    "prompt": from_prompt,
    "chosen": from_prompt,
}


def schema_of(row):
    for column, schema in SCHEMAS.items():
        if row.get(column) is not None:
            return schema
    return from_post


def split_prompt(prompt, responses):
    """Texts or chats -> the prompt's text, and the responses' texts that follow it.

    Without a prompt, and where a response is a chat that repeats it, the prompt is what all share: up to the last
    answer of a chat, or up to a space.
    """
    texts = list(map(chat_text, responses))
    chats = [response for response in responses if isinstance(response, list)]
    repeats_prompt = max(map(len, chats), default=0) > 1  # a chat of several turns
    if prompt is None or repeats_prompt:
        shared = os.path.commonprefix(texts)
        # Cut before a word, for its token takes in the space; or, better, where the last answer begins.
        end = max(shared.rfind(" "), 0)
        if ANSWER in shared:
            end = shared.rfind(ANSWER) + len(ANSWER)
        return shared[:end], [text[end:] for text in texts]

    answers = []
    for response, text in zip(responses, texts):
        if isinstance(response, list):
            text = text.removeprefix(ANSWER)
        answers.append(text)
    if isinstance(prompt, str):
        return prompt, answers
    return chat_text(prompt) + ANSWER, answers


def chat_text(value):
    """A text as it is; a chat, a list of {role, content}, as "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    if isinstance(value, str):
        return value
    wrong = f"{value!r} is neither a text nor a list of {{role, content}}; correct or drop the row"
    require(isinstance(value, list), wrong)
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

"""The files beside a model's weights by which other libraries know how to use it."""

import shutil

from hub.files import write_json

# What hub/rows.py:chat_text makes of a chat, for those who have `messages`.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '\\n\\n' + ('Human' if message['role'] == 'user' else message['role'] | capitalize) + ': ' + message['content'] }}
{%- endfor -%}
{{ '\\n\\nAssistant:' if add_generation_prompt else '' }}"""


def write_companions(directory, tokenizer, longest):
    """Write tokenizer.json, tokenizer_config.json and generation_config.json. longest: the model's positions."""
    shutil.copyfile(tokenizer.path, directory / "tokenizer.json")
    padding = next((text for text in tokenizer.special if "pad" in text.lower()), tokenizer.eos_token)
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.eos_token,
        "eos_token": tokenizer.eos_token,
        "unk_token": tokenizer.eos_token,
        "pad_token": padding,
        "model_max_length": longest,
        "model_input_names": ["input_ids", "attention_mask"],  # GPT-NeoX takes no token types
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(directory / "tokenizer_config.json", values)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_id)
    write_json(directory / "generation_config.json", {**ids, "pad_token_id": tokenizer.special[padding]})

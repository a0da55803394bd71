"""config.json: what shapes the computation of a GPT-NeoX, under the names that every version of transformers reads."""

import os
from dataclasses import dataclass, fields

from configurator import Count, UserError, check, explain, require
from hub.files import read_json
from hub.missing import no_model

# What this code has fixed: where config.json speaks of it, it must agree.
FIXED = dict(model_type="gpt_neox", attention_bias=True, tie_word_embeddings=False)
# transformers' names of the GELU -> F.gelu's. Those of the approximation by tanh differ by rounding.
GELUS = dict(gelu="none", gelu_new="tanh", gelu_fast="tanh", gelu_pytorch_tanh="tanh")


@dataclass
class GPTNeoXConfig:
    """The fields of the hub's config.json that shape the computation; the defaults are Pythia-14m's."""

    vocab_size: Count = 50304
    hidden_size: Count = 128
    num_hidden_layers: Count = 6
    num_attention_heads: Count = 4
    intermediate_size: int = 0  # 0: four times hidden_size
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10000.0
    max_position_embeddings: Count = 2048
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_parallel_residual: bool = True
    eos_token_id: int = 0
    hidden_act: str = "gelu"

    def __post_init__(self):
        unknown = f"hidden_act {self.hidden_act!r} is not supported, only {', '.join(GELUS)}"
        require(self.hidden_act in GELUS, unknown)
        self.gelu = GELUS[self.hidden_act]
        if self.intermediate_size == 0:
            self.intermediate_size = 4 * self.hidden_size
        head_width = self.hidden_size // self.num_attention_heads
        self.rotary_dims = int(head_width * self.rotary_pct)
        wrong = f"sizes that do not fit together (heads, rotary dims) or are too large: {self}"
        require(self.hidden_size % self.num_attention_heads == 0, wrong)
        require(self.rotary_dims % 2 == 0 and self.rotary_pct <= 1, wrong)
        require(max(self.vocab_size, self.hidden_size, self.intermediate_size) < 10**7, wrong)
        require(self.num_hidden_layers < 1000, wrong)

    @classmethod
    def from_directory(cls, directory):
        """Read `directory`/config.json; keys that do not shape the computation are ignored."""
        stored = read_config(directory)
        where = os.path.join(directory, "config.json")
        values = {}
        for field in fields(cls):
            if stored.get(field.name) is not None:
                values[field.name] = check(field, stored[field.name], where)
        if not values:  # a run's config.json, for example
            raise no_model(directory, "config.json of a model")
        with explain(where, UserError):
            return cls(**values)


def read_config(directory):
    """The values of `directory`/config.json, under the names that GPT-NeoX models had before transformers 5."""
    path = os.path.join(directory, "config.json")
    if not os.path.exists(path):
        raise no_model(directory, "config.json")
    values = read_json(path)
    # The reward models of arXiv:2403.17031 keep the body's values apart, and subtract `bias` from what the head gives.
    body = values.get("base_config")
    if isinstance(body, dict):
        with explain(f"{path}: bias is no number", TypeError, ValueError, OverflowError):
            body["mean_reward"] = float(values.get("bias", 0.0))
        values = body
    for name, value in FIXED.items():
        found = values.get(name, value)
        require(found == value, f"{path}: {name} = {found!r} is not supported, only {value!r}")
    ends = values.get("eos_token_id")
    if isinstance(ends, list):  # Training takes the tokenizer's EOS; this one is only written again.
        values["eos_token_id"] = ends[0] if ends else None
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    unsupported = f"{path}: rope scaling {rope!r} is not supported; use a model without it"
    require(isinstance(rope, dict), unsupported)
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind == "default", unsupported)
    if "partial_rotary_factor" in rope:
        values["rotary_pct"] = rope["partial_rotary_factor"]
    if "rope_theta" in rope:
        values["rotary_emb_base"] = rope["rope_theta"]
    return values

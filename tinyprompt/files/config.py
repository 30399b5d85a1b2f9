"""Parse Hugging Face's `config.json` into a Config."""

from collections.abc import Mapping
from typing import Any

from tinyprompt.config import Config

IDS = {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}  # the ids of every T5 in the papers
# Keys that affect the generated text, each with its neutral values.
GENERATION: dict[str, tuple] = {
    "forced_bos_token_id": (),
    "forced_eos_token_id": (1,),
    "forced_decoder_ids": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "sequence_bias": ({},),
    "exponential_decay_length_penalty": (),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
}


def check_generation(raw: Mapping[str, Any]) -> None:
    """Check the keys of a `config.json` or a `generation_config.json` that affect the generated text.

    Raises:
        ValueError: A value is not supported. The message names the key.
    """
    for key, expected in IDS.items():
        if raw.get(key) not in (None, expected, [expected]):
            raise ValueError(f"key {key!r}: expected {expected}, as in every published T5, found {raw[key]!r}")
    for key, neutral in GENERATION.items():
        if raw.get(key) is not None and raw[key] not in neutral:
            told = "is not supported; transformers would generate another text"
            raise ValueError(f"key {key!r}: {raw[key]!r:.60} {told}; remove the key to accept the difference")


def parse_config(raw: Mapping[str, Any]) -> Config:
    """Build a Config from the content of a `config.json`.

    Raises:
        ValueError: A value is missing, out of range or not supported. The message names the key.
    """
    family = raw.get("model_type", "t5")
    if family not in ("t5", "mt5", "umt5"):
        raise ValueError(f"key 'model_type': {family!r} is not in the T5 family; expected 't5', 'mt5' or 'umt5'")

    def number(key: str, default: Any = None, kind: Any = int) -> Any:
        value = raw.get(key, default)
        most = {"num_layers": 1000, "num_decoder_layers": 1000, "layer_norm_epsilon": 1}.get(key, 2**31 - 1)
        if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value <= most:
            raise ValueError(f"key {key!r}: expected a positive number, at most {most}, found {value!r}")
        return value

    check_generation(raw)
    buckets = number("relative_attention_num_buckets", 32)
    furthest = number("relative_attention_max_distance", 128)
    if buckets < 4 or buckets % 2:
        raise ValueError(f"key 'relative_attention_num_buckets': expected an even number above 2, found {buckets}")
    if furthest <= buckets // 2:  # in the decoder, half of the buckets are for exact distances
        raise ValueError(f"key 'relative_attention_max_distance': expected more than {buckets // 2}, found {furthest}")

    kinds = {"relu": False, "gated-gelu": True, "gated-gelu_new": True}
    kind = raw.get("feed_forward_proj", "gated-gelu" if family != "t5" else "relu")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"key 'feed_forward_proj': expected one of {sorted(kinds)}, found {kind!r}")
    # mT5 never ties its head. A T5 1.0 config omits the key, which means tied.
    # transformers 5 always saves a T5 as tied, and stores the original value under another key.
    tied = raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True)) is not False and family != "mt5"
    return Config(
        **{k: number(k) for k in ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers")},
        num_decoder_layers=number("num_decoder_layers", raw.get("num_layers")),
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=furthest,
        layer_norm_epsilon=number("layer_norm_epsilon", 1e-6, float),
        gated=kinds[kind],
        tied_head=tied,
        scaled_logits=tied,
        bias_in_every_layer=family == "umt5",
    )

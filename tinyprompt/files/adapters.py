"""Convert between PEFT's adapters (LoRA and IA3) and our arrays."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinyprompt.errors import CheckpointError
from tinyprompt.tree import Flat

KINDS = {"LORA": "lora", "IA3": "ia3"}  # peft_type -> method
START = "base_model.model."
# The layers that PEFT adapts in a T5 by default. `methods` adapts the same matrices.
TARGETS = {"LORA": {"q", "v"}, "IA3": {"k", "v", "wo"}}
# Keys of adapter_config.json with their neutral values. Any other value would change the method.
NEUTRAL: dict[str, tuple] = {
    "use_rslora": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": ([],),
    "layers_to_transform": ([],),
    "layers_pattern": ([], ""),
    "exclude_modules": ([],),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "alora_invocation_tokens": ([],),
    "megatron_config": ({},),
}
LORA = re.compile(r"(.*\.(?:SelfAttention|EncDecAttention)\.[qv])\.lora_([AB])\.weight")
IA3 = re.compile(r"(.*\.(?:SelfAttention|EncDecAttention)\.[kv]|.*\.DenseReluDense\.wo)\.ia3_l")


def from_peft(config: Mapping[str, Any], tensors: Flat, where: Any) -> tuple[Flat, dict[str, Any]]:
    """Convert the tensors of a LoRA or IA3 adapter to the arrays of the method, and return its settings.

    Args:
        config: The content of adapter_config.json.
        tensors: The tensors by PEFT's names.
        where: The path of adapter_config.json, for errors.

    Raises:
        CheckpointError: A key of the configuration or a tensor is not supported. The message names it.
    """
    kind = config["peft_type"]
    for key, neutral in NEUTRAL.items():
        if config.get(key) is not None and config[key] not in neutral:
            raise CheckpointError(f"{where}: key {key!r}: {config[key]!r:.60} is not supported; retrain without it")
    found = config.get("target_modules")
    if not isinstance(found, list) or set(found) != TARGETS[kind]:
        expected = ", ".join(sorted(TARGETS[kind]))
        raise CheckpointError(f"{where}: key 'target_modules': expected {expected}, found {found!r:.80}")
    params: Flat = {}
    rank = int(_number(config, "r", where)) if kind == "LORA" else 0
    for name, value in tensors.items():
        match = (LORA if kind == "LORA" else IA3).fullmatch(name.removeprefix(START))
        if not name.startswith(START) or match is None:
            raise CheckpointError(f"{where.parent}: key {name!r} is not part of {KINDS[kind]} in a T5")
        at = match[1]
        if kind == "IA3":
            params[f"{at}.ia3.{'columns' if at.endswith('wo') else 'rows'}"] = value.reshape(-1)
        elif match[2] == "A":
            params[f"{at}.lora.a"] = value
        else:
            params[f"{at}.lora.b"] = value * np.float32(_number(config, "lora_alpha", where) / rank)
    return params, {"method": KINDS[kind]} | ({"rank": rank} if kind == "LORA" else {})


def to_peft(params: Flat, method: str) -> tuple[dict[str, Any], Flat]:
    """Convert the arrays of LoRA or IA3 to PEFT's adapter_config.json keys and tensors."""
    if method == "lora":
        rank = min(len(value) for name, value in params.items() if name.endswith(".a"))
        names = {".lora.a": ".lora_A.weight", ".lora.b": ".lora_B.weight"}
        about = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none"}
        about |= {"target_modules": sorted(TARGETS["LORA"]), "use_rslora": False, "use_dora": False}
        return about, {START + name[:-7] + names[name[-7:]]: value for name, value in params.items()}
    tensors = {}
    for name, value in params.items():
        at, _, part = name.partition(".ia3.")
        tensors[f"{START}{at}.ia3_l"] = value.reshape((1, -1) if part == "columns" else (-1, 1))
    return {"peft_type": "IA3", "target_modules": sorted(TARGETS["IA3"]), "feedforward_modules": ["wo"]}, tensors


def _number(config: Mapping[str, Any], key: str, where: Any) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"{where}: key {key!r}: expected a positive number, found {value!r}")
    return value

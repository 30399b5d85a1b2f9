"""The other side of `tinyprompt bench`: transformers, PEFT and torch, in a process of their own.

The only module that imports torch; no other module imports this one.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoTokenizer, T5ForConditionalGeneration

from tinyprompt.files.prompts import load_prompt
from tinyprompt.tools.bench import LABELS, PROMPT_FILE, TEXT, Problem, forget_peak, peak_memory
from tinyprompt.tools.process import serve


def run(engine: str, folder: Path, problem: Problem) -> None:
    """Serve the calls of "peft-fp32", "peft-bf16" (autocast; on a GPU also bf16 weights) or "peft-compile" (fp32)."""
    bf16, on_gpu = engine == "peft-bf16", problem.device == "cuda"
    dtype = torch.bfloat16 if bf16 and on_gpu else torch.float32
    frozen: Any = T5ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    frozen.to(problem.device)
    config = PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=problem.prompt_length, num_transformer_submodules=1
    )
    model: Any = get_peft_model(frozen, config)
    prompt = load_prompt(folder / PROMPT_FILE).array
    model.prompt_encoder["default"].embedding.weight.data.copy_(torch.from_numpy(prompt))
    model.save_pretrained(str(folder / "peft"))  # for the cold start
    model.train()  # as a training loop has it; the dropout rate is 0
    batch = problem.draw(frozen.config.vocab_size)
    arrays = dict(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=np.where(batch.weights, batch.labels, -100),
    )
    inputs = {name: torch.from_numpy(x).to(problem.device) for name, x in arrays.items()}
    forward = torch.compile(model) if engine == "peft-compile" else model

    def loss():
        with torch.autocast(problem.device, torch.bfloat16, enabled=bf16):
            return forward(**inputs).loss

    def step():
        model.zero_grad()
        loss().backward()
        if on_gpu:
            torch.cuda.synchronize()

    def score():
        with torch.no_grad():
            return float(loss())

    def write():
        tokens = {"min_new_tokens": problem.new_tokens, "max_new_tokens": problem.new_tokens}
        rows = {name: x for name, x in inputs.items() if name != "labels"}
        with torch.autocast(problem.device, torch.bfloat16, enabled=bf16):
            model.generate(**rows, **tokens, do_sample=False)

    def gradient():
        step()
        np.save(folder / f"{engine}.npy", model.prompt_encoder["default"].embedding.weight.grad.float().cpu().numpy())

    calls = {"step": step, "score": lambda: str(score()), "generate": write, "loss": score, "gradient": gradient}
    serve(calls | {"forget peak": forget_peak, "memory": peak_memory})


def cold_start(folder: Path) -> None:
    """The first prediction of a fresh process: the likelier of two labels."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    frozen = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(frozen, folder / "peft").eval()
    inputs = tokenizer([TEXT] * len(LABELS), return_tensors="pt")
    labels = tokenizer(list(LABELS), return_tensors="pt", padding=True).input_ids
    with torch.no_grad():
        log_p = model(**inputs, labels=labels).logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    print(LABELS[int((log_p * (labels != tokenizer.pad_token_id)).sum(-1).argmax())])


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "cold":
        cold_start(Path(where))
    else:
        run(what, Path(where), Problem(**json.loads(rest[0])))

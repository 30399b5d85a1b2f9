"""PEFT's side of `tinyprompt bench`: transformers, PEFT and torch.

It runs in its own process, and no other module imports this one.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, T5ForConditionalGeneration

from tinyprompt.bench.runs import FIRST, Run, tell
from tinyprompt.bench.steps import LABELS, PROMPT_FILE, TEXT, Problem, forget_peak, peak_memory
from tinyprompt.check.process import serve
from tinyprompt.files.prompts import load_prompt
from tinyprompt.tasks import metrics


def prompted(where: Any, first: Path, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, Any]:
    """Return a frozen T5 with the saved soft prompt `first`, and the parameter that holds its vectors."""
    vectors = torch.from_numpy(load_prompt(first).array)
    frozen: Any = T5ForConditionalGeneration.from_pretrained(where, dtype=dtype)
    config = PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=len(vectors), num_transformer_submodules=1
    )
    model: Any = get_peft_model(frozen.to(device), config)
    weight = model.prompt_encoder["default"].embedding.weight
    weight.data.copy_(vectors)
    return model, weight


def run(engine: str, folder: Path, problem: Problem) -> None:
    """Answer the calls to "peft-fp32", "peft-bf16" (autocast; on a GPU also bf16 weights) or "peft-compile" (fp32)."""
    bf16, on_gpu = engine == "peft-bf16", problem.device == "cuda"
    dtype = torch.bfloat16 if bf16 and on_gpu else torch.float32
    model, weight = prompted(folder, folder / PROMPT_FILE, dtype, problem.device)
    model.save_pretrained(str(folder / "peft"))  # for the cold start
    model.train()  # as in a training loop; the dropout rate is 0
    batch = problem.draw(model.config.vocab_size)
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
        np.save(folder / f"{engine}.npy", weight.grad.float().cpu().numpy())

    calls = {"step": step, "score": lambda: str(score()), "generate": write, "loss": score, "gradient": gradient}
    serve(calls | {"forget peak": forget_peak, "memory": peak_memory})


def tune(engine: str, folder: Path) -> None:
    """Tune as PEFT's examples do: a DataLoader, Adam, a schedule, and generated answers."""
    run = Run.read(folder)
    settings = run.settings
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    model, weight = prompted(run.model, folder / FIRST, torch.float32)

    def tokenized(rows):
        inputs = tokenizer([row.input for row in rows], truncation=True, max_length=settings.max_input_tokens)
        labels = tokenizer([row.target for row in rows]).input_ids
        return [dict(zip((*inputs, "labels"), row, strict=True)) for row in zip(*inputs.values(), labels, strict=True)]

    collate = DataCollatorForSeq2Seq(tokenizer)
    options: Any = {"batch_size": settings.batch_size, "collate_fn": collate}
    order = torch.Generator().manual_seed(settings.seed)
    training = DataLoader(tokenized(run.train), shuffle=True, generator=order, **options)
    dev = DataLoader(tokenized(run.dev), **options)
    longest = max(len(tokenizer(word).input_ids) for word in run.label_words)
    optimizer = torch.optim.Adam([weight], lr=run.learning_rate)
    falls = settings.schedule == "linear"
    schedule = LambdaLR(optimizer, lambda step: 1 - step / settings.steps if falls else 1.0)

    def precision():
        return torch.autocast("cpu", torch.bfloat16, enabled=engine == "peft-bf16")

    def accuracy():
        model.eval()
        said: list[str] = []
        with torch.no_grad(), precision():
            for batch in dev:
                batch.pop("labels")
                said += tokenizer.batch_decode(
                    model.generate(**batch, max_new_tokens=longest), skip_special_tokens=True
                )
        model.train()
        return metrics.accuracy(said, [row.target for row in run.dev])

    tell(accuracy())
    batches = itertools.chain.from_iterable(itertools.repeat(training))
    for step, batch in enumerate(itertools.islice(batches, settings.steps), 1):
        with precision():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % settings.eval_every == 0 or step == settings.steps:
            tell(accuracy())


def cold_start(folder: Path) -> None:
    """Make the first prediction in a new process: the more likely of two labels."""
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
    if what == "tune":
        tune(where, Path(rest[0]))
    elif what == "cold":
        cold_start(Path(where))
    else:
        run(what, Path(where), Problem(**json.loads(rest[0])))

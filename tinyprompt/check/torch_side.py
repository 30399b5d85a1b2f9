"""torch's side of `tinyprompt check`: transformers computes the same batches, in its own process.

python -m tinyprompt.check.torch_side MODEL FOLDER     # reads FOLDER/case0.npz, ... and writes found0.npz, ...
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM

from tinyprompt.check.process import serve
from tinyprompt.files.models import read_config


def exact_norm(self, x):
    """The layer norm of transformers without its cast to float32, which causes an error of 1e-7 in float64."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def loss_and_logits(model, prompt, input_ids, attention_mask, labels, weights):
    """Compute the weighted mean cross entropy of the labels and their logits, with a prompt before the embedded input.

    Shapes, all tensors: prompt (P, D) or (B, P, D), input_ids and attention_mask (B, L), labels and weights (B, T).
    """
    embedded = model.get_input_embeddings()(input_ids)
    prompt = prompt.expand(len(input_ids), *prompt.shape[-2:])
    logits = model(
        inputs_embeds=torch.cat([prompt, embedded], 1),
        attention_mask=torch.cat([torch.ones(prompt.shape[:2], dtype=torch.int64), attention_mask], 1),
        decoder_input_ids=torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], 1),
        use_cache=False,
    ).logits
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (nll * weights).sum() / weights.sum(), logits


def run(where: str, folder: str, name: str) -> None:
    """Compute logits, loss and prompt gradient of every case in a folder, in one dtype."""
    dtype = getattr(torch, name)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(where, dtype=dtype, local_files_only=True).eval()
    # transformers 5 treats every UMT5 as tied, and would scale its logits.
    model.config.tie_word_embeddings = read_config(Path(where) / "config.json").tied_head
    for module in model.modules():
        if dtype == torch.float64 and type(module).__name__.endswith("LayerNorm"):
            module.forward = exact_norm.__get__(module)
    for path in sorted(Path(folder).glob("case*.npz")):
        arrays = {key: torch.from_numpy(x) for key, x in np.load(path).items()}
        prompt, weights = (arrays.pop(key).to(dtype) for key in ("prompt", "weights"))
        loss, logits = loss_and_logits(model, prompt.requires_grad_(), weights=weights, **arrays)
        loss.backward()
        found = dict(logits=logits, loss=loss, gradient=prompt.grad)
        np.savez(
            path.with_name(path.name.replace("case", "found")), **{k: x.detach().numpy() for k, x in found.items()}
        )


if __name__ == "__main__":
    serve({name: partial(run, sys.argv[1], sys.argv[2], name) for name in ("float64", "float32")})

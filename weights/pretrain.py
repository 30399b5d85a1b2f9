"""Pre-train the small T5 that tinyprompt carries: span corruption, then LM adaptation.

    python weights/pretrain.py TEXT_DIR WORK_DIR [--span-tokens N] [--lm-tokens N]

TEXT_DIR holds *.txt.xz files of UTF-8 text, one paragraph a line, an empty line between
documents; files named *.valid.txt.xz are held out. WORK_DIR receives the tokenizer, the token
streams, a checkpoint every few minutes (from which a second call goes on by itself), log.jsonl,
and at the end one Hugging Face directory a stage: `span/` and `lm/`.

Needs torch and transformers, which tinyprompt itself does not.
Method: Raffel et al. 2020 (arXiv:1910.10683) section 3.1.4; Lester et al. 2021
(arXiv:2104.08691) section 3.2 for the LM adaptation that makes a frozen T5 promptable.
"""

import argparse
import json
import lzma
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import T5Config, T5ForConditionalGeneration

PIECES, SENTINELS = 8092, 100
PAD, EOS, UNK = 0, 1, 2
ROW = 128  # tokens of running text that are shuffled as one
SPAN_WINDOWS, LM_WINDOW, PREFIXES = (32, 64), 64, (32, 48)  # short, as task inputs are; few, as each shape is compiled
NOISE, SPAN = 0.25, 3  # share of masked tokens (the decoder sees more than at T5's 15 %) and mean length of a span
BATCH = 16  # rows a step: 2,048 tokens. Four times as many took longer to learn to attend, not shorter
PEAK, FLOOR = 0.01, 0.0003  # learning rate, in units of each tensor's own RMS
WARMUP, COOLDOWN = 200, 0.5  # steps; share of the LM stage in which the rate falls

CONFIG = dict(
    vocab_size=PIECES + SENTINELS,
    d_model=192,
    d_kv=64,
    num_heads=3,
    d_ff=512,
    num_layers=4,
    num_decoder_layers=2,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
    dropout_rate=0.0,
    pad_token_id=PAD,
    eos_token_id=EOS,
    decoder_start_token_id=PAD,
)


def paragraphs(path):
    """Yield the lines of one .txt.xz file, '' between documents."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield line.strip()


def train_tokenizer(files, path):
    """A lower-cased Unigram vocabulary: pad 0, eos 1, unk 2, pieces by frequency, sentinels last."""
    tok = Tokenizer(models.Unigram())
    tok.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=PIECES,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        max_piece_length=16,
        show_progress=False,
    )
    # Every 8th paragraph: about 30 MB are enough for a vocabulary.
    sample = (p for f in files for i, p in enumerate(paragraphs(f)) if p and i % 8 == 0)
    tok.train_from_iterator(sample, trainer)
    state = json.loads(tok.to_str())
    assert len(state["model"]["vocab"]) == PIECES
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    # As in T5, <extra_id_0> has the highest id. A score of 0 is harmless: added tokens never reach the model.
    state["model"]["vocab"] += [[s, 0.0] for s in reversed(sentinels)]
    tok = Tokenizer.from_str(json.dumps(state))
    tok.add_special_tokens(["<pad>", "</s>", "<unk>", *sentinels])
    tok.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
    )
    assert tok.get_vocab_size() == PIECES + SENTINELS
    assert tok.token_to_id("<extra_id_0>") == PIECES + SENTINELS - 1
    tok.save(str(path))


def tokenize(files, tokenizer, path):
    """Write all documents, each closed by eos, as one uint16 stream."""
    ends = np.array([EOS], np.uint16)
    temporary = path.with_suffix(".part")
    with open(temporary, "wb") as out:
        for file in files:
            block = []

            def flush(block=block):
                for enc in tokenizer.encode_batch(block, add_special_tokens=False):
                    ids = np.array(enc.ids, np.uint16)
                    (ids if len(ids) else ends).tofile(out)
                block.clear()

            for line in paragraphs(file):
                block.append(line)
                if len(block) == 4096:
                    flush()
            flush()
            ends.tofile(out)
    temporary.rename(path)


class Windows:
    """ROW-token pieces of a stream, reshuffled every epoch; batch i depends on (seed, i) only."""

    def __init__(self, path, seed):
        stream = np.memmap(path, np.uint16, "r")
        self.rows = stream[: len(stream) // ROW * ROW].reshape(-1, ROW)
        self.seed = seed

    def __call__(self, i, size):
        per_epoch = len(self.rows) // size
        epoch, at = divmod(i, per_epoch)
        if getattr(self, "epoch", None) != epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return self.rows[np.sort(self.order[at * size : (at + 1) * size])].astype(np.int64)


def span_corruption(rows, rng):
    """T5's objective with a fixed number of spans, so that every example of a batch has one shape."""
    width = int(rng.choice(SPAN_WINDOWS))
    noise = int(width * NOISE)
    spans = round(noise / SPAN)
    inputs, targets = [], []
    top = PIECES + SENTINELS - 1

    def parts(total):
        return np.diff([0, *np.sort(rng.choice(total - 1, spans - 1, replace=False) + 1), total])

    for row in rows.reshape(-1, width):
        x, y, at = [], [], 0
        for k, (keep, drop) in enumerate(zip(parts(width - noise), parts(noise), strict=True)):
            x += [*row[at : at + keep], top - k]
            y += [top - k, *row[at + keep : at + keep + drop]]
            at += keep + drop
        inputs.append([*x, EOS])
        targets.append([*y, EOS])
    return np.array(inputs), np.array(targets)


def prefix_lm(rows, rng):
    """LM adaptation: a prefix, one length a batch, then its continuation with an eos somewhere in it.

    The place of the eos is random, so that an answer may end after any number of tokens; what follows it
    is the rest of the text, so that no token goes unused.
    """
    rows, p = rows.reshape(-1, LM_WINDOW), int(rng.choice(PREFIXES))
    ends = np.full((len(rows), 1), EOS)
    targets = np.concatenate([rows[:, p:], ends], 1)
    cut = rng.integers(1, targets.shape[1], (len(rows), 1))
    order = np.arange(targets.shape[1]) - (np.arange(targets.shape[1]) >= cut)
    np.put_along_axis(order, cut, targets.shape[1] - 1, 1)
    return np.concatenate([rows[:, :p], ends], 1), np.take_along_axis(targets, order, 1)


STAGES = {"span": span_corruption, "lm": prefix_lm}


class ScaledAdam(torch.optim.Optimizer):
    """Adam whose step is a share of each tensor's own RMS, as Adafactor's parameter scaling; gradients clipped to 1."""

    def __init__(self, params, betas=(0.9, 0.98), eps=1e-3):
        super().__init__(params, dict(lr=0.0, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            clip = (1 / torch.nn.utils.get_total_norm([p.grad for p in group["params"]])).clamp(max=1.0)
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["t"] += 1
                fixes = torch.tensor([1 - b ** state["t"] for b in group["betas"]], device=p.device)
                rate = torch.tensor(group["lr"], device=p.device)
                adam_update(p, p.grad, state["m"], state["v"], clip, rate, fixes, group["betas"], group["eps"])


@torch.compile(dynamic=False)
def adam_update(p, grad, m, v, clip, rate, fixes, betas, eps):
    """One tensor's step, in one pass over its memory."""
    grad = grad * clip
    m.lerp_(grad, 1 - betas[0])
    v.lerp_(grad * grad, 1 - betas[1])
    scale = p.square().mean().sqrt().clamp(min=eps)
    p.sub_(rate * scale * (m / fixes[0]) / ((v / fixes[1]).sqrt() + 1e-12))


def loss_of(model, x, y):
    """Mean cross entropy of the targets; bf16 products, float32 loss."""
    start = torch.full_like(y[:, :1], PAD)
    with torch.autocast(x.device.type, torch.bfloat16):
        logits = model(input_ids=x, decoder_input_ids=torch.cat([start, y[:, :-1]], 1), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def build_model():
    """A fresh T5 1.1 whose attention starts where trained attention ends up (Trockman and Kolter 2023).

    With random attention the decoder ignores the encoder for thousands of steps, more than this budget has. So:
    queries and keys match equal vectors, values and outputs pass a vector on (arXiv:2305.09828), and the position
    biases look at the nearest neighbours.
    """
    model = T5ForConditionalGeneration(T5Config(**CONFIG))
    # transformers 5 ties the head to the embedding; T5 1.1 does not.
    head = torch.randn(CONFIG["vocab_size"], CONFIG["d_model"]) * CONFIG["d_model"] ** -0.5
    model.lm_head.weight = torch.nn.Parameter(head)

    def orthogonal():
        return torch.linalg.qr(torch.randn(CONFIG["num_heads"] * CONFIG["d_kv"], CONFIG["d_model"]))[0]

    with torch.no_grad():
        for name, module in model.named_modules():
            if not hasattr(module, "q"):
                continue
            match, copy = orthogonal(), orthogonal()
            sharpness = 0.08 if "EncDecAttention" in name else 0.02
            for weight in (module.q.weight, module.k.weight):
                weight.copy_(sharpness**0.5 * match + 0.002 * torch.randn_like(weight))
            module.v.weight.copy_(0.7 * copy)
            module.o.weight.copy_(0.7 * copy.T)
            if module.has_relative_attention_bias:
                bias = module.relative_attention_bias.weight.zero_()
                after = CONFIG["relative_attention_num_buckets"] // 2
                if name.startswith("encoder"):  # one head looks ahead, one back
                    bias[after + 1, 0], bias[after + 2, 0], bias[1, 1], bias[2, 1] = 3.0, 1.5, 3.0, 1.5
                else:  # one head for the last token, one for the token before it
                    bias[1, 0], bias[2, 1] = 3.0, 3.0
    return model


@torch.no_grad()
def held_out(model, objective, windows, device):
    """Mean loss a target token over 16 fixed batches."""
    model.eval()
    total = 0.0
    for i in range(16):
        x, y = objective(windows(i, 4 * BATCH), np.random.default_rng([7, i]))
        total += loss_of(model, torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)).item()
    model.train()
    return total / 16


def export(model, tokenizer_path, folder):
    """A Hugging Face directory: fp16 safetensors, config.json, tokenizer.json."""
    folder.mkdir(exist_ok=True)
    state = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in model.state_dict().items()}
    state = {k: v for k, v in state.items() if k not in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = dict(architectures=["T5ForConditionalGeneration"], model_type="t5", **CONFIG)
    config.update(layer_norm_epsilon=1e-6, is_encoder_decoder=True, torch_dtype="float16")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "tokenizer.json").write_bytes(tokenizer_path.read_bytes())
    specials = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>", tokenizer_class="PreTrainedTokenizerFast")
    (folder / "tokenizer_config.json").write_text(json.dumps(specials, indent=2, sort_keys=True) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="folder of *.txt.xz")
    parser.add_argument("work", type=Path, help="folder for everything this makes")
    parser.add_argument("--span-tokens", type=float, default=28e6, help="tokens read in span corruption")
    parser.add_argument("--lm-tokens", type=float, default=72.2e6, help="tokens read in LM adaptation")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    files = sorted(args.text.glob("*.txt.xz"))
    train_files = [f for f in files if ".valid." not in f.name]
    valid_files = [f for f in files if ".valid." in f.name]
    tokenizer_path = args.work / "tokenizer.json"
    if not tokenizer_path.exists():
        train_tokenizer(train_files, tokenizer_path)
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    for name, part in (("train", train_files), ("valid", valid_files)):
        if not (args.work / f"{name}.u16").exists():
            tokenize(part, tokenizer, args.work / f"{name}.u16")
    train, valid = Windows(args.work / "train.u16", args.seed), Windows(args.work / "valid.u16", 1)

    torch.manual_seed(args.seed)
    model = build_model().to(device).train()
    optimizer = ScaledAdam(model.parameters())
    done = dict(step=0, read=0, target=0, seconds=0.0)
    saved = args.work / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    torch._dynamo.config.recompile_limit = 64
    compiled = torch.compile(loss_of, dynamic=False)
    log = open(args.work / "log.jsonl", "a", buffering=1)  # noqa: SIM115 - open to the end of the run
    started = last_saved = time.time()
    before = done["seconds"]
    window = []

    def save():
        torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), done=done), str(saved) + ".part")
        os.replace(str(saved) + ".part", saved)

    total = args.span_tokens + args.lm_tokens
    while done["read"] < total:
        stage = "span" if done["read"] < args.span_tokens else "lm"
        left = (total - done["read"]) / (COOLDOWN * args.lm_tokens)
        rate = PEAK * min(1.0, (done["step"] + 1) / WARMUP)
        rate = max(min(rate, PEAK * left), FLOOR)
        x, y = STAGES[stage](train(done["step"], BATCH), np.random.default_rng([args.seed, done["step"]]))
        loss = compiled(model, torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        window.append(loss.item())
        done["step"] += 1
        done["read"] += x.size + y.size
        done["target"] += y.size
        done["seconds"] = before + time.time() - started
        if not math.isfinite(window[-1]):
            raise SystemExit(f"loss is {window[-1]} at step {done['step']}")
        if done["step"] % 50 == 0:
            row = dict(stage=stage, loss=round(float(np.mean(window)), 4), rate=round(rate, 5), **done)
            window = []
            if done["step"] % 5000 == 0:
                row["held_out"] = {k: round(held_out(model, f, valid, device), 4) for k, f in STAGES.items()}
            print(json.dumps(row), file=log)
        span_ends = stage == "span" and done["read"] >= args.span_tokens
        if span_ends:
            export(model, tokenizer_path, args.work / "span")
        if span_ends or time.time() - last_saved > args.save_minutes * 60:
            save()
            last_saved = time.time()
    save()
    export(model, tokenizer_path, args.work / "lm")
    final = {k: held_out(model, f, valid, device) for k, f in STAGES.items()}
    print(
        json.dumps(dict(stage="end", held_out=final, perplexity={k: math.exp(v) for k, v in final.items()}, **done)),
        file=log,
    )


if __name__ == "__main__":
    main()

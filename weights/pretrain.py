"""Pre-train a built-in T5 of tinyprompt: distillation and span corruption, then LM adaptation.

    python weights/pretrain.py TEXT_DIR TEACHER_DIR WORK_DIR --size base

TEXT_DIR contains *.txt.xz files of UTF-8 text with one paragraph per line; files named *.valid.txt.xz are held out.
TEACHER_DIR is all-MiniLM-L6-v2, a sentence encoder, as a Hugging Face directory. WORK_DIR receives the tokenizer, the
segments and the teacher's vectors, which all sizes share; a checkpoint every few minutes, from which a second call
continues; log-SIZE.jsonl; and finally one Hugging Face directory per stage: `SIZE-span/` and `SIZE/`.

Stage 1: the encoder learns the teacher's vector of each token, and the decoder learns to fill in spans. Stage 2: the
decoder learns to continue text, and to choose the word, among those before a text, that fits it best. The teacher
decides which word fits. No labelled data are used.

Needs torch, transformers and tokenizers. Method: Raffel et al. 2020 (arXiv:1910.10683) section 3.1.4; Lester et al.
2021 (arXiv:2104.08691) section 3.2 for the LM adaptation; Jiao et al. 2020 (arXiv:1909.10351) for one target per token.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from prepare import CLS, EOS, PAD, PIECES, SENTINELS, SEP, prepare
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModel, T5Config, T5ForConditionalGeneration

NOISE, SPAN = 0.15, 3  # share of masked tokens and mean span length, as in T5
BLOCK = 20  # largest number of tokens before a text: 2 to 6 words to choose from, and random pieces
SHARPNESS = 0.02  # temperature of the softmax of cosines by which the teacher chooses
WARMUP, COOLDOWN = 100, 0.4  # steps; share of each stage in which the learning rates fall to 0
ADAM, MUON = 0.02, 0.005  # learning rates of vectors and the table, and of matrices
GENTLE = 0.3  # factor of all rates except the decoder's matrices in stage 2, which preserves earlier learning

# d_model, d_kv, num_heads, d_ff, num_layers, num_decoder_layers
SIZES = {
    "tiny": (32, 32, 2, 64, 4, 2),
    "small": (96, 32, 3, 192, 4, 2),
    "base": (256, 32, 8, 512, 5, 2),
    "large": (384, 32, 12, 768, 6, 2),
}
INGREDIENTS = ("table", "matching", "tokens", "sentences", "mixed", "choose", "muon")  # the values of --without

# Words that do not characterise the topic of a text.
EMPTY = """
the and for with that this was were from his her are but not you all had has have one two they she him its who what when
which there their been would could should will than then them some into out only more other such very our your any may
most also after before over under about said upon shall
"""


def padded(rows, width, fill):
    """Return rows of ids, padded to (B, width)."""
    out = np.full((len(rows), width), fill, np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


class Objectives:
    """The tasks of a batch: inputs (B, S), targets (B, T) with -100 at padding, and each input token's index, or -1.

    Every objective takes the segments, the rows, their width and a random generator.
    """

    def __init__(self, tok, words, vectors, sentences):
        """words: ids to choose from; vectors and sentences: the teacher's vectors of words and of segments."""
        self.top = tok.get_vocab_size() - 1
        self.words, self.vectors = words, unit(vectors)
        # The mean cosine of each word is subtracted, since a few words are close to every text.
        self.hubs = (unit(sentences.astype(np.float32)) @ self.vectors.T).mean(0)

    def span(self, segments, rows, width, rng):
        """T5's span corruption: each masked span becomes a sentinel, and the target lists the spans."""
        inputs, targets, places = [], [], []
        for r in rows:
            a = segments.row(r)
            noise = max(1, round(len(a) * NOISE))
            spans = max(1, round(noise / SPAN))
            x, y, place, at = [], [], [], 0
            kept, dropped = parts(len(a) - noise, spans, rng), parts(noise, spans, rng)
            for k, (keep, drop) in enumerate(zip(kept, dropped, strict=True)):
                x += [*a[at : at + keep], self.top - k]
                place += [*range(at, at + keep), -1]
                y += [self.top - k, *a[at + keep : at + keep + drop]]
                at += keep + drop
            inputs.append([*x, EOS])
            targets.append([*y, EOS])
            places.append(place)
        longest = round(width * NOISE * 1.4) + 3
        return padded(inputs, width + 1, PAD), padded(targets, longest, -100), padded(places, width + 1, -1)

    @staticmethod
    def read(segments, rows, width, rng):
        """The whole segment, for the encoder only."""
        inputs = [[*segments.row(r), EOS] for r in rows]
        return padded(inputs, width + 1, PAD), None, padded([range(len(x) - 1) for x in inputs], width + 1, -1)

    @staticmethod
    def lm(segments, rows, width, rng):
        """A prefix and its continuation. There are no distillation targets: the encoder must not see the rest."""
        inputs, targets = [], []
        for r in rows:
            a = segments.row(r)
            cut = int(rng.integers(3, len(a) - 1))
            inputs.append([*a[:cut], EOS])
            targets.append([*a[cut:], EOS])
        return padded(inputs, width - 1, PAD), padded(targets, width - 2, -100), None

    def choose(self, segments, rows, width, rng):
        """Words, then random pieces, then a text: the target is the word that is closest to the text for the teacher.

        This is the form of a prompt: the label words, then rows of the vocabulary (Lester et al. 2021, section 3.2). In
        seven of ten rows the words are close to segments of this batch, and one of them to this segment; otherwise they
        are random. In a quarter of the rows nothing precedes the text, and the target is a word close to it.
        """
        near = unit(segments.sentences[rows].astype(np.float32)) @ self.vectors.T - self.hubs
        best = np.argpartition(-near, 12, 1)[:, :12]
        own = best[np.arange(len(rows)), rng.integers(0, 12, len(rows))]
        inputs, targets, places = [], [], []
        for i, r in enumerate(rows):
            a, k, block = segments.row(r), int(rng.integers(2, 7)), []
            words, kind = best[i], rng.random()
            if kind < 0.75:
                many = rng.random() < 0.7
                words = [own[i], *own[rng.integers(0, len(rows), k - 1)]] if many else rng.choice(len(self.words), k)
                words = rng.permutation(np.unique(words))
                block = [*self.words[words], *(3 + rng.choice(5000, int(rng.integers(0, BLOCK - len(words) + 1))))]
            answer = words[np.argmax(near[i, words] / SHARPNESS + rng.gumbel(size=len(words)))]
            inputs.append([*block, *a, EOS])
            targets.append([self.words[answer], EOS])
            places.append([-1] * len(block) + [*range(len(a))])
        width += BLOCK + 1
        return padded(inputs, width, PAD), padded(targets, 2, -100), padded(places, width, -1)


def unit(vectors):
    """Normalise vectors to length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def parts(total, count, rng):
    """Return `count` random positive integers with this sum."""
    return np.diff([0, *np.sort(rng.choice(total - 1, count - 1, replace=False) + 1), total])


def word_vectors(teacher, tok, teacher_ids):
    """Return ids of content words of at least three letters, and the teacher's vector of each word alone."""
    names, empty = [tok.id_to_token(i) for i in range(PIECES - SENTINELS)], EMPTY.split()
    words = np.array([i for i, name in enumerate(names) if name.isalpha() and len(name) > 2 and name not in empty])
    x = F.pad(torch.from_numpy(teacher_ids[words])[:, None], (1, 0), value=CLS)
    with torch.inference_mode():
        vectors = [teacher(input_ids=F.pad(b, (0, 1), value=SEP)).last_hidden_state.mean(1) for b in x.split(512)]
    return words, torch.cat(vectors).numpy()


def config_of(size):
    """Return config.json: the blocks of T5 1.1 (gated gelu), and a tied output head as in T5 1.0.

    A table of 16,128 pieces is most of a small model. Tying it to the head stores it once.
    """
    d_model, d_kv, num_heads, d_ff, num_layers, num_decoder_layers = SIZES[size]
    return dict(
        vocab_size=PIECES, d_model=d_model, d_kv=d_kv, num_heads=num_heads, d_ff=d_ff, num_layers=num_layers,
        num_decoder_layers=num_decoder_layers, feed_forward_proj="gated-gelu", tie_word_embeddings=True,
        relative_attention_num_buckets=32, relative_attention_max_distance=128, dropout_rate=0.0, pad_token_id=PAD,
        eos_token_id=EOS, decoder_start_token_id=PAD,
    )  # fmt: skip


def build_model(size, table, without):
    """Build a T5 that starts with the teacher's table and with attention patterns of trained models.

    Table: the teacher's vectors of the pieces, projected to their d_model main directions, with mean square 1.
    Attention (Trockman and Kolter 2023, arXiv:2305.09828): queries and keys match equal vectors, values and outputs
    copy a vector, and the position biases favour the nearest neighbours. With random attention, the decoder ignores the
    encoder for thousands of steps, which exceeds this budget.
    """
    c = config_of(size)
    model = T5ForConditionalGeneration(T5Config(**c))
    d_model, inner = c["d_model"], c["num_heads"] * c["d_kv"]
    with torch.no_grad():
        if "table" not in without:
            real = table[3:-SENTINELS] - table[3:-SENTINELS].mean(0)
            real = real @ torch.linalg.svd(real, full_matrices=False)[2][:d_model].T
            model.shared.weight[3:-SENTINELS] = real / real.square().mean().sqrt()
        for name, module in model.named_modules():
            if not hasattr(module, "q") or "matching" in without:
                continue

            def orthogonal():
                return torch.linalg.qr(torch.randn(max(inner, d_model), min(inner, d_model)))[0].reshape(inner, d_model)

            match, copy = orthogonal(), orthogonal()
            sharpness = (0.08 if "EncDecAttention" in name else 0.02) * 192 / d_model
            for weight in (module.q.weight, module.k.weight):
                weight.copy_(sharpness**0.5 * match + 0.002 * torch.randn_like(weight))
            module.v.weight.copy_(0.7 * copy)
            module.o.weight.copy_(0.7 * copy.T)
            if module.has_relative_attention_bias:
                bias = module.relative_attention_bias.weight.zero_()
                after = c["relative_attention_num_buckets"] // 2
                if name.startswith("encoder"):  # one head looks ahead, one looks back
                    bias[after + 1, 0], bias[after + 2, 0], bias[1, 1], bias[2, 1] = 3.0, 1.5, 3.0, 1.5
                else:  # one head for the last token, one for the token before it
                    bias[1, 0], bias[2, 1] = 3.0, 3.0
    return model


class Student(torch.nn.Module):
    """The T5, and two linear maps to the teacher's space, which are dropped at the end."""

    def __init__(self, model, scale, dtype):
        super().__init__()
        self.model, self.dtype = model, dtype
        self.to_token = torch.nn.Linear(model.config.d_model, 384)
        self.to_sentence = torch.nn.Linear(model.config.d_model, 384)
        for name, value in scale.items():  # mean and deviation of each component of the teacher's vectors
            self.register_buffer(name, torch.from_numpy(value))

    def forward(self, x, y, places, tokens, sentences):
        """Return the losses: unexplained share of the teacher's variance per token and per segment; cross entropy."""
        mask, losses = x != PAD, {}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            h = self.model.encoder(input_ids=x, attention_mask=mask.long()).last_hidden_state
            if places is not None:
                known = (places >= 0).float()
                mean = (h.float() * known[..., None]).sum(1) / known.sum(1, keepdim=True)
                wanted = (tokens - self.token_mean) / self.token_deviation
                error = (self.to_token(h).float() - wanted).square().mean(-1)
                losses["tokens"] = (error * known).sum() / known.sum()
                wanted = (sentences - self.sentence_mean) / self.sentence_deviation
                losses["sentences"] = (self.to_sentence(mean).float() - wanted).square().mean()
            if y is not None:
                start = F.pad(y[:, :-1].clamp(min=0), (1, 0), value=PAD)
                states = self.model.decoder(
                    input_ids=start, encoder_hidden_states=h, encoder_attention_mask=mask.long(), use_cache=False
                ).last_hidden_state[y >= 0]
                logits = F.linear(states * states.shape[-1] ** -0.5, self.model.shared.weight)
                losses["targets"] = F.cross_entropy(logits.float(), y[y >= 0])
        return losses


def optimizers(student, without):
    """Return Muon for the matrices of encoder and decoder, and Adam for the table and all vectors."""
    named = list(student.named_parameters())
    matrices = {n: p for n, p in named if ".block." in n and p.ndim == 2 and "relative" not in n}
    rest = [p for n, p in named if n not in matrices]
    parts = [[p for n, p in matrices.items() if f".{part}." in n] for part in ("encoder", "decoder")]
    adam = torch.optim.Adam(rest, betas=(0.9, 0.98), fused=True)
    if "muon" in without:
        return [adam, *(torch.optim.Adam(p, betas=(0.9, 0.98), fused=True) for p in parts)]
    return [adam, *(torch.optim.Muon(p, weight_decay=0.01, adjust_lr_fn="match_rms_adamw") for p in parts)]


def fastest_dtype():
    """Return bfloat16 if this machine multiplies it faster than float32; it can also be 40 times slower."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        a @ a
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=seconds.get)


def export(model, size, tokenizer_path, folder):
    """Write a Hugging Face directory: fp16 safetensors, config.json, tokenizer.json."""
    folder.mkdir(exist_ok=True, parents=True)
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    state = {k: v.detach().to(torch.float16).contiguous() for k, v in model.state_dict().items() if k not in copies}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = dict(architectures=["T5ForConditionalGeneration"], model_type="t5", **config_of(size))
    config.update(layer_norm_epsilon=1e-6, is_encoder_decoder=True, torch_dtype="float16")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "tokenizer.json").write_bytes(tokenizer_path.read_bytes())
    specials = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>", tokenizer_class="PreTrainedTokenizerFast")
    (folder / "tokenizer_config.json").write_text(json.dumps(specials, indent=2, sort_keys=True) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="folder of *.txt.xz")
    parser.add_argument("teacher", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("work", type=Path, help="folder of all output")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--segments", type=int, default=272_000, help="segments of running text that the teacher reads")
    parser.add_argument(
        "--mixed", type=int, default=320_000, help="segments with replaced words that the teacher reads"
    )
    parser.add_argument("--span-steps", type=int, default=4000, help="steps of distillation and span corruption")
    parser.add_argument("--lm-steps", type=int, default=1800, help="steps of LM adaptation")
    parser.add_argument(
        "--without", nargs="+", choices=INGREDIENTS, default=[], help="ingredients to leave out, for ablations"
    )
    parser.add_argument("--name", help="name of log and folders (default: the size)")
    parser.add_argument("--save-minutes", type=float, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # moments of rare pieces decay into denormals, which are ten times slower
    dtype, name, without = fastest_dtype(), args.name or args.size, set(args.without)

    teacher_tok = Tokenizer.from_file(str(args.teacher / "tokenizer.json"))
    teacher_tok.no_truncation()
    teacher_tok.no_padding()
    teacher = AutoModel.from_pretrained(args.teacher, attn_implementation="sdpa").eval()
    most = dict(valid=10**9, train=args.segments, mixed=args.mixed)
    sources = prepare(args.text, args.work, teacher, teacher_tok, most, dtype)
    valid = sources.pop("valid")
    tokenizer_path = args.work / "tokenizer.json"
    tok, teacher_ids = Tokenizer.from_file(str(tokenizer_path)), np.load(args.work / "teacher_ids.npy")
    table = teacher.embeddings.word_embeddings.weight.detach()[torch.from_numpy(teacher_ids)].float()
    objectives = Objectives(tok, *word_vectors(teacher.float(), tok, teacher_ids), sources["train"].sentences[:20_000])
    del teacher

    torch.manual_seed(args.seed)
    scale = {}
    for kind, vectors in (("token", valid.tokens), ("sentence", valid.sentences)):
        vectors = vectors[:50_000].astype(np.float32)
        scale[f"{kind}_mean"], deviation = vectors.mean(0), vectors.std(0)
        scale[f"{kind}_deviation"] = np.where(deviation < 1e-3, 1, deviation)  # one component is constant
    student = Student(build_model(args.size, table, without), scale, dtype)
    optims = optimizers(student, without)
    done = dict(step=0, read=0, target=0, seconds=0.0)
    saved = args.work / f"checkpoint-{name}.pt"
    if saved.exists():
        state = torch.load(saved)
        student.load_state_dict(state["student"])
        done = state["done"]
        if done["step"] != args.span_steps:  # a stage starts with fresh moments
            for optim, values in zip(optims, state["optims"], strict=True):
                optim.load_state_dict(values)

    def save():
        state = dict(student=student.state_dict(), optims=[optim.state_dict() for optim in optims], done=done)
        torch.save(state, f"{saved}.part")
        os.replace(f"{saved}.part", saved)

    def losses_of(objective, segments, i, seed):
        """Return the losses of batch i of a source, and the numbers of input and target tokens."""
        width, rows = segments.batch(i, seed)
        x, y, places = getattr(objectives, objective)(segments, rows, width, np.random.default_rng([seed, i]))
        targets = (None, None)
        if places is not None:
            targets = segments.targets(rows, places), segments.sentences[rows].astype(np.float32)
        tensors = (None if a is None else torch.from_numpy(a) for a in (x, y, places, *targets))
        return student(*tensors), int((x != PAD).sum()), 0 if y is None else int((y >= 0).sum())

    @torch.no_grad()
    def held_out(stage):
        """Return mean losses over 16 fixed batches of held-out text."""
        asked = {"span": ["span", "read"], "lm": ["lm", "read"] + ["choose"] * ("choose" not in without)}[stage]
        found = {o: [losses_of(o, valid, i, 7)[0] for i in range(16)] for o in asked}
        return {
            o: {k: round(float(np.mean([f[k].item() for f in each])), 4) for k in each[0]} for o, each in found.items()
        }

    # Objectives and sources in turn. The mixed segments are not suitable for continuation.
    mixed, choose = "mixed" not in without, "choose" not in without
    turns = {
        "span": [("span", "train")] + [("read", "mixed")] * mixed,
        "lm": [("lm", "train")] + ([("choose", "train")] + [("choose", "mixed")] * mixed) * choose,
    }
    matrix_rate = MUON * (0.2 if "muon" in without else 1.0)  # Muon's steps are a fifth of its rate in size
    log = open(args.work / f"log-{name}.jsonl", "a", buffering=1)  # noqa: SIM115 - open until the end of the run
    started, last_saved, before, window = time.time(), time.time(), done["seconds"], {}
    while done["step"] < args.span_steps + args.lm_steps:
        stage = "span" if done["step"] < args.span_steps else "lm"
        steps = args.span_steps if stage == "span" else args.lm_steps
        step = done["step"] if stage == "span" else done["step"] - args.span_steps
        share = min(1.0, (step + 1) / WARMUP, (steps - step) / (COOLDOWN * steps))
        objective, source = turns[stage][step % len(turns[stage])]
        losses, read, target = losses_of(objective, sources[source], step // len(turns[stage]), len(objective))
        sum(value for kind, value in losses.items() if kind not in without).backward()
        for optim, peak, gentle in zip(optims, (ADAM, matrix_rate, matrix_rate), (GENTLE, GENTLE, 1.0), strict=True):
            optim.param_groups[0]["lr"] = peak * share * (1.0 if stage == "span" else gentle)
        torch.nn.utils.clip_grad_norm_(optims[0].param_groups[0]["params"], 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        for kind, loss in losses.items():
            value = loss.item()
            window.setdefault(f"{objective}.{kind}", []).append(value)
            if not math.isfinite(value):
                raise SystemExit(f"loss is {value} at step {done['step']}")
        done = dict(
            step=done["step"] + 1,
            read=done["read"] + read,
            target=done["target"] + target,
            seconds=round(before + time.time() - started, 1),
        )
        if done["step"] % 50 == 0:
            row = dict(stage=stage, rate=round(share, 3), **done)
            print(json.dumps(row | {k: round(float(np.mean(v)), 4) for k, v in window.items()}), file=log)
            window = {}
        if step + 1 == steps:
            optims = optimizers(student, without)
            folder = args.work / (f"{name}-span" if stage == "span" else name)
            export(student.model, args.size, tokenizer_path, folder)
            print(json.dumps(dict(stage=stage, held_out=held_out(stage), **done)), file=log)
        if step + 1 == steps or time.time() - last_saved > args.save_minutes * 60:
            save()
            last_saved = time.time()


if __name__ == "__main__":
    main()

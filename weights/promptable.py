"""Stage 3: teach a model more, and make it easy to prompt. Training starts from the model of stage 2 (pretrain.py).

    python weights/promptable.py MODEL_DIR TEXT_DIR TEACHERS_DIR WORK_DIR --size base --read 30 --minutes 120
    python weights/promptable.py MODEL_DIR TEXT_DIR TEACHERS_DIR WORK_DIR --size base --cooldown 600

First both teachers read for --read minutes (segments.py; all sizes share their vectors). Then training starts, or
continues from WORK_DIR/checkpoint-SIZE.pt, also after a kill, on all existing segments. It ends --minutes after the
start, or never. The learning rates stay constant, so a run can have any length. With --cooldown N, a branch takes N
more steps from the latest checkpoint, on which the rates fall to 0. Measure and publish the model of the branch,
WORK_DIR/SIZE-cooled; the trunk is not changed. The log is WORK_DIR/log-SIZE.jsonl.

The objectives take turns (`TURNS`), one batch each:

- `tasks`: made-up tasks that a prompt must learn. A task has two to six classes of segments, by the vectors of one
  teacher, and a word for each class (`Tasks`). Each task has its own prompt, which Adam tunes from label words as in
  tinyprompt, while the model learns to be easy to tune. After some dozens of visits a new task replaces it.
- `read`: the encoder learns both teachers' vectors of tokens and segments.
- `choose`, `lm`: the decoder names the word that is closest for a teacher, and continues text, as in stage 2.

Half of the prompts start as label words and random pieces. The other half start as label words followed by a shared
first prompt, which moves towards each prompt when its task ends (Reptile, Nichol et al. 2018, arXiv:1803.02999). It is
written beside the weights as `first-prompt.npy`.

Method: Vu et al. 2022 (SPoT, arXiv:2110.07904) and Gu et al. 2022 (PPT, arXiv:2109.04332) for pre-trained prompts; Hu
et al. 2024 (arXiv:2404.06395) for constant rates with a final cooldown. No labelled data are used.
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
from prepare import EOS, PAD
from pretrain import EMPTY, SIZES, Objectives, export, fastest_dtype, padded, unit
from segments import TOKENIZER, Segments, read
from teachers import NAMES, load
from tokenizers import Tokenizer
from transformers import T5ForConditionalGeneration

TRAIN = ("train", "mixed", "made", "phrases", "news")  # sources
TURNS = ("tasks", "read", "choose", "read", "tasks", "read", "tasks", "lm")
ASKED = dict(  # the sources of each objective; only running text is continued
    choose=("train", "mixed", "news", "made"), lm=("train",), read=("phrases", "mixed", "made", "train", "news")
)
RATES = dict(matrices=7e-4, rest=3e-3)  # learning rates of Adam for the matrices, and for the table and all vectors
WARMUP = 100  # steps in which the rates rise
LIVE, VISITED, ROWS = 256, 16, 4  # concurrent tasks; tasks per batch; rows per task
LONG = 24  # most tokens of a text of a task, so that little of a batch is padding
LENGTH = 20  # vectors of a prompt
LIFE = (20, 150)  # visits until a task ends
PROMPT_RATE = (0.05, 0.3)  # learning rate of Adam; falls to 0 over a task's life
CLASS = 300  # largest number of segments of a class
NEARNESS = 0.2  # temperature of the softmax of a choice, in standard deviations of the cosines
BLOCK = 20  # largest number of tokens before a text to choose from
TO_FIRST = 0.1  # share of the distance that the first prompt moves towards a tuned prompt
WEIGHTS = {"targets": 1.0, "mini.tokens": 0.5, "e5.tokens": 0.5, "mini.sentences": 0.5, "e5.sentences": 1.0}


class Words:
    """Content words, with each teacher's centred vector of length 1."""

    def __init__(self, tok, teachers, path):
        pieces, empty = [tok.id_to_token(i) for i in range(tok.get_vocab_size())], EMPTY.split()
        self.ids = np.array([i for i, p in enumerate(pieces) if p.isalpha() and len(p) > 2 and p not in empty])
        if not path.exists():
            texts = [pieces[i] for i in self.ids]
            np.savez(path, **{name: load(teachers, name).read(texts).sentences for name in NAMES})
        found = np.load(path)
        self.vectors = {name: unit(found[name] - found[name].mean(0)) for name in NAMES}


class Space:
    """One teacher's vectors of all segments: centred, of length 1, and whitened along their main directions."""

    def __init__(self, sources, words, name, most=64):
        vectors = np.concatenate([np.asarray(s.sentences[name], np.float32) for s in sources])
        self.mean = vectors.mean(0)
        self.vectors = unit(vectors - self.mean)
        directions = np.linalg.svd(self.vectors[:: max(1, len(vectors) // 8000)], full_matrices=False)[2][:most]
        self.white = self.vectors @ directions.T
        self.white /= self.white.std(0)
        self.words = words.vectors[name]
        some = self.vectors[:: max(1, len(vectors) // 20_000)] @ self.words.T
        self.hubs, self.spread = some.mean(0), some.std()

    def near(self, rows):
        """Return the similarity of segments to all words, in standard deviations, minus each word's mean similarity."""
        return (self.vectors[rows] @ self.words.T - self.hubs) / self.spread


class Tasks:
    """Made-up classification tasks, each with a prompt that is tuned for it."""

    def __init__(self, spaces, words, table, seed, usable):
        self.usable, self.segments = np.flatnonzero(usable), len(usable)
        self.spaces, self.words, self.table = spaces, words, table
        self.seed, self.made = seed, 0
        self.first = table[self.pieces(np.random.default_rng(seed))].clone()
        width = table.shape[1]
        self.prompts = torch.zeros(LIVE, LENGTH, width)
        self.moments = torch.zeros(2, LIVE, LENGTH, width)
        self.slots = [None] * LIVE
        self.scores = {}

    def state(self):
        """Return the state for a checkpoint."""
        return {k: getattr(self, k) for k in ("made", "first", "prompts", "moments", "slots", "segments")}

    def restore(self, state):
        """Restore the state. A task's rows count through all segments, so new segments end all tasks."""
        if state["segments"] != self.segments:
            state = state | dict(slots=[None] * LIVE, segments=self.segments)
        for name in state:
            setattr(self, name, state[name])

    def pieces(self, rng):
        """Draw frequent pieces like `init vocab`."""
        return torch.from_numpy(3 + rng.choice(5000, LENGTH, replace=False))

    def classes(self, rng):
        """Return classes of segments and words for them, or None if a class is too small."""
        space, other = (self.spaces[rng.choice(list(self.spaces))] for _ in range(2))
        among = self.usable
        if rng.random() < 0.6:  # only texts of one kind
            near = other.vectors @ other.vectors[rng.choice(among)]
            among = among[np.argpartition(-near[among], size := int(rng.integers(1500, 8000)))[:size]]
        kind, k = rng.choice(["ends", "anchors", "words", "axis"]), int(rng.integers(2, 7))
        words = rng.choice(len(self.words.ids), k, replace=False)
        fitting = rng.random() < 0.8
        if kind in ("ends", "axis"):  # the two ends of a direction
            k, words = 2, words[:2]
            if kind == "ends":
                a, b = rng.choice(among, (2, int(rng.choice([1, 1, 3, 10]))))
                score = space.white[among] @ (space.white[a].mean(0) - space.white[b].mean(0))
            else:
                near = space.vectors[rng.choice(among)] @ space.words.T - space.hubs
                words[0] = rng.choice(np.argpartition(-near, 100)[:100])
                score = space.vectors[among] @ (space.words[words[0]] - space.words[words[1]])
                fitting = False
            score = score - np.median(score)
            label, margin = (score < 0).astype(int), np.abs(score)
        else:
            if kind == "words":  # the nearest segments of some words, each of which is close to a segment
                near = space.vectors[rng.choice(among, k)] @ space.words.T - space.hubs
                words = np.array([rng.choice(np.argpartition(-row, 20)[:20]) for row in near])
                if len(set(words)) < k:
                    return None
                score = space.vectors[among] @ space.words[words].T - space.hubs[words]
                fitting = rng.random() < 0.2
            else:  # the nearest segments of some segments
                score = space.vectors[among] @ space.vectors[rng.choice(among, k, replace=False)].T
                score = score - score.mean(0)
            label, best = score.argmax(1), np.sort(score, 1)
            margin = best[:, -1] - best[:, -2]
        keep = margin > np.quantile(margin, rng.uniform(0.1, 0.6))
        pools = [among[keep & (label == c)] for c in range(k)]
        if min(map(len, pools)) < 25:
            return None
        pools = [rng.permutation(pool)[:CLASS] for pool in pools]
        if fitting:  # words that are closer to their class than to the others
            near = np.stack([space.near(pool).mean(0) for pool in pools])
            near = near - near.mean(0)
            words = np.array([rng.choice(np.argpartition(-row, 10)[:10]) for row in near])
        if len(set(words)) < k:
            return None
        return pools, self.words.ids[words]

    def begin(self, slot):
        """Put a new task into a slot."""
        found = None
        while found is None:
            self.made += 1
            rng = np.random.default_rng([self.seed, self.made])
            found = self.classes(rng)
        pools, words = found
        life = int(math.exp(rng.uniform(*np.log(LIFE))))
        rate = math.exp(rng.uniform(*np.log(PROMPT_RATE)))
        from_first = bool(rng.random() < 0.5)
        prompt = self.first.clone() if from_first else self.table[self.pieces(rng)].clone()
        prompt[: len(words)] = self.table[torch.from_numpy(words)]
        self.prompts[slot], self.moments[:, slot] = prompt, 0
        self.slots[slot] = dict(pools=pools, words=words, life=life, rate=rate, visits=0, from_first=from_first)

    def batch(self, rng):
        """Return some slots, their prompts as a leaf of the graph, and rows: (index in `prompts`, segment, answer)."""
        chosen = rng.choice(LIVE, VISITED, replace=False)
        rows = []
        for i, slot in enumerate(chosen):
            if self.slots[slot] is None or self.slots[slot]["visits"] >= self.slots[slot]["life"]:
                self.end(slot)
                self.begin(slot)
            task = self.slots[slot]
            for label in rng.integers(0, len(task["words"]), ROWS):
                rows.append((i, rng.choice(task["pools"][label]), task["words"][label]))
        return chosen, self.prompts[torch.from_numpy(chosen)].requires_grad_(), rows

    def end(self, slot):
        """Move the first prompt towards a tuned one, except the vectors of label words, which belong to the task."""
        task = self.slots[slot]
        if task and task["from_first"]:
            k = len(task["words"])
            self.first[k:] += TO_FIRST * (self.prompts[slot, k:] - self.first[k:])

    def step(self, chosen, prompts):
        """Apply Adam to the prompts of a batch."""
        for i, slot in enumerate(chosen):
            task, grad = self.slots[slot], prompts.grad[i]
            t = task["visits"] = task["visits"] + 1
            m, v = self.moments[0, slot], self.moments[1, slot]
            m.mul_(0.9).add_(grad, alpha=0.1)
            v.mul_(0.999).addcmul_(grad, grad, value=0.001)
            rate = task["rate"] * (1 - (t - 1) / task["life"])
            self.prompts[slot] -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    def score(self, chosen, rows, logits):
        """Record correct answers among a task's words, separately for new tasks and tasks in their last third."""
        for (i, _, answer), row in zip(rows, logits, strict=True):
            task = self.slots[chosen[i]]
            age = task["visits"] / task["life"]
            kind = "new" if task["visits"] <= 2 else "tuned" if age > 0.67 else "between"
            right = task["words"][int(row[torch.from_numpy(task["words"])].argmax())] == answer
            self.scores.setdefault(kind, []).append((right, 1 / len(task["words"])))


class Reader:
    """The inputs and targets of batches. The segments of all sources form one list here."""

    def __init__(self, sources, spaces, words):
        self.sources, self.spaces, self.words = sources, spaces, words
        self.begins = np.concatenate([[0], np.cumsum([len(s.ids) for s in sources.values()])])

    def place(self, row):
        """Return the segments that contain a row of the whole list, and its index there."""
        at = int(np.searchsorted(self.begins, row, "right")) - 1
        return list(self.sources.values())[at], row - self.begins[at]

    def choose(self, segments, rows, width, rng, begin):
        """Words, random pieces, then a text: the answer is the nearest word by the vectors of one teacher.

        As in stage 2, the words are close to segments of this batch in seven of ten rows, and otherwise random. In a
        quarter of the rows nothing precedes the text, and the answer is one of the nearest words of all.
        """
        name = rng.choice(list(self.spaces))
        near = self.spaces[name].near(begin + rows)
        best = np.argpartition(-near, 12, 1)[:, :12]
        own = best[np.arange(len(rows)), rng.integers(0, 12, len(rows))]
        inputs, targets, places = [], [], []
        for i, r in enumerate(rows):
            a, k, block, words = segments.row(r), int(rng.integers(2, 7)), [], best[i]
            if rng.random() < 0.75:
                many = rng.random() < 0.7
                words = [own[i], *own[rng.integers(0, len(rows), k - 1)]] if many else rng.choice(near.shape[1], k)
                words = rng.permutation(np.unique(words))
                filling = int(rng.integers(0, BLOCK - len(words) + 1))
                block = [*self.words.ids[words], *(3 + rng.choice(5000, filling))]
            answer = words[np.argmax(near[i, words] / NEARNESS + rng.gumbel(size=len(words)))]
            inputs.append([*block, *a, EOS])
            targets.append([self.words.ids[answer], EOS])
            places.append([-1] * len(block) + [*range(len(a))])
        width += BLOCK + 1
        return padded(inputs, width, PAD), padded(targets, 2, -100), padded(places, width, -1)

    def batch(self, objective, source, i):
        """Return inputs, targets, places and both teachers' vectors of batch i of a source."""
        segments = self.sources[source]
        seed = [len(objective), list(self.sources).index(source)]
        width, rows = segments.batch(i, sum(seed))
        rng = np.random.default_rng([*seed, i])
        if objective == "choose":
            begin = self.begins[list(self.sources).index(source)]
            x, y, places = self.choose(segments, rows, width, rng, begin)
        else:
            x, y, places = getattr(Objectives, objective)(segments, rows, width, rng)
        if places is None:
            return x, y, None, None, None
        sentences = {name: segments.sentences[name][rows].astype(np.float32) for name in NAMES}
        return x, y, places, segments.targets(rows, places), sentences

    def tasks(self, rows):
        """Return inputs, targets, places and vectors for rows of tasks, without their prompts."""
        found = [self.place(row) for _, row, _ in rows]
        inputs = [[*segments.row(r), EOS] for segments, r in found]
        width = max(map(len, inputs))
        places = padded([range(len(a) - 1) for a in inputs], width, -1)
        tokens = {name: np.zeros((len(rows), width, 384), np.float32) for name in NAMES}
        sentences = {name: np.zeros((len(rows), 384), np.float32) for name in NAMES}
        for i, (segments, r) in enumerate(found):
            for name in NAMES:
                tokens[name][i, : segments.length[r]] = segments.tokens[name][segments.start[r] : segments.start[r + 1]]
                sentences[name][i] = segments.sentences[name][r]
        y = np.array([[answer, EOS] for _, _, answer in rows])
        return padded(inputs, width, PAD), y, places, tokens, sentences


class Student(torch.nn.Module):
    """The T5, and linear maps to both teachers' spaces for tokens and segments, which are dropped at the end."""

    def __init__(self, model, valid, dtype):
        super().__init__()
        self.model, self.dtype = model, dtype
        self.maps = torch.nn.ModuleDict()
        for name in NAMES:
            for kind, vectors in (("tokens", valid.tokens[name]), ("sentences", valid.sentences[name])):
                self.maps[f"{name}_{kind}"] = torch.nn.Linear(model.config.d_model, vectors.shape[1])
                vectors = torch.from_numpy(np.asarray(vectors, np.float32))
                deviation = vectors.std(0)
                self.register_buffer(f"{name}_{kind}_mean", vectors.mean(0))
                self.register_buffer(f"{name}_{kind}_deviation", torch.where(deviation < 1e-3, 1.0, deviation))

    def encode(self, x, places, prompt=None):
        """Encode a prompt and a text; return the states, the mask, and the mean over positions with a place."""
        mask = (x != PAD).long()
        embedded = self.model.shared(x)
        if prompt is not None:
            embedded = torch.cat([prompt, embedded], 1)
            mask = F.pad(mask, (prompt.shape[1], 0), value=1)
        h = self.model.encoder(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        own = h if prompt is None else h[:, prompt.shape[1] :]
        mean = None
        if places is not None:
            known = (places >= 0).float()
            mean = (own.float() * known[..., None]).sum(1) / known.sum(1, keepdim=True)
        return h, own, mask, mean

    def wanted(self, name, kind, vectors):
        """Return the teacher's vectors with each component standardised."""
        return (vectors - getattr(self, f"{name}_{kind}_mean")) / getattr(self, f"{name}_{kind}_deviation")

    @torch.no_grad()
    def fit_maps(self, batches):
        """Start with the best linear maps: ridge regression on the encoder's output for some batches."""
        sums = {}
        for x, _, places, tokens, sentences in batches:
            _, own, _, mean = self.encode(torch.from_numpy(x), torch.from_numpy(places))
            known = torch.from_numpy(places) >= 0
            for name in NAMES:
                for kind, states, vectors in (
                    ("tokens", own[known], torch.from_numpy(tokens[name])[known]),
                    ("sentences", mean, torch.from_numpy(sentences[name])),
                ):
                    a = F.pad(states.float(), (0, 1), value=1)
                    both = a.T @ a, a.T @ self.wanted(name, kind, vectors)
                    old = sums.get(f"{name}_{kind}", (0, 0))
                    sums[f"{name}_{kind}"] = old[0] + both[0], old[1] + both[1]
        for key, (left, right) in sums.items():
            ridge = 1e-3 * left.diagonal().mean() * torch.eye(len(left))
            solved = torch.linalg.solve(left + ridge, right)
            self.maps[key].weight.copy_(solved[:-1].T)
            self.maps[key].bias.copy_(solved[-1])

    def forward(self, x, y, places, tokens, sentences, prompt=None):
        """Return the losses, and the logits of the first target token of each row."""
        losses, first = {}, None
        x, y, places = (None if a is None else torch.from_numpy(a) for a in (x, y, places))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            h, own, mask, mean = self.encode(x, places, prompt)
            if places is not None:
                known = places >= 0
                for name in NAMES:
                    wanted = self.wanted(name, "tokens", torch.from_numpy(tokens[name])[known])
                    error = self.maps[f"{name}_tokens"](own[known]).float() - wanted
                    losses[f"{name}.tokens"] = error.square().mean()
                    error = self.maps[f"{name}_sentences"](mean).float()
                    error = error - self.wanted(name, "sentences", torch.from_numpy(sentences[name]))
                    losses[f"{name}.sentences"] = error.square().mean()
            if y is not None:
                start = F.pad(y[:, :-1].clamp(min=0), (1, 0), value=PAD)
                states = self.model.decoder(
                    input_ids=start, encoder_hidden_states=h, encoder_attention_mask=mask, use_cache=False
                ).last_hidden_state[y >= 0]
                logits = F.linear(states * states.shape[-1] ** -0.5, self.model.shared.weight)
                losses["targets"] = F.cross_entropy(logits.float(), y[y >= 0])
                first = logits.detach()
        return losses, first


def optimizer_of(student):
    """Return Adam with one rate for the matrices and one for the table and all vectors."""
    named = list(student.named_parameters())
    matrix = lambda n, p: (".block." in n and p.ndim == 2 and "relative" not in n) or n.startswith("maps")
    return torch.optim.Adam(
        [dict(params=[p for n, p in named if matrix(n, p)]), dict(params=[p for n, p in named if not matrix(n, p)])],
        betas=(0.9, 0.98),
        fused=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("start", type=Path, help="folder of the model after stage 2")
    parser.add_argument("text", type=Path, help="folder of *.txt.xz")
    parser.add_argument("teachers", type=Path, help="folder of both teachers (teachers.py)")
    parser.add_argument("work", type=Path, help="folder of all output")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--read", type=float, default=0, help="minutes for which the teachers read first")
    parser.add_argument("--minutes", type=float, default=1e9, help="time limit; the next call continues")
    parser.add_argument("--steps", type=int, default=10**9, help="last step of the trunk")
    parser.add_argument("--cooldown", type=int, default=0, help="steps of a branch on which the rates fall to 0")
    parser.add_argument("--name", help="name of log, checkpoint and folder (default: the size)")
    parser.add_argument("--save-minutes", type=float, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", choices=NAMES, help="leave one teacher out (an ablation)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # moments of rare pieces decay into denormals, which are ten times slower
    torch.manual_seed(args.seed)
    start_of_run, dtype, name = time.time(), fastest_dtype(), args.name or args.size

    read(args.text, args.teachers, args.work, args.read)
    tok = Tokenizer.from_file(str(TOKENIZER))
    words = Words(tok, args.teachers, args.work / "words.npz")
    valid = Segments(args.work / "valid")
    sources = {source: Segments(args.work / source) for source in TRAIN}
    weights = {kind: 0.0 if args.without and kind.startswith(args.without) else w for kind, w in WEIGHTS.items()}
    spaces = {t: Space(list(sources.values()), words, t) for t in NAMES if t != args.without}
    reader = Reader(sources, spaces, words)
    validator = Reader({"valid": valid}, {t: Space([valid], words, t) for t in NAMES}, words)

    model = T5ForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32).train()
    for block in (*model.encoder.block, *model.decoder.block):  # one fused function
        block.layer[-1].DenseReluDense.act = torch.nn.GELU(approximate="tanh")
    student = Student(model, valid, dtype)
    optim = optimizer_of(student)
    branch = args.cooldown > 0
    usable = np.concatenate([(s.length <= LONG) & (source != "phrases") for source, s in sources.items()])
    tasks = Tasks(spaces, words, model.shared.weight.detach(), args.seed, usable)
    done = dict(step=0, read=0, target=0, seconds=0.0)
    trunk, saved = (args.work / f"checkpoint-{name}{end}.pt" for end in ("", "-cooled" if args.cooldown else ""))
    first_step = 0
    opened = saved if saved.exists() else trunk
    if opened.exists():
        state = torch.load(opened, weights_only=False)
        student.load_state_dict(state["student"])
        optim.load_state_dict(state["optim"])
        tasks.restore(state["tasks"])
        done = state["done"]
        first_step = state.get("first_step", done["step"])
    else:
        student.fit_maps([reader.batch("read", source, i) for source in sources for i in range(8)])
    last_step = first_step + args.cooldown if branch else args.steps

    def save():
        state = dict(student=student.state_dict(), optim=optim.state_dict(), tasks=tasks.state(), done=done)
        torch.save(state | (dict(first_step=first_step) if branch else {}), f"{saved}.part")
        os.replace(f"{saved}.part", saved)

    @torch.no_grad()
    def held_out():
        """Return mean losses over fixed batches of held-out text."""
        out = {}
        for objective in ("lm", "read", "choose"):
            found = [student(*validator.batch(objective, "valid", i))[0] for i in range(8)]
            out[objective] = {k: round(float(np.mean([f[k].item() for f in found])), 4) for k in found[0]}
        return out

    log = open(args.work / f"log-{name}.jsonl", "a", buffering=1)  # noqa: SIM115 - open until the end of the run
    kind = dict(branch="cooldown") if branch else {}

    def measure():
        print(json.dumps(dict(**kind, **done, segments=int(reader.begins[-1]), held_out=held_out())), file=log)

    measure()
    started, last_saved, before, window = time.time(), time.time(), done["seconds"], {}
    while done["step"] < last_step and time.time() - start_of_run < args.minutes * 60:
        step = done["step"]
        share = min(1.0, (step + 1) / WARMUP) * ((last_step - step) / args.cooldown if branch else 1.0)
        objective = TURNS[step % len(TURNS)]
        rng = np.random.default_rng([args.seed, step])
        if objective == "tasks":
            chosen, prompts, rows = tasks.batch(rng)
            batch = reader.tasks(rows)
            losses, logits = student(*batch, prompt=prompts[torch.tensor([i for i, _, _ in rows])])
            tasks.score(chosen, rows, logits[::2])  # the logits of the word, without the end
        else:
            turn = step // len(TURNS) * TURNS.count(objective) + TURNS[: step % len(TURNS)].count(objective)
            source = ASKED[objective][turn % len(ASKED[objective])]
            batch = reader.batch(objective, source, turn)
            losses, _ = student(*batch)
        sum(weights[kind] * value for kind, value in losses.items()).backward()
        for group, peak in zip(optim.param_groups, RATES.values(), strict=True):
            group["lr"] = peak * share
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)
        if objective == "tasks":
            tasks.step(chosen, prompts)
        for part, loss in losses.items():
            value = loss.item()
            window.setdefault(f"{objective}.{part}", []).append(value)
            if not math.isfinite(value):
                raise SystemExit(f"loss is {value} at step {step}")
        done = dict(
            step=step + 1,
            read=done["read"] + int((batch[0] != PAD).sum()),
            target=done["target"] + (0 if batch[1] is None else int((batch[1] >= 0).sum())),
            seconds=round(before + time.time() - started, 1),
        )
        if done["step"] % 80 == 0:
            row = dict(**kind, **done, tasks_made=tasks.made)
            row |= {k: round(float(np.mean(v)), 4) for k, v in window.items()}
            for age, scores in tasks.scores.items():
                row[f"{age} tasks"], row[f"{age} chance"] = (round(float(x), 3) for x in np.mean(scores, 0))
            print(json.dumps(row), file=log)
            window, tasks.scores = {}, {}
        if done["step"] % 800 == 0:
            measure()
        if time.time() - last_saved > args.save_minutes * 60:
            save()
            last_saved = time.time()
    save()
    if branch and done["step"] >= last_step:
        saved.unlink()  # the next branch starts from the trunk again
    folder = args.work / (f"{name}-cooled" if branch else name)
    export(student.model, args.size, TOKENIZER, folder)
    np.save(folder / "first-prompt.npy", tasks.first.numpy())
    measure()


if __name__ == "__main__":
    main()

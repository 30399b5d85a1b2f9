"""Compare engines on one prompt-tuning problem: time, memory and cold start, with ratios.

A frozen T5 of a named size with random weights is written to a folder. Every engine opens it in its own process and
then waits. The parent sends one call at a time, in rounds, so that other load on the machine affects all engines alike.
The results are medians. `peft_side.py` implements the calls for PEFT and torch.
"""

import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from tinyprompt import decode, train
from tinyprompt.check.process import Engine, run_once, serve
from tinyprompt.config import T5_1_1, Config, weight_shapes
from tinyprompt.data import Batch, random_batch
from tinyprompt.device import DEVICES, check_device, compile, default_device, open_session
from tinyprompt.errors import DeviceError
from tinyprompt.files import io, models, prompts, safetensors
from tinyprompt.lowering import lower
from tinyprompt.methods import init_params
from tinyprompt.model import PROMPT, Prompt
from tinyprompt.predict import predict
from tinyprompt.settings import COUNT, Settings, check_fields, setting
from tinyprompt.tree import flatten, merge, nest

# T5 1.1, which the paper freezes, and the first T5 (Raffel et al. 2020, sections 3.1.2 and 3.5).
T5_1_0 = {"gated": False, "tied_head": True, "scaled_logits": True}
SIZES = {
    "tiny": Config(32128, 16, 64, 24, 2, 1, 1),  # to test the benchmark itself
    **T5_1_1,
    "small-1.0": Config(32128, 512, 64, 2048, 8, 6, 6, **T5_1_0),
    "base-1.0": Config(32128, 768, 64, 3072, 12, 12, 12, **T5_1_0),
}
ENGINES = {
    "cpu": ("numpy", "ort", "ort-int8", "peft-fp32", "peft-bf16", "peft-compile", "ct2-fp32", "ct2-int8"),
    "cuda": ("numpy", "ort", "ort-bf16", "peft-fp32", "peft-bf16"),
}
SIDES = {"numpy": "steps", "ort": "steps", "peft": "peft_side", "ct2": "ctranslate2_side"}  # of the process
NEEDS = {"numpy": (), "peft": ("torch", "transformers", "peft"), "ct2": ("ctranslate2", "torch", "transformers")}
STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": bfloat16}
GEMM = 1920  # rows and columns of the matrices that measure the machine's peak rate
PRODUCT_ROUNDS = 2
TEXT, LABELS = "The film was long, and yet it ended too soon.", ("bad", "good")
COLD_STARTS = 3
SAME = 0.02  # relative difference of losses that 8-bit or 16-bit arithmetic may cause
EXACT, ROUGH = 0.05, 0.5  # limits of gradient errors: in 32 bits (a relu near 0 may switch sides), and in 8 or 16
PROMPT_FILE = "prompt.safetensors"


@dataclass(frozen=True)
class Problem:
    """The shapes of the training batch that every engine computes.

    Raises:
        TypeError, ValueError: A field is invalid. The message names it.
    """

    size: str = setting("small", "problem", "shape of the T5: 1.1, or 1.0 where it says so", choices=SIZES)
    batch_size: int = setting(8, "problem", "rows of a batch", COUNT)
    input_tokens: int = setting(64, "problem", "tokens of every input, padding included", COUNT)
    target_tokens: int = setting(4, "problem", "tokens of every target", COUNT)
    prompt_length: int = setting(100, "problem", "vectors of the prompt", COUNT)
    new_tokens: int = setting(64, "problem", "tokens that are written greedily", COUNT)
    storage: str = setting("float32", "problem", "dtype of the weights in their file", choices=STORAGE)
    device: str = setting("cpu", "problem", "where to compute", choices=ENGINES)

    def __post_init__(self):
        check_fields(self)

    def draw(self, vocab_size: int) -> Batch:
        """Draw the batch that every engine computes."""
        return random_batch(vocab_size, self.batch_size, self.input_tokens, self.target_tokens)


def config_json(size: str) -> dict[str, Any]:
    """Return the config.json of a T5 of a named size."""
    c = SIZES[size]
    return dict(
        model_type="t5",
        architectures=["T5ForConditionalGeneration"],
        vocab_size=c.vocab_size,
        d_model=c.d_model,
        d_kv=c.d_kv,
        d_ff=c.d_ff,
        num_heads=c.num_heads,
        num_layers=c.num_layers,
        num_decoder_layers=c.num_decoder_layers,
        feed_forward_proj="gated-gelu" if c.gated else "relu",
        tie_word_embeddings=c.tied_head,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )


def write_model(folder: Path, size: str, storage: str = "float32") -> None:
    """Write a Hugging Face directory of a T5 with random weights and the built-in model's tokenizer."""
    (folder / "config.json").write_text(json.dumps(config_json(size)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models.default_model() / name, folder)
    io.write({folder / "model.safetensors": safetensors.dump(random_weights(size, STORAGE[storage]), {"format": "pt"})})


def random_weights(size: str, dtype: Any) -> dict[str, safetensors.Lazy]:
    """Draw random weights quickly, since there may be billions. Each is drawn when it is written."""
    config, normal = SIZES[size], np.random.default_rng(0).standard_normal(1 << 22, np.float32)

    def weight(i: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, dtype)
        scale = 1.0 if name == "shared.weight" else shape[-1] ** -0.5 * (config.d_kv**-0.5 if ".q." in name else 1)
        return np.resize((np.roll(normal, -i) * np.float32(scale)).astype(dtype), shape)

    shapes = enumerate(weight_shapes(config).items())
    return {
        name: safetensors.Lazy(shape, np.dtype(dtype), partial(weight, i, name, shape)) for i, (name, shape) in shapes
    }


def write_prompt(folder: Path, length: int) -> None:
    """Write the first prompt of every engine: embeddings of random pieces."""
    params = init_params(models.load(folder), Settings(prompt_length=length, init="vocab"), None)
    prompts.save_prompt(Prompt(params, folder.name, None, LABELS), folder / PROMPT_FILE)


# ---- in the process of an engine ----


def peak_memory() -> float:
    """Return the peak memory of this process since `forget_peak`, in GiB, including mapped files."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    except (OSError, IndexError):
        import resource  # not available on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def forget_peak() -> None:
    """Reset the peak memory, to exclude loading (Linux only)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def gemm_flops(graph) -> int:
    """Count the floating-point operations in the matrix products of a lowered graph."""
    products = (x for x in graph.nodes if x.op in ("MatMul", "FusedMatMul"))
    return sum(
        2 * x.size * x.inputs[0].shape[-2 if x.attributes.get("transA") else -1] for x in products if x.inputs[0].ndim
    )


def run_own(engine: str, folder: Path, problem: Problem) -> None:
    """Answer the calls to "numpy", or to "ort" with a precision."""
    device = "numpy" if engine == "numpy" else engine.replace("ort", problem.device)
    model = models.load(folder)
    prompt = prompts.load_prompt(folder / PROMPT_FILE)
    arguments = prompt.params, model.params, model.config, problem.draw(model.config.vocab_size)
    step, score = (compile(function, device, frozen="params") for function in (train.loss_and_grads, train.loss))

    def write():
        params, frozen, config, batch = arguments
        inputs = batch.input_ids, batch.attention_mask
        decode.greedy(
            decode.Cache(merge(frozen, params), config, *inputs, 1, device), problem.batch_size, problem.new_tokens
        )

    calls = {
        "step": lambda: step(*arguments),
        "score": lambda: str(score(*arguments)),
        "generate": write,
        "loss": lambda: float(score(*arguments)),
        "gradient": lambda: np.save(folder / f"{engine}.npy", step(*arguments)[1][PROMPT]),
        "exact": lambda: save_exact(folder, problem),
        "forget peak": forget_peak,
        "memory": peak_memory,
    }
    calls["flops"] = lambda: float(gemm_flops(lower(train.loss_and_grads, *arguments)[0]))
    if engine == "ort":
        calls["build"] = lambda: open_session(lower(train.loss_and_grads, *arguments)[0], device)
    serve(calls)


def save_exact(folder: Path, problem: Problem) -> None:
    """Compute the reference gradient with NumPy in float64."""
    model = models.load(folder)
    exact = nest({name: value.astype(np.float64) for name, value in flatten(model.params).items()})
    params = {PROMPT: prompts.load_prompt(folder / PROMPT_FILE).array.astype(np.float64)}
    batch = problem.draw(model.config.vocab_size)
    batch = batch._replace(weights=batch.weights.astype(np.float64))
    np.save(folder / "exact.npy", train.loss_and_grads(params, exact, model.config, batch)[1][PROMPT])


def cold_start(folder: Path) -> None:
    """Make the first prediction in a new process."""
    model = models.load(folder)
    prompt = prompts.load_prompt(folder / PROMPT_FILE)
    print(predict(model, prompt, TEXT))


# ---- in the parent process ----


def command(engine: str) -> list[str]:
    """Return the command that starts an engine's process."""
    return [sys.executable, "-m", f"tinyprompt.bench.{SIDES[engine.partition('-')[0]]}"]


def available(device: str) -> list[str]:
    """List the engines that can run here, without importing them."""
    found = {name: all(map(importlib.util.find_spec, needs)) for name, needs in NEEDS.items()}
    found |= {"ort": default_device() != "numpy"}
    return [name for name in ENGINES[device] if found[name.partition("-")[0]]]


def only_writes(engine: str) -> bool:
    """Return whether an engine only generates text, without a loss and a gradient."""
    return engine.startswith("ct2")


def gpu_memory() -> float:
    """Return the GPU memory in use by all processes, in GiB."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(map(float, run_once(query, Path()).split())) / 2**10


class Notes:
    """Measurements: a list of values for each engine, quantity and unit."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str, str], list[float]] = {}

    def add(self, engine: str, what: str, unit: str, value: float) -> None:
        self.values.setdefault((engine, what, unit), []).append(value)

    def median(self, engine: str, what: str) -> float | None:
        return next((statistics.median(v) for (e, w, _), v in self.values.items() if (e, w) == (engine, what)), None)

    def ratio(self, what: str, over: str, under: str) -> float | None:
        """Return the median of one engine divided by the median of another, or None if either did not run."""
        sides = self.median(over, what), self.median(under, what)
        return sides[0] / sides[1] if sides[0] and sides[1] else None

    def rows(self) -> list[dict[str, Any]]:
        return [
            dict(engine=engine, what=what, median=statistics.median(v), min=min(v), max=max(v), unit=unit)
            for (engine, what, unit), v in self.values.items()
        ]


def measure(problem: Problem, engines: Sequence[str], rounds: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure engines on a problem, in alternation.

    Args:
        problem: The shapes of the batch, the model and the device.
        engines: Names of engines.
        rounds: Number of rounds.
        report: Called with a line before each step of the benchmark.

    Returns:
        `{"problem", "cores", "rows": [{engine, what, median, min, max, unit}], "ratios": {name: number or None}}`.

    Raises:
        ValueError: An engine cannot run here, or the engines compute different losses or gradients.
        DeviceError: The device cannot be used.
    """
    if problem.device == "cuda":
        check_device("cuda")
    for name in engines:
        if name not in available(problem.device):
            raise ValueError(f"engine {name!r}: expected one of {', '.join(available(problem.device))}")
    notes = Notes()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        report(f"writing random weights of T5 {problem.size} in {problem.storage} to {folder}")
        write_model(folder, problem.size, problem.storage)
        write_prompt(folder, problem.prompt_length)
        with ExitStack() as stack:
            running = {}
            for name in engines:
                report(f"opening {name}")
                before = gpu_memory() if problem.device == "cuda" else 0.0
                words = [*command(name), name, folder, json.dumps(asdict(problem))]
                running[name] = Engine(name, words, folder)
                stack.callback(running[name].close)
                if only_writes(name):
                    continue
                notes.add(name, "loss", "", running[name].ask("loss"))
                notes.add(name, "first step", "s", running[name].ask("step"))
                if problem.device == "cuda":
                    notes.add(name, "peak memory of step", "GiB", gpu_memory() - before)
            losses = {name: notes.median(name, "loss") or 0.0 for name in running if not only_writes(name)}
            first = next(iter(losses.values()), 0.0)
            if not all(abs(x - first) <= SAME * abs(first) for x in losses.values()):
                raise ValueError(f"the engines do not compute the same: their losses are {losses}")
            _take_turns(running, problem, rounds, notes, report)
            measure_products(problem, folder, notes, report)
            share_rates(running, notes)
            if "numpy" in running:
                _judge(running, folder, problem, notes, report)
        _start_cold(running, folder, problem, notes, report)
    ratios = {
        "step_speedup_vs_peft_fp32": notes.ratio("step", "peft-fp32", "ort"),
        "step_speedup_vs_peft_bf16": notes.ratio("step", "peft-bf16", "ort"),
        "step_speedup_vs_numpy": notes.ratio("step", "numpy", "ort"),
        "int8_step_speedup_vs_peft_bf16": notes.ratio("step", "peft-bf16", "ort-int8"),
        "bf16_step_speedup_vs_peft_bf16": notes.ratio("step", "peft-bf16", "ort-bf16"),
        "generate_speedup_vs_peft_fp32": notes.ratio("generate", "ort", "peft-fp32"),
        "generate_speedup_vs_ct2_fp32": notes.ratio("generate", "ort", "ct2-fp32"),
        "int8_generate_speedup_vs_ct2_int8": notes.ratio("generate", "ort-int8", "ct2-int8"),
        "gradient_error_vs_peft_fp32": notes.ratio("gradient error", "ort", "peft-fp32"),
        "memory_vs_peft": notes.ratio("peak memory of step", "ort", "peft-fp32"),
        "cold_start_vs_peft": notes.ratio("cold start", "ort", "peft-fp32"),
    }
    return {"problem": asdict(problem), "cores": os.cpu_count(), "rows": notes.rows(), "ratios": ratios}


def _take_turns(running: dict[str, Engine], problem: Problem, rounds: int, notes: Notes, report) -> None:
    """Measure steps, forward passes and greedy decoding of all engines in alternation."""
    tokens = problem.batch_size * (problem.prompt_length + problem.input_tokens + problem.target_tokens)
    learn = {name: engine for name, engine in running.items() if not only_writes(name)}
    for engine in running.values():
        engine.ask("generate")
    for engine in learn.values():
        engine.ask("score")
        engine.ask("forget peak")
    for i in range(rounds):
        report(f"round {i + 1} of {rounds}")
        for name, engine in learn.items():
            engine.ask("step")  # warm up: in training, a step follows another step
            notes.add(name, "step", "ms", 1e3 * engine.ask("step"))
            if i == 0 and problem.device == "cpu":
                notes.add(name, "peak memory of step", "GiB", engine.ask("memory"))
        for name, engine in learn.items():
            seconds = engine.ask("score")
            notes.add(name, "forward", "ms", 1e3 * seconds)
            notes.add(name, "forward rate", "token/s", tokens / seconds)
        for name, engine in running.items():
            notes.add(name, "generate", "token/s", problem.batch_size * problem.new_tokens / engine.ask("generate"))
    if "ort" in running:
        notes.add("ort", "build", "s", running["ort"].ask("build"))


def precision_of(engine: str) -> str:
    """Return the dtype in which an engine multiplies."""
    return {"int8": "int8", "bf16": "bfloat16"}.get(engine.rpartition("-")[2], "float32")


def libraries(device: str) -> list[str]:
    """List the libraries whose matrix products are measured: devices, and torch."""
    found = ["torch"] if importlib.util.find_spec("torch") else []
    for name in DEVICES if device == "cpu" else ():
        if DEVICES[name].place != "cuda":
            with suppress(DeviceError):
                check_device(name)
                found.append(name)
    return found


def measure_products(problem: Problem, folder: Path, notes: Notes, report: Callable[[str], None]) -> None:
    """Measure the products of every library in alternation, each in its own process."""
    for i in range(PRODUCT_ROUNDS):
        for name in libraries(problem.device):
            report(f"products of {name}, round {i + 1} of {PRODUCT_ROUNDS}")
            words = [sys.executable, "-m", "tinyprompt.bench.products_side", name, str(GEMM), problem.device]
            for precision, value in json.loads(run_once(words, folder).splitlines()[-1]).items():
                notes.add(name, f"products in {precision}", "GFLOP/s", value)


def share_rates(running: dict[str, Engine], notes: Notes) -> None:
    """Add the rate of every step, and its share of the best rate that any library reaches in that precision."""
    own = next((engine for name, engine in running.items() if SIDES[name.partition("-")[0]] == "steps"), None)
    if not own:
        return
    flops = own.ask("flops")
    for name in [name for name in running if not only_writes(name)]:
        what = f"products in {precision_of(name)}"
        best = max((max(v) for (_, found, _), v in notes.values.items() if found == what), default=None)
        for value in notes.values[name, "step", "ms"]:
            notes.add(name, "rate in a step", "GFLOP/s", flops / value / 1e6)
            if best:
                notes.add(name, "share of the best", "", flops / value / 1e6 / best)


def _judge(running: dict[str, Engine], folder: Path, problem: Problem, notes: Notes, report) -> None:
    """Measure the relative error of each gradient against float64. Raises ValueError if one is too large."""
    report("gradient in float64")
    running["numpy"].ask("exact")
    exact = np.load(folder / "exact.npy")
    for name, engine in running.items():
        if only_writes(name):
            continue
        engine.ask("gradient")
        error = np.linalg.norm(np.load(folder / f"{name}.npy") - exact) / np.linalg.norm(exact)
        notes.add(name, "gradient error", "relative", float(error))
        allowed = ROUGH if name.endswith(("int8", "bf16")) else EXACT
        if not error <= allowed:
            raise ValueError(
                f"engine {name}: the relative error of its gradient is {error:.2g}; expected at most {allowed}"
            )


def _start_cold(engines: Iterable[str], folder: Path, problem: Problem, notes: Notes, report) -> None:
    """Measure import, loading and the first prediction."""
    starters = [name for name in ("ort", "peft-fp32") if name in engines and problem.device == "cpu"]
    for i in range(COLD_STARTS if starters else 0):
        report(f"cold start {i + 1} of {COLD_STARTS}")
        for name in starters:
            started = time.perf_counter()
            run_once([*command(name), "cold", folder], folder)
            notes.add(name, "cold start", "s", time.perf_counter() - started)


def table(result: dict[str, Any]) -> str:
    """Format the result of `measure` as text."""
    lines = [f"{'':<22}{'engine':<14}{'median':>10}{'min':>10}{'max':>10}"]
    for row in sorted(result["rows"], key=lambda row: row["what"]):
        figures = "".join(f"{row[k]:>10.4g}" for k in ("median", "min", "max"))
        lines.append(f"{row['what']:<22}{row['engine']:<14}{figures}  {row['unit']}".rstrip())
    return "\n".join([*lines, *(f"{k:<36}{v:>10.2f}" for k, v in result["ratios"].items() if v is not None)])


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "cold":
        cold_start(Path(where))
    else:
        run_own(what, Path(where), Problem(**json.loads(rest[0])))

"""One runtime with one model in a process of its own, for benchmarks/onnx.py.

`python -P onnx_worker.py RUNTIME FOLDER` reads one JSON request a line and answers with one.
{"tokens": "ids.npy", "length": L, "steps": n} prefills L - n - 1 tokens and decodes n greedily,
one thread: {"prefill": seconds, "decode": median seconds a token, "peak_mb", "state_mb"}.
{"tokens": …, "score": L} scores L tokens in one prefill, the first not: {"perplexity"}.
{"tokens": …, "score": L, "steps": n} scores the last n of them one by one after the others.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Rewriter:
    """An exported folder in rewriter.runtime: numpy and onnxruntime, no torch."""

    def __init__(self, folder: Path) -> None:
        from rewriter.runtime import OnnxModel

        self.model = OnnxModel(folder, threads=1)

    def start(self, total: int) -> None:
        self.sequence = self.model.start(1, total)

    def prefill(self, tokens: Array) -> Array:
        """Logits of the last position, or of all where the file has them: [L or 1, V]."""
        return self.sequence(tokens[None])[0]

    def greedy(self, logits: Array) -> int:
        return int(logits[-1].argmax())

    def step(self, token: int) -> tuple[Array, int]:
        logits = self.sequence(np.array([[token]]))[0]
        return logits, self.greedy(logits)

    def state_bytes(self) -> int:
        """Of all buffers: a state that is not updated in place counts twice."""
        return self.sequence.states.bytes()


class Genai:
    """A folder of onnxruntime-genai's builder, with its own generator."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai

        self.package = onnxruntime_genai
        self.model = onnxruntime_genai.Model(str(folder))

    def start(self, total: int) -> None:
        options = self.package.GeneratorParams(self.model)
        options.set_search_options(max_length=total, do_sample=False)
        self.generator = self.package.Generator(self.model, options)

    def prefill(self, tokens: Array) -> Array:
        self.generator.append_tokens(tokens.astype(np.int32))
        return self.generator.get_logits()[0]

    def greedy(self, logits: Array) -> int:
        self.generator.generate_next_token()  # chooses; the model runs in the next call
        return -1

    def step(self, token: int) -> tuple[Array, int]:
        if token >= 0:  # a given one
            self.generator.append_tokens(np.array([token], dtype=np.int32))
            return self.generator.get_logits()[0], token
        self.generator.generate_next_token()
        return np.empty(0), -1

    def state_bytes(self) -> int:
        return 0  # not told


class Openvino:
    """A stateful model of optimum-intel in OpenVINO, its default precision hints off."""

    def __init__(self, folder: Path) -> None:
        import openvino

        core = openvino.Core()
        hints = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        hints |= {"KV_CACHE_PRECISION": "f32"}
        model = core.compile_model(str(folder / "openvino_model.xml"), "CPU", hints)
        self.names = {name for port in model.inputs for name in port.get_names()}
        self.request = model.create_infer_request()

    def start(self, total: int) -> None:
        self.request.reset_state()
        self.past = 0

    def prefill(self, tokens: Array) -> Array:
        end = self.past + len(tokens)
        given = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, end), dtype=np.int64),
            "position_ids": np.arange(self.past, end)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        self.past = end
        self.request.infer({k: v for k, v in given.items() if k in self.names})
        return self.request.get_output_tensor(0).data[0]

    greedy = Rewriter.greedy

    def step(self, token: int) -> tuple[Array, int]:
        logits = self.prefill(np.array([token]))
        return logits, self.greedy(logits)

    def state_bytes(self) -> int:
        return sum(s.state.byte_size for s in self.request.query_state())


RUNTIMES: dict[str, Any] = {
    "rewriter": Rewriter,
    "onnxruntime-genai": Genai,
    "openvino": Openvino,
}


def timed(runtime: Any, tokens: Array, length: int, steps: int) -> dict[str, float]:
    runtime.start(length)
    clock = time.perf_counter()
    logits = runtime.prefill(tokens[: length - steps - 1])
    prefill = time.perf_counter() - clock
    token, seconds = runtime.greedy(logits), []
    for _ in range(steps):
        clock = time.perf_counter()
        _, token = runtime.step(token)
        seconds.append(time.perf_counter() - clock)
    return {
        "prefill": prefill,
        "decode": median(seconds),
        "peak_mb": peak(),
        "state_mb": runtime.state_bytes() / 1e6,
    }


def peak() -> float:
    """High-water mark of this process's resident memory, MB; getrusage's is its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def score(runtime: Any, tokens: Array, length: int, steps: int) -> dict[str, float]:
    """exp of the mean loss of tokens 1 … length - 1, or of the last `steps` in cached decode."""
    tokens = tokens[:length]
    runtime.start(length)
    if not steps:
        losses = _losses(runtime.prefill(tokens)[:-1], tokens[1:])
        return {"perplexity": float(np.exp(losses.mean()))}
    logits = [runtime.prefill(tokens[: length - steps])[-1:]]
    logits += [runtime.step(int(t))[0][-1:] for t in tokens[length - steps : -1]]
    return {"perplexity": float(np.exp(_losses(np.concatenate(logits), tokens[-steps:]).mean()))}


def _losses(logits: Array, targets: Array) -> Array:
    logits = logits.astype(np.float64)
    top = logits.max(-1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return np.asarray(total - logits[np.arange(len(targets)), targets])


def main() -> None:
    runtime = RUNTIMES[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps({"peak_mb": peak()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        tokens = np.load(asked["tokens"])
        if "score" in asked:
            answer = score(runtime, tokens, asked["score"], asked.get("steps", 0))
        else:
            answer = timed(runtime, tokens, asked["length"], asked["steps"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

"""Three clients on exports of SmolLM2-135M against RewrittenModel.generate: tokens must be equal.

    cd examples/node && npm install --ignore-scripts
    python -m benchmarks.clients

onnxruntime-genai and Node run the folder; the openai library asks `rewriter serve`. Writes
benchmarks/results/clients.json and fails if any token differs.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import torch
from transformers import AutoTokenizer

import rewriter

SOURCE = Path.home() / ".cache/rewriter/assets/smollm2"
ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "clients.json"
NEW = 64
TEXTS = [
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):",
    "It is a truth universally acknowledged, that a single man",
]
CHAT: Any = [{"role": "user", "content": "What is the capital of France, and of Italy?"}]


def genai(folder: Path) -> Callable[[str], list[int]]:
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)

    def generate(text: str) -> list[int]:
        prompt = tokenizer.encode(text)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + NEW)
        generator, made = og.Generator(model, params), []
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
            made.append(int(generator.get_next_tokens()[0]))
        return made

    return generate


def node(folder: Path) -> Callable[[str], list[int]]:
    def generate(text: str) -> list[int]:
        command = ["node", str(ROOT / "examples/node/generate.mjs"), str(folder), text, str(NEW)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return json.loads(said.strip().splitlines()[-1])["made"]

    return generate


def served(folder: Path, want: dict[str, list[int]], chat: str) -> int:
    """Equal answers of the openai library, of one more than there are texts."""
    command = [sys.executable, "-c", "from rewriter.cli import main; main()", "serve"]
    process = subprocess.Popen(
        [*command, str(folder), "--port", "0", "--name", "model"], stdout=subprocess.PIPE, text=True
    )
    try:
        url = process.stdout.readline().split(" on ")[1].strip()  # type: ignore[union-attr]
        client = openai.OpenAI(base_url=url, api_key="none")
        given: Any = {"model": "model", "temperature": 0, "max_tokens": NEW}
        more: Any = {"extra_body": {"return_token_ids": True}}
        equal = 0
        for text, tokens in want.items():
            made = client.completions.create(prompt=text, **given, **more)
            equal += made.choices[0].model_extra["token_ids"] == tokens  # type: ignore[index]
        events = client.chat.completions.create(messages=CHAT, stream=True, **given)
        said = "".join(e.choices[0].delta.content or "" for e in events)
        return equal + (said == chat)
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    made = rewriter.rewrite(str(SOURCE), {"steps": []})

    def greedy(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        return made.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW)[0].tolist()

    want = {}
    for text in TEXTS:
        prompt = tokenizer(text)["input_ids"]
        want[text] = greedy(prompt)[len(prompt) :]
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    chat = tokenizer.decode(greedy(prompt)[len(prompt) :], skip_special_tokens=True)
    found: dict[str, Any] = {"answers": {}}
    with tempfile.TemporaryDirectory() as temporary:
        # onnxruntime-node is behind onnxruntime.
        for name, client, runtime in (("onnxruntime-genai", genai, None), ("node", node, "1.30")):
            folder = Path(temporary) / name
            rewriter.export(made, folder, to="onnx", logits="last", runtime=runtime)
            generate = client(folder)
            equal = sum(generate(text) == tokens for text, tokens in want.items())
            found["answers"][name] = [equal, len(want)]
        folder = Path(temporary) / "onnxruntime-genai"
        found["answers"]["openai"] = [served(folder, want, chat), len(want) + 1]
    found["new_tokens"] = NEW
    names = ("onnxruntime", "onnxruntime-genai", "openai")
    found["versions"] = {name: importlib.metadata.version(name) for name in names}
    package = json.loads((ROOT / "examples/node/package.json").read_text())
    found["versions"] |= package["dependencies"]
    print(json.dumps(found, indent=2))
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    if any(equal != count for equal, count in found["answers"].values()):
        sys.exit("a client made other tokens")


if __name__ == "__main__":
    main()

"""A tiny model with a tokenizer, exported; and `rewriter serve` over it in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

import rewriter
from rewriter.backends.onnx import export_onnx

TEMPLATE = (
    "{{ bos_token }}{%- for message in messages %}"
    "{%- if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role') }}{%- endif %}"
    "<{{ message.role }}>{{ message.content | trim }}</s>{%- endfor %}"
    "{% if add_generation_prompt %}\n<assistant>{% endif %}"
)
SAMPLE = Path(rewriter.__file__).parent / "data/sample.txt"


@dataclass
class Tiny:
    """The rewritten model, the folder of its export, and its tokenizer."""

    model: Any
    folder: Path
    tokenizer: Any

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """New tokens of RewrittenModel.generate, up to the end of text."""
        made = self.model.generate(
            input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=count
        )
        return made[0, len(prompt) :].tolist()


def tiny(folder: Path, steps: list[dict[str, Any]], layers: int = 2) -> Tiny:
    """A few layers, GQA, 320 tokens, rewritten by `steps` and exported to `folder`/tiny."""
    from transformers import AutoTokenizer

    source = folder / "source"
    source.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<user>", "<assistant>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE.read_text()[:20000]], trainer)
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<pad>",
            }
        )
    )
    (source / "chat_template.jinja").write_text(TEMPLATE)
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        initializer_range=0.2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(source)
    data = torch.randint(5, 320, (2, 32), generator=torch.Generator().manual_seed(1))
    made = rewriter.rewrite(str(source), {"steps": steps}, data=data)
    export_onnx(made, folder / "tiny", logits="last")
    return Tiny(made, folder / "tiny", AutoTokenizer.from_pretrained(source))


# ---- the server ------------------------------------------------------------------------------

#: Told at the end, so that a test sees what was imported and that it ended by itself.
START = """
import sys
from rewriter.cli import run
{before}
code = run(["serve", *sys.argv[1:]])
print("ended", code, sorted({{"torch", "transformers", "onnx"}} & set(sys.modules)), flush=True)
"""
#: A model of which each token takes 20 ms.
SLOW = """
import time
from rewriter.serve import engine
take = engine.Job.take
engine.Job.take = lambda *a: (time.sleep(0.02), take(*a))[1]
"""


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def get(self, path: str) -> Any:
        return self.send("GET", path)[2]

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
        """Status, headers and body as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, data, {"Content-Type": "application/json", **headers})

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: Any = None
    ) -> tuple[int, Any, Any]:
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, json.loads(answer.read())

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Events up to [DONE], which must come."""
        with contextlib.closing(self.connect()) as connection:
            data = json.dumps(body | {"stream": True}).encode()
            connection.request("POST", path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            for line in answer:
                if line.strip() == b"data: [DONE]":
                    return
                if line.strip():
                    yield json.loads(line.removeprefix(b"data: "))
        raise AssertionError("the stream ended without [DONE]")

    def until(self, running: int) -> None:
        """Wait until so many answers are being written."""
        for _ in range(200):
            if self.get("/health")["running"] == running:
                return
            time.sleep(0.02)
        raise AssertionError(self.get("/health"))

    def end(self) -> list[str]:
        """SIGTERM; what it printed after that."""
        self.process.terminate()
        return self.process.communicate(timeout=30)[0].splitlines()


@contextlib.contextmanager
def server(folder: Path, *options: str, before: str = "") -> Iterator[Server]:
    command = [sys.executable, "-c", START.format(before=before), str(folder), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--threads", "1", *options], stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()  # type: ignore[union-attr]
        assert line.startswith("serving tiny on http://127.0.0.1:"), line
        yield Server(process, int(line.split(":")[-1].split("/")[0]))
    finally:
        process.kill()
        process.communicate()

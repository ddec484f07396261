"""Clients that people have: onnxruntime-genai and the openai library, on exported folders."""

from __future__ import annotations

import json
from typing import Any

import onnxruntime_genai
import openai
import pytest
from serving import Server, Tiny, server, tiny

from rewriter.backends.onnx.capabilities import capabilities
from rewriter.backends.onnx.genai import genai_config, layers, not_runnable
from rewriter.errors import RewriterError

WINDOW = {"pass": "sliding_window", "window": 8, "policy": "warn"}
PLANS: dict[str, list[dict[str, Any]]] = {
    "attention": [],
    "recurrent, window and attention": [
        {"pass": "mamba2", "layers": [0]},
        WINDOW | {"sinks": 2, "layers": [1]},
    ],
}
CHAT = [{"role": "user", "content": "Over the hills and far away, in the morning"}]


@pytest.fixture(scope="module", params=PLANS)
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("clients"), PLANS[request.param], layers=3)


@pytest.fixture(scope="module")
def served(model: Tiny) -> Any:
    with server(model.folder) as made:
        yield made


def test_genai_runs_the_folder_unchanged(model: Tiny) -> None:
    """Greedy tokens past the window, with its own tokenizer and search settings."""
    report = json.loads((model.folder / "export.json").read_text())
    assert report["genai"] == "genai_config.json"
    text = "Over the hills and far away, in the morning"
    loaded = onnxruntime_genai.Model(str(model.folder))
    prompt = onnxruntime_genai.Tokenizer(loaded).encode(text)
    assert prompt.tolist() == model.tokenizer(text)["input_ids"]
    params = onnxruntime_genai.GeneratorParams(loaded)
    params.set_search_options(max_length=len(prompt) + 60)
    generator = onnxruntime_genai.Generator(loaded, params)
    generator.append_tokens(prompt)
    made = []
    while not generator.is_done():
        generator.generate_next_token()
        made.append(int(generator.get_next_tokens()[0]))
    assert made == model.greedy(prompt.tolist(), 60)
    assert len(made) > 20


@pytest.mark.parametrize("model", ["attention"], indirect=True)
def test_openai_reads_what_the_torch_model_says(model: Tiny, served: Server) -> None:
    prompt = model.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    want = model.greedy(prompt, 30)
    said = model.tokenizer.decode(want, skip_special_tokens=True)
    client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["tiny"]
    given: Any = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 30}
    whole = client.chat.completions.create(**given)
    assert whole.choices[0].message.content == said
    assert whole.usage and whole.usage.completion_tokens == len(want)
    stream = client.chat.completions.create(**given, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == said
    text = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=30)
    assert text.choices[0].text == said
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        client.chat.completions.create(**given, n=2)
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.chat.completions.create(**given | {"model": "gpt"})


# ---- genai_config.json -----------------------------------------------------------------------


def state(kind: str, index: int, shape: list[int], grows: int | None = None, shared: bool = True):
    name = f"{kind}_{index}"
    return {
        "input": f"past_{name}",
        "output": f"present_{name}",
        "shape": shape,
        "grows": grows,
        "dtype": "float32",
        "shared": shared,
        "aligned": False,
    }


def attention(index: int, window: int = 0, shared: bool = True) -> list[Any]:
    grows = None if window else 2
    return [state(k, index, [2, window, 16], grows, shared) for k in ("key", "value")]


REASONS: dict[str, tuple[list[Any], str]] = {
    "a third state": (
        [*attention(0, 8), state("linear", 0, [2, 16, 16])],
        "layer 0 has the states",
    ),
    "two windows": ([*attention(0, 8), *attention(1, 16)], "one size of window"),
    "concatenated": ([*attention(0, 8), *attention(1, shared=False)], "by concatenation"),
    "two mixers": (
        [
            state(k, i, s)
            for i, r in ((0, "ssm"), (1, "delta"))
            for k, s in (("conv", [8, 3]), (r, [2, 4, 4]))
        ],
        "one template",
    ),
    "narrow values": ([state("key", 0, [2, 0, 16], 2), state("value", 0, [2, 0, 8], 2)], "wide"),
    "no states": ([], "no states"),
}


@pytest.mark.parametrize("name", REASONS)
def test_why_it_cannot(name: str) -> None:
    states, reason = REASONS[name]
    inputs = ["input_ids", *(s["input"] for s in states)]
    report = {"inputs": inputs, "outputs": ["logits"], "states": states}
    assert reason in not_runnable(report)
    report["states"] = attention(0)
    report["inputs"] = ["input_ids", "pixel_values", "past_key_0", "past_value_0"]
    assert "pixel_values" in not_runnable(report)


def test_settings_come_from_the_model() -> None:
    states = [*attention(0), *attention(2), state("conv", 1, [8, 3]), state("ssm", 1, [2, 4, 4])]
    report = {"inputs": ["input_ids", *(s["input"] for s in states)], "states": states}
    report |= {"file": "model.onnx", "outputs": ["logits"], "ops": {"all": 9}}
    config = {
        "vocab_size": 50,
        "eos_token_id": 3,
        "original": {"n_positions": 77, "vocab_size": 50},
    }
    made = genai_config(report, config, {"eos_token_id": [3, 4], "pad_token_id": None})
    assert made["model"]["eos_token_id"] == [3, 4] and made["model"]["context_length"] == 77
    assert made["model"]["decoder"]["inputs"]["past_recurrent_names"] == "past_ssm_%d"
    assert made["model"]["decoder"]["num_hidden_layers"] == 3
    assert made["search"]["past_present_share_buffer"] is False  # no operator that writes in place
    assert list(layers(states)) == [0, 1, 2]
    assert not_runnable(report) == ""


def test_an_older_runtime_lacks_what_came_later() -> None:
    """onnxruntime-node is behind onnxruntime."""
    assert not capabilities("1.30").query_lengths and not capabilities("1.31.2").window_cache
    assert capabilities("1.32").query_lengths == capabilities().query_lengths
    assert capabilities("1.30").grouped_query
    with pytest.raises(RewriterError, match="cannot check an export for 99.0"):
        capabilities("99.0")
    with pytest.raises(RewriterError, match="no version"):
        capabilities("latest")

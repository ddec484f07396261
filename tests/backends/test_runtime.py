"""The runtime without torch: same tokens as the torch model, states that stay in their buffers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import rewriter
from rewriter.errors import RewriterError

pytest.importorskip("onnxruntime")

from rewriter.backends.onnx import export_onnx  # noqa: E402
from rewriter.runtime import Batch, OnnxModel, Sampler  # noqa: E402

WINDOW = {"pass": "sliding_window", "window": 8, "policy": "warn"}
PLANS = {
    "empty": [],
    "window": [WINDOW | {"sinks": 0}],
    "sinks": [WINDOW | {"sinks": 3}],
    "mamba2": [{"pass": "mamba2", "layers": [1]}],
    "hybrid": [{"pass": "hybrid_linear", "window": 4, "policy": "warn"}],
    "standard": [],
}
PROMPTS = torch.tensor([[0, 0, 0, 7, 8], [0, 31, 2, 77, 5], [3, 9, 101, 4, 150]])
MASK = (PROMPTS != 0).long()


@pytest.fixture(scope="module", params=PLANS)
def pair(request, tiny_llama, tmp_path_factory):
    """The torch model, and its export opened by the runtime."""
    tokens = torch.randint(1, 200, (2, 48), generator=torch.Generator().manual_seed(1))
    made = rewriter.rewrite(tiny_llama, {"steps": PLANS[request.param]}, data=tokens)
    folder = tmp_path_factory.mktemp("runtime") / "out"
    style = "standard" if request.param == "standard" else "fused"
    export_onnx(made, folder, attention=style, logits="last")
    return made, OnnxModel(folder, threads=1)


def test_greedy_tokens_are_those_of_the_torch_model(pair) -> None:
    """A left-padded batch, longer than the window; all at once, in chunks, one by one."""
    made, onnx = pair
    want = made.generate(
        input_ids=PROMPTS, attention_mask=MASK, do_sample=False, max_new_tokens=40, eos_token_id=-1
    ).numpy()
    options = {"max_new_tokens": 40, "eos_token_id": -1}
    np.testing.assert_array_equal(onnx.generate(PROMPTS, MASK, **options), want)
    np.testing.assert_array_equal(onnx.generate(PROMPTS, MASK, chunk=2, **options), want)
    streamed = np.stack(list(onnx.stream(PROMPTS.numpy(), MASK.numpy(), **options)), 1)
    np.testing.assert_array_equal(streamed, want[:, 5:])


def test_rows_end_on_their_own(pair) -> None:
    made, onnx = pair
    free = onnx.generate(PROMPTS, MASK, max_new_tokens=30, eos_token_id=-1)
    end = int(free[1, 9])
    options = {"max_new_tokens": 30, "eos_token_id": end, "pad_token_id": 0}
    want = made.generate(input_ids=PROMPTS, attention_mask=MASK, do_sample=False, **options)
    np.testing.assert_array_equal(onnx.generate(PROMPTS, MASK, **options), want.numpy())


def test_states_stay_in_their_buffers(pair) -> None:
    """No state is allocated anew while there is room; windows and recurrent states never grow."""
    _, onnx = pair
    sequence = onnx.start(batch=2, expected=40)
    addresses, sizes = set(), set()
    for _ in range(40):
        sequence(np.array([[5], [6]]))
        held = [*sequence.states.values.items(), *sequence.states.spare.items()]
        keep = {s["input"] for s in onnx.about["states"] if s["shared"] or s["grows"] is None}
        addresses.add(frozenset(v.data_ptr() for k, v in held if k in keep))
        sizes.add(sum(v.tensor_size_in_bytes() for k, v in held if k in keep))
    assert len(addresses) == len(sizes) == 1


def test_a_cache_that_outgrows_its_room_goes_on(pair) -> None:
    made, onnx = pair
    tokens = torch.randint(1, 200, (2, 150), generator=torch.Generator().manual_seed(3))
    sequence = onnx.start(batch=2)  # told nothing of how long it will be
    with torch.no_grad():
        want = made(input_ids=tokens).logits
    for at in range(0, 150, 25):
        got = torch.from_numpy(sequence(tokens[:, at : at + 25]))[:, -1]
        reference = want[:, at + 24]
        assert (got - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_rows_that_come_and_go_get_what_they_get_alone(pair) -> None:
    """Prompts shorter and longer than the window join while others are being decoded."""
    _, onnx = pair
    if reason := Batch.refuses(onnx):
        states = onnx.about["states"]
        assert any(s["aligned"] or not s["shared"] for s in states), reason
        with pytest.raises(RewriterError, match="padding"):
            Batch(onnx, 64)
        return
    random = np.random.default_rng(0)
    batch, alone = Batch(onnx, 64), []

    def join(length: int) -> None:
        prompt = random.integers(1, 200, (1, length))
        mine, copied = onnx.start(1, 64), onnx.start(1, length)
        mine(prompt), copied(prompt)
        batch.join(copied)
        alone.append(mine)

    def step(times: int) -> None:
        for _ in range(times):
            new = random.integers(1, 200, len(alone))
            made = batch(new)
            want = np.concatenate(
                [s(t[None, None])[:, -1] for s, t in zip(alone, new, strict=True)]
            )
            assert np.abs(made - want).max() <= 1e-5 * np.abs(want).max()

    def leave(row: int) -> None:
        batch.leave(row)
        alone[row] = alone[-1]
        alone.pop()

    for length in (3, 21, 9):
        join(length)
        step(4)
    leave(0)
    step(12)
    leave(1)
    join(1)
    step(10)
    for _ in range(7):
        join(5)
    step(3)
    while len(alone) > 1:
        leave(0)
    step(2)
    with pytest.raises(RewriterError, match="of at most 64"):
        batch([1, 2])


def test_sampling() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]] * 4000))
    drawn = Sampler(temperature=1.0, seed=0)(logits)
    shares = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    assert set(Sampler(1.0, top_p=0.75, seed=0)(logits)) == {0, 1}
    assert set(Sampler(1.0, top_k=3, seed=0)(logits)) == {0, 1, 2}
    assert set(Sampler(1.0, top_p=0.1, seed=0)(logits)) == {0}
    np.testing.assert_array_equal(Sampler(0.7, seed=5)(logits), Sampler(0.7, seed=5)(logits))
    sharp = np.bincount(Sampler(0.5, seed=1)(logits), minlength=4) / 4000
    want = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(sharp, want / want.sum(), atol=0.03)
    with pytest.raises(RewriterError, match="top_p"):
        Sampler(top_p=0)


@pytest.mark.parametrize("pair", ["empty"], indirect=True)
def test_mistakes_are_named(pair, tmp_path) -> None:
    _, onnx = pair
    folder = onnx.folder
    with pytest.raises(RewriterError, match="CUDAExecutionProvider"):
        OnnxModel(folder, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(RewriterError, match=r"export\.json"):
        OnnxModel(tmp_path)
    with pytest.raises(RewriterError, match="max_new_tokens"):
        onnx.generate(PROMPTS, MASK, max_new_tokens=0)
    with pytest.raises(RewriterError, match="integers"):
        onnx.generate(np.zeros((1, 3), dtype=np.float32))
    with pytest.raises(RewriterError, match="batch of 1"):
        onnx.start(1)(PROMPTS)


@pytest.mark.parametrize("pair", ["empty"], indirect=True)
def test_it_imports_neither_torch_nor_transformers(pair) -> None:
    _, onnx = pair
    code = (
        "import sys; from rewriter.runtime import OnnxModel;"
        f"OnnxModel({str(onnx.folder)!r}).generate([[1, 2, 3]], max_new_tokens=3);"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

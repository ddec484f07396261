"""Quantised exports: the grid's numbers, a source's own grid bit for bit, the measured loss."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import rewriter
from rewriter.errors import GateError, RewriterError

pytest.importorskip("onnxruntime")
gguf = pytest.importorskip("gguf")

import onnx_ir as ir  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from rewriter.backends.onnx import quantize  # noqa: E402
from rewriter.backends.onnx.export import export_onnx  # noqa: E402
from rewriter.backends.onnx.quantize import gguf as sources  # noqa: E402
from rewriter.backends.onnx.quantize import nodes  # noqa: E402
from rewriter.backends.onnx.quantize.grids import Grid, round_to_grid  # noqa: E402
from rewriter.backends.onnx.quantize.outliers import outliers  # noqa: E402
from rewriter.runtime import OnnxModel  # noqa: E402

KIND = gguf.GGMLQuantizationType
RANDOM = np.random.default_rng(0)


def unpacked(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    rows = packed.reshape(packed.shape[0], -1)
    if bits == 4:
        rows = np.stack([rows & 15, rows >> 4], -1).reshape(len(rows), -1)
    return rows[:, :columns]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """Tied, with grouped queries, so that a GGUF file permutes the rows of queries and keys."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=211,
        tie_word_embeddings=True,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
        for layer in model.model.layers:
            layer.input_layernorm.weight[9] = 80  # an outlier, as trained models have them
            layer.self_attn.q_proj.weight[:, 9] /= 80
            layer.self_attn.k_proj.weight[:, 9] /= 80
            layer.self_attn.v_proj.weight[:, 9] /= 80
    return model


@pytest.fixture(scope="module")
def plain(llama) -> rewriter.RewrittenModel:
    return rewritten(llama)


def rewritten(model: LlamaForCausalLM, *steps: dict) -> rewriter.RewrittenModel:
    tokens = torch.randint(0, 211, (2, 48), generator=torch.Generator().manual_seed(1))
    return rewriter.rewrite(model, rewriter.Plan(steps=list(steps)), data=tokens)


# ---- grids -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.008), (4, 0.11)])
def test_rounding(bits: int, bound: float) -> None:
    """Columns that fill no whole block, a block of zeros, a row of one sign."""
    weight = RANDOM.standard_normal((5, 70)).astype(np.float32)
    weight[1, :32] = 0
    weight[2] = np.abs(weight[2]) + 3
    grid = round_to_grid(weight, bits)
    made = grid.weights()
    assert made.shape == weight.shape and not made[1, :32].any()
    error = np.linalg.norm(made - weight, axis=1) / np.linalg.norm(weight, axis=1)
    assert error.max() <= bound
    np.testing.assert_array_equal(unpacked(grid.packed(), bits, 96), grid.quants)
    if bits == 4:
        np.testing.assert_array_equal(unpacked(grid.packed_zeros(), 4, 3), grid.zeros)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_block_format_is_read_bit_for_bit(kind: str) -> None:
    """Against the reader of the gguf package; Q4_1 also where minima and scales differ widely."""
    weight = RANDOM.standard_normal((6, 96)).astype(np.float32)
    weight[0, :32] = 700 + 1e-3 * weight[0, :32]
    data = gguf.quantize(weight, KIND[kind])
    grid = sources.READERS[kind](data)
    np.testing.assert_array_equal(grid.weights(), gguf.dequantize(data, KIND[kind]))
    assert (grid.minima is not None) == (kind == "Q4_1")
    # One block that sums exactly leaves all others the zero point 8.
    assert (grid.zeros is not None) == (kind == "Q4_1")
    if kind == "Q4_1":
        assert sources.READERS[kind](gguf.quantize(weight[1:], KIND[kind])).zeros is None


def test_columns_that_spoil_their_block_are_found() -> None:
    """Two planted ones; none where all columns are alike, or where the weights do not read them."""
    x = RANDOM.standard_normal((50, 96)).astype(np.float32)
    ones = np.ones(96)
    assert not len(outliers(x, ones))
    x[:, [7, 70]] *= 60
    assert outliers(x, ones).tolist() == [7, 70]
    middle = np.zeros(96)
    middle[32:64] = 1
    assert not len(outliers(x, middle))


# ---- exports -----------------------------------------------------------------------------------

PLANS = {
    "dense": [],
    "mamba2": [{"pass": "mamba2", "layers": [1]}],
    "low_rank": [{"pass": "low_rank", "rank": 40, "policy": "warn"}],
}


@pytest.mark.parametrize(
    ("plan", "weights", "attention"),
    [
        ("dense", "int8", "fused"),
        ("low_rank", "int4", "standard"),
        ("mamba2", "int8", "fused"),
    ],
)
def test_export(llama, tmp_path, plan: str, weights: str, attention: str) -> None:
    """Every matrix is on a grid, embedding and head share one tensor, and the tokens are those of
    the torch model with the grid's numbers."""
    made = rewritten(llama, *PLANS[plan])
    report = export_onnx(
        made, tmp_path / "out", weights=weights, attention=attention, logits="last", max_loss=3
    )
    found = report["quantised"]
    assert found["exact_error"] <= 1e-5 and report["weights"] == weights
    assert {"prefill", "decode"} < set(found["loss"])
    assert found["loss"]["prefill"]["kl"] > 0 and found["loss"]["decode"]["kl"] > 0
    assert set(found["float_columns"].values()) == {2}
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == report
    assert sorted(p.name for p in (tmp_path / "out").glob("*model*")) == [
        "model.onnx",
        "model.onnx.data",
    ]
    model = ir.load(tmp_path / "out" / "model.onnx")
    ops = [n.op_type for n in model.graph.all_nodes()]
    assert ops.count("GatherBlockQuantized") == 1 and "FusedMatMul" not in ops
    quants = [w for n, w in model.graph.initializers.items() if n.endswith(".quants")]
    readers = {n.op_type for w in quants for n in w.consumers() if len(w.consumers()) > 1}
    assert readers == {"GatherBlockQuantized", "MatMulNBits"}
    left = [w for w in model.graph.initializers.values() if w.dtype is ir.DataType.FLOAT]
    sizes = {w.name: np.prod(w.shape) for w in left if len(w.shape) == 2}
    assert all(size < 2048 for name, size in sizes.items() if "scales" not in name), sizes
    if plan == "dense":  # queries, keys and values are one product; gate and up another
        assert report["ops"]["com.microsoft::MatMulNBits"] == 2 * 4 + 1
    onnx = OnnxModel(tmp_path / "out", threads=1)
    tokens = RANDOM.integers(3, 211, (2, 9))
    assert onnx.generate(tokens, max_new_tokens=5, eos_token_id=-1).shape == (2, 14)


# ---- a GGUF source -----------------------------------------------------------------------------

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as llama.cpp orders them for its rotary embedding."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def quantised_source(llama, tmp_path_factory):
    """A GGUF file of the model in three kinds, and the model with that file's numbers."""
    import copy

    model, path = copy.deepcopy(llama), tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")

    def add(name: str, parameter: torch.nn.Parameter, kind: str, heads: int = 0) -> None:
        weight = parameter.detach().numpy()
        data = gguf.quantize(permuted(weight, heads) if heads else weight, KIND[kind])
        writer.add_tensor(name, data, raw_dtype=KIND[kind])
        values = gguf.dequantize(data, KIND[kind])
        if heads:  # the inverse of the permutation
            values = unpermuted(values, heads)
        parameter.data.copy_(torch.from_numpy(values))

    add("token_embd.weight", model.model.embed_tokens.weight, "Q8_0")
    for i, layer in enumerate(model.model.layers):
        for inner, outer in NAMES.items():
            heads = {"attn_q": 4, "attn_k": 2}.get(outer, 0)
            weight = layer.get_submodule(inner).weight
            add(f"blk.{i}.{outer}.weight", weight, "Q4_1" if i == 0 else "Q4_0", heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, path


def test_a_source_keeps_its_grid(quantised_source, tmp_path) -> None:
    """Every tensor of the file is found in the export bit for bit, rows in the model's order."""
    model, path = quantised_source
    report = export_onnx(rewritten(model), tmp_path / "out", weights="source", source=path)
    found = report["quantised"]
    assert found["not_quantised"] == [] and found["exact_error"] <= 1e-5
    kinds = {"8 bits, Q8_0": 211 * 64}
    each = 64 * (64 + 32 + 32 + 64 + 96 * 3)
    assert found["parameters"] == kinds | {"4 bits, Q4_1": each, "4 bits, Q4_0": each}
    onnx = ir.load(tmp_path / "out" / "model.onnx")
    held = {n: v.const_value.numpy() for n, v in onnx.graph.initializers.items()}
    rows: dict[bytes, int] = {}
    for name, quants in held.items():
        if name.endswith(".quants"):
            scales = held[name.removesuffix("quants") + "scales"]
            for row, scale in zip(quants.reshape(len(quants), -1), scales, strict=True):
                key = row.tobytes() + scale.tobytes()
                rows[key] = rows.get(key, 0) + 1
    for tensor in gguf.GGUFReader(path).tensors:
        grid = sources.READERS[tensor.tensor_type.name](tensor.data)
        for row, scale in zip(grid.packed().reshape(grid.rows, -1), grid.scales, strict=True):
            assert rows.get(row.tobytes() + scale.tobytes()), tensor.name


def test_only_what_the_source_holds_is_quantised(quantised_source, tmp_path) -> None:
    """The factors of a product are not in it; the report says so."""
    model, path = quantised_source
    report = export_onnx(
        rewritten(model, PLANS["low_rank"][0] | {"layers": [1]}),
        tmp_path / "out",
        weights="source",
        source=path,
    )
    kept = " ".join(report["quantised"]["not_quantised"])
    assert "rows are not in the source" in kept
    assert report["quantised"]["parameters"]["4 bits, Q4_1"] == 64 * (64 + 32 + 32 + 64 + 96 * 3)


# ---- what goes wrong ---------------------------------------------------------------------------


def test_a_wrong_grid_is_caught(plain, tmp_path, monkeypatch) -> None:
    """A packing that swaps the nibbles."""
    packed = Grid.packed
    swap = lambda self: np.roll(packed(self), 1, axis=-1)  # noqa: E731
    monkeypatch.setattr(nodes.Grid, "packed", swap)
    with pytest.raises(GateError, match="grid's numbers"):
        export_onnx(plain, tmp_path / "out", weights="int8")
    assert not (tmp_path / "out").exists()


def test_a_loss_above_its_bound_leaves_nothing(plain, tmp_path, monkeypatch) -> None:
    """In cached decode alone, which a check of the prefill does not see."""
    compare = quantize.loss._compare

    def worse(got, want, ids):
        found = compare(got, want, ids)
        return found | ({"ratio": 1.7} if len(got) < 150 else {})

    monkeypatch.setattr(quantize.loss, "_compare", worse)
    with pytest.raises(GateError, match="perplexity in decode"):
        export_onnx(plain, tmp_path / "out", weights="int8")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named(plain, tmp_path) -> None:
    for options, text in (
        ({"weights": "int3"}, "int3"),
        ({"weights": "source"}, "GGUF"),
        ({"weights": "source", "source": tmp_path / "none.gguf"}, r"none\.gguf"),
    ):
        with pytest.raises(RewriterError, match=text):
            export_onnx(plain, tmp_path / "out", **options)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(RewriterError, match=r"bad\.gguf"):
        export_onnx(plain, tmp_path / "out", weights="source", source=tmp_path / "bad.gguf")

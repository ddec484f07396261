"""`rewriter::block_sparse_attention`: every form against the float64 reference, and its laws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from forms import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from rewriter.kernels.attention import attention, attention_with_lse, merge, with_sink
from rewriter.kernels.block_sparse_attention import (
    BlockPlan,
    DecodePlan,
    block_sparse_attention,
    cpu,
    op,
    reference,
    select_blocks,
    select_pages,
    triton,
)

FORMS = {"cpu": op.block_sparse_attention, "triton": triton.forward}
GRADIENTS = {"cpu": cpu.gradients, "triton": triton.gradients}
PLANS = ["selection", "heads", "shared", "window", "columns", "permuted", "groups", "tokens"]


def make(batch=2, heads=6, kv_heads=2, length=63, keys=63, width=16, value_width=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    return (
        r(batch, heads, length, width),
        r(batch, kv_heads, keys, width),
        r(batch, kv_heads, keys, value_width or width),
    )


def plan_for(kind, q, k, first=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    (batch, heads, length, _), (groups, keys) = q.shape, k.shape[1:3]
    tiles = lambda n, b: -(-n // b)  # noqa: E731
    if kind in ("selection", "heads"):
        share = "group" if kind == "selection" else "head"
        blocks = select_blocks(q, k, 3, 16, share=share)
        return BlockPlan.from_selection(blocks, 16, length, keys)
    if kind == "shared":  # one list for all, with empty rows; blocks of odd size
        keep = torch.rand(1, 1, tiles(length, 24), tiles(keys, 20), generator=g) < 0.4
        keep[:, :, 0] = False
        return BlockPlan.from_blocks(keep, 24, 20, length, keys, causal=False)
    if kind == "window":
        return BlockPlan.sliding_window(length, keys, 20, 5, 16, 32, first)
    if kind == "columns":
        plan = BlockPlan.from_selection(select_blocks(q, k, 2, 32, share="head"), 32, length, keys)
        columns = torch.stack([torch.randperm(keys, generator=g)[:9] for _ in range(batch * heads)])
        if columns.shape[1] > 2:
            columns[:, -2:] = -1
        return replace(
            plan,
            columns=columns.view(batch, heads, -1).int(),
            key_bias=torch.randn(batch, heads, keys, generator=g),
        )
    if kind == "permuted":
        order = torch.randperm(keys, generator=g).int()
        pos_k = order.expand(1, groups, -1).contiguous()
        pos_q = torch.arange(keys - length, keys).int().expand(1, groups, -1).contiguous()
        keep = torch.rand(1, groups, tiles(length, 32), tiles(keys, 16), generator=g) < 0.5
        return BlockPlan.from_blocks(keep, 32, 16, length, keys, pos_q=pos_q, pos_k=pos_k)
    if kind == "groups":
        group_k = (torch.arange(keys) // 11).int().expand(1, 1, -1).contiguous()
        keep = torch.ones(1, 1, tiles(length, 32), tiles(keys, 32), dtype=torch.bool)
        return BlockPlan.from_blocks(
            keep, 32, 32, length, keys, group_q=group_k[..., keys - length :].contiguous(),
            group_k=group_k,
        )  # fmt: skip
    keep = torch.rand(1, groups, length, tiles(keys, 16), generator=g) < 0.4
    return BlockPlan.from_blocks(keep, 1, 16, length, keys)


def arguments(q, k, v, plan, mask=None, softcap=0.0):
    return (
        q, k, v, plan.index, plan.count, plan.full, mask, plan.columns, plan.pos_q, plan.pos_k,
        plan.group_q, plan.group_k, plan.key_bias, q.shape[-1] ** -0.5, plan.block_q, plan.block_k,
        plan.causal, plan.window, plan.sinks, softcap,
    )  # fmt: skip


def padded(kind, batch, keys):
    """A mask, and the first real column of each row."""
    if kind == "none":
        return None, None
    mask = torch.ones(batch, keys, dtype=torch.bool)
    if kind == "left":
        mask[0, : keys // 5] = False
    else:
        mask[1, keys - keys // 4 :] = False
    return mask, mask.long().argmax(-1)


def check(form, q, k, v, plan, mask=None, softcap=0.0):
    """Values, LSE and the gradients of both, against float64."""
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    exact = plan
    if plan.key_bias is not None:
        wide.append(plan.key_bias.double().requires_grad_())
        exact = replace(plan, key_bias=wide[3])
    truth = reference.block_sparse_attention(*arguments(*wide[:3], exact, mask, softcap))
    args = arguments(q, k, v, plan, mask, softcap)
    output, lse = FORMS[form](*args)
    seen = truth[1] > float("-inf")
    assert torch.equal(lse > float("-inf"), seen)
    assert not lse.isnan().any() and (output.transpose(1, 2)[~seen] == 0).all()
    assert_close(output, truth[0], "output")
    assert_close(lse[seen], truth[1][seen], "lse")
    up, up_lse = torch.randn(output.shape), torch.randn(lse.shape) * seen
    loss = (truth[0] * up).sum() + (truth[1][seen] * up_lse[seen]).sum()
    if not seen.any():
        return
    expected = torch.autograd.grad(loss, wide)
    found = GRADIENTS[form](up, up_lse, output, lse, *args)
    for name, a, b in zip(("query", "key", "value", "key_bias"), found, expected, strict=False):
        assert_close(a, b, name)


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("length", "keys"), [(63, 63), (1, 70), (50, 130)])
def test_cpu(kind, padding, length, keys, poison):
    q, k, v = make(length=length, keys=keys)
    mask, first = padded(padding, 2, keys)
    check("cpu", q, k, v, plan_for(kind, q, k, first), mask)


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("padding", ["none", "right"])
def test_triton(kind, padding, poison):
    q, k, v = make(heads=2, kv_heads=1, length=37, keys=63)
    mask, first = padded(padding, 2, 63)
    check("triton", q, k, v, plan_for(kind, q, k, first), mask)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (4, 1), (8, 1), (4, 4)])
def test_groups(form, heads, kv_heads, poison):
    q, k, v = make(1, heads, kv_heads, 33, 33)
    check(form, q, k, v, plan_for("selection", q, k))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "value_width"), [(48, 48), (64, 32), (80, 80), (128, 128)])
def test_widths(form, width, value_width, poison):
    q, k, v = make(1, 2, 1, 33, 33, width, value_width)
    check(form, q, k, v, plan_for("heads", q, k), softcap=2.0 if width == 64 else 0.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 63])
def test_nothing_to_see(form, length):
    q, k, v = make(1, 2, 1, length, length)
    keep = torch.zeros(1, 1, -(-length // 16), -(-length // 16), dtype=torch.bool)
    plan = BlockPlan.from_blocks(keep, 16, 16, length, length)
    output, lse = FORMS[form](*arguments(q, k, v, plan))
    assert (output == 0).all() and (lse == float("-inf")).all()
    check(form, q, k, v, plan)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_pages(form, page, heads):
    """One step on pages, split over many programs on a GPU and merged; the last page is short."""
    q, k, v = make(2, 4, 2, 1, 333)
    scores = torch.randn(2, heads, -(-333 // page))
    plan = DecodePlan.from_scores(scores, 5 if page > 1 else 290, page, 333).prefill()
    assert ((plan.index >= 332 // page).any(-1)).all()  # the current page
    args = arguments(q, k, v, plan)
    truth = reference.block_sparse_attention(*(t.double() for t in args[:3]), *args[3:])
    for name, a, b in zip(("output", "lse"), FORMS[form](*args), truth, strict=True):
        assert_close(a, b, name)


@pytest.mark.parametrize("layout", ["room", "odd room", "token first"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_step_reads_a_cache_of_any_layout(heads, layout):
    """Whole pages are copied where they lie; the cache itself is never copied for its strides."""
    q, k, v = make(2, 4, 2, 1, 128)
    plan = select_pages(q, k.unflatten(2, (-1, 16)).mean(3), 3, 16, 128)
    plan = replace(plan, index=plan.index[:, :1].repeat(1, heads, 1), count=plan.count[:, :1])
    plan = replace(plan, count=plan.count.repeat(1, heads))
    room = torch.full((2, 2, 160 if layout == "room" else 150, 16), float("nan"))
    room[:, :, :128] = k
    other = room[:, :, :128]
    if layout == "token first":
        other = k.transpose(1, 2).contiguous().transpose(1, 2)
    expected = block_sparse_attention(q.double(), k.double(), v.double(), plan)
    for a, e in zip(block_sparse_attention(q, other, v, plan), expected, strict=True):
        assert_close(a, e)


def test_pages_are_chosen_by_their_mean_key():
    q, k, _ = make(2, 4, 2, 1, 150)
    k[:, 1, 48:64] += 5 * q[:, 2:].mean(1)
    means = torch.stack([part.mean(2) for part in k.split(16, 2)], 2)
    plan = select_pages(q, means, 3, 16, 150)
    assert (plan.index[..., -1] == 9).all() and (plan.index.diff() > 0).all()  # the last page
    assert (plan.index[:, 1] == 3).any(-1).all()
    assert torch.equal(plan.index, select_pages(q, pad(means, (0, 0, 0, 2)), 3, 16, 150).index)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form):
    q, k, v = (t.bfloat16() for t in make(1, 2, 1, 63, 63, 64))
    plan = plan_for("selection", q, k)
    output, lse = FORMS[form](*arguments(q, k, v, plan))
    assert output.dtype == torch.bfloat16 and lse.dtype == torch.float32
    wide = arguments(q.double(), k.double(), v.double(), plan)
    assert_close(output, reference.block_sparse_attention(*wide)[0], limit=2e-2)


def test_memory_is_that_of_its_blocks():
    """No [L, S] tensor and no repeated keys: the greatest tensor is the queries'."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Greatest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for t in made if isinstance(made, (tuple, list)) else (made,):
                if isinstance(t, torch.Tensor):
                    self.size = max(self.size, t.untyped_storage().nbytes())
            return made

    q, k, v = make(1, 9, 3, 4096, 4096, 64)
    plan = BlockPlan.from_selection(select_blocks(q, k, 8, 64), 64, 4096, 4096)
    with Greatest() as seen:
        cpu.block_sparse_attention(*arguments(q, k, v, plan))
    assert seen.size <= 4 * q.numel()


# ---- laws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 63, 100])
def test_full_plan_is_dense_attention(length):
    q, k, v = make(length=length, keys=100)
    got, lse = block_sparse_attention(q, k, v, BlockPlan.dense(length, 100, 16, 32))
    args = (q, k, v, None, None, None, None, q.shape[-1] ** -0.5, True, 0, 0, 0, 0.0)
    dense, dense_lse = attention_with_lse(*args)
    assert_close(got, dense)
    assert_close(lse, dense_lse)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 40), st.integers(0, 9), st.data())
def test_window_plan_is_the_window(length, window, more, sinks, data):
    keys = length + more
    q, k, v = make(1, 2, 1, length, keys, 8)
    blocks = data.draw(st.tuples(*[st.sampled_from([1, 8, 16, 20])] * 2))
    plan = BlockPlan.sliding_window(length, keys, window, sinks, *blocks)
    args = (q, k, v, None, None, None, None, q.shape[-1] ** -0.5, True, window, 0, sinks, 0.0)
    assert_close(block_sparse_attention(q, k, v, plan)[0], attention(*args))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.integers(2, 4))
def test_merge_of_any_split(seed, parts):
    g = torch.Generator().manual_seed(seed)
    q, k, v = make(1, 2, 1, 40, 40, 8, seed=seed)
    owner = torch.randint(parts, (1, 1, 5, 5), generator=g)
    results = []
    for part in range(parts):  # some rows of a part are empty
        plan = BlockPlan.from_blocks(owner == part, 8, 8, 40, 40)
        results.append(block_sparse_attention(q, k, v, plan))
    output, lse = merge(*map(list, zip(*results, strict=True)))
    whole = block_sparse_attention(q, k, v, BlockPlan.dense(40, 40, 8, 8))
    assert_close(output, whole[0])
    assert_close(lse, whole[1])


def test_merge_carries_gradients_and_empty_rows():
    q, k, v = (t.requires_grad_() for t in make(1, 2, 1, 40, 40, 8))
    left = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    left[..., :2] = True
    parts = [
        block_sparse_attention(q, k, v, BlockPlan.from_blocks(m, 8, 8, 40, 40))
        for m in (left, ~left)
    ]
    output, _ = merge(*map(list, zip(*parts, strict=True)))
    whole, _ = block_sparse_attention(q, k, v, BlockPlan.dense(40, 40, 8, 8))
    up = torch.randn(output.shape)
    for a, b in zip(
        torch.autograd.grad((output * up).sum(), (q, k, v)),
        torch.autograd.grad((whole * up).sum(), (q, k, v)),
        strict=True,
    ):
        assert_close(a, b)
    nothing = torch.zeros(1, 3, 2, 4), torch.full((1, 2, 3), float("-inf"))
    output, lse = merge([nothing[0]] * 2, [nothing[1]] * 2)
    assert (output == 0).all() and (lse == float("-inf")).all()


def test_a_learned_sink_joins_afterwards():
    q, k, v = make(length=40, keys=40)
    sink, scale = torch.randn(6), q.shape[-1] ** -0.5
    output, lse = block_sparse_attention(q, k, v, BlockPlan.dense(40, 40, 16, 16))
    args = (q, k, v, None, None, sink, None, scale, True, 0, 0, 0, 0.0)
    assert_close(with_sink(output, lse, sink)[0], attention(*args))


@pytest.mark.parametrize("kind", ["selection", "heads"])
def test_causality(kind):
    """Weights never look ahead (U3); the choice looks to the end of its own block at most (U4)."""
    q, k, v = make(length=64, keys=64)
    plan = plan_for(kind, q, k)
    assert plan.selection == "W"
    before, _ = block_sparse_attention(q, k, v, plan)
    changed = v.clone()
    changed[:, :, 40:] += 1
    after, _ = block_sparse_attention(q, k, changed, plan)
    assert torch.equal(before[:, :40], after[:, :40]) and not torch.equal(before, after)
    for t in (q, k, v):
        t[:, :, 40:] += torch.randn(t[:, :, 40:].shape)
    again, _ = block_sparse_attention(q, k, v, plan_for(kind, q, k))
    assert torch.equal(before[:, :32], again[:, :32])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_change_nothing(side):
    """U6, U7: a padded batch of unequal lengths equals its rows one by one."""
    q, k, v = make(length=64, keys=64)
    real = {"left": slice(16, 64), "right": slice(0, 48)}[side]
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[0] = True
    mask[1, real] = True
    first = mask.long().argmax(-1)
    plan = BlockPlan.sliding_window(64, 64, 20, 3, 16, 16, first)
    got, _ = block_sparse_attention(q, k, v, plan, mask)
    for row, part in ((0, slice(0, 64)), (1, real)):
        one = [t[row : row + 1, :, part] for t in (q, k, v)]
        size = one[0].shape[2]
        alone, _ = block_sparse_attention(*one, BlockPlan.sliding_window(size, size, 20, 3, 16, 16))
        assert_close(got[row : row + 1, part], alone)


def test_more_budget_never_removes_a_block():
    q, k, _ = make(length=200, keys=200)
    kept = None
    for blocks in range(1, 14):
        plan = BlockPlan.from_selection(select_blocks(q, k, blocks, 16), 16, 200, 200)
        more, _ = plan.blocks(200)
        own = torch.arange(13)
        assert more[..., own, own].all()  # U11: its own block
        assert kept is None or (more | ~kept).all()  # U8
        kept = more
    assert plan.density(200, 200) == 1


@pytest.mark.parametrize("kind", ["selection", "heads", "window", "tokens"])
def test_density_is_counted(kind):
    """U9: the share of the causal area."""
    q, k, _ = make(length=63, keys=63)
    plan = plan_for(kind, q, k)
    seen = plan.visible(63, 63)
    area = seen.shape[0] * seen.shape[1] * 63 * 64 / 2
    assert plan.density(63, 63) == pytest.approx(float(seen.sum()) / area)


def test_prefill_then_step():
    """U5 for a strict selection: the last row of a window plan is a step on its pages."""
    q, k, v = make(length=64, keys=64)
    whole, _ = block_sparse_attention(q, k, v, BlockPlan.sliding_window(64, 64, 16, 16, 16, 16))
    pages = torch.tensor([0, 3], dtype=torch.int32).expand(1, 1, 2)
    step = DecodePlan(pages, torch.full((1, 1), 2, dtype=torch.int32), 16)
    last, _ = block_sparse_attention(q[:, :, -1:], k, v, step)
    assert_close(last, whole[:, -1:])


def test_selection_finds_the_planted_block():
    q, k, _ = make(1, 2, 1, 128, 128)
    k[:, :, 32:48] += 5 * q[:, :, 112:].mean((1, 2), keepdim=True)
    chosen = select_blocks(q, k, 3, 16)
    assert 2 in chosen[0, 0, 7].tolist()
    assert chosen[0, 0, 7].tolist().count(7) == 1 and 0 in chosen[0, 0, 7].tolist()
    assert chosen[0, 0, 0].tolist() == [0, -1, -1]


@pytest.mark.parametrize(
    "wrong", ["plan heads", "plan rows", "key width", "mask", "columns and plan batch"]
)
def test_what_does_not_fit_is_named(wrong):
    q, k, v = make(length=64, keys=64)
    plan, mask = BlockPlan.dense(64, 64, 16, 16), None
    if wrong == "plan heads":
        plan = plan_for("tokens", *make(2, 4, 4, 64, 64)[:2])
    elif wrong == "plan rows":
        plan = BlockPlan.dense(48, 64, 16, 16)
    elif wrong == "key width":
        k = k[..., :8]
    elif wrong == "mask":
        mask = torch.ones(2, 63, dtype=torch.bool)
    else:
        plan = replace(plan, index=plan.index.expand(3, -1, -1, -1))
    with pytest.raises(ValueError, match="block_sparse_attention"):
        block_sparse_attention(q, k, v, plan, mask)


@pytest.mark.parametrize("kind", ["selection", "columns"])
def test_opcheck(kind):
    q, k, v = (t.requires_grad_() for t in make(length=33, keys=33, width=8))
    args = arguments(q, k, v, plan_for(kind, q.detach(), k.detach()))
    torch.library.opcheck(torch.ops.rewriter.block_sparse_attention.default, args)


def test_one_node_in_export_and_compile():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return block_sparse_attention(q, k, v, plan)[0] * 2

    q, k, v = make(length=32, keys=32)
    plan = BlockPlan.dense(32, 32, 16, 16)
    exported = torch.export.export(Model(), (q, k, v))
    calls = [n for n in exported.graph.nodes if "block_sparse" in str(n.target)]
    assert len(calls) == 1
    assert torch.equal(exported.module()(q, k, v), Model()(q, k, v))

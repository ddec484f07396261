"""One query on whole pages of a cache: gather them, and attend."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.kernels.attention.fused import attend_rows
from rewriter.kernels.block_sparse_attention.arguments import Arguments


def is_step(given: Arguments) -> bool:
    """One query, and every list is of whole blocks and as long as the others."""
    if given.query.shape[2] != 1 or not (given.mask is given.columns is given.key_bias is None):
        return False
    return int(given.full.min()) == given.index.shape[3]


def step(given: Arguments) -> tuple[Tensor, Tensor]:
    """Results of the op, where `is_step`."""
    (batch, heads, _, width), keys, page = given.query.shape, given.key.shape[2], given.block_k
    lists = max(given.index.shape[1], given.key.shape[1])
    pages = given.index.expand(batch, lists, 1, -1).reshape(batch * lists, -1)
    extra: Tensor | None = None
    if keys % page:  # the last page is short: tokens for pages
        pages = (pages[..., None] * page + torch.arange(page, dtype=pages.dtype)).flatten(1)
        extra = torch.where(pages < keys, 0.0, float("-inf")).to(given.query.dtype)
        extra = extra[:, None].expand(-1, heads // lists, -1)
        pages, page = pages.clamp_(max=keys - 1), 1
    gathered, rows, rows_apart = [], pages, 0
    for x in (given.key, given.value):
        table, apart = _table(x, page)
        if apart != rows_apart:
            first = torch.arange(0, batch * x.shape[1] * apart, apart, dtype=pages.dtype)
            each = first if lists == x.shape[1] else first.repeat_interleave(lists // x.shape[1])
            rows, rows_apart = (pages + each[:, None]).flatten(), apart
        gathered.append(table.index_select(0, rows).view(len(pages), -1, x.shape[3]))
    query = given.query.reshape(batch * lists, heads // lists, width)
    output, lse = attend_rows(query, *gathered, extra, given.scale, given.softcap, True)
    assert lse is not None
    return output.view(batch, 1, heads, -1), lse.view(batch, heads, 1)


def _table(x: Tensor, page: int) -> tuple[Tensor, int]:
    """x, [B, Hk, S, D], as a table with a row for each page, and how many rows apart heads are.

    x may be a part of a cache with more room; it is copied only where pages are not whole rows.
    """
    batch, groups, keys, width = x.shape
    row, apart = page * width, x.stride(1)
    regular = x.stride()[2:] == (width, 1) and apart % row == 0
    if not regular or (batch > 1 and x.stride(0) != groups * apart):
        x, apart = x.contiguous(), keys * width
    count = ((batch * groups - 1) * apart + keys * width) // row
    return x.as_strided((count, row), (row, 1)), apart // row

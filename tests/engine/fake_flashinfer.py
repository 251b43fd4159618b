"""What FlashInfer's documentation says of two of its wrappers, in plain torch, for machines without a GPU.

https://docs.flashinfer.ai/api/attention.html. Pages are [blocks, block size, kv heads, size] (layout "NHD"). Under
`use_cuda_graph`, `plan` copies into the buffers that the wrapper was made with, and refuses another batch size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[q, heads, size], [k, kv heads, size] twice; the last query is at the last key -> [q, heads, size]."""
    repeats = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double().repeat_interleave(repeats, 1)) * scale
    hidden = torch.ones(len(query), len(key)).triu(len(key) - len(query) + 1).bool()
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.double().repeat_interleave(repeats, 1)).to(query.dtype)


class _Wrapper:
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"
        self.plans = 0

    def _pages(self) -> list[Tensor]:
        """Ids of each request's pages, and then the number of tokens in the last."""
        starts = self.starts.tolist()
        return [self.pages[begin:end].long() for begin, end in pairwise(starts)]

    def _run(self, query: Tensor, cache: tuple[Tensor, Tensor], queries: list[int]) -> Tensor:
        assert query.is_contiguous()
        assert query.shape[1:] == (self.heads, self.size)
        assert query.dtype == self.dtype
        keys, values = cache
        assert keys.shape[1:] == values.shape[1:] == (self.page_size, self.kv_heads, self.size)
        out = torch.full_like(query, torch.nan)
        for row, ids in enumerate(self._pages()):
            length = (len(ids) - 1) * self.page_size + int(self.last[row])
            begin, end = queries[row : row + 2]
            key, value = (tensor[ids].flatten(0, 1)[:length] for tensor in cache)
            out[begin:end] = attend(query[begin:end], key, value, self.scale)
        return out


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        assert causal
        assert sm_scale is not None
        assert {tensor.dtype for tensor in (qo_indptr, paged_kv_indptr, paged_kv_indices)} == {torch.int32}
        self.queries, self.starts, self.pages = qo_indptr, paged_kv_indptr, paged_kv_indices
        self.last, self.heads, self.kv_heads = paged_kv_last_page_len, num_qo_heads, num_kv_heads
        self.size, self.page_size, self.scale = head_dim_qk, page_size, sm_scale
        self.dtype = q_data_type
        self.plans += 1

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        return self._run(q, paged_kv_cache, self.queries.tolist())


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        assert use_cuda_graph
        assert paged_kv_indptr_buffer is not None
        assert paged_kv_indices_buffer is not None
        assert paged_kv_last_page_len_buffer is not None
        assert len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1
        self.starts, self.pages = paged_kv_indptr_buffer, paged_kv_indices_buffer
        self.last = paged_kv_last_page_len_buffer

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        sm_scale: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        assert len(last_page_len) == len(self.last), "the batch size is fixed in CUDA-graph mode"
        assert len(indices) <= len(self.pages)
        assert sm_scale is not None
        self.starts.copy_(indptr)
        self.pages[: len(indices)].copy_(indices)
        self.last.copy_(last_page_len)
        self.heads, self.kv_heads, self.size = num_qo_heads, num_kv_heads, head_dim
        self.page_size, self.scale, self.dtype = page_size, sm_scale, q_data_type
        self.plans += 1

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        return self._run(q, paged_kv_cache, list(range(len(self.last) + 1)))

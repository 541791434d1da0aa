"""How does cuDNN's attention give the same bits each time? By its own deterministic backward pass.

torch calls cuDNN's attention, but only in the form whose gradients of the queries are summed with atomics. cuDNN's
frontend (the package nvidia-cudnn-frontend) offers the other form, which keeps a part of those sums for each block of
keys and adds them in order: a few percent slower, and far faster than other deterministic kernels on a Hopper GPU. A
plan is built once for each layout of the tensors; cuDNN chooses it by shapes alone.

Shapes: B sequences, H heads, G key-value heads, T positions, Q head size.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """A built graph of cuDNN, its tensors in the order of `run`'s, and the bytes it works in."""

    graph: Any
    tensors: list[Any]
    workspace: int

    def run(self, tensors: list[Tensor]) -> None:
        """Execute it on the current stream."""
        handle = _handle(tensors[0].device.index, torch.cuda.current_stream().cuda_stream)
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=tensors[0].device)
        self.graph.execute(dict(zip(self.tensors, tensors, strict=True)), workspace, handle=handle)


Layout = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides


@torch.library.custom_op("llmtrain::cudnn_attention", mutates_args=())
def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention in bf16, and the log-sum of each row: (B, H, T, Q) with (B, G, T, Q) twice to (B, H, T, Q) and
    (B, H, T, 1) fp32.
    """
    out, row_sums = _results(q)
    inputs = [q, k, v]
    _forward_plan(*map(_layout, inputs), _layout(out), q.device.index).run([*inputs, out, row_sums])
    return out, row_sums


@torch.library.custom_op("llmtrain::cudnn_attention_backward", mutates_args=())
def cudnn_attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, row_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, the same bits each time."""
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    results = [torch.empty_like(x) for x in (q, k, v)]
    inputs = [q, k, v, out, gradient, row_sums]
    _backward_plan(*map(_layout, inputs), *map(_layout, results), q.device.index).run([*inputs, *results])
    return results[0], results[1], results[2]


def attend_deterministically(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention whose gradients are the same each time. (B, H, T, Q) with (B, G, T, Q) twice."""
    out: Tensor = cudnn_attention(q, k, v)[0]
    return out


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((*q.shape[:-1], 1), dtype=torch.float32)


@cudnn_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _results(q)


@cudnn_attention_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, row_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _go_back(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = cudnn_attention_backward(gradient, *ctx.saved_tensors)
    return gradients


cudnn_attention.register_autograd(_go_back, setup_context=_keep)


def _layout(x: Tensor) -> Layout:
    return tuple(x.shape), tuple(x.stride())


@cache
def _handle(device: int, stream: int) -> Any:
    import cudnn

    with torch.cuda.device(device):
        handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=stream)
    return handle


def _graph(device: int) -> Any:
    import cudnn

    single, bf16 = cudnn.data_type.FLOAT, cudnn.data_type.BFLOAT16
    handle = _handle(device, torch.cuda.current_stream().cuda_stream)
    return cudnn.pygraph(io_data_type=bf16, intermediate_data_type=single, compute_data_type=single, handle=handle)


def _tensor(graph: Any, layout: Layout, single: bool = False) -> Any:
    import cudnn

    kind = cudnn.data_type.FLOAT if single else cudnn.data_type.BFLOAT16
    return graph.tensor(dim=list(layout[0]), stride=list(layout[1]), data_type=kind)


def _output(tensor: Any, layout: Layout) -> Any:
    return tensor.set_output(True).set_dim(list(layout[0])).set_stride(list(layout[1]))


def _built(graph: Any, tensors: list[Any]) -> Plan:
    import cudnn

    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    return Plan(graph, tensors, max(1, graph.get_workspace_size()))


@cache
def _forward_plan(q: Layout, k: Layout, v: Layout, out: Layout, device: int) -> Plan:
    import cudnn

    graph = _graph(device)
    inputs = [_tensor(graph, layout) for layout in (q, k, v)]
    result, row_sums = graph.sdpa(
        *inputs, attn_scale=1 / math.sqrt(q[0][-1]), generate_stats=True, use_causal_mask=True
    )
    B, H, T = q[0][:3]
    _output(result, out)
    _output(row_sums, ((B, H, T, 1), (H * T, T, 1, 1))).set_data_type(cudnn.data_type.FLOAT)
    return _built(graph, [*inputs, result, row_sums])


@cache
def _backward_plan(
    q: Layout,
    k: Layout,
    v: Layout,
    out: Layout,
    gradient: Layout,
    row_sums: Layout,
    of_q: Layout,
    of_k: Layout,
    of_v: Layout,
    device: int,
) -> Plan:
    graph = _graph(device)
    inputs = [_tensor(graph, layout) for layout in (q, k, v, out, gradient)]
    inputs.append(_tensor(graph, row_sums, single=True))
    results = graph.sdpa_backward(
        *inputs,
        attn_scale=1 / math.sqrt(q[0][-1]),
        use_causal_mask=True,
        use_deterministic_algorithm=True,
    )
    for result, layout in zip(results, (of_q, of_k, of_v), strict=True):
        _output(result, layout)
    return _built(graph, [*inputs, *results])

"""An embedding in the host's memory, which the GPU reads where it lies."""

import torch

from actors.models.host_memory import move_to_host, on_host
from tests.helpers.gpu import NEEDS_GPU

pytestmark = NEEDS_GPU


def test_the_gpu_reads_the_same_values_and_no_longer_holds_them():
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(1000, 512, device="cuda", dtype=dtype)
        mapped = on_host(weight)
        assert mapped.is_cuda and mapped.dtype == dtype and mapped.shape == weight.shape
        assert torch.equal(mapped, weight)
    model = torch.nn.Sequential(torch.nn.Embedding(200_000, 512), torch.nn.Linear(512, 4)).cuda()
    ids = torch.randint(0, 200_000, (64,), device="cuda")
    before, expected = torch.cuda.memory_allocated(), model(ids)
    move_to_host(model, model[0])
    assert torch.cuda.memory_allocated() < before - 200_000 * 512 * 3
    assert torch.equal(model(ids), expected)


def test_a_graph_reads_it_too():
    embedding = torch.nn.Embedding(1000, 64).cuda().requires_grad_(False)
    expected = embedding.weight.clone()
    move_to_host(embedding, embedding)
    ids = torch.arange(8, device="cuda")
    embedding(ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = embedding(ids)
    ids.copy_(torch.arange(100, 108, device="cuda"))
    graph.replay()
    assert torch.equal(rows, expected[100:108])

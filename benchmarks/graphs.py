"""A candidate as a CUDA graph: what is left when launching costs nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .race import Candidate, backward


def captured(make: Callable[[], Candidate]) -> Candidate:
    """Capture forward and backward of a candidate once; each run replays them."""
    candidate = make()

    def step() -> None:
        candidate.clear()
        outputs = candidate.forward()
        if outputs is not None:
            backward(outputs, candidate)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    candidate.clear()
    with torch.cuda.graph(graph):
        step()

    def replay(kept: Candidate = candidate) -> None:  # the graph writes into tensors of the candidate's own
        graph.replay()

    return Candidate(replay)

"""Train with VCL, then export to ONNX: the file has the plain network's nodes and computes what PyTorch computes.

Run: python examples/export_onnx.py (needs onnx and onnxscript)
"""

from pathlib import Path

import onnx
import torch
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vcl_kernels as vk


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1),
        nn.ELU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def export(model: nn.Module, example: Tensor, path: Path) -> onnx.ModelProto:
    """Write what the model computes in evaluation, for batches of any size."""
    model.eval()
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (example,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)
    return onnx.load(path)


def main(epochs: int = 20, images: int = 1000, folder: str | Path = "out/onnx") -> tuple[float, float]:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(digits.target)
    train, test = train_test_split(range(len(x)), train_size=images, stratify=digits.target, random_state=0)
    x = (x - x[train].mean()) / x[train].std()
    loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=20, shuffle=True, drop_last=True)

    model = network()
    handle = vk.attach(model, x[:1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(1, epochs + 1):
        for inputs, labels in loader:
            loss = F.cross_entropy(model(inputs), labels) + handle.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss of the last batch {loss.item():.3f}")

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trained, plain = export(model, x[:2], folder / "vcl.onnx"), export(network(), x[:2], folder / "plain.onnx")
    nodes, plain_nodes = ([node.op_type for node in exported.graph.node] for exported in (trained, plain))
    print(f"nodes: {', '.join(nodes)} ({'the same' if nodes == plain_nodes else 'not the same'} as without VCL)")

    session = ReferenceEvaluator(trained)
    (array,) = session.run(None, {session.input_names[0]: x[test].numpy()})
    outputs = torch.as_tensor(array)
    with torch.no_grad():
        difference = float((outputs - model(x[test])).abs().max())
    error = 100 * float((outputs.argmax(1) != y[test]).float().mean())
    print(f"ONNX: test error {error:.2f} %; outputs differ from PyTorch's by at most {difference:.1g}")
    return error, difference


if __name__ == "__main__":
    main()

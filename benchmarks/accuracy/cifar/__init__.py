"""The paper's claim on the paper's data: the authors' recipe on CIFAR, run by a queue or on one GPU (PLAN.md)."""

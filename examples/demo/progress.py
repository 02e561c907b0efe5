"""What is seen while networks train: a bar for all, a bar for each training that runs, a line for each split."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .learning import METHODS
from .schedule import methods_of
from .training import Task


class Bars:
    """Progress on a terminal; elsewhere only the lines are printed."""

    def __init__(self, console: Console, epochs: int) -> None:
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[of]}"),
        )
        self.progress = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        self.epochs = epochs
        self.all = self.progress.add_task("all", total=None, of="trainings")
        self.bars: dict[Task, TaskID] = {}
        self.errors: dict[int, dict[str, float]] = {}  # of each split and method

    def tell(self, task: Task, epoch: int) -> None:
        """A training has finished so many epochs. What a process said last may come after its result."""
        if task.method in self.errors.get(task.split, {}):
            return
        if task not in self.bars:
            self.bars[task] = self.progress.add_task(str(task), total=self.epochs, of="epochs")
        self.progress.update(self.bars[task], completed=epoch)

    def end(self, task: Task, found: dict[str, Any], total: int) -> None:
        """A training has ended; ``total`` are expected."""
        if task in self.bars:
            self.progress.remove_task(self.bars[task])
        self.progress.update(self.all, advance=1, total=total)
        errors = self.errors.setdefault(task.split, {})
        errors[task.method] = found["test_error"][-1]
        if all(method in errors for method in methods_of(task.split)):
            shown = ", ".join(f"{METHODS[method]} {errors[method]:.2f} %" for method in methods_of(task.split))
            self.progress.console.print(f"split {task.split + 1}: error with {shown}", highlight=False, soft_wrap=True)

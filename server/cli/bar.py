"""The bar of a training run."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from model.train import Step


class Bar:
    """Loss, tokens a second and time left, all moving means. Drawn from the first step on, under
    the line that says what runs."""

    KEEP = 0.98

    def __init__(self, progress: Progress, start_line: str) -> None:
        self.progress, self.start_line = progress, start_line
        self.task: TaskID | None = None
        self.loss, self.speed = 0.0, 0.0
        self._seen = 0

    def update(self, step: Step) -> None:
        if self.task is None:
            self.progress.console.print(self.start_line, markup=False, highlight=False)
            self.task = self.progress.add_task("train", loss="", speed="")
            self.progress.start()
        speed = step.tokens / step.seconds
        self._seen += 1
        weight = max(1 - self.KEEP, 1 / self._seen)
        self.loss += weight * (step.loss - self.loss)
        self.speed += weight * (speed - self.speed)
        self.progress.update(
            self.task,
            total=step.steps,
            completed=step.number,
            loss=f"{self.loss:.3f}",
            speed=f"{self.speed:,.0f}",
        )


@contextmanager
def training_bar(start_line: str) -> Iterator[Bar]:
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
    )
    bar = Bar(Progress(*columns, console=Console(stderr=True)), start_line)
    try:
        yield bar
    finally:
        if bar.task is not None:
            bar.progress.stop()

"""What a person looks at: figures, the report, the picture of the loop. Everything is read back from a run folder."""

from grpo_kit.show.loop import loop_figure
from grpo_kit.show.plots import (
    category_plot,
    comparison_plot,
    gallery_figure,
    group_figure,
    image_grid,
    learning_figure,
    training_curves,
)
from grpo_kit.show.record import RunRecord, read_run
from grpo_kit.show.report import write_report
from grpo_kit.show.summary import comparison_table, representative_cases, worst_cases

__all__ = [
    "RunRecord",
    "category_plot",
    "comparison_plot",
    "comparison_table",
    "gallery_figure",
    "group_figure",
    "image_grid",
    "learning_figure",
    "loop_figure",
    "read_run",
    "representative_cases",
    "training_curves",
    "worst_cases",
    "write_report",
]

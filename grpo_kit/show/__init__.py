"""What a person looks at: figures, the report, the picture of the loop. Everything is read back from a run folder.

The widgets are loaded when they are first used: they need ipywidgets and torch, the rest does not.
"""

from grpo_kit import lazy_names
from grpo_kit.runs.record import RunRecord, read_run
from grpo_kit.show.lessons.loss import (
    clipping_figure,
    group_rows_figure,
    group_size_figure,
    kl_estimators_figure,
    token_weights_figure,
)
from grpo_kit.show.lessons.models import (
    curve_figure,
    distribution_figure,
    flow_figure,
    interval_figure,
    seed_figure,
    token_figure,
)
from grpo_kit.show.lessons.rewards import (
    agreement_figure,
    audit_figure,
    similarity_figure,
    vectors_figure,
    winners_figure,
)
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
from grpo_kit.show.report import write_report
from grpo_kit.show.summary import comparison_table, representative_cases, worst_cases

_WIDGETS = (
    "AdvantagePlayground",
    "BeTheReward",
    "GroupExplorer",
    "ImageCompare",
    "LiveTraining",
    "LossPlayground",
)

__all__ = [
    "AdvantagePlayground",
    "BeTheReward",
    "GroupExplorer",
    "ImageCompare",
    "LiveTraining",
    "LossPlayground",
    "RunRecord",
    "agreement_figure",
    "audit_figure",
    "category_plot",
    "clipping_figure",
    "comparison_plot",
    "comparison_table",
    "curve_figure",
    "distribution_figure",
    "flow_figure",
    "gallery_figure",
    "group_figure",
    "group_rows_figure",
    "group_size_figure",
    "image_grid",
    "interval_figure",
    "kl_estimators_figure",
    "learning_figure",
    "loop_figure",
    "read_run",
    "representative_cases",
    "seed_figure",
    "similarity_figure",
    "token_figure",
    "token_weights_figure",
    "training_curves",
    "vectors_figure",
    "winners_figure",
    "worst_cases",
    "write_report",
]


__getattr__, __dir__ = lazy_names(__name__, dict.fromkeys(_WIDGETS, "widgets"))

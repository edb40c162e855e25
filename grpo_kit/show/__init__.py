"""What a person looks at: figures, the report, the picture of the loop. Everything is read back from a run folder.

The names below are loaded when they are first used: the widgets need ipywidgets and torch, the rest does not.
"""

from grpo_kit import lazy_names
from grpo_kit.runs.record import RunRecord, read_run

_HOME = {
    "AdvantagePlayground": "widgets.advantage_playground",
    "BeTheReward": "widgets.be_the_reward",
    "GroupExplorer": "widgets.group_explorer",
    "ImageCompare": "widgets.image_compare",
    "LiveTraining": "widgets.live_training",
    "LossPlayground": "widgets.loss_playground",
    "agreement_figure": "lessons.rewards",
    "audit_figure": "lessons.rewards",
    "category_plot": "intervals",
    "clipping_figure": "lessons.loss",
    "comparison_plot": "intervals",
    "comparison_table": "summary",
    "curve_figure": "curves",
    "distribution_figure": "lessons.models",
    "flow_figure": "lessons.models",
    "gallery_figure": "images",
    "group_figure": "images",
    "group_rows_figure": "lessons.loss",
    "group_size_figure": "lessons.loss",
    "image_grid": "images",
    "interval_figure": "intervals",
    "kl_estimators_figure": "lessons.loss",
    "learning_figure": "lessons.loss",
    "loop_figure": "loop",
    "representative_cases": "summary",
    "seed_figure": "lessons.models",
    "similarity_figure": "lessons.rewards",
    "token_figure": "lessons.models",
    "token_weights_figure": "lessons.loss",
    "training_curves": "curves",
    "vectors_figure": "lessons.rewards",
    "winners_figure": "lessons.rewards",
    "worst_cases": "summary",
    "write_report": "report",
}

__all__ = ["RunRecord", "read_run", *_HOME]

__getattr__, __dir__ = lazy_names(__name__, _HOME)

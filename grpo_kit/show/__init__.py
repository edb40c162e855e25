"""What a person looks at: figures, the report, the picture of the loop. Everything is read back from a run folder.

The names below are loaded when they are first used: the widgets need ipywidgets and torch, the rest does not.
"""

from grpo_kit import lazy_names
from grpo_kit.runs.record import RunRecord, read_run

_MODULES = {
    ("AdvantagePlayground",): "widgets.advantage_playground",
    ("BeTheReward",): "widgets.be_the_reward",
    ("EpisodeExplorer",): "widgets.episode",
    ("GroupExplorer",): "widgets.group_explorer",
    ("ImageCompare",): "widgets.image_compare",
    ("LiveTraining",): "widgets.live_training",
    ("LossPlayground",): "widgets.loss_playground",
    ("curve_figure", "training_curves"): "curves",
    ("gallery_figure", "group_figure", "image_grid"): "images",
    ("category_plot", "comparison_plot", "interval_figure", "looks_plot"): "intervals",
    ("clipping_figure", "kl_estimators_figure", "token_weights_figure"): "lessons.loss",
    ("group_rows_figure", "group_size_figure", "learning_figure"): "lessons.loss",
    ("distribution_figure", "flow_figure", "seed_figure", "token_figure"): "lessons.models",
    ("climb_figure", "estimates_figure", "texts_figure"): "lessons.models",
    ("agreement_figure", "audit_figure", "similarity_figure", "vectors_figure", "winners_figure"): "lessons.rewards",
    ("loop_figure",): "loop",
    ("write_report",): "report",
    ("comparison_table", "representative_cases", "worst_cases"): "summary",
}
_HOME = {name: module for names, module in _MODULES.items() for name in names}

__all__ = ["RunRecord", "read_run", *_HOME]

__getattr__, __dir__ = lazy_names(__name__, _HOME)

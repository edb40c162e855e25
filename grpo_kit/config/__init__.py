"""What a run is given: settings and where they come from, prompts, devices, seeds; and the errors that users mend."""

from grpo_kit.config.errors import ConfigError, KitError, nearest, one_line, printable, shown
from grpo_kit.config.loading import RECORDS, load_config, pairs_from_texts, settings_from_texts
from grpo_kit.config.paths import PROJECT_ROOT, working_folder
from grpo_kit.config.settings import (
    PROFILE_FOLDER,
    PROFILES,
    Config,
    Count,
    EvaluationSettings,
    LoraSettings,
    ModelSettings,
    Name,
    Number,
    Section,
    TrainingSettings,
    Whole,
)
from grpo_kit.config.validation import validated

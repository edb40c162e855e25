"""Training, evaluation, replay and turns with media that are no pictures: tiny genuine Wan and Stable Audio."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.media_generators import MEDIA_FAMILIES

import grpo_kit as gk
from grpo_kit.config.media import Medium, Sound, digest, kind_of, thumbnail
from grpo_kit.experiment import Experiment
from grpo_kit.models.conversation import Turn
from grpo_kit.models.generator import load_generator
from grpo_kit.rewards.composition import Rewards
from grpo_kit.runs.record import file_beside, read_run
from grpo_kit.show.report import write_report
from grpo_kit.training.loop import train
from grpo_kit.training.replay import replay

SETTINGS = {
    "model_settings.device": "cpu",
    "generation_settings.num_inference_steps": 2,
    "generation_settings.rollout_steps": None,
    "generation_settings.max_sequence_length": None,
    "reward_settings.weights": {"spread": 1.0},
    "reward_settings.monitors": [],
    "training_settings.num_iterations": 2,
    "training_settings.prompts_per_iteration": 2,
    "training_settings.group_size": 2,
    "training_settings.validate_every": 2,
    "training_settings.save_every": 1,
    "training_settings.max_resampling": 1,
    "evaluation_settings.validation_prompts": 2,
    "evaluation_settings.paraphrases": False,
    "evaluation_settings.gold": None,
}
TEXT = "a large red circle, sharp"


def spread(images: Sequence[Medium], prompts: Sequence[str], enhanced_prompts: Sequence[str]) -> list[float]:
    """How far a medium's values are apart: nobody's opinion, and cheap."""
    return [float(np.std(one.samples if isinstance(one, Sound) else np.stack(one.pictures))) for one in images]


spread.media = ("video", "sound", "views")


@pytest.fixture(scope="module", params=["Wan", "Stable Audio"])
def media_kit(request: pytest.FixtureRequest, kit: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The embedded policy before a generator of another medium; do not train it."""
    family = next(one for one in MEDIA_FAMILIES if one.name == request.param)
    family.write(folder := tmp_path_factory.mktemp("generator"))
    size = {f"generation_settings.{name}": value for name, value in family.size.items()}
    config = gk.load_config("tiny", SETTINGS | {"model_settings.sd_model": str(folder)} | size)
    rewards = Rewards({"spread": spread}, {"spread": 1.0})
    return dataclasses.replace(kit, config=config, generator=load_generator(config), rewards=rewards)


def trained(kit: Experiment, place: Path) -> Path:
    train(_own(kit), place, progress=False)
    return place


def _own(kit: Experiment) -> Experiment:
    """With a policy that may be trained."""
    return dataclasses.replace(kit, policy=copy.deepcopy(kit.policy))


def test_a_run_is_kept_evaluated_replayed_and_shown(media_kit: Experiment, tmp_path: Path) -> None:
    run = trained(media_kit, tmp_path / "run")
    record, kind = read_run(run), media_kit.generator.medium
    rows = record.rollout(2)
    for row in rows.to_dict("records"):
        kept = record.medium(row["thumbnail"])
        drawn = media_kit.generator.generate_image(row["enhanced_prompt"], row["image_seed"])
        assert kind_of(kept) == kind_of(drawn) == kind
        there, here = (np.asarray(getattr(one, "frames", getattr(one, "samples", 0)), float) for one in (kept, drawn))
        assert np.abs(there - here).max() <= (1 if kind == "video" else 1e-4)  # alone or in a batch: by rounding
    assert all(record.medium(sample["thumbnail"]) for sample in record.validations[-1]["samples"])

    assert replay(run, 2, kit=_own(media_kit), progress=False).equal
    first = file_beside(record.file(rows["thumbnail"].iloc[0]))
    first.write_bytes(first.read_bytes() + b"\0")  # a replay that looked at thumbnails alone would find them equal
    assert first.name in replay(run, 2, kit=_own(media_kit), progress=False).first_difference

    result = gk.evaluate(media_kit, media_kit.val_prompts[:2], ("raw", "initial"), run_dir=run, seeds_per_prompt=1)
    assert np.isfinite(result.rows["reward"]).all() and len(result.rows) == 4
    images = read_run(run).evaluation_images()
    assert {kind_of(one) for one in map(images.__getitem__, images)} == {kind}
    page = write_report(run).read_text()
    assert page.count("data:audio/wav" if kind == "sound" else "data:image/webp") >= 4


def test_a_policy_sees_the_picture_that_stands_for_a_medium(media_kit: Experiment) -> None:
    medium = media_kit.generator.generate_image(TEXT, 3)
    seen = Turn(TEXT, medium).image
    assert isinstance(seen, Image.Image) and digest(seen) == digest(thumbnail(medium))
    parts = media_kit.policy, media_kit.generator, media_kit.rewards, media_kit.train_prompts[:1]
    rollout = gk.collect_rollout(*parts, num_generations=2, turns=2, use_image=True)
    assert len(rollout.images) == 4 and rollout.rewards.isfinite().all()
    later = [context for context in rollout.contexts if context.turns]
    assert [digest(one.pictures[-1]) for one in later] == [digest(thumbnail(row[0])) for row in rollout.images[:2]]
    assert all(len(context.images) == 1 for context in rollout.contexts)


def test_the_checks_words_are_refused_before_anything_is_drawn(media_kit: Experiment) -> None:
    parts = media_kit.policy, None, media_kit.rewards, media_kit.train_prompts[:1]
    silent = type("Silent", (), {"medium": media_kit.generator.medium})()  # which cannot draw
    with pytest.raises(gk.KitError, match=f"look_at: found words with a generator of {silent.medium}, allowed"):
        gk.collect_rollout(parts[0], silent, *parts[2:], num_generations=2, turns=2, look_at="words")

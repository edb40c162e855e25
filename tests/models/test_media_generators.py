"""Generators of videos, sounds and objects: one sample for each text and seed, and the whole way of a training step.

Each family is a tiny pipeline of its own classes, with random weights (media_generators.py), loaded as users load one.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from support.generators import SIZE
from support.media_generators import MEDIA_FAMILIES, RATE, MediaFamily, stable_audio, wan

from grpo_kit.config import Config, ConfigError, load_config
from grpo_kit.config.hub import ModelError
from grpo_kit.config.media import Medium, Sound, digest, kind_of
from grpo_kit.experiment import Experiment
from grpo_kit.models.generator import Generator, load_generator
from grpo_kit.models.media import VIEWS, drawn_alone, medium_of, raw_media
from grpo_kit.models.pipeline import load_pipeline
from grpo_kit.models.policy import load_policy
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rollout import Rollout, collect_rollout, score_rows
from grpo_kit.training.step import grpo_step

TEXTS = ["a large red circle, sharp", "Two tiny golden pyramids", ""]
NAMES = {family.name: family for family in MEDIA_FAMILIES}
EXACT = 1e-6


@pytest.fixture(scope="module", params=MEDIA_FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> MediaFamily:
    """Each of them in turn."""
    return request.param


@pytest.fixture(scope="module")
def folder(family: MediaFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's pipeline in hub form."""
    place = tmp_path_factory.mktemp("media")
    family.write(place)
    return place


def _config(folder: Path, family: MediaFamily, **settings: object) -> Config:
    generation = {"height": None, "width": None, "max_sequence_length": None, "num_inference_steps": 2}
    generation |= {"rollout_steps": None, "guidance_scale": 1.0} | family.size | settings
    named = {f"generation_settings.{key}": value for key, value in generation.items()}
    return load_config("tiny", {"model_settings.sd_model": str(folder), "model_settings.device": "cpu"} | named)


def _load(folder: Path, family: MediaFamily, **settings: object) -> Generator:
    return load_generator(_config(folder, family, **settings))


@pytest.fixture(scope="module")
def generator(folder: Path, family: MediaFamily) -> Generator:
    """It, as load_generator gives it."""
    return _load(folder, family)


def _digests(media: Sequence[Medium]) -> list[str]:
    return [digest(medium) for medium in media]


@torch.no_grad()
def _values(generator: Generator, texts: list[str], seeds: list[int], **arguments: object) -> np.ndarray:
    """What one call gives before it is rounded, (N, …); with the texts themselves where arguments are given."""
    given = arguments or generator._text_inputs(texts)
    kind = "latent" if generator.medium == "views" else "np"
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    output = generator.pipeline(**(generator._options() | given), generator=sources, output_type=kind)
    return np.stack(raw_media(generator.pipeline, output, seeds, generator._size))


@contextmanager
def _in_double(generator: Generator) -> Iterator[None]:
    """Films in double precision, since what float32 rounds grows to 6e-6 in a decoder of 30 layers."""
    try:
        if generator.medium == "video":
            generator.pipeline.to(torch.float64)
            generator._texts._kept.clear()
        yield
    finally:
        if generator.medium == "video":
            generator.pipeline.to(torch.float32)
            generator._texts._kept.clear()


# --- one text and seed, one sample ------------------------------------------------------------------------------------


def test_medium_is_that_of_the_class_and_has_the_size_that_is_asked_for(generator: Generator, family: MediaFamily):
    first, second = generator.generate_images(TEXTS[:2], [0, 1])
    assert generator.medium == family.medium == kind_of(first)
    if family.medium == "video":
        rate = {"Wan": 16, "LTX": 8, "CogVideoX": 8}[family.name]
        assert first.frames.shape == (9, SIZE, SIZE, 3) and first.rate == rate
    elif family.medium == "sound":
        assert first.samples.shape == (2 if family.name == "Stable Audio" else 1, RATE // 10) and first.rate == RATE
        assert first.samples.dtype == np.float32 and np.abs(first.samples).max() <= 1
    else:
        assert [view.size for view in first.pictures] == [(8, 8)] * 4
        assert len({view.tobytes() for view in first.pictures}) == 4  # from four sides
    assert digest(first) != digest(second)


@pytest.mark.trap("T19")
@pytest.mark.parametrize("guided", [False, True])
def test_sample_is_the_same_alone_and_in_a_batch(generator: Generator, family: MediaFamily, guided: bool):
    generator.guidance_scale = family.guidance if guided else 1.0
    seeds = [0, 1, 2]
    at_once = 1 if drawn_alone(generator.pipeline) else 3
    batches = [slice(start, start + at_once) for start in range(0, 3, at_once)]
    with _in_double(generator):
        together = np.concatenate([_values(generator, TEXTS[part], seeds[part]) for part in batches])
        alone = np.concatenate([_values(generator, [text], [seed]) for text, seed in zip(TEXTS, seeds, strict=True)])
        other = _values(generator, TEXTS[:1], [5])
    assert float(np.abs(together - alone).max()) < EXACT
    assert float(np.abs(together[:1] - other).max()) > 1e-3
    found = _digests(generator.generate_images(TEXTS, seeds))
    assert found == _digests(generator.generate_images(TEXTS, seeds))
    assert not set(found) & set(_digests(generator.generate_images(TEXTS, [3, 4, 5])))


@pytest.mark.parametrize("guided", [False, True])
def test_sample_is_the_one_that_the_pipeline_gives_for_the_text(
    generator: Generator, family: MediaFamily, guided: bool
):
    generator.guidance_scale = family.guidance if guided else 1.0
    ours = _values(generator, TEXTS[:1], [0])
    assert float(np.abs(ours - _values(generator, [], [0], prompt=TEXTS[:1])).max()) < 1e-5
    other = _values(generator, TEXTS[1:2], [0])
    assert np.abs(ours - other).max() > EXACT


def test_views_are_those_of_the_pipelines_own_renderer(tmp_path: Path):
    family = NAMES["Shap-E"]
    family.write(tmp_path)
    generator = _load(tmp_path, family, height=16, frames=VIEWS)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        (latent,) = generator.pipeline(
            TEXTS[:1], num_inference_steps=2, guidance_scale=1.0, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        renderer = generator.pipeline.shap_e_renderer
        theirs = renderer.decode_to_image(latent[None], latent.device, size=16, ray_batch_size=256).numpy()
    ours = _values(generator, TEXTS[:1], [0])[0]
    near, far = (np.abs(ours - other).mean() for other in (theirs[:VIEWS], theirs[1:]))
    assert theirs.shape == (VIEWS + 1, 16, 16, 3) and near < far / 2  # points along the rays are others


def test_global_noise_neither_decides_nor_is_used_up(generator: Generator):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found, before = digest(generator.generate_image(TEXTS[0])), torch.get_rng_state()
        torch.manual_seed(2)
        assert digest(generator.generate_image(TEXTS[0])) == found
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("guided", [False, True])
def test_negative_branch_is_computed_where_guidance_asks_for_it_alone(
    generator: Generator, family: MediaFamily, guided: bool
):
    generator.guidance_scale = family.guidance if guided else 1.0
    parts = (getattr(generator.pipeline, name, None) for name in ("transformer", "unet", "prior"))
    denoiser, rows = next(filter(None, parts)), []
    hook = denoiser.register_forward_pre_hook(
        lambda module, given, named: rows.append(len(named.get("hidden_states", given[0] if given else None))),
        with_kwargs=True,
    )
    generator.generate_images(TEXTS[:1], [0])
    hook.remove()
    steps = 3 if family.name == "Shap-E" else 2  # Heun's takes the first one twice
    assert sum(rows) == steps * (2 if guided else 1)


def test_negative_prompt_is_the_pipelines_own(folder: Path, family: MediaFamily):
    settings = {"guidance_scale": family.guidance, "negative_prompt": "a blurry square"}
    if not family.negative:
        with pytest.raises(ConfigError, match="negative_prompt: found one, but ShapEPipeline takes none; set null"):
            _load(folder, family, **settings)
        return
    generator = _load(folder, family, **settings)
    ours = _values(generator, TEXTS[:1], [0])
    theirs = _values(generator, [], [0], prompt=TEXTS[:1], negative_prompt=["a blurry square"])
    assert float(np.abs(ours - theirs).max()) < 1e-5
    without = _values(_load(folder, family, guidance_scale=family.guidance), TEXTS[:1], [0])
    assert np.abs(ours - without).max() > EXACT


# --- what is refused --------------------------------------------------------------------------------------------------


def test_size_that_does_not_fit_is_one_line_with_one_that_does(folder: Path, family: MediaFamily):
    for setting, (value, allowed) in family.refused.items():
        with pytest.raises(ConfigError, match=f"generation_settings.{setting}: found {value:g}, .*{allowed}") as error:
            _load(folder, family, **{setting: value})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("setting", "value"), [("frames", 9), ("frame_rate", 8.0), ("seconds", 1.0)])
def test_pictures_have_no_length(setting: str, value: float):
    with pytest.raises(ConfigError, match=rf"{setting}: found {value:g}, but \w+ gives pictures; set null"):
        load_generator(load_config("tiny", {f"generation_settings.{setting}": value, "model_settings.device": "cpu"}))


class OfFilms:
    """A pipeline of videos that the kit does not know."""

    def set_progress_bar_config(self, **options: object) -> None:
        """A pipeline has this."""

    def __call__(self, prompt: list[str], num_frames: int, num_inference_steps: int, generator: list) -> object:
        raise NotImplementedError


def test_pipeline_of_another_medium_that_is_not_known_is_one_line():
    with pytest.raises(ConfigError, match=r"found a OfFilms, not known here; allowed: pipelines of pictures, and Wan"):
        Generator(OfFilms(), num_inference_steps=1, guidance_scale=1.0)


def test_deprecated_pipeline_is_refused():
    from diffusers import TextToVideoSDPipeline

    pipeline = object.__new__(TextToVideoSDPipeline)
    pipeline.set_progress_bar_config = lambda **options: None
    with pytest.raises(ConfigError, match="TextToVideoSDPipeline, which diffusers no longer maintains"):
        Generator(pipeline, num_inference_steps=1, guidance_scale=1.0)


@pytest.mark.skipif(find_spec("torchsde") is not None, reason="torchsde is installed")
def test_scheduler_that_needs_a_library_that_is_not_there_is_one_line(tmp_path: Path):
    stable_audio(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"))
    settings = _config(tmp_path, NAMES["Stable Audio"]).model_settings
    with pytest.raises(ModelError, match="torchsde") as error:
        load_pipeline(settings, torch.float32)
    assert "\n" not in str(error.value)


# --- failed samples ---------------------------------------------------------------------------------------------------


@pytest.mark.trap("T16")
def test_sample_that_is_not_finite_or_shows_nothing_is_none(generator: Generator, family: MediaFamily):
    values = _values(generator, TEXTS[:1], [0])[0]
    assert medium_of(generator.pipeline, values, generator._size) is not None
    spoiled = values.copy()
    spoiled.flat[7] = np.nan
    for broken in (spoiled, values * np.inf, np.full_like(values, 0.5), values[:, :0]):
        assert medium_of(generator.pipeline, broken, generator._size) is None


@pytest.mark.trap("T16")
def test_infinite_values_of_a_decoder_are_a_failed_sample(generator: Generator, family: MediaFamily):
    part = generator.pipeline.shap_e_renderer.mlp if family.medium == "views" else generator.pipeline.vae.decoder

    def spoil(module: torch.nn.Module, given: object, values: object) -> object:
        if family.medium == "views":
            return dataclasses.replace(values, channels=values.channels * torch.nan)
        if isinstance(values, tuple):
            return (values[0] * torch.inf, *values[1:])
        return values * torch.inf

    hook = part.register_forward_hook(spoil)
    assert generator.generate_images(TEXTS[:1], [0]) == [None]
    hook.remove()
    assert generator.generate_images(TEXTS[:1], [0]) != [None]


def test_sounds_are_cut_off_at_one_and_counted(tmp_path: Path):
    stable_audio(tmp_path)
    generator = _load(tmp_path, NAMES["Stable Audio"])
    quiet = generator.generate_images(TEXTS, [0, 1, 2])
    assert generator.clipped == 0
    hook = generator.pipeline.vae.decoder.register_forward_hook(lambda module, given, values: values * 1e4)
    loud = generator.generate_images(TEXTS, [0, 1, 2])
    hook.remove()
    assert generator.clipped == 3
    for one, other in zip(quiet, loud, strict=True):
        assert isinstance(other, Sound) and np.allclose(other.samples, (one.samples * 1e4).clip(-1, 1), atol=1e-4)


# --- threads ----------------------------------------------------------------------------------------------------------


def _drawn(generator: Generator, threads: int) -> list[str]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _digests(generator.generate_images(TEXTS * 2, range(6)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("write", [wan, stable_audio])
def test_samples_do_not_depend_on_how_many_threads_draw_them(write: object, tmp_path: Path):
    write(tmp_path)
    family = next(one for one in MEDIA_FAMILIES if one.write is write)
    generator = _load(tmp_path, family, image_batch_size=2)
    alone = _drawn(generator, 1)
    assert _drawn(generator, 2) == alone == _drawn(generator, 3)


def test_threads_that_share_what_was_decoded_last_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wan(tmp_path)
    generator = _load(tmp_path, NAMES["Wan"], image_batch_size=1, frames=17)
    alone, twin = _drawn(generator, 1), Generator._twin

    def sharing(self: Generator) -> Generator:
        found = twin(self)
        found.pipeline.vae = self.pipeline.vae
        return found

    monkeypatch.setattr(Generator, "_twin", sharing)
    differs = False
    for _ in range(20):
        try:
            differs = differs or _drawn(generator, 3) != alone
        except Exception:  # a frame of one film behind that of another, of another size
            differs = True
    assert differs


# --- the whole way ----------------------------------------------------------------------------------------------------


def brightness(images: Sequence[Medium | None], prompts: Sequence[str], enhanced: Sequence[str]) -> list[float]:
    """The mean of the values of each; NaN for a failed sample."""

    def level(medium: Medium | None) -> float:
        if medium is None:
            return float("nan")
        values = {"video": "frames", "sound": "samples", "views": "pictures"}[kind_of(medium)]
        return float(np.abs(np.asarray([np.asarray(part) for part in getattr(medium, values)], float)).mean())

    return [level(medium) for medium in images]


brightness.media = ("video", "sound", "views")
REWARDS = Rewards(parts={"brightness": brightness}, weights={"brightness": 1.0})


def _collect(kit: Experiment, generator: object, rewards: Rewards = REWARDS, prompts: int = 2) -> Rollout:
    return collect_rollout(kit.policy, generator, rewards, kit.train_prompts[:prompts], 3, seed=0)


@pytest.mark.trap("T1")
@pytest.mark.trap("T13")
def test_whole_way_from_loading_to_a_trained_policy_that_is_loaded_again(
    own_kit: Experiment, folder: Path, family: MediaFamily, tmp_path: Path
):
    config = load_config(_config(folder, family), {"training_settings.updates_per_rollout": 1})
    generator, policy = load_generator(config), own_kit.policy
    rollout = _collect(own_kit, generator)
    assert {kind_of(medium) for row in rollout.images for medium in row} == {family.medium}
    assert torch.isfinite(rollout.rewards).all() and rollout.rewards.unique().numel() > 2
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-3)
    stats = grpo_step(policy, optimizer, rollout, config)
    assert stats.metrics["sampling/sampling_logp_difference/max"] < 2e-5
    assert stats.metrics["clip_ratio/region_mean"] == 0 and stats.metrics["grad_norm"] > 0
    policy.save_pretrained(tmp_path)
    again, rows = load_policy(config, tmp_path), torch.arange(len(rollout.group_ids))
    with torch.no_grad():
        trained = score_rows(policy, rollout, rows).logprobs
        assert torch.equal(score_rows(again, rollout, rows).logprobs, trained)
    assert float((trained - rollout.old_logprobs).abs().max()) > 1e-4
    reloaded = load_generator(config)
    assert _digests(reloaded.generate_images(TEXTS, [0, 1, 2])) == _digests(generator.generate_images(TEXTS, [0, 1, 2]))


@pytest.mark.trap("T8")
@pytest.mark.trap("T9")
@pytest.mark.trap("T10")
@pytest.mark.trap("T11")
@pytest.mark.trap("T12")
def test_what_a_policy_writes_does_not_depend_on_what_draws_it(kit: Experiment, generator: Generator):
    """So what the tests of those traps show with pictures holds with other media."""
    ours, pictures = _collect(kit, generator), _collect(kit, kit.generator, kit.rewards)
    assert ours.enhanced_prompts == pictures.enhanced_prompts
    for name in ("completion_ids", "completion_mask", "old_logprobs", "group_ids", "image_seeds", "truncated"):
        assert torch.equal(getattr(ours, name), getattr(pictures, name))


@pytest.mark.trap("T3")
def test_groups_beside_it_change_nothing_of_a_group(kit: Experiment, generator: Generator):
    rollout = _collect(kit, generator)
    rows = (rollout.group_ids == 1).nonzero().flatten().tolist()
    texts, seeds = [rollout.enhanced_prompts[row] for row in rows], rollout.image_seeds[rows, 0].tolist()
    alone = REWARDS(generator.generate_images(texts, seeds), [kit.train_prompts[1].user_prompt] * len(rows), texts)
    assert torch.allclose(alone, rollout.rewards[rows], atol=0.01)  # of 255, where a value may be rounded otherwise


@pytest.mark.trap("T16")
def test_failed_sample_has_no_reward_and_leaves_its_group(kit: Experiment, generator: Generator):
    failing = copy.copy(generator)
    failing.generate_images = lambda texts, seeds: [None, *generator.generate_images(texts, seeds)[1:]]
    rollout = _collect(kit, failing)
    assert rollout.images[0] == [None] or rollout.images[0][0] is None
    assert torch.isnan(rollout.rewards[0]) and torch.isfinite(rollout.rewards[1:]).all()

"""What the benchmark of scoring during drawing measures is what a rollout does."""

from benchmarks.speed.overlap import answering, drawn, wanted_pictures
from grpo_kit.experiment import Experiment


def test_both_orders_draw_and_score_all_pictures(kit: Experiment):
    wanted = wanted_pictures(kit, 1, 2)
    rewards = answering(kit.rewards, 0.0)
    with kit.generator.steps(1):
        plain, overlapped = (drawn(kit.generator, rewards, wanted, overlap) for overlap in (False, True))
    assert set(plain.parts) == set(overlapped.parts) == {*rewards.parts, *rewards.monitors}
    assert all(len(values) == 2 for values in plain.parts.values())
    assert [[image.tobytes() for image in row] for row in plain.images] == [
        [image.tobytes() for image in row] for row in overlapped.images
    ]

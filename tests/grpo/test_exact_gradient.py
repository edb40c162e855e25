"""GRPO's gradient against the true one, on a policy so small that all that it can write is listed (T2, T5 to T10, T16).

The policy has its own logits after every prefix; J is its expected reward, and ∇J is known exactly. So is the
expectation of the loss's gradient over all groups that can be sampled. Settings without bias give -∇J times a constant;
of the others, the bias that the papers state is shown, against its exact value.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import scipy.stats
import torch
from support.broken_twins import broken_versions

from grpo_kit.grpo import completion_mask, group_advantages, grpo_loss, kl_divergence, token_logprobs
from grpo_kit.models import decoding

END = 0  # the end of sequence, and the padding too
NO_CLIP = 1e9


@dataclass(frozen=True)
class World:
    """Every completion of at most `longest` tokens, N in all, and every prefix that is continued, K in all."""

    vocabulary: int
    longest: int

    @functools.cached_property
    def completions(self) -> list[tuple[int, ...]]:
        """N tuples of tokens: those that end, and those that are cut off at the limit."""
        rows, unfinished = [], [()]
        for length in range(1, self.longest + 1):
            longer = [(*prefix, token) for prefix in unfinished for token in range(self.vocabulary)]
            rows += [row for row in longer if row[-1] == END or length == self.longest]
            unfinished = [row for row in longer if row[-1] != END]
        return rows

    @functools.cached_property
    def prefixes(self) -> list[tuple[int, ...]]:
        """K tuples of tokens, the empty one first."""
        return sorted({row[:place] for row in self.completions for place in range(len(row))})

    @functools.cached_property
    def ids(self) -> torch.Tensor:
        """(N, T) padded with the end token."""
        return torch.tensor([(*row, *[END] * (self.longest - len(row))) for row in self.completions])

    @functools.cached_property
    def mask(self) -> torch.Tensor:
        """(N, T)."""
        return completion_mask(self.ids, END)

    @functools.cached_property
    def places(self) -> torch.Tensor:
        """(N, T) which prefix each token follows, the last one of its row after the end."""
        where = [
            [self.prefixes.index(row[: min(t, len(row) - 1)]) for t in range(self.longest)] for row in self.completions
        ]
        return torch.tensor(where)

    def logits(self, seed: int, spread: float = 1.0) -> torch.Tensor:
        """(K, V) of some policy."""
        source = torch.Generator().manual_seed(seed)
        return spread * torch.randn(len(self.prefixes), self.vocabulary, generator=source, dtype=torch.float64)

    def logprobs(self, logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """(N, T); after the end, what the policy happens to think of padding."""
        return token_logprobs(logits[self.places], self.ids, temperature)

    def chances(self, logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """(N,) probability of each completion."""
        return self.logprobs(logits, temperature).where(self.mask, 0.0).sum(dim=1).exp()

    def visits(self, logits: torch.Tensor) -> torch.Tensor:
        """(K,) how likely it is that a completion comes past each prefix."""
        starts = [[row[: len(prefix)] == prefix for row in self.completions] for prefix in self.prefixes]
        return torch.tensor(starts).double() @ self.chances(logits)


WORLD = World(vocabulary=3, longest=3)
SMALL = World(vocabulary=3, longest=2)
BANDIT = World(vocabulary=6, longest=1)  # one token: its ratio is that of the completion
LONGEST = 4  # max_completion_length: any constant will do; divisions by 4 and 8 are exact also in float32
POLICY, REFERENCE = WORLD.logits(0), WORLD.logits(1)
REWARDS = torch.rand(15, generator=torch.Generator().manual_seed(2), dtype=torch.float64).pow(4)  # few are good

Estimate = Callable[..., torch.Tensor]  # logprobs (G, T), old_logprobs (G, T), rewards (G,), mask (G, T) → loss


def gradient(value: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor = POLICY) -> torch.Tensor:
    """∇ value at these logits."""
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(value(logits), logits)[0]


def true_gradient(
    rewards: torch.Tensor = REWARDS, logits: torch.Tensor = POLICY, world: World = WORLD, temperature: float = 1.0
) -> torch.Tensor:
    """∇J, of the expected reward: Σ π(y) r(y) over all completions."""
    return gradient(lambda logits: world.chances(logits, temperature) @ rewards, logits)


def weighted_score(weights: torch.Tensor) -> torch.Tensor:
    """Σ π(y) weight(y) ∇ log π(y) for (N,) weights: what an estimate is on average that pushes y by weight(y)."""
    pushed = (WORLD.chances(POLICY) * weights).unsqueeze(1) * WORLD.mask
    return gradient(lambda logits: (pushed * WORLD.logprobs(logits)).sum())


def kit(scale_rewards: str = "none", baseline: str = "leave_one_out", **options: object) -> Estimate:
    """The kit's loss of one group."""
    options = {"loss_type": "dr_grpo", "max_completion_length": LONGEST} | options

    def estimate(logprobs, old_logprobs, rewards, mask):
        group = torch.zeros(len(rewards), dtype=torch.int64)
        advantages = group_advantages(rewards, group, scale_rewards=scale_rewards, baseline=baseline, eps=1e-14)
        return grpo_loss(logprobs, advantages, mask, old_logprobs=old_logprobs, **options).loss

    return estimate


def expected_gradient(
    estimate: Estimate,
    size: int = 2,
    *,
    world: World = WORLD,
    rewards: torch.Tensor = REWARDS,
    logits: torch.Tensor = POLICY,
    temperature: float = 1.0,
    old: torch.Tensor | None = None,
    chances: torch.Tensor | None = None,
) -> torch.Tensor:
    """The exact expectation of an estimate's gradient over all groups of a size.

    Args:
        old: logits of the policy in the ratio's denominator; None is the policy itself.
        chances: (N,) with which completions are sampled; None means that the old policy samples.
    """
    old = logits if old is None else old
    chances = world.chances(old, temperature) if chances is None else chances
    old_logprobs = world.logprobs(old, temperature)

    def expectation(logits: torch.Tensor) -> torch.Tensor:
        logprobs, total = world.logprobs(logits, temperature), 0.0
        for group in itertools.product(range(len(rewards)), repeat=size):
            rows = list(group)
            loss = estimate(logprobs[rows], old_logprobs[rows], rewards[rows], world.mask[rows])
            total = total + chances[rows].prod() * loss
        return total

    return gradient(expectation, logits)


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of `found` from `expected`, in lengths of `expected`."""
    return float((found - expected).norm() / expected.norm())


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """In degrees."""
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1).acos().rad2deg())


def test_all_completions_are_listed():
    assert [len(row) for row in WORLD.completions] == [1] + 2 * [2] + 12 * [3] and len(set(WORLD.completions)) == 15
    assert WORLD.mask.sum(dim=1).tolist() == [len(row) for row in WORLD.completions] and len(WORLD.prefixes) == 7
    for world in (WORLD, SMALL, BANDIT):
        assert float(world.chances(world.logits(5)).sum()) == pytest.approx(1, abs=1e-12)
    assert_equal(WORLD.visits(POLICY)[:1], torch.ones(1, dtype=torch.float64))


# --- without bias -----------------------------------------------------------------------------------------------------

UNBIASED = {  # loss type → its settings, and the constant that the gradient is multiplied by for a group of 2
    "dr_grpo": ({}, 1 / LONGEST),
    "luspo": ({}, 1.0),
    "dapo": ({"num_items_in_batch": 8}, 2 / 8),  # a number of tokens that does not depend on what was sampled
    "cispo": ({"num_items_in_batch": 8, "epsilon_high": 5.0}, 2 / 8),
    "vespo": ({"num_items_in_batch": 8}, 2 / 8),
}


@pytest.mark.trap("T5")
@pytest.mark.trap("T6")
@pytest.mark.trap("T10")
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", UNBIASED)
def test_expectation_is_the_gradient_of_the_expected_reward(loss_type: str, level: str):
    options, constant = UNBIASED[loss_type]
    estimate = kit(loss_type=loss_type, importance_sampling_level=level, **options)
    assert_equal(expected_gradient(estimate), -constant * true_gradient())


@pytest.mark.trap("T5")
@pytest.mark.parametrize("size", [2, 3, 4])
def test_expectation_does_not_depend_on_the_size_of_the_group(size: int):
    logits = SMALL.logits(3)
    found = expected_gradient(kit(), size, world=SMALL, rewards=REWARDS[:7], logits=logits)
    assert_equal(found, -true_gradient(REWARDS[:7], logits, SMALL) / LONGEST)


@pytest.mark.trap("T8")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_expectation_is_that_of_the_policy_at_its_sampling_temperature(temperature: float):
    found = expected_gradient(kit(), temperature=temperature)
    assert_equal(found, -true_gradient(temperature=temperature) / LONGEST)


@pytest.mark.trap("T16")
@pytest.mark.trap("T16", broken="failure_as_zero_reward")
def test_failed_samples_leave_the_gradient_of_the_expected_reward_of_the_others():
    """With s(y) 1 where y can be scored, 0 elsewhere: E[s]² ∇(E[s r] / E[s])."""
    scored = (torch.arange(15) % 4 != 1).double()

    def conditional(logits: torch.Tensor) -> torch.Tensor:
        return WORLD.chances(logits) @ (scored * REWARDS) / (WORLD.chances(logits) @ scored)

    expected = -((WORLD.chances(POLICY) @ scored) ** 2) * gradient(conditional) / LONGEST
    assert_equal(expected_gradient(kit(), rewards=REWARDS.where(scored > 0, torch.nan)), expected)
    assert distance(expected_gradient(kit(), rewards=REWARDS * scored), expected) > 0.1


# --- broken on purpose ------------------------------------------------------------------------------------------------


def sign_turned() -> torch.Tensor:
    return expected_gradient(kit(), rewards=-REWARDS)


def ratio_against_the_reference() -> torch.Tensor:
    return expected_gradient(kit(epsilon=NO_CLIP), old=REFERENCE, chances=WORLD.chances(POLICY))


def temperature_forgotten_in_scoring() -> torch.Tensor:
    return expected_gradient(kit(), temperature=1.0, chances=WORLD.chances(POLICY, 0.5))


def temperature_applied_twice() -> torch.Tensor:
    return expected_gradient(kit(), temperature=0.25, chances=WORLD.chances(POLICY, 0.5))


def top_2_sampled_and_all_scored() -> torch.Tensor:
    kept = POLICY >= POLICY.topk(2, dim=1).values[:, 1:]
    return expected_gradient(kit(), chances=WORLD.chances(POLICY.where(kept, -torch.inf)))


def end_left_out() -> torch.Tensor:
    def estimate(logprobs, old_logprobs, rewards, mask):
        length = mask.sum(dim=1, keepdim=True)
        return kit()(logprobs, old_logprobs, rewards, mask & (torch.arange(WORLD.longest) < length - 1))

    return expected_gradient(estimate)


def padding_counted() -> torch.Tensor:
    return expected_gradient(lambda new, old, rewards, mask: kit()(new, old, rewards, torch.ones_like(mask)))


def divided_by_the_longest_of_the_batch() -> torch.Tensor:
    def estimate(logprobs, old_logprobs, rewards, mask):
        longest = int(mask.sum(dim=1).max())
        return kit(max_completion_length=longest)(logprobs, old_logprobs, rewards, mask)

    return expected_gradient(estimate)


def divided_by_the_length_of_the_row() -> torch.Tensor:
    return expected_gradient(kit(loss_type="grpo"))


BROKEN = {
    sign_turned: "",
    ratio_against_the_reference: "T2",
    temperature_forgotten_in_scoring: "T8",
    temperature_applied_twice: "T8",
    top_2_sampled_and_all_scored: "T9",
    end_left_out: "T10",
    padding_counted: "T10",
    divided_by_the_longest_of_the_batch: "T6",
    divided_by_the_length_of_the_row: "T6",
}


@pytest.mark.parametrize("mutant", broken_versions(BROKEN))
def test_broken_version_points_elsewhere(mutant: Callable[[], torch.Tensor]):
    temperature = 0.5 if mutant.__name__.startswith("temperature") else 1.0
    assert angle(mutant(), -true_gradient(temperature=temperature)) > 3


# --- with the bias that is stated -------------------------------------------------------------------------------------


@pytest.mark.trap("T5")
@pytest.mark.parametrize("size", [2, 3])
def test_mean_baseline_shrinks_the_gradient_by_one_part_in_the_group(size: int):
    logits = SMALL.logits(3)
    found = expected_gradient(kit(baseline="mean"), size, world=SMALL, rewards=REWARDS[:7], logits=logits)
    assert_equal(found, -(size - 1) / size * true_gradient(REWARDS[:7], logits, SMALL) / LONGEST)


def expected_win(rewards: torch.Tensor) -> torch.Tensor:
    """(N,) chance of a better reward than another sample's, less that of a worse one."""
    return (rewards.unsqueeze(1) - rewards).sign() @ WORLD.chances(POLICY)


@pytest.mark.trap("T5")
@pytest.mark.trap("T5", broken="deviation_of_n")
def test_group_deviation_follows_who_wins_and_not_by_how_much():
    """A pair gets ±1/√2 for any gap: the gradient is that of the chance to win against another sample."""
    found = expected_gradient(kit("group", "mean"))
    expected = -weighted_score(expected_win(REWARDS)) / 2**0.5 / LONGEST
    assert_equal(found, expected)
    assert angle(found, -true_gradient()) > 10
    deviation_of_n = found * 2**0.5  # of two rewards, the biased deviation is √2 smaller
    assert distance(deviation_of_n, expected) > 0.4


@pytest.mark.trap("T5")
def test_group_deviation_makes_a_nearly_flat_prompt_as_loud_as_any():
    """Of two prompts whose rewards lie a thousand times closer in one: by how much each pulls."""
    flat, steep = 1e-3 * REWARDS, REWARDS
    pulls = {
        scale: [float(expected_gradient(kit(scale, "mean"), rewards=rewards).norm()) for rewards in (steep, flat)]
        for scale in ("none", "group")
    }
    assert pulls["none"][0] == pytest.approx(1000 * pulls["none"][1])
    assert pulls["group"][0] == pytest.approx(pulls["group"][1])


@pytest.mark.trap("T6")
@pytest.mark.parametrize("loss_type", ["grpo", "sapo"])
def test_a_mean_of_row_means_divides_each_push_by_the_length(loss_type: str):
    """Σ π (r - J) / length ∇ log π: a token of a short good row gains most, one of a long bad row loses least."""
    length = WORLD.mask.sum(dim=1)
    advantage = REWARDS - WORLD.chances(POLICY) @ REWARDS
    found = expected_gradient(kit(loss_type=loss_type))
    assert_equal(found, -weighted_score(advantage / length))
    assert angle(found, -true_gradient()) > 2
    assert_equal(-weighted_score(advantage), -true_gradient())  # it is the division that turns it


@pytest.mark.trap("T6")
def test_equally_good_rows_are_pushed_per_token_by_the_inverse_of_their_length_in_grpo_alone():
    rewards = torch.tensor([0.9, 0.9, 0.1, 0.1], dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([[1], [4], [1], [4]])  # short and long, good and bad
    old = torch.zeros(4, 4, dtype=torch.float64)
    for loss_type, shares in (("grpo", [4, 1, -4, -1]), ("dr_grpo", [1, 1, -1, -1]), ("dapo", [1, 1, -1, -1])):
        loss = kit(loss_type=loss_type)
        push = -gradient(functools.partial(loss, old_logprobs=old, rewards=rewards, mask=mask), old)[:, 0]
        assert_equal(push / push[1], torch.tensor(shares, dtype=torch.float64))


@pytest.mark.trap("T6")
@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
def test_a_count_of_the_batchs_own_tokens_weighs_a_row_by_those_beside_it(loss_type: str):
    """Σ π(y) π(y') (r - r') / (length + length') ∇ log π(y), twice."""
    length = WORLD.mask.sum(dim=1)
    pairs = (REWARDS.unsqueeze(1) - REWARDS) / (length.unsqueeze(1) + length)
    found = expected_gradient(kit(loss_type=loss_type))
    assert_equal(found, -2 * weighted_score(pairs @ WORLD.chances(POLICY)))
    assert angle(found, -true_gradient()) > 0.5


# --- the KL term (T7) -------------------------------------------------------------------------------------------------

Loss = Callable[..., object]


def expected_kl_gradient(
    estimator: str,
    loss: Loss = grpo_loss,
    world: World = WORLD,
    policies: tuple[torch.Tensor, torch.Tensor] = (POLICY, REFERENCE),
    chances: torch.Tensor | None = None,
    importance: bool = False,
) -> torch.Tensor:
    """Expectation of the gradient of the KL term alone, over all completions in one call.

    Args:
        policies: logits of the policy and of its reference.
        chances: (N,) with which completions are sampled; None is the policy's own.
        importance: weigh each completion by policy / sampler.
    """
    policy, reference = policies
    own = world.chances(policy)
    chances = own if chances is None else chances
    weights = (chances * (own / chances if importance else 1.0)).unsqueeze(1) * world.mask
    options = {"ref_logprobs": world.logprobs(reference), "beta": 1.0, "kl_estimator": estimator, "weights": weights}
    nothing = torch.zeros(len(chances), dtype=torch.float64)
    return gradient(lambda logits: loss(world.logprobs(logits), nothing, world.mask, **options).loss, policy)


def true_kl_gradient(towards_policy: bool) -> torch.Tensor:
    """∇KL(π ‖ reference) of the next token, or ∇KL(reference ‖ π), at each prefix as often as it is visited."""
    q, visits = REFERENCE.log_softmax(dim=1), WORLD.visits(POLICY).unsqueeze(1)

    def divergence(logits: torch.Tensor) -> torch.Tensor:
        p = logits.log_softmax(dim=1)
        return (visits * (p.exp() * (p - q) if towards_policy else q.exp() * (q - p))).sum()

    return gradient(divergence)


def whole_kl(logits: torch.Tensor, reference: torch.Tensor, world: World) -> torch.Tensor:
    """KL(π ‖ reference) of completions."""
    chances = world.chances(logits)
    return (chances * (chances / world.chances(reference)).log()).sum()


KL_TRUTH = {
    "k1": torch.zeros_like(POLICY),
    "k2": true_kl_gradient(towards_policy=True),
    "k3": true_kl_gradient(towards_policy=False),
}


@pytest.mark.trap("T7")
@pytest.mark.parametrize("estimator", KL_TRUTH)
def test_kl_as_a_loss_has_the_stated_gradient_at_every_prefix(estimator: str):
    assert_equal(expected_kl_gradient(estimator), KL_TRUTH[estimator])


@pytest.mark.trap("T7")
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_has_the_value_of_the_divergence_of_completions(estimator: str):
    tokens = kl_divergence(WORLD.logprobs(POLICY), WORLD.logprobs(REFERENCE), estimator) * WORLD.mask
    found = WORLD.chances(POLICY) @ tokens.sum(dim=1)
    assert_equal(found, whole_kl(POLICY, REFERENCE, WORLD))


def test_kl_as_a_loss_leaves_out_which_prefixes_are_visited():
    """On one token k2 is all of ∇KL; on several it lacks the part through which the policy reaches a prefix."""
    policies = BANDIT.logits(0), BANDIT.logits(1)
    one_token = gradient(lambda logits: whole_kl(logits, policies[1], BANDIT), policies[0])
    assert_equal(expected_kl_gradient("k2", world=BANDIT, policies=policies), one_token)
    several = gradient(lambda logits: whole_kl(logits, REFERENCE, WORLD))
    visited = gradient(lambda logits: WORLD.visits(logits) @ _kl_at_prefixes())
    assert_equal(expected_kl_gradient("k2"), several - visited)
    assert distance(expected_kl_gradient("k2"), several) > 0.1


def _kl_at_prefixes() -> torch.Tensor:
    p, q = POLICY.log_softmax(dim=1), REFERENCE.log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1)


@pytest.mark.trap("T7")
@pytest.mark.trap("T7", broken="kl_of_old_samples_without_their_weight")
@pytest.mark.parametrize("estimator", KL_TRUTH)
def test_kl_of_samples_of_another_policy_needs_the_importance_weight(estimator: str):
    policies, sampler = (BANDIT.logits(0), BANDIT.logits(1)), BANDIT.chances(BANDIT.logits(2, spread=0.5))
    truth = expected_kl_gradient(estimator, world=BANDIT, policies=policies)
    options = {"world": BANDIT, "policies": policies, "chances": sampler}
    assert_equal(expected_kl_gradient(estimator, importance=True, **options), truth)
    assert float((expected_kl_gradient(estimator, **options) - truth).norm()) > 0.1


@pytest.mark.trap("T7")
@pytest.mark.trap("T7", broken="correction_without_gradient")
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_bias_correction_gives_the_gradient_of_the_divergence_whoever_sampled(estimator: str):
    now, reference, before = (BANDIT.logits(seed, spread=0.5) for seed in range(3))
    old = BANDIT.logprobs(before)

    def loss(logits: torch.Tensor, detached: bool = False) -> torch.Tensor:
        logprobs = BANDIT.logprobs(logits)
        ratio = (logprobs - old).exp().detach() if detached else 1.0
        return grpo_loss(
            logprobs, torch.zeros(len(old), dtype=torch.float64), BANDIT.mask, old_logprobs=old,
            ref_logprobs=BANDIT.logprobs(reference), beta=1.0, kl_estimator=estimator,
            use_bias_correction_kl=not detached, weights=BANDIT.chances(before).unsqueeze(1) * ratio,
        ).loss  # fmt: skip

    truth = gradient(lambda logits: whole_kl(logits, reference, BANDIT), now)
    assert_equal(gradient(loss, now), truth)
    assert distance(gradient(lambda logits: loss(logits, detached=True), now), truth) > 0.05


def kl_detached(logprobs: torch.Tensor, *args: object, **options: object) -> object:
    return grpo_loss(logprobs.detach() + 0.0 * logprobs, *args, **options)


def kl_with_the_sign_turned(*args: object, **options: object) -> object:
    return grpo_loss(*args, **options | {"beta": -options["beta"]})


def kl_as_the_log_ratio(*args: object, **options: object) -> object:
    return grpo_loss(*args, **options | {"kl_estimator": "k1"})


def k2_and_k3_confused(*args: object, **options: object) -> object:
    return grpo_loss(*args, **options | {"kl_estimator": {"k2": "k3", "k3": "k2"}[options["kl_estimator"]]})


KL_MUTANTS = dict.fromkeys((kl_detached, kl_with_the_sign_turned, kl_as_the_log_ratio, k2_and_k3_confused), "T7")


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("mutant", broken_versions(KL_MUTANTS))
def test_broken_kl_term_has_another_gradient(mutant: Loss, estimator: str):
    assert distance(expected_kl_gradient(estimator, mutant), KL_TRUTH[estimator]) > 0.1


# --- samples of an older policy ---------------------------------------------------------------------------------------

NOW, BEFORE = BANDIT.logits(0), BANDIT.logits(0) + BANDIT.logits(1)
PRIZES = REWARDS[:6]
OLD_SAMPLES = {"world": BANDIT, "rewards": PRIZES, "logits": NOW, "old": BEFORE}


@pytest.mark.trap("T2")
@pytest.mark.trap("T2", broken="ratio_against_a_third_policy")
@pytest.mark.trap("T2", broken="no_ratio")
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_ratio_to_the_sampler_makes_old_samples_as_good_as_new_ones(level: str):
    truth = -true_gradient(PRIZES, NOW, BANDIT) / LONGEST
    estimate = kit(epsilon=NO_CLIP, importance_sampling_level=level)
    assert_equal(expected_gradient(estimate, **OLD_SAMPLES), truth)
    sampled = {"chances": BANDIT.chances(BEFORE)}
    assert distance(expected_gradient(estimate, **OLD_SAMPLES | {"old": BANDIT.logits(7)} | sampled), truth) > 0.1
    assert distance(expected_gradient(estimate, **OLD_SAMPLES | {"old": NOW} | sampled), truth) > 0.05


def test_clipping_leaves_out_the_tokens_that_have_gone_far_enough():
    new, old = BANDIT.chances(NOW), BANDIT.chances(BEFORE)
    gap = PRIZES.unsqueeze(1) - PRIZES  # of the first of a pair over the second
    ratio = (new / old).unsqueeze(1)
    clipped = ((gap > 0) & (ratio > 1.2)) | ((gap < 0) & (ratio < 0.8))
    push = (ratio * gap).masked_fill(clipped, 0.0) @ old  # (N,) for each sampled token
    expected = -gradient(lambda logits: (old * push) @ BANDIT.logprobs(logits)[:, 0], NOW) / LONGEST
    found = expected_gradient(kit(epsilon=0.2), **OLD_SAMPLES)
    assert clipped.any() and not clipped.all()
    assert_equal(found, expected)
    assert distance(found, -true_gradient(PRIZES, NOW, BANDIT) / LONGEST) > 0.05


def _old_values(old: torch.Tensor) -> torch.Tensor:
    """(K, V) expected reward once a token follows a prefix, when the old policy goes on from there."""
    chances = WORLD.chances(old)

    def value(start: tuple[int, ...]) -> torch.Tensor:
        through = torch.tensor([row[: len(start)] == start for row in WORLD.completions])
        return (chances * through) @ REWARDS / (chances * through).sum()

    return torch.stack(
        [torch.stack([value((*prefix, token)) for token in range(WORLD.vocabulary)]) for prefix in WORLD.prefixes]
    )


def test_token_ratios_of_several_tokens_take_prefixes_and_what_follows_from_the_old_policy():
    """Σ over prefixes of visits_old · Σ π(token) Q_old: a first-order objective, exact only where nothing has moved."""
    old = POLICY + WORLD.logits(4, spread=0.5)
    visits, values = WORLD.visits(old).unsqueeze(1), _old_values(old)
    surrogate = gradient(lambda logits: (visits * logits.softmax(dim=1) * values).sum())
    found = expected_gradient(kit(epsilon=NO_CLIP), old=old)
    assert_equal(found, -surrogate / LONGEST)
    assert distance(found, -true_gradient() / LONGEST) > 0.1
    on_policy = gradient(
        lambda logits: (WORLD.visits(POLICY).unsqueeze(1) * logits.softmax(1) * _old_values(POLICY)).sum()
    )
    assert_equal(on_policy, true_gradient())


# --- sampled ----------------------------------------------------------------------------------------------------------

BATCHES, GROUPS, SIZE = 256, 16, 4


def sampled(seed: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, T) ids of a batch, drawn by the kit's own sampling loop, and (rows,) which completions they are."""
    count = GROUPS * SIZE
    place, after = torch.zeros(count, dtype=torch.int64), torch.zeros(len(WORLD.prefixes), 3, dtype=torch.int64)
    for i, prefix in enumerate(WORLD.prefixes):
        for token in range(3):
            longer = (*prefix, token)
            after[i, token] = WORLD.prefixes.index(longer) if longer in WORLD.prefixes else i

    def next_logits(ids: torch.Tensor, step: int) -> torch.Tensor:
        nonlocal place
        place = after[place, ids]
        return POLICY[place]

    ids, _ = decoding.decode(
        POLICY[place], next_logits, eos_token_ids=[END], pad_token_id=END, max_new_tokens=WORLD.longest,
        temperature=temperature, uniforms=decoding.row_uniforms(decoding.row_seeds(seed, GROUPS, SIZE), WORLD.longest),
    )  # fmt: skip
    return ids, (ids.unsqueeze(1) == WORLD.ids).all(dim=2).int().argmax(dim=1)


def batch_gradients(temperature: float = 1.0, scored_at: float | None = None, **advantage: str) -> torch.Tensor:
    """(batches, K·V) gradient of the kit's loss on each of many sampled batches."""
    scored_at = temperature if scored_at is None else scored_at
    groups = torch.arange(GROUPS).repeat_interleave(SIZE)
    found = []
    for seed in range(BATCHES):
        ids, which = sampled(seed, temperature)
        settings = {"scale_rewards": "none", "baseline": "leave_one_out"} | advantage
        advantages, mask = group_advantages(REWARDS[which], groups, **settings), completion_mask(ids, END)

        def loss(logits: torch.Tensor, ids=ids, which=which, advantages=advantages, mask=mask) -> torch.Tensor:
            logprobs = token_logprobs(logits[WORLD.places[which]], ids, scored_at)
            return grpo_loss(logprobs, advantages, mask, loss_type="dr_grpo", max_completion_length=LONGEST).loss

        found.append(gradient(loss).flatten())
    return torch.stack(found)


def is_the_mean(gradients: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether a t-test of every component, at one in ten thousand for all together, accepts the truth as their mean."""
    error = gradients.std(dim=0) / len(gradients) ** 0.5
    limit = scipy.stats.t.ppf(1 - 1e-4 / 2 / truth.numel(), df=len(gradients) - 1)
    return bool(((gradients.mean(dim=0) - truth.flatten()).abs() / error < limit).all())


def typical_error(gradients: torch.Tensor, truth: torch.Tensor, batches: int) -> float:
    """Root mean square distance from the truth of means over so many batches."""
    means = gradients.reshape(-1, batches, truth.numel()).mean(dim=1)
    return float((means - truth.flatten()).square().sum(dim=1).mean().sqrt())


@pytest.mark.trap("T8")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_mean_of_sampled_gradients_goes_to_the_true_one_as_one_over_the_root_of_their_number(temperature: float):
    gradients, truth = batch_gradients(temperature), -true_gradient(temperature=temperature) / LONGEST
    assert is_the_mean(gradients, truth)
    errors = [typical_error(gradients, truth, batches) for batches in (1, 4, 16)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2) and errors[0] / errors[2] == pytest.approx(4, rel=0.3)


BIASED = {
    "mean_baseline": ({"baseline": "mean"}, [], 1.0),
    "group_deviation": ({"scale_rewards": "group"}, [], 1.0),
    "temperature_forgotten_in_scoring": ({"temperature": 0.5, "scored_at": 1.0}, ["T8"], 0.5),
    "temperature_applied_twice": ({"temperature": 0.5, "scored_at": 0.25}, ["T8"], 0.5),
}


@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        pytest.param(options, temperature, marks=[pytest.mark.trap(trap, broken=name) for trap in traps], id=name)
        for name, (options, traps, temperature) in BIASED.items()
    ],
)
def test_samples_show_a_bias_that_more_of_them_do_not_mend(options: dict[str, object], temperature: float):
    gradients, truth = batch_gradients(**options), -true_gradient(temperature=temperature) / LONGEST
    assert not is_the_mean(gradients, truth)
    bias = float((gradients.mean(dim=0) - truth.flatten()).norm())
    assert typical_error(gradients, truth, 64) < 1.3 * bias


def top_2(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """Draws as many samplers do by default."""
    kept = logits >= logits.topk(2, dim=1).values[:, 1:]
    return CHOOSE(logits.where(kept, -torch.inf), uniforms, temperature)


CHOOSE = decoding.choose_tokens


@pytest.mark.trap("T9")
@pytest.mark.trap("T9", broken="top_2_sampled_and_all_scored")
def test_a_sampler_that_truncates_shows_in_the_mean(monkeypatch: pytest.MonkeyPatch):
    truth = -true_gradient() / LONGEST
    assert is_the_mean(batch_gradients(), truth)
    monkeypatch.setattr(decoding, "choose_tokens", top_2)
    assert not is_the_mean(batch_gradients(), truth)

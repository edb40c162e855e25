"""The prompts for real text-to-image models: balanced, none in both files, and with metadata that tell the truth."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain, combinations, product
from pathlib import Path

import pytest

from grpo_kit.config import PROJECT_ROOT, load_config
from grpo_kit.config.prompts import Prompt, balanced_batch, load_prompts

FILES = {split: PROJECT_ROOT / "data" / "prompts" / f"{split}_prompts.jsonl" for split in ("train", "val")}
DIFFICULTIES = ("easy", "medium", "hard")
CATEGORIES = (
    "basic", "photography", "creative", "composition", "counting", "colour_binding", "text_in_image", "people", "style",
    "materials", "weather_light", "scale",
)  # fmt: skip


@pytest.fixture(scope="module")
def train() -> list[Prompt]:
    return load_prompts(FILES["train"])


@pytest.fixture(scope="module")
def val() -> list[Prompt]:
    return load_prompts(FILES["val"])


# -- how many, and in what order ---------------------------------------------------------------------------------------


def test_the_profile_for_real_models_reads_these_files():
    config = load_config("full")
    assert Path(config.training_settings.train_prompts) == FILES["train"]
    assert Path(config.evaluation_settings.val_prompts) == FILES["val"]


def test_there_are_enough_of_every_category_and_as_many_of_each_difficulty(train: list[Prompt], val: list[Prompt]):
    assert len(train) >= 320 and len(val) >= 110
    for prompts, fewest in ((train, 20), (val, 7)):
        cells = Counter((prompt.category, prompt.difficulty) for prompt in prompts)
        assert set(cells) == set(product(CATEGORIES, DIFFICULTIES))
        assert len(set(cells.values())) == 1 and 3 * min(cells.values()) >= fewest


def test_the_readme_beside_the_files_is_up_to_date(train: list[Prompt], val: list[Prompt]):
    readme = (FILES["train"].parent / "README.md").read_text(encoding="utf-8")
    assert f"| {len(train)}, {len(val)} held out |" in readme
    assert re.findall(r"^\| `(\w+)` \| .* \| .*\|$", readme.split("## Difficulty")[0], re.MULTILINE) == list(CATEGORIES)


def test_any_beginning_of_a_file_is_balanced(train: list[Prompt], val: list[Prompt]):
    """Validation looks at the first prompts of a file alone."""
    for prompts in (train, val):
        for start in range(0, len(prompts), len(CATEGORIES)):
            rows = prompts[start : start + len(CATEGORIES)]
            assert {prompt.category for prompt in rows} == set(CATEGORIES)
            assert set(Counter(prompt.difficulty for prompt in rows).values()) == {len(CATEGORIES) // 3}


def test_prompts_are_short_and_long_and_one_line_of_clean_text(train: list[Prompt], val: list[Prompt]):
    lengths = [len(prompt.user_prompt.split()) for prompt in train + val]
    assert min(lengths) <= 2 and 6 <= sorted(lengths)[len(lengths) // 2] <= 12 and 20 <= max(lengths) <= 30
    assert all(re.fullmatch(r"[\w',.:\"-]+( [\w',.:\"-]+)*", prompt.user_prompt) for prompt in train + val)


# -- no prompt twice, however worded -----------------------------------------------------------------------------------

SMALL_WORDS = frozenset(
    "a an and as at be both by can could for from get have i i'd in inside into is it its like make me need of on one "
    "or over please so some that the their them this to up want was were with you".split()
)
OVERLAP = 0.5


def content_words(text: str) -> frozenset[str]:
    """The words that carry meaning, without endings: "Three red apples, please" → {three, red, appl}."""
    return frozenset(
        _stem(word) for word in re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower()) if word not in SMALL_WORDS
    )


def _stem(word: str) -> str:
    word = word.removesuffix("'s")
    endings = (
        ending for ending in ("ing", "es", "ed", "s", "e") if word.endswith(ending) and len(word) - len(ending) > 2
    )
    return word.removesuffix(next(endings, ""))


def overlap(one: frozenset[str], two: frozenset[str]) -> float:
    """Jaccard index of two sets: 1 for the same words in any order, 0 for none in common."""
    return len(one & two) / len(one | two)


def alike(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs in which one prompt is the other one, or trivially reworded."""
    return [(one, two) for one, two in pairs if overlap(content_words(one), content_words(two)) >= OVERLAP]


def same_text(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Broken: compares letter by letter, so that a comma makes another prompt."""
    return [(one, two) for one, two in pairs if one == two]


REWORDED: tuple[Callable[[str], str], ...] = (
    lambda text: text.upper() + "!",
    lambda text: f"please make me {text}",
    lambda text: " ".join(reversed(text.split())),
    lambda text: f"{text}, detailed",
    lambda text: re.sub(r"\b(an?|the|of|and|in|on) ", "", text.title()),
    lambda text: text.rstrip(".") + "s",
)


def _texts(prompts: Iterable[Prompt]) -> list[str]:
    return [prompt.user_prompt for prompt in prompts]


def test_held_out_prompts_are_no_training_prompts_reworded(train: list[Prompt], val: list[Prompt]):
    assert alike(product(_texts(train), _texts(val))) == []


def test_no_file_says_a_thing_twice(train: list[Prompt], val: list[Prompt]):
    for prompts in (train, val):
        assert alike(combinations(_texts(prompts), 2)) == []


@pytest.mark.parametrize("reword", REWORDED)
def test_a_leaked_prompt_is_found_however_it_is_reworded(reword: Callable[[str], str], train: list[Prompt]):
    for text in _texts(train)[:36]:
        if len(content_words(text)) > 1:
            assert alike([(text, reword(text))]), text
            assert not same_text([(text, reword(text))])  # the broken twin lets it through


# -- metadata ----------------------------------------------------------------------------------------------------------

NUMBERS = dict(enumerate("two three four five six seven eight nine ten".split(), start=2))
MORE_NAMES = {2: ["a pair of"], 12: ["a dozen"]}
RELATIONS = {
    "left of", "right of", "above", "below", "behind", "in front of", "between", "on top of", "on", "under", "inside",
}  # fmt: skip
KEYS = {
    "composition": {"subject", "relation", "object"},
    "counting": {"count", "object"},
    "colour_binding": {"pairs"},
    "text_in_image": {"text"},
    "style": {"style"},
    "materials": {"materials"},
}


def parts(metadata: dict) -> list[dict]:
    """What a prompt of `composition` or `counting` asks for: one relation or count, or two."""
    first = {key: value for key, value in metadata.items() if key != "second"}
    return [first, metadata["second"]] if "second" in metadata else [first]


def untrue(prompt: Prompt) -> list[str]:
    """What the metadata say that the prompt does not, in words; empty where they agree."""
    says = {
        "composition": _untrue_relations,
        "counting": _untrue_counts,
        "colour_binding": lambda text, meta: _missing(text, [f"{colour} {thing}" for thing, colour in meta["pairs"]]),
        "text_in_image": lambda text, meta: [] if re.findall('"([^"]*)"', text) == [meta["text"]] else [meta["text"]],
        "style": lambda text, meta: _missing(text, [meta["style"]]),
        "materials": lambda text, meta: _missing(text, meta["materials"]),
    }
    expected = KEYS.get(prompt.category, set())
    two = {"second"} if prompt.category in ("composition", "counting") else set()
    if not expected <= set(prompt.metadata) <= expected | two:
        return [f"keys {sorted(prompt.metadata)}"]
    return says[prompt.category](prompt.user_prompt, prompt.metadata) if expected else []


def _missing(text: str, phrases: list[str]) -> list[str]:
    return [phrase for phrase in phrases if not re.search(rf"\b{re.escape(phrase.lower())}\b", text.lower())]


def _untrue_counts(text: str, metadata: dict) -> list[str]:
    found = []
    for part in parts(metadata):
        count = part["count"]
        names = [str(count), *MORE_NAMES.get(count, []), *filter(None, [NUMBERS.get(count)])]
        if len(_missing(text, [f"{name} {part['object']}" for name in names])) == len(names):
            found.append(f"{count} {part['object']}")
    return found


def _untrue_relations(text: str, metadata: dict) -> list[str]:
    """Each word stands in the prompt; the first relation reads subject, relation, object, so none are swapped."""
    found = [part["relation"] for part in parts(metadata) if part["relation"] not in RELATIONS]
    for part in parts(metadata):
        things = [word for word in f"{part['subject']} {part['object']}".split() if word != "and"]
        found += _missing(text, [part["relation"], *things])
    first = parts(metadata)[0]
    order = [rf"\b{re.escape(name)}\b" for name in (first["subject"], first["relation"], first["object"].split()[-1])]
    return found if re.search(".*".join(order), text, re.IGNORECASE) else [*found, "order"]


def test_metadata_say_what_the_prompt_says(train: list[Prompt], val: list[Prompt]):
    assert {prompt.user_prompt: lies for prompt in train + val if (lies := untrue(prompt))} == {}


LIES = {
    "another count": ("three apples on a plate", {"count": 4, "object": "apples"}),
    "another thing": ("three apples on a plate", {"count": 3, "object": "plates"}),
    "the second count": (
        "two pears and three plums",
        {"count": 2, "object": "pears", "second": {"count": 2, "object": "plums"}},
    ),
    "swapped colours": ("a red cup and a blue plate", {"pairs": [["cup", "blue"], ["plate", "red"]]}),
    "swapped things": ("a dog to the left of a tree", {"subject": "tree", "relation": "left of", "object": "dog"}),
    "another side": ("a dog to the left of a tree", {"subject": "dog", "relation": "right of", "object": "tree"}),
    "other letters": ('a sign that says "OPEN"', {"text": "open"}),
    "half the text": ('a sign that says "OPEN NOW"', {"text": "OPEN"}),
    "another style": ("a fox as a woodcut", {"style": "linocut"}),
    "no such material": ("a clear glass teapot", {"materials": ["glass", "brass"]}),
    "a part of a word": ("a grassy hill", {"materials": ["grass"]}),
    "a key too many": ("a clear glass teapot", {"materials": ["glass"], "count": 1}),
    "no key": ("a clear glass teapot", {}),
}


@pytest.mark.parametrize("name", LIES)
def test_untrue_metadata_are_found(name: str):
    text, metadata = LIES[name]
    category = next((c for c, keys in KEYS.items() if keys <= set(metadata)), "materials")
    assert untrue(Prompt(text, category, "easy", metadata))


# -- difficulty: the rules of data/prompts/README.md, where a program can tell -----------------------------------------


def _at_most(value: int, easy: int, medium: int) -> str:
    return "easy" if value <= easy else "medium" if value <= medium else "hard"


def allowed_difficulties(prompt: Prompt) -> set[str]:
    """The difficulties which a prompt may have by the README's rules; all three where these need a person's eye."""
    metadata = prompt.metadata
    if prompt.category == "counting":
        return {"hard"} if "second" in metadata else {_at_most(metadata["count"], 3, 5)}
    if prompt.category == "composition":
        return {"hard"} if "second" in metadata else {"easy", "medium"}
    if prompt.category == "colour_binding":
        return {"hard"} if len(metadata["pairs"]) > 2 else {"easy", "medium"}
    if prompt.category == "text_in_image":
        words = metadata["text"].split()
        return {_at_most(len(words), 0, 2)} if len(words) > 1 else {_at_most(len(words[0]), 5, 99)}
    return set(DIFFICULTIES)


def test_difficulty_means_the_same_in_both_files(train: list[Prompt], val: list[Prompt]):
    assert [prompt for prompt in train + val if prompt.difficulty not in allowed_difficulties(prompt)] == []


def test_hard_prompts_say_more_than_the_others(train: list[Prompt], val: list[Prompt]):
    for prompts, category in product((train, val), CATEGORIES):
        asked = {d: [p for p in prompts if (p.category, p.difficulty) == (category, d)] for d in DIFFICULTIES}
        words = [sum(len(p.user_prompt.split()) for p in asked[d]) for d in DIFFICULTIES]
        assert words[2] > max(words[:2]), (category, words)


def test_a_wrong_difficulty_is_found(train: list[Prompt]):
    ruled = [prompt for prompt in train if len(allowed_difficulties(prompt)) < 3]
    assert len(ruled) >= 80
    for prompt in ruled:
        wrong = "easy" if prompt.difficulty == "hard" else "hard"
        assert replace(prompt, difficulty=wrong).difficulty not in allowed_difficulties(prompt)


# -- batches -----------------------------------------------------------------------------------------------------------


Deal = Callable[[Sequence[Prompt], int, int, int], list[Prompt]]  # (prompts, size, seed, iteration) → a batch


def largest_difference(deal: Deal, prompts: Sequence[Prompt], size: int) -> int:
    """By how many prompts two categories ever differ, looked at after each of 60 iterations."""
    seen, largest = Counter(dict.fromkeys(CATEGORIES, 0)), 0
    for iteration in range(60):
        seen.update(prompt.category for prompt in deal(prompts, size, 3, iteration))
        largest = max(largest, max(seen.values()) - min(seen.values()))
    return largest


def any_prompts(prompts: Sequence[Prompt], size: int, seed: int, iteration: int) -> list[Prompt]:
    """Broken: draws from all prompts, and so is balanced on average alone."""
    return random.Random(f"{seed} {iteration}").sample(list(prompts), size)


def every_batch_alone(prompts: Sequence[Prompt], size: int, seed: int, iteration: int) -> list[Prompt]:
    """Broken: starts with the same categories in each iteration, so that the last ones are never reached."""
    return balanced_batch(prompts, size, seed, 0)


@pytest.mark.parametrize("size", [1, 5, 8, 30])
def test_two_categories_differ_by_at_most_one_after_any_number_of_iterations(size: int, train: list[Prompt]):
    assert largest_difference(balanced_batch, train, size) <= 1
    for broken in (any_prompts, every_batch_alone):
        assert largest_difference(broken, train, size) > 1


@pytest.mark.parametrize("seed", range(10))
def test_difficulties_are_mixed_all_the_way_through_an_epoch(seed: int, train: list[Prompt]):
    epoch = [balanced_batch(train, 12, seed, iteration) for iteration in range(27)]
    assert Counter(_texts(chain.from_iterable(epoch))) == Counter(
        _texts(train)
    )  # so each difficulty comes equally often
    for start in range(0, 27 - 9 + 1):
        some = Counter(prompt.difficulty for batch in epoch[start : start + 9] for prompt in batch)
        assert all(0.17 < some[difficulty] / 108 < 0.5 for difficulty in DIFFICULTIES), some


def test_a_run_that_goes_on_sees_the_batches_it_would_have_seen(train: list[Prompt]):
    straight = [balanced_batch(train, 8, seed=7, iteration=i) for i in range(50)]
    resumed = [balanced_batch(load_prompts(FILES["train"]), 8, seed=7, iteration=i) for i in range(30, 50)]
    assert straight[30:] == resumed
    assert straight != [balanced_batch(train, 8, seed=8, iteration=i) for i in range(50)]


def test_every_line_keeps_its_metadata_through_the_loader(train: list[Prompt]):
    rows = [json.loads(line) for line in FILES["train"].read_text(encoding="utf-8").splitlines()]
    loaded = [{k: v for k, v in vars(p).items() if k not in ("metadata", "images")} | p.metadata for p in train]
    assert loaded == rows

"""The reward `judge`: a vision-language model on this machine, and the same one behind OpenAI's protocol."""

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import families
from support.chat_server import chat_completions
from support.json_server import Raw, serving
from transformers import AutoModelForImageTextToText, AutoProcessor

from grpo_kit.config import KitError, load_config
from grpo_kit.experiment import Experiment
from grpo_kit.rewards import RewardError, load_rewards
from grpo_kit.rewards.judge import Judge
from grpo_kit.rewards.loading import check_reward_settings
from grpo_kit.rewards.protocol import RewardContractError

COLOURS = ["red", "blue", "crimson", "navy"]
IMAGES = [Image.new("RGB", (32, 32), colour) for colour in COLOURS]
TEXTS = ["a red circle", "a red circle, above two tiny golden pyramids", "red", "a <|im_end|> red <|image_pad|> ‘원’"]
PLAIN = [*TEXTS[:3], "a ‘원’"]
QUESTION = 'Is this "{prompt}"?'
pytestmark = pytest.mark.field("remote and judge rewards")


def _settings_error(**options: object) -> str:
    settings = {"weights": {"judge": 1.0}, "options": {"judge": options}}
    with pytest.raises(KitError) as error:
        check_reward_settings(load_config("tiny", {"reward_settings": settings}))
    return str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL that has learned to begin with "y" for what is red, and with "n" for what is blue."""
    folder = tmp_path_factory.mktemp("judge")
    families.qwen2_5_vl(folder)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION.replace("{prompt}", TEXTS[0])}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text] * 2, images=[[image] for image in IMAGES[:2]], return_tensors="pt")
    wanted = torch.tensor([processor.tokenizer.convert_tokens_to_ids(letter) for letter in "yn"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits[:, -1], wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def test_red_is_red_and_blue_is_not(folder: Path):
    shares = Judge(model=str(folder), question=QUESTION)(IMAGES, TEXTS[:1] * 4, [""] * 4)
    assert shares.dtype == torch.float64 and shares[0] > 0.9 > 0.1 > shares[1]
    assert ((0 <= shares) & (shares <= 1)).all()


def test_served_model_gives_the_same_as_the_one_here(folder: Path):
    here = Judge(model=str(folder), question=QUESTION, batch_size=3)
    with serving(chat_completions(folder), fault_rate=0.2, seed=14) as server:
        there = Judge(
            url=f"{server.url}/v1", model="red-or-blue", question=QUESTION, retries=12, backoff=0.01, timeout=2
        )
        found = there(IMAGES * 3, PLAIN * 3, [""] * 12)
    expected = here(IMAGES * 3, PLAIN * 3, [""] * 12)
    assert found == pytest.approx(expected.tolist(), abs=1e-4)
    assert server.faults and there.failed_tries >= len(server.faults)
    path, _, asked = server.calls[0]
    assert path == "/v1/chat/completions" and asked["model"] == "red-or-blue"
    assert (asked["logprobs"], asked["top_logprobs"], asked["max_tokens"]) == (True, 20, 1)


def test_rows_own_pictures_stand_before_the_judged_one_or_are_refused(folder: Path):
    own = [[IMAGES[1]], None, [IMAGES[0], IMAGES[1]], None]
    judge = Judge(model=str(folder), question=QUESTION, references=True, batch_size=3)
    blind = Judge(model=str(folder), question=QUESTION, references=False)
    alone = [judge(IMAGES[row : row + 1], PLAIN[row : row + 1], [""], [own[row]]) for row in range(4)]
    found, unseen = judge(IMAGES, PLAIN, [""] * 4, own), blind(IMAGES, PLAIN, [""] * 4, own)
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-5)
    assert torch.equal(unseen, blind(IMAGES, PLAIN, [""] * 4))
    assert [abs(float(a - b)) < 1e-5 for a, b in zip(found, unseen, strict=True)] == [False, True, False, True]
    with serving(chat_completions(folder)) as server:
        there = Judge(url=server.url, model="x", question=QUESTION, references=True, retries=0)
        assert there(IMAGES, PLAIN, [""] * 4, own) == pytest.approx(found.tolist(), abs=1e-4)
    with pytest.raises(RewardContractError, match="references: found prompts with pictures of their own"):
        Judge(model=str(folder))(IMAGES, PLAIN, [""] * 4, own)


def test_share_does_not_depend_on_its_batch(folder: Path):
    judges = [Judge(model=str(folder), batch_size=size) for size in (1, 4)]
    one, four = (judge(IMAGES, TEXTS, [""] * 4) for judge in judges)
    torch.testing.assert_close(one, four, rtol=0, atol=1e-5)


def test_how_a_model_samples_by_itself_does_not_matter(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    own = {"do_sample": True, "temperature": 0.1, "top_k": 1, "repetition_penalty": 1.5, "num_beams": 3}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    plain, own = (Judge(model=str(place))(IMAGES, PLAIN, PLAIN) for place in (folder, tmp_path / "model"))
    assert torch.equal(plain, own)


@pytest.mark.parametrize("family", [one for one in families.FAMILIES if one.sees], ids=lambda one: one.name)
def test_every_family_that_sees_can_judge(family: families.Family, tmp_path: Path):
    family.write(tmp_path)
    judge = Judge(model=str(tmp_path))
    shares = judge(IMAGES, [*TEXTS[:3], "<image>"], [""] * 4)
    assert ((0 < shares) & (shares < 1)).all()
    processor, model = judge.processor, judge.network  # by hand, alone
    content = [{"type": "image"}, {"type": "text", "text": judge.question.replace("{prompt}", TEXTS[1])}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    start = processor.tokenizer.bos_token
    inputs = processor(
        text=[text],
        images=[[IMAGES[1]]],
        return_tensors="pt",
        add_special_tokens=not (start and text.startswith(start)),
    )
    with torch.no_grad():
        p = model(**inputs).logits[0, -1].softmax(dim=-1)
    texts = [processor.tokenizer.decode([token]).strip().lower() for token in range(len(processor.tokenizer))]
    begins = [{"y", "ye", "yes"}, {"n", "no"}]
    yes, no = (float(p[[token for token, text in enumerate(texts) if text in known]].sum()) for known in begins)
    assert float(shares[1]) == pytest.approx(yes / (yes + no), abs=1e-5)


def test_embedded_policy_judges_both_here_and_served(kit: Experiment):
    folder = Path(kit.config.model_settings.vlm_model)
    options = {"answers": ("a", "the")}
    here = Judge(model=str(folder), **options)
    with serving(chat_completions(folder)) as server:
        found = Judge(url=server.url, model="embedded", retries=0, **options)(IMAGES, PLAIN, [""] * 4)
    expected = here(IMAGES, PLAIN, [""] * 4).tolist()
    assert all(there == pytest.approx(one, abs=1e-4) for there, one in zip(found, expected, strict=True))


def test_settings_reach_the_judge_and_its_address_is_recorded(kit: Experiment, folder: Path):
    with serving(chat_completions(folder)) as server:
        options = {
            "url": f"{server.url}/v1/",
            "model": "x",
            "question": QUESTION,
            "request": {"seed": 1, "max_tokens": 2},
        }
        settings = {"weights": {"judge": 1.0}, "monitors": [], "options": {"judge": options}}
        config = load_config(kit.config, {"reward_settings": settings})
        scores = load_rewards(config).score(IMAGES, PLAIN, PLAIN)["judge"]
    assert scores.isfinite().all() and scores[0] > scores[1]
    assert all((body["seed"], body["max_tokens"]) == (1, 2) for *_, body in server.calls)
    assert config.to_dict()["reward_settings"]["options"]["judge"] == options


def test_judge_under_a_name_of_ones_own_is_the_judge(kit: Experiment, folder: Path):
    settings = {"weights": {"is_it": 1.0}, "monitors": []}
    settings["options"] = {"is_it": {"reward": "judge", "model": str(folder), "question": QUESTION}}
    rewards = load_rewards(load_config(kit.config, {"reward_settings": settings}))
    assert torch.equal(rewards(IMAGES, PLAIN), Judge(model=str(folder), question=QUESTION)(IMAGES, PLAIN, PLAIN))
    assert rewards.record()["is_it"]["options"]["model"] == str(folder)


def test_words_are_taken_where_a_server_has_no_logprobs(caplog: pytest.LogCaptureFixture):
    said = iter(["Yes.", "**No**, it is not: yes and no", "I cannot say", "Yes"])

    def answer(asked: dict) -> dict:
        assert "logprobs" not in asked and asked["temperature"] == 0
        return {"choices": [{"message": {"content": next(said)}}]}

    with serving(answer) as server, caplog.at_level(logging.WARNING, "grpo_kit"):
        judge = Judge(url=server.url, model="x", logprobs=False, concurrency=1)
        found = judge(IMAGES, TEXTS, TEXTS)
    assert found[:2] == [1.0, 0.0] and math.isnan(found[2]) and found[3] == 1.0
    assert judge.undecided == 1 and caplog.text.count("neither of") == 1


def test_neither_answer_among_the_likeliest_is_no_score(folder: Path, caplog: pytest.LogCaptureFixture):
    with serving(chat_completions(folder)) as server:
        judge = Judge(url=server.url, model="x", answers=("oui", "non merci"), request={"top_logprobs": 1})
        assert all(math.isnan(share) or share == 0 for share in judge(IMAGES, PLAIN, PLAIN))


WRONG = {
    "no logprobs": (
        {"choices": [{"message": {"content": "Yes"}, "logprobs": None}]},
        "logprobs: false takes its words",
    ),
    "another protocol": ({"text": "Yes"}, "expected JSON"),
    "no choice": ({"choices": []}, "expected JSON"),
    "wrong model": (Raw(404, b'{"message": "The model `x` does not exist"}'), "does not exist"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_server_that_cannot_judge_is_one_line(wrong: str):
    answer, expected = WRONG[wrong]
    with serving(lambda asked: answer) as server, pytest.raises(RewardError, match=expected) as error:
        Judge(url=server.url, model="x", retries=1, backoff=0.01)(IMAGES, TEXTS, TEXTS)
    assert "\n" not in str(error.value) and f"{server.url}/chat/completions" in str(error.value)


def test_model_that_cannot_judge_is_one_line(tmp_path: Path, folder: Path):
    for name, write in (("text", families.gpt2), ("bare", families.qwen2_5_vl)):
        write(tmp_path / name)
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    cases = {
        tmp_path / "text": "reward_settings.options.judge.model: could not load",
        tmp_path / "bare": "has no chat template",
        tmp_path / "none": "could not load .*no such folder",
    }
    for model, expected in cases.items():
        with pytest.raises(KitError, match=expected) as error:
            Judge(model=str(model))
        assert "\n" not in str(error.value)
    with pytest.raises(RewardError, match=r"answers: found \('yes', 'yes'\)"):
        Judge(model=str(folder), answers=("yes", "yes"))
    assert "question: found 'Is it good?', allowed: a text that contains {prompt}" in _settings_error(
        model="x", question="Is it good?"
    )
    assert "judge.model: missing" in _settings_error()

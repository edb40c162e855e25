r"""Which part of a completion is the prompt: what is drawn and scored of it; the policy learns from all its tokens.

Every rule is regular expressions in stages, so that a model's card can say it without the kit: of each stage the first
expression that matches gives the text for the next one; where none does, the text stays as it is.
"""

import re
from collections.abc import Sequence

_THOUGHT = r"(?:think|thinking|thought|reasoning)"
_OPEN, _CLOSE = rf"(?:<{_THOUGHT}>|\[THINK\])", rf"(?:</{_THOUGHT}>|\[/THINK\])"
_LEAD = r"(?:^|[:：])[\s*_>]*"  # quotation marks in the middle of a sentence are the sentence's
_QUOTED = (
    r'"(?:\w+_)?prompt"\s*:\s*"((?:[^"\\]|\\.)+)',  # {"prompt": "…"}
    r'(?s)`{3}(?:\w*\n)?\s*["“]?(.+?)["”]?\s*(?:`{3}|\Z)',
    rf'(?m){_LEAD}"((?:[^"]|(?<=\s)"[^"\n]*"(?!\w))+)',  # with words in quotation marks inside
    rf"(?m){_LEAD}[“„«「『‹]([^“”»」』›]+)",
    rf"(?m){_LEAD}[‘'](.+?)[’']\W*$",
    rf"(?m){_LEAD}`([^`\n]+)`",
    r"(?is)(?:\A|\n)[^\n:：]*(?:prompt|프롬프트|提示词|プロンプト)[^\n:：]*[:：][\s*_#]*(.+?)[\s*_]*(?:\n\s*\n|\Z)",
    r'["“](\w+(?:\s[^"“”\s]+){3,})["”]',  # of at least four words they are the prompt anywhere
)


def part_patterns(rule: str, opens_thinking: bool = False) -> list[list[str]]:
    """The regular expressions of a rule, in stages.

    Args:
        rule: "whole"; "after_thinking": what stands after the thinking, nothing where that does not end; "quoted": of
            that what stands in quotation marks, in a code block, or after "prompt:"; or an expression with one group.
        opens_thinking: whether the chat template opens the thinking itself.
    """
    unclosed = ".*" if opens_thinking else rf".*?{_OPEN}.*|"
    thinking = rf"(?is)\A(?:.*{_CLOSE}|{unclosed})(.*)"
    stages = {"whole": [], "after_thinking": [[thinking]], "quoted": [[thinking], [*_QUOTED]]}
    return stages.get(rule, [[rule]])


def prompt_part(text: str, stages: Sequence[Sequence[str]]) -> tuple[str, bool]:
    """The part of a completion's text that is the prompt, and whether its rule found one there.

    Args:
        stages: from `part_patterns`.
    """
    found = True
    for patterns in stages:
        matches = (re.search(pattern, text) for pattern in patterns)
        match = next((one for one in matches if one and one[1] is not None), None)
        text, found = (text if match is None else match[1]).strip(), match is not None
    return text, found and bool(text or not stages)

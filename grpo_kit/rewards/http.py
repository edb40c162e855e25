"""A scorer behind HTTP: pictures and texts are sent as JSON, numbers come back. docs/rewards.md has the protocol."""

import asyncio
import base64
import itertools
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Annotated, Any, Literal

import httpx
from PIL import Image
from pydantic import BeforeValidator, Field

from grpo_kit.config import Count, Name, Whole, one_line, shown
from grpo_kit.config.settings import Positive
from grpo_kit.rewards.plain import as_file
from grpo_kit.rewards.protocol import Images, References, RewardContractError, RewardError, Texts, finished

logger = logging.getLogger(__name__)
_LONGEST_PAUSE, _LONGEST_ASKED = 30.0, 300.0  # seconds between two tries: by itself, and where the server asks for it
_JITTER = random.Random()  # of its own: the global random numbers stay as they are
_SECRETS = re.compile(r"//[^/?#]*@|[?&]([\w-]*[_-]|api)?(key|token|secret|password)=[^&]*", re.IGNORECASE)
_URL = "http(s)://host/path without credentials, which config.json would hold: token_env names a variable for them"
Url = Annotated[
    str,
    BeforeValidator(lambda url: _SECRETS.sub(" ... ", url) if isinstance(url, str) else url),  # refused, but not shown
    Field(pattern=r"^https?://[^\s/?#]+\S*$", json_schema_extra={"allowed": _URL}),
]
Variable = Annotated[Name, Field(pattern=r"^[A-Za-z_]\w*$", json_schema_extra={"allowed": "an environment variable"})]


class WrongAnswerError(RewardContractError):
    """A server that refuses what it is sent, or answers something else than scores: it is mended, not waited for."""


@dataclass(kw_only=True, eq=False)
class Service:
    """An address that answers JSON with JSON. Tries that fail are counted, and repeated after growing pauses.

    Raises:
        RewardError: nobody answers there, or the variable that `token_env` names is not set.
    """

    url: Url
    token_env: Variable | None = None  # names the environment variable with a bearer token
    image_format: Literal["png", "jpeg"] = "png"  # PNG keeps every pixel; JPEG (quality 95) is smaller
    timeout: Positive = 60.0  # seconds for one try, until the last byte of its answer
    retries: Annotated[Whole, Field(ge=0)] = 4  # where the connection, the time or the answer fails, or status 429, 5xx
    backoff: Positive = 0.5  # seconds before the second try; twice as long each time, times 0.5 to 1 by chance
    concurrency: Count = 1  # calls at the same time

    def __post_init__(self) -> None:
        self.failed_tries, headers = 0, {}
        if self.token_env:
            token = os.environ.get(self.token_env, "").strip()
            if not token or not (token.isascii() and token.isprintable()):
                found = f"{self.token_env}, which {'holds no plain text' if token else 'is not set'}"
                raise RewardError(f"token_env: found {found}. Export the token under this name where the run starts")
            headers = {"Authorization": f"Bearer {token}"}
        self.client_options = {"headers": headers, "follow_redirects": True}
        try:
            if self.url:
                is_here = httpx.URL(self.url).host in ("localhost", "127.0.0.1", "::1")  # no proxy leads there
                self.client_options["trust_env"] = not is_here
                httpx.head(self.url, timeout=5, **self.client_options)  # whatever it answers, somebody is there
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError, httpx.InvalidURL, ValueError) as error:
            found = f"{self.url.partition('?')[0]}, where nobody answers ({type(error).__name__}: {one_line(error)})"
            raise RewardError(f"url: found {found}. Start the server, or correct the url") from error
        except httpx.HTTPError:
            pass

    def encoded(self, image: Image.Image) -> str:
        """An image's RGB pixels as the base64 text of a file."""
        return base64.b64encode(as_file(image, self.image_format)).decode()

    def scores(
        self, url: str, parts: Sequence[range], body: Callable[[range], dict], read: Callable[[Any, int], list]
    ) -> list[float | None]:
        """The scores of the parts' rows in order; NaN for those of a part whose call failed in all its tries.

        Args:
            body: rows → the JSON to send.
            read: an answer, the number of its rows → their scores; raises `RewardError("what is expected")`.

        Raises:
            RewardError: no call went through; `WrongAnswerError` where that is not for an outage.
        """
        found = finished(self._answers(url, parts, body, read))
        failed = [one for one in found if isinstance(one, RewardError)]
        if failed and len(failed) == len(parts):
            raise failed[0]
        if failed:
            logger.warning("%s; %d of %d calls gave no scores", failed[0], len(failed), len(parts))
        nan = [[float("nan")] * len(rows) if one in failed else one for one, rows in zip(found, parts, strict=True)]
        return [score for scores in nan for score in scores]

    async def _answers(self, url: str, parts: Sequence[range], body: Callable, read: Callable) -> list:
        gate, ended = asyncio.Semaphore(self.concurrency), []

        async def one(client: httpx.AsyncClient, rows: range) -> list | RewardError:
            async with gate:
                has_failed = bool(ended) and all(isinstance(other, RewardError) for other in ended)
                if has_failed and (len(ended) > 2 or type(ended[0]) is RewardError):  # one refusal may be a picture's
                    return ended[0]  # nobody is there: that takes its time once, not once a part
                ended.append(await self._answer(client, url, body(rows), lambda answer: read(answer, len(rows))))
                return ended[-1]

        async with httpx.AsyncClient(timeout=None, **self.client_options) as client:
            return await asyncio.gather(*(one(client, rows) for rows in parts))

    async def _answer(self, client: httpx.AsyncClient, url: str, body: dict, read: Callable) -> list | RewardError:
        place = url.partition("?")[0]
        try:
            request = client.build_request("POST", url, json=body)
        except (TypeError, ValueError) as error:
            return WrongAnswerError(f"{place}: not asked, since JSON cannot hold what the rows have: {one_line(error)}")
        for number in itertools.count(1):
            again, pause = number <= self.retries, min(self.backoff * 2 ** (number - 1), _LONGEST_PAUSE)
            pause, is_outage = pause * _JITTER.uniform(0.5, 1), True
            try:
                async with asyncio.timeout(self.timeout):  # httpx's own limits begin again with every byte
                    answer = await client.send(request)
                kind = answer.headers.get("content-type", "no type")
                problem = f"found status {answer.status_code}, {kind}, {shown(answer.text[:200])}; expected "
                if answer.is_success:
                    return read(answer.json())
                problem += "status 200"
                is_outage = answer.status_code == 429 or answer.status_code >= 500
                again = again and is_outage
                pause = max(pause, _asked_pause(answer.headers.get("retry-after", "0")))
            except TimeoutError:
                problem = f"no answer within {self.timeout:g} s"
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {one_line(error)}"
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                is_outage = False
                problem += str(error) if isinstance(error, RewardError) else "JSON as in docs/rewards.md"
            problem = f"{place}: {problem} (try {number} of {self.retries + 1})"
            self.failed_tries += 1
            if not again:
                return RewardError(problem) if is_outage else WrongAnswerError(problem)
            level = logging.WARNING if self.failed_tries == 1 else logging.INFO
            logger.log(level, "%s; %d tries failed so far", problem, self.failed_tries)
            await asyncio.sleep(pause)


def _asked_pause(value: str) -> float:
    """Seconds that `Retry-After` asks to wait, by a number or a date."""
    try:
        seconds = float(value) if value.isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), _LONGEST_ASKED)


@dataclass(kw_only=True, eq=False)
class HttpScorer(Service):
    """Scores that a server gives: {"scores": [...]} or the list alone, null where a picture is none of its business."""

    batch_size: Count = 32  # pictures a call
    metadata: bool = False  # send the further fields of each prompt's row

    def __call__(
        self,
        images: Images,
        prompts: Texts,
        enhanced_prompts: Texts,
        metadata: Sequence[Mapping] | None = None,
        references: References | None = None,
    ) -> list[float | None]:
        """N scores; NaN for the pictures of a call that failed while others went through."""
        columns = {"prompts": prompts, "enhanced_prompts": enhanced_prompts}
        if self.metadata:
            columns["metadata"] = metadata or [{}] * len(images)

        def body(rows: range) -> dict[str, Any]:
            pictures = {"images": [self.encoded(images[row]) for row in rows]}
            if references and any(references[row] for row in rows):
                pictures["references"] = [[self.encoded(one) for one in references[row] or ()] for row in rows]
            return pictures | {name: [column[row] for row in rows] for name, column in columns.items()}

        everything = range(len(images))
        parts = [everything[start : start + self.batch_size] for start in everything[:: self.batch_size]]
        return self.scores(self.url, parts, body, _numbers)


def _numbers(answer: Any, count: int) -> list[float | None]:
    scores = answer.get("scores") if isinstance(answer, dict) else answer
    if isinstance(scores, list):
        scores = [one[0] if isinstance(one, list) and len(one) == 1 else one for one in scores]
        if len(scores) == count and all(one is None or type(one) in (int, float) for one in scores):
            return scores
    raise RewardError(f'{{"scores": [{count} numbers, null where there is none]}}, one for each picture')

"""Settings checked by pydantic, whose errors become one line: the key, the value found, and what is allowed.

What is allowed (type, bounds, choices, whether null is) is read from the JSON schema of the settings, since pydantic's
own messages name only the bound that was passed, or the type.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from grpo_kit.config.errors import ConfigError, nearest, printable, shown

Model = TypeVar("Model", bound=BaseModel)
Schema = dict[str, Any]

_WORDS = {"string": "text", "boolean": "true or false", "array": "a list", "object": "a JSON object"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def validated(
    model: type[Model], values: Mapping[str, Any], place: str = "", source: Callable[[str], str] = lambda sentence: ""
) -> Model:
    """The values as that model of settings; a `ConfigError` on the first mistake, with the number of the others.

    Args:
        place: the dotted key where they stand, such as `reward_settings.options.safety`; "" for a whole configuration.
        source: gives the end of the error, such as the file that they came from, for its sentence.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")  # a misspelt key is missing, too
    lines = list(dict.fromkeys(_sentence(problem, place, _schema(model)) for problem in problems))
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    raise ConfigError(printable(lines[0]) + more + source(lines[0]))


def forms_of(model: type[BaseModel], keys: Sequence[str]) -> list[Schema]:
    """The forms that the setting at these keys may have, each as a JSON schema."""
    return _forms(_node(_schema(model), keys), _schema(model))


@functools.lru_cache(maxsize=4)
def _schema(model: type[BaseModel]) -> Schema:
    return model.model_json_schema()


def _node(root: Schema, keys: Sequence[str]) -> Schema:
    """The part of a JSON schema that is about the setting at these keys; of an unknown one, what is above it."""
    node = root
    for key in keys:
        inside = [
            child
            for form in _forms(node, root)
            for child in (form.get("properties", {}).get(key), form.get("additionalProperties"), form.get("items"))
            if isinstance(child, dict)
        ]
        if not inside:
            break
        node = inside[0]
    return node


def _forms(node: Schema, root: Schema) -> list[Schema]:
    forms = node.get("anyOf", [node])
    return [root["$defs"][form["$ref"].rpartition("/")[2]] if "$ref" in form else form for form in forms]


def _sentence(problem: Mapping[str, Any], place: str, root: Schema) -> str:
    """One error of pydantic in words."""
    keys = [str(part) for part in problem["loc"] if part != "[key]"]
    message = problem["msg"].removeprefix("Value error, ")
    if not keys:
        if problem["type"] == "string_unicode":  # pydantic does not say where the key stands
            return f"key {shown(problem['input'])}: allowed: text of whole characters (no lone surrogates)"
        return message  # of a check of several settings, which wrote the whole line
    node, above = _node(root, keys), _node(root, keys[:-1])
    is_unknown = problem["type"] == "extra_forbidden"
    if node is above and not is_unknown and isinstance(problem["loc"][-1], str):
        keys = keys[:-1]  # pydantic's name for one side of an "or"
    name = ".".join([place, *keys] if place else keys)[:100]
    if is_unknown:
        known = sorted(key for form in _forms(above, root) for key in form.get("properties", {}))
        return f"{name or repr(name)}: unknown key{nearest(keys[-1], known)}; allowed: {', '.join(known)}"
    about = f" ({node['description']})" if "description" in node and "properties" not in node else ""
    found = "missing" if problem["type"] == "missing" else f"found {shown(problem['input'])}"
    allowed = message if problem["type"] == "value_error" else " or ".join(map(_allowed, _forms(node, root)))
    return f"{name}: {found}, allowed: {node.get('allowed', allowed)}{about}"


def _allowed(form: Schema) -> str:
    """What one form of a setting may be, in words."""
    if "allowed" in form:
        return form["allowed"]
    if "enum" in form or "const" in form:
        return ", ".join(map(str, form.get("enum", [form.get("const")])))
    kind = form.get("type", "a value")
    limits = " and ".join(f"{sign} {form[name]:g}" for name, sign in _BOUNDS.items() if name in form)
    filled = ", not empty" if form.get("minLength") or form.get("minProperties") else ""
    return f"{_WORDS.get(kind, kind)} {limits}".strip() + filled

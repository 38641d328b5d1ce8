"""Where a value goes in the text of a YAML file, so that every other byte stays as it was.

The places are those that PyYAML's parser gives its nodes: it is the parser that MetaGPT reads the file with. A YAML
library that writes the whole file anew would change lines that nobody asked it to (indentation of lists, blanks in
flow mappings, escapes, line ends) and, with YAML 1.2, what ``yes`` means. No I/O here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence, Tuple, Union

import yaml
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode, SequenceNode

__all__ = ["KeyPath", "YamlProblem", "key_path", "parsed", "with_values"]

#: ``"llm.local.timeouts"``, or a tuple where a key has dots in it or is the index in a list.
KeyPath = Union[str, Tuple[Union[str, int], ...]]
_Steps = Tuple[Union[str, int], ...]


#: Values of a configuration, and how deep they may be in one another.
_LARGEST, _DEEPEST = 100_000, 100


class YamlProblem(ValueError):
    """A text that is no YAML, or in which a value cannot be set.

    Attributes:
        line: where, from 1 on; None where that is no single line.
        reason: in words.
    """

    def __init__(self, reason: str, line: Optional[int] = None) -> None:
        super().__init__(reason if line is None else f"line {line}: {reason}")
        self.reason, self.line = reason, line


def key_path(path: KeyPath) -> _Steps:
    """The steps of a path; a step of digits is an index."""
    if not isinstance(path, str):
        return tuple(path)
    return tuple(int(step) if step.isdecimal() else step for step in path.split("."))


def parsed(text: str) -> dict[Any, Any]:
    """The content of a configuration; an empty one is an empty mapping.

    Raises:
        YamlProblem: it does not parse, or is no mapping.
    """
    try:
        loaded = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = error.problem or error.context or str(error)
        hint = "; YAML takes no tabs: indent with blanks" if "\\t" in reason else ""
        raise YamlProblem(f"{reason}{hint}", mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:
        raise YamlProblem(" ".join(str(error).split())) from None
    except Exception as error:  # PyYAML lets any through: a date that is none, !!bool of a number, a list in a list in a list …
        raise YamlProblem(f"it cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None
    if loaded is None:
        return {}
    if _size(loaded, 0) > _LARGEST:
        raise YamlProblem("its aliases make more of it than any configuration is")
    if not isinstance(loaded, dict):
        raise YamlProblem("it is no list of settings of the form 'key: value'")
    return loaded


def _size(value: Any, depth: int) -> int:
    """How many values there are, those of aliases wherever they stand; what is over _LARGEST is not counted to its end."""
    if depth > _DEEPEST:
        return _LARGEST + 1
    size = 1
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            size += _size(item, depth + 1)
            if size > _LARGEST:
                break
    return size


def with_values(text: str, values: Mapping[KeyPath, Any]) -> str:
    """``text`` with ``values`` set, and nothing else changed; what is missing on the way is made.

    A value is text, a number, a truth value, None, or lists and dicts of those; a list or a dict takes the place of
    what was there. A value that is there already changes nothing.

    Raises:
        YamlProblem: the text does not parse, or a value cannot be set without changing something else (a path leads
            through text or through an alias).
    """
    for path, value in values.items():
        steps = key_path(path)
        expected = _with_value(_copy(parsed(text)), steps, value)
        if _same(parsed(text), expected):
            continue
        changed = _edited(text, steps, value)
        if not _is_yaml_of(changed, expected):
            name = ".".join(map(str, steps))
            raise YamlProblem(f"{name} cannot be set without changing something else; please write it by hand")
        text = changed
    return text


def _is_yaml_of(text: str, expected: Any) -> bool:
    try:
        return _same(parsed(text), expected)
    except YamlProblem:
        return False


def _copy(value: Any) -> Any:
    """A deep copy in which nothing is shared: what an alias repeats is there twice."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _same(one: Any, other: Any) -> bool:
    """Equal, and of the same types: 1 is neither 1.0 nor true."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(_same(item, other[key]) for key, item in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and (one == other or one != one)


def _with_value(content: Any, steps: _Steps, value: Any) -> Any:
    """The content as it is to be."""
    if not steps:
        return value
    first, *rest = steps
    if isinstance(content, list) and isinstance(first, int) and first < len(content):
        content[first] = _with_value(content[first], tuple(rest), value)
        return content
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise YamlProblem(f"there is no place for '{first}' in a value that is {_words(content)}")
    name = _key_in(content, first)
    content[name] = _with_value(content.get(name), tuple(rest), value)
    return content


def _key_in(keys: Any, step: Union[str, int]) -> Any:
    return str(step) if isinstance(step, int) and step not in keys else step


def _words(value: Any) -> str:
    """What it is, and not the value: that may be a key that stands in a wrong place."""
    return "a list" if isinstance(value, list) else "text" if isinstance(value, str) else f"of the type {type(value).__name__}"


# ------------------------------------------------------------------------------------------------ the text


def _edited(text: str, steps: _Steps, value: Any) -> str:
    """The text with the value at its place, as far as one can tell without looking at the result."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is None:
        return _with_lines(text, len(text), _lines({steps[0]: _nested(steps[1:], value)}, 0))
    place = _Place(text, 0, flow=False, of_key=False)
    for number, step in enumerate(steps):
        rest = _nested(steps[number + 1 :], value)
        if isinstance(node, SequenceNode):
            place = _Place(text, node.start_mark.column, place.flow or bool(node.flow_style), of_key=False)
            node = node.value[int(step)]
            continue
        if not isinstance(node, MappingNode):
            return place.instead(node, {step: rest})
        place = _Place(text, node.start_mark.column, place.flow or bool(node.flow_style), of_key=True)
        found = [pair for pair in node.value if isinstance(pair[0], ScalarNode) and pair[0].value == str(step)]
        if not found:
            if place.flow:
                return _into_flow(text, node, f"{_flow(step)}: {_flow(rest)}")
            return _with_lines(text, _end(text, node), _lines({step: rest}, place.column))
        key, node = found[-1]
        if node.start_mark.index < key.end_mark.index:
            raise YamlProblem(f"'{step}' is an alias; write it out to change it", key.start_mark.line + 1)
    return place.instead(node, value)


def _nested(steps: _Steps, value: Any) -> Any:
    for step in reversed(steps):
        value = {step: value}
    return value


@dataclass(frozen=True)
class _Place:
    """What surrounds a node: the column of the mapping or list that it is in, and whether that is in flow style."""

    text: str
    column: int
    flow: bool
    of_key: bool

    def instead(self, node: Node, value: Any) -> str:
        """The text with ``value`` in the place of ``node``."""
        text, start, end = self.text, node.start_mark.index, _end(self.text, node)
        lines_wanted = not self.flow and _has_lines(value)
        if isinstance(node, CollectionNode) and not node.flow_style and not self.flow:
            line = text.rfind("\n", 0, start) + 1
            behind_dash = bool(text[line:start].strip())
            same = isinstance(node, SequenceNode) == isinstance(value, list)
            column = node.start_mark.column if same or behind_dash else self.column + 2
            lines = _lines(value, column) if lines_wanted else [" " * (self.column + 2) + _flow(value)]
            before = text[:start] if behind_dash else text[:line]
            new = _newline(text).join(lines)
            return before + (new if before.endswith("\n") or not before else new.lstrip(" ")) + text[end:]
        if isinstance(node, ScalarNode) and node.style in ("|", ">"):
            end = len(text[:end].rstrip())
        elif lines_wanted and self.of_key and not (isinstance(node, CollectionNode) and node.value):
            kept = text[:start].rstrip(" ") if end > start else text[:start]
            return _with_lines(kept + text[end:], len(kept), _lines(value, self.column + 2))
        style = node.style if isinstance(node, ScalarNode) and node.style in ("'", '"') else None
        new = _flow(value, style, braces=self.flow)
        if start == end and text[start - 1 : start] == ":":
            new = f" {new}"
        return text[:start] + new + _moved(text[end:], len(new) - (end - start))


def _moved(rest: str, longer: int) -> str:
    """What follows a value that became longer by so many characters: a comment stays in its column."""
    gap = len(rest) - len(rest.lstrip(" "))
    if gap >= 2 and rest[gap : gap + 1] == "#":
        return " " * max(1, gap - longer) + rest[gap:]
    return rest


def _end(text: str, node: Node) -> int:
    """Where a node's text ends: for a block, that of its last item, since the parser counts comments below it in."""
    if not isinstance(node, CollectionNode) or node.flow_style:
        return int(node.end_mark.index)
    if isinstance(node, SequenceNode):
        return _end(text, node.value[-1])
    key, last = node.value[-1]
    if last.start_mark.index >= key.end_mark.index:
        return _end(text, last)
    found = text.find("\n", key.end_mark.index)  # an alias, whose node is elsewhere
    return len(text) if found < 0 else found


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _with_lines(text: str, index: int, lines: Sequence[str]) -> str:
    """The text with ``lines`` below the line that ``index`` is in; at ``index`` where that is a line's beginning."""
    newline = _newline(text)
    if index and text[index - 1] != "\n":
        found = text.find("\n", index)
        if found < 0:
            return text + newline + newline.join(lines) + newline
        index = found + 1
    return text[:index] + newline.join(lines) + newline + text[index:]


def _into_flow(text: str, node: MappingNode, entry: str) -> str:
    """The text with an entry at the end of a mapping in braces."""
    if not node.value:
        brace = node.end_mark.index - 1
        return text[:brace].rstrip(" ") + entry + text[brace:]
    key, last = node.value[-1]
    end = max(int(key.end_mark.index), _end(text, last))
    if last.start_mark.index < key.end_mark.index:
        alias = re.compile(r"\s*:\s*\*[^\s,\]}]+").match(text, key.end_mark.index)
        end = alias.end() if alias else end
    return f"{text[:end]}, {entry}{text[end:]}"


# ------------------------------------------------------------------------------------------------ the values


class _OneLine(yaml.SafeDumper):
    """Puts text of several lines into the quotes that have escapes for their ends."""

    def represent_scalar(self, tag: str, value: Any, style: Optional[str] = None) -> ScalarNode:
        if isinstance(value, str) and (len(f"{value}.".splitlines()) > 1 or value.strip(" ") != value.strip()):
            style = '"'
        return super().represent_scalar(tag, value, style)


def _flow(value: Any, style: Optional[str] = None, *, braces: bool = True) -> str:
    """A value on one line; ``style``: the quotes to use; ``braces``: whether it may stand between them."""
    style = style if isinstance(value, str) else None
    braces = braces or isinstance(value, (dict, list))
    options: dict[str, Any] = {"default_flow_style": braces, "default_style": style, "sort_keys": False}
    dumped = str(yaml.dump([value], Dumper=_OneLine, width=1 << 30, allow_unicode=True, **options))
    return dumped.strip()[1:-1] if braces else dumped[2:].rstrip("\n")


def _has_lines(value: Any) -> bool:
    """Whether a value takes lines of its own: a mapping, and a list of mappings."""
    if isinstance(value, list):
        return any(isinstance(item, dict) and item for item in value)
    return isinstance(value, dict) and bool(value)


def _lines(value: Any, column: int) -> list[str]:
    pad = " " * column
    lines: list[str] = []
    if isinstance(value, list):
        for item in value:
            first, *others = [f"{_flow(key)}: {_flow(inner, braces=False)}" for key, inner in item.items()] \
                if isinstance(item, dict) and item else [_flow(item, braces=False)]
            lines += [f"{pad}- {first}", *(f"{pad}  {other}" for other in others)]
        return lines
    for key, inner in value.items():
        if _has_lines(inner):
            lines += [f"{pad}{_flow(key)}:", *_lines(inner, column + 2)]
        else:
            lines.append(f"{pad}{_flow(key)}: {_flow(inner, braces=False)}")
    return lines

"""Plain YAML: the part of YAML that cannot surprise.

Scalars are read by the rules of YAML 1.2: `1e-5` is a number, while `no`, `010`, `12:30` and `2024-01-01`
are text. Anchors, aliases, tags, repeated keys, keys that are not text and deep nesting are refused, so no
file can hang or mean something that its reader does not see.
"""

import re
from typing import Any

import yaml
from yaml.reader import ReaderError

MAX_DEPTH = 32
_TEXT = "tag:yaml.org,2002:str"
_INT = r"[-+]?(?:0|[1-9][0-9]*)"
_FLOAT = r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_SCALARS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", _INT, list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
)


def read(text: str) -> Any:
    """Give the mappings, lists, text, numbers, truth values and nulls of one document; None if there is none.

    Raises: ValueError: the text is not plain YAML; the message names line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if (mark := error.problem_mark) else ""
        raise ValueError(f"{where}{error.problem}") from error
    except ReaderError as error:
        raise ValueError(f"character {error.position}: {error.reason}") from error


def write(tree: Any) -> str:
    """Write a tree that `read` gives back equal."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _refuse(problem: str, part: yaml.Event | yaml.Node) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=part.start_mark)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  PyYAML's own way to start without the scalars of YAML 1.1
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise _refuse("anchors and aliases (& and *) are not allowed; quote the text", event)
        if getattr(event, "tag", None) is not None:
            raise _refuse("tags (!) are not allowed; quote the text", event)
        if self.depth == MAX_DEPTH:
            raise _refuse(f"nested deeper than {MAX_DEPTH}", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != _TEXT:
                raise _refuse(f"a key must be text, not {key.value!r}; quote it", key)
            if key.value in seen:
                raise _refuse(f"key {key.value!r} is given twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes any text that either YAML 1.1 or 1.2 would take for something else."""

    def represent_text(self, text: str) -> yaml.Node:
        """Escape line breaks and controls; PyYAML would write some, such as U+0085, and read a space."""
        return self.represent_scalar(_TEXT, text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)

"""Settings: YAML and `key.sub=value` overrides in, frozen typed pydantic models out.

A settings class lives in the file that uses it; this file only reads, writes and explains them.
Deliberately absent: chains of files, interpolation, lists of defaults, flags, and guessing
what a wrong value may have meant.

A file with the line `extends: OTHER.yaml`, a file beside it that extends none, holds only what differs: its sections
are laid over those of the other key by key, but one of another `kind` takes the place of the whole section.
What is dumped, as in a run's folder, is complete.

What was read is validated as JSON in pydantic's strict mode: a list may fill a tuple, text a path and an
integer a float; nothing else is converted. Unions of sections are told apart by their field `kind`.
"""

import difflib
import inspect
import json
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, to_jsonable_python

from reward import plain_yaml

COMMAND_LINE = "command line"
EXTENDS = "extends"
_OVERRIDE = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)=(.*)", re.DOTALL)
_LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "at least", "max_length": "at most"}


class ConfigError(ValueError):
    """A setting that cannot be used: where it stands, its key, its value, and what was expected."""


class Config(BaseModel):
    """Base of all settings: frozen, strict, no unknown keys; a string under a field is its meaning."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a default section unlike its class: a file that gives half of it would lose the rest."""
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.model_fields.items():
            default = field.get_default(call_default_factory=True, validated_data={})
            if isinstance(default, Config) and default.model_fields_set:
                changed = ", ".join(sorted(default.model_fields_set))
                raise TypeError(f"{cls.__name__}.{name}: set {changed} in {type(default).__name__} itself")


C = TypeVar("C", bound=Config)


# Reading and writing ----------------------------------------------------------------------------------------


def load(schema: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """Read a file of settings, or start from none, and apply overrides such as `optim.lr=1e-4`.

    Raises: ConfigError: anything unreadable, unknown, missing or of the wrong type; all such keys at once.
    """
    tree, source = ({}, COMMAND_LINE) if path is None else _read_extended(path)
    keys = _apply_overrides(schema, tree, overrides)
    return _validate(schema, tree, source=source, overridden=keys)


def dump(config: Config) -> str:
    """Write all settings as YAML which `load` reads back to an equal object."""
    return plain_yaml.write(config.model_dump(mode="json"))


def json_schema(schema: type[Config]) -> dict[str, Any]:
    """Give the JSON schema that lets an editor complete and check a file of these settings.

    A file that extends another may lack keys at the top, but not inside a section.
    """
    tree = schema.model_json_schema()
    other = {"type": "string", "description": "A file beside this one, over whose settings these are laid."}
    tree["properties"] = {EXTENDS: other, **tree["properties"]}
    tree["anyOf"] = [{"required": [EXTENDS]}, {"required": tree.pop("required", [])}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}


def _read_extended(path: Path) -> tuple[dict[str, Any], str]:
    """Read a file, over the one that it extends if it does; say where its keys stand."""
    tree = _read_file(path)
    if EXTENDS not in tree:
        return tree, str(path)
    name = tree.pop(EXTENDS)
    if not isinstance(name, str):
        raise ConfigError(f"{path}: {EXTENDS}: expected the name of a file beside this one, got {_shown(name)}")
    other = path.parent / name
    under = _read_file(other)
    if EXTENDS in under:
        raise ConfigError(f"{path}: {EXTENDS}: {other} extends a file itself; extend that one, or none")
    return _over(tree, under), f"{path} over {other}"


def _over(tree: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
    both = [key for key in tree if isinstance(tree[key], dict) and isinstance(under.get(key), dict)]
    alike = [key for key in both if tree[key].get("kind", under[key].get("kind")) == under[key].get("kind")]
    return under | tree | {key: _over(tree[key], under[key]) for key in alike}


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a UTF-8 text file: {error}") from error
    tree = _read_yaml(text, where=str(path))
    if tree is None:
        raise ConfigError(f"{path}: is empty; expected lines of `key: value`")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {_shown(tree)}; expected lines of `key: value`")
    return tree


def _read_yaml(text: str, *, where: str) -> Any:
    try:
        return plain_yaml.read(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not readable as YAML: {error}") from error


def _validate(schema: type[C], tree: dict[str, Any], *, source: str, overridden: Sequence[str]) -> C:
    try:
        return schema.model_validate_json(json.dumps(tree))
    except ValidationError as invalid:
        lines = []
        for error in invalid.errors(include_url=False):
            key, problem = _explain(schema, error)
            where = COMMAND_LINE if any(_within(key, given) for given in overridden) else source
            lines.append(": ".join(filter(None, (where, key, problem))))
        raise ConfigError("\n".join(dict.fromkeys(lines))) from invalid


# Types: finding the part of a schema that a key is about ----------------------------------------------------


def _members(annotation: Any) -> list[Any]:
    """List the alternatives of a union, unwrapped; any other type is its own only alternative."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _sections(annotation: Any) -> list[type[Config]]:
    return [member for member in _members(annotation) if isinstance(member, type) and issubclass(member, Config)]


def _kinds(section: type[Config]) -> tuple[Any, ...]:
    return get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()


def _child(member: Any, key: str | int) -> list[Any]:
    """List the types that `key` can hold inside one alternative; none where there is no such key."""
    if _sections(member):
        return _members(member.model_fields[key].annotation) if key in member.model_fields else []
    if get_origin(member) is dict and isinstance(key, str):
        return _members(get_args(member)[1])
    if get_origin(member) in (list, tuple) and isinstance(key, int):
        return [part for argument in get_args(member) for part in _members(argument)]
    return []


def _children(members: list[Any], key: str | int) -> list[Any]:
    return [child for member in members for child in _child(member, key)]


# Overrides --------------------------------------------------------------------------------------------------


def _apply_overrides(schema: type[Config], tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Put `key.sub=value` items into the tree, in order; give their keys."""
    keys: list[str] = []
    for item in overrides:
        match = _OVERRIDE.fullmatch(item)
        if match is None:
            raise ConfigError(f"{COMMAND_LINE}: {item!r} is no setting; expected key=value, such as optim.lr=1e-4")
        key, text = match.groups()
        if any(_within(given, key) for given in keys):
            raise ConfigError(f"{COMMAND_LINE}: {key}: would undo an earlier setting of the same command; give it once")
        _apply_override(schema, tree, key, text)
        keys.append(key)
    return keys


def _apply_override(schema: type[Config], tree: dict[str, Any], key: str, text: str) -> None:
    node: Any = tree
    members: list[Any] = [schema]
    *parents, last = key.split(".")
    for depth, name in enumerate(parents, start=1):
        members = _children(members, name)
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            section = ".".join(parents[:depth])
            raise ConfigError(f"{COMMAND_LINE}: {key}: {section} is {_shown(node)}, which has no keys")
        members = [member for member in members if _fits_kind(member, node)]
    node[last] = _read_value(text, _children(members, last), key)


def _fits_kind(member: Any, node: dict[str, Any]) -> bool:
    return "kind" not in node or not _sections(member) or node["kind"] in _kinds(member)


def _read_value(text: str, members: list[Any], key: str) -> Any:
    """Read a value of the command line: literally where text can stand, as YAML elsewhere."""
    if text == "null" and types.NoneType in members:
        return None
    words = {word for member in members if get_origin(member) is Literal for word in get_args(member)}
    if str in members or Path in members or text in words:
        return text
    return _read_yaml(text, where=f"{COMMAND_LINE}: {key}")


def _within(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")


# Explaining errors ------------------------------------------------------------------------------------------


def _explain(schema: type[Config], error: ErrorDetails) -> tuple[str, str]:
    """Turn an error of pydantic into a dotted key and what is wrong with it."""
    keys, members = _locate(schema, error["loc"])
    sections = [section for member in members for section in _sections(member)]
    kinds = [kind for section in sections for kind in _kinds(section)]
    match error["type"]:
        case "extra_forbidden":
            name = str(error["loc"][-1])
            known = [field for section in sections for field in section.model_fields]
            owner = " or ".join(section.__name__ for section in sections)
            return ".".join([*keys, name]), f"unknown key of {owner}; {_suggest(name, known)}"
        case "missing":
            return ".".join(keys), "is missing"
        case "union_tag_not_found":
            return ".".join([*keys, "kind"]), f"is missing; expected one of {', '.join(map(repr, kinds))}"
        case "union_tag_invalid":
            kind = error["input"]["kind"]
            return ".".join([*keys, "kind"]), f"unknown kind {_shown(kind)}; {_suggest(str(kind), kinds)}"
        case "json_invalid":  # the only text that JSON cannot carry: half of a surrogate pair
            return "", "some text is not valid Unicode"
        case "value_error" if isinstance(error["input"], dict):  # a check across keys names its values
            return ".".join(keys), error["msg"].removeprefix("Value error, ")
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return ".".join(keys), f"{message}, got {_shown(error['input'])}"


def _locate(schema: type[Config], loc: tuple[int | str, ...]) -> tuple[list[str], list[Any]]:
    """Find the keys and types of a place in pydantic's words, where union members are steps too."""
    keys: list[str] = []
    members: list[Any] = [schema]
    for part in loc:
        tagged = [section for section in members if _sections(section) and part in _kinds(section)]
        if tagged and len(members) > 1:
            members = tagged
        elif children := _children(members, part):
            keys.append(str(part))
            members = children
    return keys, members


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _shown(value: Any) -> str:
    return textwrap.shorten(repr(value), 80, placeholder=" ...")


# Command line -----------------------------------------------------------------------------------------------


def parse(
    schema: type[C],
    argv: Sequence[str],
    *,
    prog: str,
    positional: str | None = None,
    preview: Callable[[C], str] | None = None,
) -> C:
    """Read the settings of a program from its arguments: a YAML file, and `key=value` items.

    With `positional`, bare arguments fill that field instead: a list takes all, anything else just one.
    `--help` prints the schema, `--dry-run` the resolved settings and, as a comment, what `preview` says of
    them; both end the program, and so does a wrong setting, with status 2.
    """
    if "--help" in argv:
        print(describe(schema, prog=prog, positional=positional))
        raise SystemExit(0)
    try:
        config = _from_arguments(schema, [item for item in argv if item != "--dry-run"], positional)
    except ConfigError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if "--dry-run" in argv:
        print(dump(config), end="")
        if preview is not None:
            print(textwrap.indent(preview(config), "# ", lambda _: True))
        raise SystemExit(0)
    return config


def _from_arguments(schema: type[C], argv: Sequence[str], positional: str | None) -> C:
    overrides = [item for item in argv if _OVERRIDE.fullmatch(item)]
    bare = [item for item in argv if not _OVERRIDE.fullmatch(item)]
    if flags := [item for item in bare if item.startswith("-")]:
        raise ConfigError(f"unknown option {flags[0]}; settings are given as key=value, see --help")
    if positional is None:
        if len(bare) > 1:
            raise ConfigError(f"expected at most one file of settings, got {', '.join(bare)}")
        return load(schema, Path(bare[0]) if bare else None, overrides)
    tree: dict[str, Any] = {positional: _fill(schema, positional, bare)} if bare else {}
    keys = _apply_overrides(schema, tree, overrides)
    if bare and positional in keys:
        raise ConfigError(f"{positional}: given both as {_shown(bare[0])} and as {positional}=...; give it once")
    return _validate(schema, tree, source=COMMAND_LINE, overridden=keys)


def _fill(schema: type[Config], positional: str, bare: Sequence[str]) -> Any:
    members = _child(schema, positional)
    if any(get_origin(member) in (list, tuple) for member in members):
        return list(bare)
    if len(bare) > 1:
        raise ConfigError(f"expected one {positional}, got {len(bare)}: {', '.join(bare)}")
    return _read_value(bare[0], members, positional)


def describe(schema: type[Config], *, prog: str, positional: str | None = None) -> str:
    """Write the help of a program: every key with its type, default and meaning."""
    bare = f"{positional.upper()} ..." if positional else "[FILE.yaml]"
    usage = f"usage: {prog} {bare} [key=value ...] [--help] [--dry-run]"
    return "\n".join([usage, "", inspect.cleandoc(schema.__doc__ or ""), "", *_describe_keys(schema)])


def _describe_keys(schema: type[Config], prefix: str = "", note: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield f"  {prefix}{name}: {_describe_type(field)}{_describe_default(field)}{note}"
        yield from textwrap.wrap(field.description or "", 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
        sections = _sections(field.annotation)
        for section in sections:
            only = f"   (of {section.__name__})" if len(sections) > 1 else ""
            yield from _describe_keys(section, f"{prefix}{name}.", only)


def _describe_type(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(item, key)}" for item in field.metadata for key, sign in _LIMITS.items() if hasattr(item, key)
    ]
    return " ".join([_type_name(field.annotation), *limits])


def _describe_default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if field.is_required():
        return ", required"
    return "" if isinstance(default, Config) else f" = {json.dumps(to_jsonable_python(default), ensure_ascii=False)}"


def _type_name(annotation: Any) -> str:
    names = {str: "text", Path: "path", types.NoneType: "null", Ellipsis: "...", Any: "any"}
    members = _members(annotation)
    if len(members) > 1:
        return " | ".join(map(_type_name, members))
    member = members[0]
    if get_origin(member) is Literal:
        return " | ".join(map(str, get_args(member)))
    if get_origin(member):
        return f"{get_origin(member).__name__}[{', '.join(map(_type_name, get_args(member)))}]"
    return names.get(member) or member.__name__

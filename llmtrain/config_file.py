"""How is a config read, overridden, refused and written?

YAML is read by the 1.2 core rules that people expect: `6e-4` is a float, `no` and `1:30` and `2026-01-01` are strings,
a key given twice is an error. Every complaint names the dotted path, and all of them are given at once.
"""

import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from llmtrain.config import Config
from llmtrain.errors import ConfigError, did_you_mean

SectionT = TypeVar("SectionT", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core schema and without silent duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        return int(str(self.construct_scalar(node)).replace("_", ""))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f'line {key_node.start_mark.line + 1}: key "{key}" is given twice')
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"$"), [""])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)


def parse_yaml(text: str, where: str) -> Any:
    """The value `text` writes. Raises ConfigError with `where` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read the YAML file at `path`, apply `a.b=value` overrides, validate. Raises ConfigError naming every fault."""
    values = read_mapping(Path(path), "config", Config)
    for override in overrides or []:
        apply_override(values, override)
    return validate(values, f"config {path}")


def read_mapping(path: Path, what: str, section: type[BaseModel]) -> dict[str, Any]:
    """The YAML file at `path` with the keys of `section`, not validated. Raises ConfigError that calls it `what`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}{near}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not UTF-8 text: {error.reason}") from None
    values = parse_yaml(text, f"{what} {path}")
    if not isinstance(values, dict):
        raise ConfigError(f"{what} {path} must be a mapping with {', '.join(section.model_fields)}")
    return values


def checkpoints_of(run_dir: Path) -> str:
    """Where the checkpoints of a run folder lie: what its config says, wherever the folder was moved to."""
    saved = run_dir / "config.yaml"
    if not saved.is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it has no config.yaml")
    return load_config(saved).checkpoint.dir or str(run_dir / "checkpoints")


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in the raw mapping; the value is read as YAML."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f'--set "{override}": write section.key=value, for example --set optim.clip=0.5')
    place = values
    for depth, key in enumerate(keys[:-1]):
        below = place.get(key)
        if below is None:
            below = place[key] = {}
        if not isinstance(below, dict):
            raise ConfigError(f'--set "{override}": {".".join(keys[: depth + 1])} is {below!r}, not a section')
        place = below
    place[keys[-1]] = parse_yaml(text.strip(), f'--set "{override}"')


def validate(values: dict[str, Any], where: str) -> Config:
    """Build the Config, or raise one ConfigError that lists every fault by its dotted path."""
    return read_section(Config, values, where)


def read_section(section: type[SectionT], values: dict[str, Any], where: str) -> SectionT:
    """Build one section of the config, or raise one ConfigError that lists every fault by its dotted path."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        lines = [_complaint(fault, section) for fault in error.errors(include_url=False)]
        raise ConfigError(f"{where}:\n" + "\n".join(f"  {line}" for line in lines)) from None
    except ConfigError as error:
        raise ConfigError(f"{where}:\n  {error}") from None


def to_yaml(config: Config) -> str:
    """The resolved config, every default written out; reading it again gives an equal Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)


def _complaint(fault: Any, section: type[BaseModel]) -> str:
    keys = [str(key) for key in fault["loc"]]
    path, known = _place(keys, section)
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if fault["type"] == "extra_forbidden":
        return f'unknown key "{path}"{did_you_mean(keys[-1], known)}'
    if fault["type"] == "missing":
        return f"{path} is missing"
    if fault["type"].startswith("value_error"):
        return f"{path}: {message}" if path else message
    return f"{path}: {message}, found {fault['input']!r}"


def _place(keys: list[str], section: type[BaseModel]) -> tuple[str, list[str]]:
    """The dotted path without pydantic's union tags, and the keys known where the last one stands."""
    model: Any = section
    path: list[str] = []
    known = list(section.model_fields)
    for key in keys:
        fields = getattr(model, "model_fields", {})
        if key in fields:
            path.append(key)
            known = list(fields)
            model = fields[key].annotation
            continue
        member = next((m for m in _members(model) if _kind_matches(m, key)), None)
        if member is not None:
            model = member
            known = list(member.model_fields)
            continue
        if fields:
            known = list(fields)
        if not key.startswith(("function-", "literal[", "constrained-", "int", "bool", "list[")):
            path.append(key)
    return ".".join(path), known


def _members(annotation: Any) -> list[type[BaseModel]]:
    """Every model in a union annotation, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [member for arg in get_args(annotation) for member in _members(arg)]


def _kind_matches(model: type[BaseModel], tag: str) -> bool:
    kind = model.model_fields.get("kind")
    return model.__name__ == tag or (kind is not None and tag in get_args(kind.annotation))

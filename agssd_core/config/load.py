"""Reading a configuration: YAML, preset, command-line overrides, every fault at once."""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from agssd_core.config.presets import PRESETS
from agssd_core.config.run import RunConfig
from agssd_core.errors import ConfigError

N = TypeVar("N", bound=BaseModel)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, lay it over its preset, apply ``key=value`` overrides, validate.

    Raises:
        ConfigError: the file cannot be read, or any key or value is wrong; ``problems`` lists all.
    """
    return _read(Path(path), lambda content: parse_config(content, overrides))


def load_node(path: Path, model: type[N]) -> N:
    """Read a YAML file that is one node by itself, without preset and overrides.

    Raises:
        ConfigError: as ``load_config``.
    """
    return _read(path, lambda content: _validated(OmegaConf.to_container(content), model))


def _read(file: Path, parse: Callable[[Any], N]) -> N:
    if not file.is_file():
        raise ConfigError(f"{file} is not a file. Name a YAML file, as in configs/simulation.yaml.")
    try:
        return parse(OmegaConf.load(file))
    except ConfigError as error:
        problems = tuple(f"{file}: {problem}" for problem in error.problems)
        raise ConfigError("\n".join(problems), problems) from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"{file} is not valid YAML ({first_line}). Mend that line.") from None


def parse_config(content: Any, overrides: Sequence[str] = ()) -> RunConfig:
    """Validate already-read content (a mapping or an OmegaConf node)."""
    for override in overrides:
        if "=" not in override:
            message = f"override {override!r} is not KEY=VALUE. Example: federation.rounds=5"
            raise ConfigError(message)
    given = content if OmegaConf.is_config(content) else OmegaConf.create(content or {})
    try:
        for override in overrides:  # replaces what stands there, a list by a mapping too
            key = override.split("=", 1)[0]
            value = OmegaConf.select(OmegaConf.from_dotlist([override]), key)
            OmegaConf.update(given, key, value, merge=False, force_add=True)
        preset = OmegaConf.select(given, "preset", default="small")
        base = OmegaConf.create(PRESETS.get(str(preset), {}))
        plain = OmegaConf.to_container(OmegaConf.merge(base, given), resolve=True)
    except (OmegaConfBaseException, TypeError, ValueError, AttributeError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"the content is not a mapping of sections ({first_line}).") from None
    return _validated(plain, RunConfig)


def dump_config(config: BaseModel) -> str:
    """Canonical JSON of a node: equal configs give equal text."""
    return json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


def config_from_json(text: str) -> RunConfig:
    """Read what ``dump_config`` wrote, checking it again.

    Raises:
        ConfigError: the text is not such a configuration.
    """
    try:
        plain = json.loads(text)
    except json.JSONDecodeError:
        raise ConfigError("the configuration is not valid JSON. Send it again.") from None
    return _validated(plain, RunConfig)


def _validated(plain: Any, model: type[N]) -> N:
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        problems = tuple(line for item in error.errors() for line in _explain(item, model))
        raise ConfigError("\n".join(problems), problems) from None


def _explain(item: Mapping[str, Any], model: type[BaseModel]) -> list[str]:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return [f"{where} is not a known key.{_nearest(item['loc'], model)}"]
    if item["type"] == "value_error":
        return str(item["ctx"]["error"]).splitlines()
    return [f"{where} = {item['input']!r}: {item['msg']}."]


def _nearest(location: Sequence[str | int], model: type[BaseModel]) -> str:
    node: Any = model
    for part in location[:-1]:
        field = node.model_fields.get(part) if hasattr(node, "model_fields") else None
        node = field.annotation if field is not None else None
    known = list(node.model_fields) if hasattr(node, "model_fields") else []
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known keys: {', '.join(known)}." if known else ""

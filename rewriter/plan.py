"""A plan: which passes to run, on which sites, with which options. Data, never code."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rewriter.errors import PlanError
from rewriter.protocol import Pass, PassConfig, passes
from rewriter.recover.stages import Stage
from rewriter.selection import select

__all__ = ["GateOptions", "Plan", "Step", "select"]


class _Strict(BaseModel):
    """Frozen, strictly typed, no unknown fields; a mistake is one PlanError."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: Any) -> Any:
        try:
            return handler(data)
        except ValidationError as error:
            raise _plan_error(error, cls, cls.__name__.lower()) from None


class GateOptions(_Strict):
    """How the result is checked against the original.

    sequences: how many; length: tokens in each; max_kl: mean KL(original ‖ rewritten) in nats
    per token above which the run fails (None: recorded only).
    """

    sequences: int = Field(default=4, ge=1)
    length: int = Field(default=512, ge=2)
    max_kl: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class CalibrationOptions(_Strict):
    """How much text passes measure on: `sequences` of `length` tokens, spread over the data.

    gradient_tokens: how many of them a pass that weighs by the loss gradient uses.
    """

    sequences: int = Field(default=32, ge=1)
    length: int = Field(default=512, ge=2)
    gradient_tokens: int = Field(default=4096, ge=1)


class Step(_Strict):
    """One pass with its options, checked against the pass's own Config on creation."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Step:
        self.config  # noqa: B018  raises PlanError
        return self

    @property
    def config(self) -> PassConfig:
        """The options as the pass's Config, defaults filled in."""
        where = f"step '{self.name}'"
        config_class = _known_pass(self.name).Config
        try:
            # Strict JSON mode: '256' is no integer, yet a list may become a tuple and a string
            # an enum, which is what a plan written in YAML needs.
            config = config_class.model_validate_json(json.dumps(self.options), strict=True)
        except ValidationError as error:
            raise _plan_error(error, config_class, where) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(
                f"{where}: options are not plain data ({error})",
                "use numbers, strings, booleans, lists and mappings only",
            ) from None
        _check_selection(config, where)
        return config

    def build(self) -> Pass:
        """The pass, configured."""
        return _known_pass(self.name)(self.config)


class Plan(_Strict):
    """An ordered list of steps, the data to measure on and how much of it, seed, gate, recovery.

    `Plan(steps=[{"pass": "sliding_window", "window": 256}])`, or the same in YAML. data: a
    file, a folder, several of them, or the name of a data set on the hub. recover: the stages
    that `rewriter recover` runs afterwards.
    Raises PlanError, with the cause and the fix, for anything that is not valid.
    """

    version: Literal[1] = 1
    steps: list[Step] = Field(default_factory=list)
    data: str | list[str] | None = None
    calibration: CalibrationOptions = CalibrationOptions()
    seed: int = Field(default=0, ge=0, lt=2**63)
    gate: GateOptions = GateOptions()
    recover: list[Stage] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _spell_steps(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("steps"), list):
            return data
        steps = [_read_step(i, step) for i, step in enumerate(data["steps"], 1)]
        return data | {"steps": steps}

    @classmethod
    def from_yaml(cls, source: str | Path) -> Plan:
        """Read a plan from a YAML file, or from YAML text.

        Anchors, Python tags and duplicate keys are refused. Raises PlanError.
        """
        text, where = _read_source(source)
        try:
            data = yaml.load(text, Loader=_PlanLoader)  # a SafeLoader
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            detail = " ".join(str(error).split())[:400] or type(error).__name__
            raise PlanError(
                f"{where} is not a plan in YAML: {detail}",
                "write plain YAML: no Python tags, no anchors, every key once",
            ) from None
        if not isinstance(data, dict):
            what = "empty" if data is None else f"a {type(data).__name__}, not a mapping"
            raise PlanError(f"{where} is {what}", "start with 'steps:' and a list of steps")
        if wrong := [key for key in data if not isinstance(key, str)]:
            raise PlanError(f"{where}: the key {wrong[0]!r} is not a string", "quote it")
        plan = cls(**data)
        # In Python a plan without steps is the identity; a file that has none is a slip.
        if "steps" not in data:
            raise PlanError(f"{where}: 'steps' is missing", "start with 'steps:' and a list")
        return plan

    def to_yaml(self) -> str:
        """The plan as YAML; `from_yaml` reads it back to an equal plan."""
        data = self.model_dump(mode="json", exclude={"steps"}, exclude_none=True)
        data["steps"] = [{"pass": step.name, **step.options} for step in self.steps]
        if self.recover:
            stages = [stage.model_dump(mode="json", exclude_unset=True) for stage in self.recover]
            named = zip(self.recover, stages, strict=True)
            data["recover"] = [{"stage": known.stage, **stage} for known, stage in named]
        else:
            data.pop("recover", None)
        order = ("version", "steps", "data", "calibration", "seed", "gate", "recover")
        data = {key: data[key] for key in order if key in data}
        return yaml.dump(data, Dumper=_PlanDumper, sort_keys=False, allow_unicode=True, width=100)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON schema of plans, with the options of every known pass."""
        schema = cls.model_json_schema()
        definitions = schema.setdefault("$defs", {})
        definitions.pop("Step", None)
        for name, known in passes().items():
            options = known.Config.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
            inner = options.pop("$defs", {})
            definitions |= {f"{name}.{key}": value for key, value in inner.items()}
            options["title"] = name
            options["description"] = first_line(known)
            options["properties"] = {"pass": {"const": name}, **options["properties"]}
            options["required"] = ["pass", *options.get("required", [])]
            definitions[name] = options
        schema["properties"]["steps"]["items"] = {
            "oneOf": [{"$ref": f"#/$defs/{name}"} for name in passes()]
        }
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def first_line(known: type[Pass]) -> str:
    """First line of a pass's docstring."""
    return next(iter((known.__doc__ or "").strip().splitlines()), "")


def _known_pass(name: str) -> type[Pass]:
    known = passes()
    if name in known:
        return known[name]
    fix = f"use one of: {', '.join(known)}"
    if close := difflib.get_close_matches(name, known, 1):
        fix = f"did you mean '{close[0]}'? {fix}"
    raise PlanError(f"unknown pass '{name}'", fix)


def _read_step(index: int, step: Any) -> Any:
    """{"pass": name, **options} → Step; a Step passes through."""
    if isinstance(step, Step):
        return step
    if not isinstance(step, dict) or not isinstance(step.get("pass"), str):
        raise PlanError(
            f"step {index} names no pass: {str(step):.120}",
            "write it as '- pass: NAME', with the options beside it",
        )
    if wrong := [key for key in step if not isinstance(key, str)]:
        raise PlanError(f"step {index}: the option {wrong[0]!r} is not a string", "quote it")
    options = {key: value for key, value in step.items() if key != "pass"}
    try:
        return Step(name=step["pass"], options=options)
    except PlanError as error:
        raise PlanError(f"step {index}: {error.cause}", error.fix) from None


def _check_selection(config: PassConfig, where: str) -> None:
    """What of `layers` and `targets` is wrong for every model."""
    layers = config.layers
    if isinstance(layers, list):
        if negative := [layer for layer in layers if layer < 0]:
            raise PlanError(f"{where}: layer {negative[0]} is negative", "layers count from 0")
        if not layers:
            raise PlanError(f"{where}: 'layers' is empty", "leave it out to take every layer")
    elif layers is not None and layers.to is not None and layers.to < layers.start:
        raise PlanError(
            f"{where}: layers from {layers.start} to {layers.to} is an empty range",
            "'to' is the last layer taken and must not be below 'from'",
        )
    if config.targets is not None and not config.targets:
        raise PlanError(f"{where}: 'targets' is empty", "leave it out to take every site")
    for target in config.targets or []:
        if target.startswith("re:"):
            try:
                re.compile(target[3:])
            except (re.error, RecursionError, OverflowError) as error:
                raise PlanError(
                    f"{where}: target '{target}' is no regular expression: {error}",
                    "Python's 're' syntax after 're:'; it must match the whole path",
                ) from None


def _plan_error(error: ValidationError, model: type[BaseModel], where: str) -> PlanError:
    """All mistakes that pydantic found, as one message, with the valid names."""
    names = [field.alias or name for name, field in model.model_fields.items()]
    causes, hints = [], []
    for item in error.errors(include_url=False, include_context=False):
        # Branches of a union are part of pydantic's location; they tell a user nothing.
        path = ".".join(str(p) for p in item["loc"] if str(p).isidentifier() or type(p) is int)
        if item["type"] == "extra_forbidden":
            causes.append(f"unknown option '{path}'")
            if close := difflib.get_close_matches(path, names, 1):
                hints.append(f"did you mean '{close[0]}'?")
        elif item["type"] == "missing":
            causes.append(f"'{path}' is missing")
        else:
            prefix = f"'{path}': " if path else ""
            causes.append(f"{prefix}{item['msg']} (got {item['input']!r:.80})")
    hints.append(f"options: {', '.join(names)}")
    return PlanError(f"{where}: " + "; ".join(dict.fromkeys(causes)), " ".join(hints))


def _read_source(source: str | Path) -> tuple[str, str]:
    """Text of a plan and what to call it in messages."""
    if isinstance(source, str) and "\n" in source:
        return source, "the plan"
    path = Path(source).expanduser()
    try:
        exists = path.exists()
    except (OSError, ValueError):  # too long for a path, or a null byte in it
        exists = False
    if not exists:
        looks_like_path = path.suffix in {".yaml", ".yml", ".json"} or ":" not in str(source)
        if isinstance(source, str) and not (source and looks_like_path):
            return source, "the plan"
        raise PlanError(f"there is no plan file '{source}'", "give the path of a YAML file")
    try:
        return path.read_text(encoding="utf-8"), f"'{path}'"
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise PlanError(f"cannot read '{path}': {reason}", "give a YAML file") from None


class _PlanLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and anchors, and reads 1e-3 as a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        # A few nested anchors can stand for gigabytes.
        if getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases are not allowed", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"duplicate key '{key.value}'", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _PlanDumper(yaml.SafeDumper):
    """SafeDumper without anchors: a list used twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# YAML 1.1, which PyYAML reads, takes 1e-3 (no dot) for a string.
_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+")
for _class in (_PlanLoader, _PlanDumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))

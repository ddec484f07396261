"""Plans: reading, strictness, round trip, schema, selection."""

import json
from enum import StrEnum

import pytest
from pydantic import Field

from rewriter.errors import PlanError
from rewriter.plan import Plan, Step, select
from rewriter.protocol import REGISTRY, Contract, NearMiss, Pass, PassConfig, Site


class Mode(StrEnum):
    FAST = "fast"
    GOOD = "good"


@pytest.fixture(autouse=True)
def dummy():
    class Dummy(Pass):
        """A pass for tests."""

        name, contract = "dummy_window", Contract.EXACT

        class Config(PassConfig):
            window: int = Field(gt=0)
            mode: Mode = Mode.FAST
            ratio: float | None = None
            pair: tuple[int, int] = (1, 2)

        def sites(self, graph):
            yield from ()

        def rewrite(self, graph, site):
            raise NotImplementedError

    yield Dummy
    del REGISTRY["dummy_window"]


def make(**options):
    return Plan(steps=[{"pass": "dummy_window", "window": 4, **options}])


def config(**options) -> PassConfig:
    return make(**options).steps[0].config


def test_python_and_yaml_are_one_plan():
    text = """
version: 1
steps:
  - pass: dummy_window
    window: 4
    mode: good
    ratio: 1e-3
    pair: [3, 4]
    layers: {from: 2, to: 8, every: 2}
    targets: ['re:.*attn']
data: [a.txt, b.txt]
seed: 7
gate: {sequences: 2, length: 64, max_kl: 0.1}
"""
    plan = Plan.from_yaml(text)
    options = plan.steps[0].config
    assert (options.window, options.mode, options.ratio) == (4, Mode.GOOD, 1e-3)
    assert options.pair == (3, 4) and options.layers.every == 2
    assert plan.data == ["a.txt", "b.txt"] and plan.gate.max_kl == 0.1
    step = Step(name="dummy_window", options=plan.steps[0].options)
    assert Plan(steps=[step], data=plan.data, seed=7, gate=plan.gate) == plan


@pytest.mark.parametrize(
    "plan_options",
    [{}, {"ratio": 1e-07}, {"ratio": 5.0}, {"targets": ["model.0", "re:a: b#c"]}, {"layers": [3]}],
)
def test_round_trip(plan_options, tmp_path):
    shared = plan_options.get("layers", [1])
    step = {"pass": "dummy_window", "window": 4} | plan_options
    plan = Plan(steps=[step | {"layers": shared}, step | {"layers": shared}], data="ä.txt")
    assert Plan.from_yaml(plan.to_yaml()) == plan
    file = tmp_path / "plan.yaml"
    file.write_text(plan.to_yaml(), encoding="utf-8")
    assert Plan.from_yaml(file) == Plan.from_yaml(str(file)) == plan


def test_build_gives_the_configured_pass(dummy):
    built = make(mode="good").steps[0].build()
    assert type(built) is dummy and built.config.window == 4 and built.config.mode is Mode.GOOD


def test_plan_is_frozen():
    with pytest.raises(Exception, match="frozen"):
        make().seed = 3


def test_messages_name_the_fix():
    with pytest.raises(PlanError) as error:
        make(windw=3)
    assert "step 1" in error.value.cause and "unknown option 'windw'" in error.value.cause
    assert "did you mean 'window'" in error.value.fix and "layers" in error.value.fix
    with pytest.raises(PlanError, match="did you mean 'dummy_window'"):
        Plan(steps=[{"pass": "dumy_window"}])
    with pytest.raises(PlanError, match="'window' is missing"):
        Plan(steps=[{"pass": "dummy_window"}])


@pytest.mark.parametrize(
    "options",
    [
        {"window": "4"},
        {"window": True},
        {"window": 4.5},
        {"window": -1},
        {"mode": "slow"},
        {"ratio": "x"},
        {"ratio": {1, 2}},
        pytest.param({"ratio": object()}, id="not plain data"),
        {"layers": [-1]},
        {"layers": []},
        {"layers": {"from": 4, "to": 2}},
        {"layers": {"from": 0, "every": 0}},
        {"layers": [True]},
        {"targets": []},
        {"targets": ["re:("]},
        {"missing": "maybe"},
        {"policy": "pray"},
        {"tolerance": 0.0},
    ],
    ids=str,
)
def test_bad_options(options):
    with pytest.raises(PlanError):
        make(**options)


def test_schema_has_every_pass():
    schema = Plan.json_schema()
    json.dumps(schema)
    step = schema["$defs"]["dummy_window"]
    assert step["properties"]["pass"] == {"const": "dummy_window"}
    assert set(step["required"]) == {"pass", "window"} and not step["additionalProperties"]
    assert {"$ref": "#/$defs/dummy_window"} in schema["properties"]["steps"]["items"]["oneOf"]
    references = set()

    def walk(value):
        if isinstance(value, dict):
            references.update(v for k, v in value.items() if k == "$ref")
            list(map(walk, value.values()))
        elif isinstance(value, list):
            list(map(walk, value))

    walk(schema)
    assert all(ref.removeprefix("#/$defs/") in schema["$defs"] for ref in references)


# ---- selection ---------------------------------------------------------------------------

PLACES = [Site(f"model.layers.{i}.self_attn", None, i) for i in range(4)] + [
    NearMiss("model.layers.4.self_attn", None, "its mask is dense", 4)
]


def names(places):
    return [place.name for place in places]


def test_select_all_keeps_near_misses():
    sites, misses = select(PLACES, config(), 6, "p")
    assert len(sites) == 4 and names(misses) == ["model.layers.4.self_attn"]


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"layers": [0, 3]}, [0, 3]),
        ({"layers": {"from": 1}}, [1, 2, 3]),
        ({"layers": {"from": 0, "to": 3, "every": 2}}, [0, 2]),
        ({"targets": ["model.layers.2.self_attn"]}, [2]),
        ({"targets": [r"re:model\.layers\.[01]\..*"]}, [0, 1]),
        ({"targets": ["re:.*attn"], "layers": [1]}, [1]),
    ],
)
def test_select(options, chosen):
    sites, _ = select(PLACES, config(**options), 6, "p")
    assert [site.layer for site in sites] == chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [6]}, "layer 6 does not exist, the model has 6"),
        ({"layers": {"from": 2, "to": 9}}, "layer 9 does not exist"),
        ({"layers": {"from": 8}}, "layer 8 does not exist"),
        ({"layers": [0, 4]}, "its mask is dense"),
        ({"layers": [0, 5]}, "layer 5 has no site"),
        ({"layers": {"from": 4}}, "its mask is dense"),
        ({"targets": ["model.layers.4.self_attn"]}, "its mask is dense"),
        ({"targets": ["model.layer.2.self_attn"]}, "nearest site is 'model.layers.2.self_attn'"),
        ({"targets": ["re:layers"]}, "nearest site"),
        ({"targets": ["re:.*attn", "model.lm_head"]}, "'model.lm_head' has no site"),
        ({"targets": ["model.layers.2.self_attn"], "layers": [1]}, "no site to rewrite"),
    ],
)
def test_nothing_is_silently_left_out(options, message):
    with pytest.raises(PlanError, match="(?s)" + message):
        select(PLACES, config(**options), 6, "p")


def test_missing_skip():
    assert select(PLACES, config(layers=[5], missing="skip"), 6, "p") == ([], [])
    sites, misses = select(PLACES, config(layers=[0, 4], missing="skip"), 6, "p")
    assert len(sites) == len(misses) == 1
    assert select([], config(missing="skip"), 0, "p") == ([], [])
    with pytest.raises(PlanError):
        select([], config(), 0, "p")
    with pytest.raises(PlanError, match="does not exist"):
        select(PLACES, config(layers=[99], missing="skip"), 6, "p")

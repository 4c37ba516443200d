"""Recipes: every packaged one parses, every fault is told at once, and a round trip changes nothing."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hfsd import recipes
from hfsd.blocks import NAME, slug
from hfsd.errors import BadRequest

MINIMAL = "name: x\nmodel: org/model\ndata: rows.jsonl\nprune: {blocks: 3}\n"


@pytest.mark.parametrize("name", recipes.packaged())
def test_packaged_recipes_parse_and_round_trip(name: str) -> None:
    made, text = recipes.load(name)
    assert made.name == name and text.startswith("#")
    assert recipes.validate(recipes.dump(made)) == made
    assert recipes.parse(yaml.safe_dump(recipes.dump(made))) == made


def test_the_packaged_recipes_are_the_promised_ones() -> None:
    assert recipes.packaged() == ["demo", "llama3.1-8b-6of32", "smollm2-gsm8k"]
    llama = recipes.load("llama3.1-8b-6of32")[0]
    assert (llama.prune.blocks, llama.rewrite.engine, llama.evaluate.tasks) == (6, "endpoint", ("openllm",))


def test_all_faults_at_once_with_the_nearest_names() -> None:
    text = (
        "name: X\nmodel: {path: a, dtyp: auto}\ndata: {rows: 0}\nprune: {remove: 9:3}\nscn: {}\ntrain: {arms: [stf]}\n"
    )
    with pytest.raises(BadRequest) as caught:
        recipes.parse(text, "mine.yaml")
    lines = str(caught.value).splitlines()
    assert all(line.startswith("mine.yaml: ") for line in lines)
    for part in (
        "name: 'X' must be lower-case",
        "model.dtyp: unknown key (did you mean 'dtype'?)",
        "data.source: missing",
        "data.rows: input should be greater than or equal to 1; got 0",
        "prune.remove: '9:3' is no range",
        "scn: unknown key (did you mean 'scan'?)",
        "train.arms.0: input should be 'sft', 'self-distilled', 'sdd+kd' or 'on-policy'; got 'stf'",
    ):
        assert any(part in line for line in lines), part
    assert len(lines) == 7


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ("{}", "exactly one of blocks, remove, keep, from; got none"),
        ("{blocks: 2, remove: '1:3'}", "got blocks and remove"),
        ("{blocks: -1}", "greater than or equal to 0"),
        ("{keep: '3,1'}", "no list of blocks, each once and ascending"),
        ("{remove: '5:5'}", "no range START:STOP"),
        ("{blocks: 2, max_shard_size: big}", "max_shard_size"),
        ("{blocks: two}", "got 'two'"),
    ],
)
def test_one_way_to_prune(prune: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        recipes.parse(f"name: x\nmodel: m\ndata: d.jsonl\nprune: {prune}\n")


def test_several_data_sets_and_their_faults() -> None:
    several = "name: x\nmodel: m\ndata: [{source: a}, b]\nprune: {blocks: 2}\nmerge: {of: [a, b]}\n"
    made = recipes.parse(several, sets=["data.0.rows=3"])
    assert [(d.label, d.rows) for d in made.data] == [("a", 3), ("b", 1000)] and recipes.validate(
        recipes.dump(made)
    ) == made
    assert (made.rewrite_step("a"), recipes.parse(MINIMAL).rewrite_step("rows")) == ("rewrite/a", "rewrite")
    for text, sets, message in (
        (several, ["data.rows=3"], "'data' is a list of 2; name one by its number: data.0.rows"),
        (several.replace("[a, b]}", "[a, bb]}"), [], r"merge.of: no data set 'bb' \(did you mean 'b'\?\)"),
        (several.replace("{source: a}", "{source: a, rows: 0}"), [], "data.0.rows: input should be greater"),
        (several.replace(", b]\nprune", ", c/a]\nprune"), [], "two sets are called a, a; give them names of their own"),
        (several + "train: {arms: [sft]}\n", [], "merge.arm: self-distilled is not trained"),
        (several + "train: {adapter_from: {sft: x}}\n", [], "one adapter per arm, and data lists several"),
        (several + "rewrite: {from: x.jsonl}\n", [], "rewrites of one data set, and data lists several"),
    ):
        with pytest.raises(BadRequest, match=message):
            recipes.parse(text, sets=sets)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("{lora: {scope: behind}}", "lora.scope is 'behind'; it is all or after-cut"),
        ("{method: full, lora: {r: 4}}", "trains no adapter, but lora sets r"),
        ("{seeds: [1, 1]}", r"\[1, 1\] names one of them twice"),
        ("{seeds: [0, 1], adapter_from: {sft: x}}", "one adapter per arm, and seeds asks for 2"),
    ],
)
def test_training_that_cannot_be(train: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        recipes.parse(f"{MINIMAL}train: {train}\n")


def test_set_overrides_and_its_faults() -> None:
    made = recipes.parse(
        MINIMAL, sets=["prune.blocks=5", "data.rows=7", "train.sft.learning_rate=1e-4", "model.dtype=float16"]
    )
    assert (made.prune.blocks, made.data[0].rows, made.data[0].source, made.model.path) == (
        5,
        7,
        "rows.jsonl",
        "org/model",
    )
    assert made.model.dtype == "float16" and made.train.sft["learning_rate"] == 1e-4
    assert recipes.parse(MINIMAL.replace("blocks: 3", "remove: 12:18")).prune.range == (12, 18)
    for item, message in (
        ("prune.blocks", "write it as a.b=c"),
        ("name.x=1", "has no fields"),
        ("a.b=[", "not a YAML value"),
    ):
        with pytest.raises(BadRequest, match=message):
            recipes.parse(MINIMAL, sets=[item])


def test_what_is_no_recipe() -> None:
    for text, message in (("- a\n", "a recipe is a mapping"), ("a: [", "not YAML")):
        with pytest.raises(BadRequest, match=message):
            recipes.parse(text)
    with pytest.raises(BadRequest, match=r"no such file or packaged recipe \(did you mean 'demo'"):
        recipes.load("demoo")


@given(st.text(max_size=40))
def test_a_slug_is_a_name_or_unnamed(text: str) -> None:
    assert NAME.match(slug(text)[:64].strip("-."))


@given(
    st.dictionaries(
        st.sampled_from(["name", "model", "data", "prune", "scan", "trian"]),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5),
            lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=5), x, max_size=2),
            max_leaves=4,
        ),
    )
)
def test_any_mapping_gives_a_recipe_or_one_error(data: dict) -> None:
    try:
        made = recipes.validate(data)
    except BadRequest as error:
        assert str(error)
    else:
        assert recipes.validate(recipes.dump(made)) == made


def test_names_of_models_and_data() -> None:
    made = recipes.load("demo")[0]
    assert made.model_name == "smollm2-135m-instruct" and made.data[0].label == "gsm-symbolic"
    path = made.model.path
    assert made.short(path) == "smollm2-135m-instruct"

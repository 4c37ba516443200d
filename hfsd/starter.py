"""`hfsd init`: a commented recipe from a model's config and a data set's columns."""

from __future__ import annotations

from hfsd import data, fetch, shapes
from hfsd.blocks import slug
from hfsd.blocks_cut import Data, Model
from hfsd.errors import BadRequest
from hfsd.recipe import Recipe
from hfsd.recipes import parse

TEMPLATE = """\
# Made by `hfsd init`. Run it with: hfsd run FILE. Every field, with its meaning: hfsd recipe demo, and the README.
name: {name}

model:
  path: {model}       # {depth} decoder blocks
  # revision: COMMIT        # pin a Hub commit
  # license: apache-2.0     # stated on the cards; none is guessed

data:
  source: {source}
  # {columns}
  rows: 1000          # training rows, after a quarter is held out for evaluation

scan:
  rows: 128           # calibration sequences; candidates are verified on {verify} others
  verify_rows: {verify}

prune:
  blocks: {blocks}           # of {depth}; the scan chooses which. Or name them: remove: "{start}:{stop}"

rewrite:
  task: {task}  # instruction, math (final numbers must agree) or code
  max_new_tokens: 512
  # engine: endpoint        # any OpenAI-compatible server, such as `vllm serve {model}`
  # endpoint: {{url: "http://localhost:8000/v1"}}

train:
  lora: {{r: 16}}       # any field of peft.LoraConfig
  sft:                # any field of trl.SFTConfig
    learning_rate: 2.0e-4
    num_train_epochs: 1

evaluate:
  tasks: [arc_easy, piqa]   # suites demo and openllm, or any lm-eval task
  limit: 200                # documents per task; leave it out for all

compare:
  prompts: 32

publish:
  to: folder          # or a Hub namespace; `hfsd push` does it later
"""


def recipe_for(model: str, source: str, blocks: int) -> str:
    """A commented recipe as YAML text, checked to be one.

    Raises:
        BadRequest: the model or the data set is not there, or has fewer blocks than are to go.
    """
    depth = fetch.depth_of(Model(path=model))
    if not 0 < blocks < depth:
        raise BadRequest(f"--blocks {blocks}: {model} has {depth} blocks, so 1 to {depth - 1} can go")
    columns, task = _columns(source)
    start = max(0, depth - 1 - blocks)
    text = TEMPLATE.format(
        name=slug(f"{Recipe.short(model)}-{blocks}of{depth}"),
        model=_quoted(model),
        source=_quoted(source),
        depth=depth,
        blocks=blocks,
        columns=columns,
        task=task,
        verify=32,
        start=start,
        stop=start + blocks,
    )
    parse(text, "hfsd init")
    return text


def _columns(source: str) -> tuple[str, str]:
    """A comment on the columns, and the task kind that they suggest."""
    if source.startswith("gym:"):
        return "generated problems with worked answers", "math"
    if not data.is_file(source):
        return "config: NAME          # and split, revision, prompt_column, reference_column if need be", "instruction"
    names = data.columns_of(source)
    found = shapes.detect_columns(names)
    if found is None:
        return f"prompt_column: NAME   # set both; columns are: {', '.join(names)}; and reference_column", "instruction"
    prompts, reference = found
    rows = data.load(Data(source=source))
    task = "math" if all("####" in r.reference for r in rows[:20]) else "instruction"
    return f"columns: prompt from {' + '.join(prompts)}, reference from {reference}", task


def _quoted(text: str) -> str:
    """YAML needs quotes around a text with a colon or a comment sign."""
    return f'"{text}"' if any(c in text for c in ":#{}[]") else text

"""Compare: how far each variant moved from the original on held-out prompts, what it is worth as its draft, its cost.

`run` needs the variants in memory; `weigh` measures models alone, when they are let go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hfsd import alike, chat, cost, divergence, models, speculation, speed
from hfsd.divergence import Distance, Text
from hfsd.engines import Request, Sampling, Transformers
from hfsd.errors import BadRequest
from hfsd.family import Family
from hfsd.findings import Answer, Cost, Draft, Shift
from hfsd.likeness import WORDS, similarity
from hfsd.plain import dumps, from_json, to_json
from hfsd.progress import Advance, track
from hfsd.recipe import Compare as CompareRecipe
from hfsd.records import Example, Variant
from hfsd.rundir import write_atomic
from hfsd.speculation import Speedup
from hfsd.speed import Alone, Speed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
BATCH = 8  # prompts per batch of generation
ALONG = ("sampled", "greedy", "references")
SPEED_PROMPTS, SPEED_TOKENS = 2, 24  # on which the speed-up by a draft model is measured
SHAPES = ("original", "pruned")  # an arm has the shape of the pruned model once it is merged


@dataclass(frozen=True)
class Checkpoints:
    """The stock checkpoint of every variant, by its id, and how one is loaded."""

    folders: Mapping[str, Path]
    dtype: str = "auto"
    trust_remote_code: bool = False
    device_map: str | None = None

    def load(self, id: str) -> PreTrainedModel:
        return models.load(self.folders[id], self.dtype, self.trust_remote_code, self.device_map)

    def other_tokens(self, id: str) -> str | None:
        """How the tokens of a variant differ from the original's; None: they are the same."""
        return alike.tokens_differ(self.folders["original"], self.folders[id], self.trust_remote_code)


@dataclass(frozen=True)
class Compared:
    """What the stage found. Variants in the one order; those of other tokens have no shift."""

    shifts: list[Shift]
    answers: list[Answer]
    drafts: list[Draft]
    costs: list[Cost]


def run(
    family: Family,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Example],
    variants: Sequence[Variant],
    recipe: CompareRecipe,
    checkpoints: Checkpoints,
    out: Path,
) -> list[Draft]:
    """Answers every prompt with every variant; measures shift and draft use; and the speed of original and pruned.

    Shift is measured along the original's sampled answers, its greedy ones, and the references, of which no more than
    `recipe.max_new_tokens` tokens count. A prompt that leaves no room for an answer is left out.

    Args:
        prompts: held-out rows; the first `recipe.prompts` are used.
        variants: the original first; ids as in the family.
        out: gets answers.jsonl, shift.json and drafts.json; what is finished lies under work/ and is not made again.

    Raises:
        BadRequest: there is no prompt, or none that leaves room for an answer.
    """
    used = list(prompts[: recipe.prompts])
    if not used:
        raise BadRequest("compare: no held-out prompt; raise data.held_out or give more rows")
    others = [v for v in variants if v.id != "original"]
    refused = {v.id: why for v in others if (why := checkpoints.other_tokens(v.id)) is not None}
    steps = len(used) * (1 + len(variants)) + (len(used) * len(ALONG) + 1) * (len(others) - len(refused)) + 1
    with track("compare", steps, "steps") as advance:
        stage = _Stage(family, tokenizer, used, recipe, checkpoints, refused, out / "work", advance)
        answers = {v.id: stage.answers(v.id) for v in variants}
        distances = stage.distances([v for v in others if v.id not in refused])
        shifts = [stage.shift(v, distances[v.id], answers) for v in others if v.id in distances]
        drafts = [
            stage.draft(v, distances[v.id]) if v.id in distances else Draft(v, 0.0, 0.0, 0.0, {}, refused=refused[v.id])
            for v in others
        ]
        stage.speeds()
    lines = [Answer(e.id, e.prompt, e.reference, {v: answers[v][e.id] for v in answers}) for e in used]
    write_atomic(out / "answers.jsonl", "".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in lines))
    write_atomic(out / "shift.json", dumps(shifts))
    write_atomic(out / "drafts.json", dumps(drafts))
    return drafts


def weigh(checkpoints: Checkpoints, out: Path) -> list[Cost]:
    """Writes cost.json: what `run` measured of speed, and what each model alone takes of memory in a new process."""
    import torch

    held = json.loads((out / "work" / "speed.json").read_text(encoding="utf-8"))
    costs = []
    for name in SHAPES:
        folder = checkpoints.folders[name]
        dtype = models.loaded_dtype(checkpoints.dtype)
        shape = cost.of_folder(folder, checkpoints.trust_remote_code, dtype)
        how = checkpoints.dtype, checkpoints.trust_remote_code, checkpoints.device_map, torch.get_num_threads()
        alone = Alone(str(folder.resolve()), *how)
        peak, said = _once(out / "work" / f"peak-{name}.json", partial(speed.peak_alone, alone))
        found = from_json(Speed, held["speeds"][name]) if held["speeds"] else None
        costs.append(
            Cost(
                shape=name,
                params=shape.params,
                matmul_flops=shape.matmul_flops,
                kv_bytes=shape.kv_bytes,
                checkpoint_bytes=shape.checkpoint_bytes,
                prefill=found.prefill if found else None,
                decode=found.decode if found else None,
                peak_bytes=peak,
                measured=f"{held['said']}; {said}",
                state_bytes=shape.state_bytes,
                dtype=dtype,
                note=shape.kv_note,
            )
        )
    write_atomic(out / "cost.json", dumps(costs))
    return costs


def read(folder: Path) -> Compared:
    """What a finished compare stage found."""

    def records(kind: type[T], name: str) -> list[T]:
        return [from_json(kind, r) for r in json.loads((folder / name).read_text(encoding="utf-8"))]

    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").split("\n")
    answers = [from_json(Answer, json.loads(line)) for line in lines if line]
    shifts, drafts = records(Shift, "shift.json"), records(Draft, "drafts.json")
    return Compared(shifts, answers, drafts, records(Cost, "cost.json"))


class _Stage:
    """What the parts of the stage share. Each part is kept under `work` as soon as it is whole."""

    def __init__(
        self,
        family: Family,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Example],
        recipe: CompareRecipe,
        checkpoints: Checkpoints,
        refused: Mapping[str, str],
        work: Path,
        advance: Advance,
    ) -> None:
        self.family, self.tokenizer, self.prompts, self.recipe = family, tokenizer, prompts, recipe
        self.checkpoints, self.refused, self.work, self.advance = checkpoints, refused, work, advance
        self.likeness = similarity(recipe.similarity_model, "compare")  # first, since what it names may not be there
        self.requests = [Request(e.id, chat.asked(e)) for e in prompts]
        self.texts = {"sampled": self._spoken("sampled"), "greedy": self._spoken("greedy")}
        self.texts["references"] = self._given()
        for kind, texts in self.texts.items():
            if not any(t.tail for t in texts):
                raise BadRequest(
                    f"compare: nothing to measure along ({kind}): each of {len(prompts)} prompts fills all of the "
                    "model's positions; lower data.max_chars"
                )

    def answers(self, id: str) -> dict[str, str]:
        """Row id -> the variant's greedy answer; "" where its prompt leaves no room."""
        if id == "original":
            engine = Transformers(self.family.original, self.tokenizer)
            return {t.id: engine.text(t.tail) for t in self.texts["greedy"]}
        return self._once(f"answers-{id}.json", lambda: self._answered(id), len(self.prompts), id)

    def distances(self, variants: Sequence[Variant]) -> dict[str, dict[str, list[Distance]]]:
        """Variant id -> kind of text -> the distances along each text.

        Variants on the family's own weights are asked together, so that the original is asked once for them; each whole
        checkpoint by itself, since one is held at once.
        """
        groups = [[v.id for v in variants if v.id not in self.family.checkpoints]]
        groups += [[v.id] for v in variants if v.id in self.family.checkpoints]
        found: dict[str, dict[str, list[Distance]]] = {v.id: {} for v in variants}
        for group in groups:
            for kind in ALONG:
                for id, distances in self._along(kind, group).items():
                    found[id][kind] = distances
        return found

    def shift(
        self, variant: Variant, found: Mapping[str, Sequence[Distance]], answers: Mapping[str, Mapping[str, str]]
    ) -> Shift:
        along = {kind: divergence.along(found[kind]) for kind in ALONG}
        ids = [t.id for t in self.texts["greedy"] if t.tail]
        name = self.recipe.similarity_model
        alike = similarity(name, "compare")(
            [answers[variant.id][i] for i in ids], [answers["original"][i] for i in ids]
        )
        return Shift(variant, **along, similarities=[round(a, 4) for a in alike], similarity_by=name or WORDS)

    def draft(self, variant: Variant, found: Mapping[str, Sequence[Distance]]) -> Draft:
        sampled, greedy = found["sampled"], found["greedy"]
        sizes, accepted = [d.tokens for d in sampled], [d.accepted for d in sampled]
        acceptance = divergence.mean(accepted, sizes)
        first = divergence.mean([d.first for d in greedy], [d.tokens for d in greedy])
        speedup = self._once(f"speedup-{variant.id}.json", lambda: self._speedup(variant.id, first), 1, variant.id)
        temperature = self.recipe.temperature
        return Draft(
            variant,
            acceptance=acceptance,
            acceptance_stderr=divergence.stderr(accepted, sizes),
            greedy=first,
            tokens_per_pass={g: speculation.tokens_per_pass(acceptance, g) for g in speculation.GAMMAS},
            speedup=from_json(Speedup, speedup).value,
            measured=speedup["said"] + (f"; acceptance at temperature {temperature:g}" if temperature != 1 else ""),
            prompts=len(sampled),
            n_tokens=sum(sizes),
        )

    def speeds(self) -> None:
        """work/speed.json: prefill and decode of original and pruned, in turns."""
        self._once("speed.json", self._speeds, 1, "speed")

    def _spoken(self, kind: str) -> list[Text]:
        """The original's own answers, as the tokens that it chose."""
        sampling = Sampling(self.recipe.max_new_tokens, self.recipe.temperature if kind == "sampled" else 0.0)

        def make() -> list[Text]:
            engine, made = Transformers(self.family.original, self.tokenizer), []
            for at in range(0, len(self.requests), BATCH):
                made += engine.tokens(self.requests[at : at + BATCH], sampling, self.recipe.seed + at)
            return [Text(r.id, head, tail) for r, (head, tail) in zip(self.requests, made, strict=True)]

        return [from_json(Text, t) for t in self._once(f"{kind}.json", make, len(self.prompts), f"original, {kind}")]

    def _given(self) -> list[Text]:
        """The references, as far as an answer may be long."""
        room = {t.id: len(t.head) for t in self.texts["greedy"] if t.tail}
        limit = Transformers(self.family.original, self.tokenizer).limit or 1 << 62
        pairs = [(e.id, *chat.answer_ids(self.tokenizer, chat.asked(e), e.reference)) for e in self.prompts]
        return [
            Text(id, head, tail[: min(self.recipe.max_new_tokens, limit - len(head))] if id in room else [])
            for id, head, tail in pairs
        ]

    def _answered(self, id: str) -> dict[str, str]:
        tokenizer = self.tokenizer
        if id in self.refused:  # it reads and writes tokens of its own
            tokenizer = models.load_tokenizer(self.checkpoints.folders[id], self.checkpoints.trust_remote_code)
        found: dict[str, str] = {}
        with self.family.use(id) as model:
            engine = Transformers(model, tokenizer)  # type: ignore[arg-type]
            for at in range(0, len(self.requests), BATCH):
                made = engine.generate(self.requests[at : at + BATCH], Sampling(self.recipe.max_new_tokens), seed=0)
                found |= {c.id: c.text for c in made}
        return found

    def _along(self, kind: str, ids: Sequence[str]) -> dict[str, list[Distance]]:
        """Variant id -> its distances along one kind of text, one text at a time to bound memory."""
        paths = {i: self.work / f"{kind}-{i}.json" for i in ids}
        waiting = [i for i in ids if not paths[i].is_file()]
        if len(waiting) < len(ids):
            self.advance(len(self.prompts) * (len(ids) - len(waiting)), earlier=True)
        made: dict[str, list[Distance]] = {i: [] for i in waiting}
        for text in self.texts[kind] if waiting else ():
            if text.tail:
                expected = divergence.logits(self.family.original, text)  # [T, V]
                for i in waiting:
                    with self.family.use(i) as model:
                        got = divergence.logits(model, text)  # [T, V]
                    made[i].append(divergence.distance(expected, got, text, self.recipe.temperature))
            self.advance(len(waiting), note=kind)
        for i in waiting:
            write_atomic(paths[i], dumps(made[i]))
        return {
            i: [from_json(Distance, d) for d in json.loads(p.read_text(encoding="utf-8"))] for i, p in paths.items()
        }

    def _speedup(self, id: str, greedy: float) -> Speedup:
        self.family.let_go()  # the original and the draft are held, and no third
        texts = [(t.head, min(len(t.tail), SPEED_TOKENS)) for t in self.texts["greedy"] if t.tail][:SPEED_PROMPTS]
        original = self.family.original
        # Decoding one text is bound by reading the weights, so a pass costs in proportion to the parameters.
        relative = self.family.params(id) / self.family.params("original")
        gamma = speculation.best_gamma(greedy, relative)

        def measure() -> Speedup:
            return speculation.measure(original, self.checkpoints.load(id), texts, gamma)

        found = _unless_memory_is_short(measure)
        if found is None:
            return Speedup(None, "no speed-up measured: memory is too short for original and draft together")
        return Speedup(found.value, f"{found.said}; {speed.setting(original)}")

    def _speeds(self) -> dict[str, Any]:
        self.family.let_go()
        original = self.family.original
        pair = {"original": original}
        found = _unless_memory_is_short(lambda: speed.side_by_side(pair | {"pruned": self.checkpoints.load("pruned")}))
        said = f"{speed.setting(original)}; {speed.HOW}" if found else "no speed measured: memory is too short for both"
        return {"speeds": found, "said": said}

    def _once(self, name: str, make: Callable[[], Any], steps: int, note: str) -> Any:
        there = (self.work / name).is_file()
        found = _once(self.work / name, make)
        self.advance(steps, note=note, earlier=there)
        return found


def _once(path: Path, make: Callable[[], Any]) -> Any:
    """What an earlier process kept in a file, else what is made now, as plain data."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    made = to_json(make())
    write_atomic(path, dumps(made))
    return made


def _unless_memory_is_short(make: Callable[[], T]) -> T | None:
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    try:
        return make()
    except Exception as error:
        if not should_reduce_batch_size(error):
            raise
    clear_device_cache(garbage_collection=True)
    return None

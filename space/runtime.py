"""What the Space serves: family.json, the models behind it (loaded in the background), and answers column by column.

No Gradio here: `app.py` shows what this module yields.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from decode import Column, Settings

from hfsd import chat, hub, models, plain, records
from hfsd.errors import BadRequest, HfsdError
from hfsd.family import Family
from hfsd.markdown import without_paths

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

# Prefill costs every column the whole prompt: a bound that a visitor can count, known before any tokenizer is loaded.
MAX_PROMPT_CHARS = 4000
MAX_TEMPERATURE = 2.0
# How long a column decodes before the next one has its turn: short enough to look simultaneous, long enough that
# switching adapters costs little.
TURN_SECONDS = 0.25


@dataclass(frozen=True)
class Place:
    """Where a checkpoint or adapter is: a folder relative to family.json, or a Hub repo at a commit."""

    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    sha256: str | None = None

    def folder(self, base: Path) -> Path:
        """The local folder, downloaded if it is on the Hub."""
        if self.path is not None:
            return (base / self.path).resolve()
        if self.repo is None:
            raise BadRequest("family.json: a place needs a path or a repo")
        here, _ = hub.snapshot(self.repo, self.revision, self.subfolder)
        return here / self.subfolder if self.subfolder else here


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with its reference and the answers that the variants gave in the run."""

    prompt: str
    reference: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Spec:
    """family.json. `max_new_tokens` is the most that a visitor may ask of one column."""

    name: str
    title: str
    n_layers: int
    kept: tuple[int, ...]
    original: Place
    adapters: dict[str, Place]
    params: dict[str, int]
    sentence: str
    headline: str
    examples: list[Sample]
    repos: dict[str, str]
    max_new_tokens: int
    # of the file that every repo of the family carries (hfsd.familyfile)
    checkpoints: dict[str, Place] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    records: Place | None = None
    shared: dict[str, str] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        """Variant ids in the order of the columns: original, pruned, then the arms as tables list them."""
        return ["original", "pruned", *sorted(self.adapters, key=_arm_first)]


@dataclass(frozen=True)
class Answer:
    """A column at one moment. `seconds` is the column's own computing time, not the time it waited for others."""

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    done: bool = False
    error: str | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Progress:
    """How far loading is: `step` of `steps` finished, what is going on, and why it failed, if it did."""

    step: int = 0
    steps: int = 1
    doing: str = "starting"
    error: str | None = None

    @property
    def ready(self) -> bool:
        return self.error is None and self.step == self.steps


@dataclass
class Runtime:
    """One family in memory, answering one visitor's turn at a time."""

    spec: Spec
    base: Path
    progress: Progress = field(default_factory=Progress)
    failed: dict[str, str] = field(default_factory=dict)  # variants that could not be loaded, and why
    settled: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    tokenizer: PreTrainedTokenizerBase = field(init=False)
    family: Family = field(init=False)

    def load_in_background(self) -> None:
        """Starts loading and returns at once; `progress` and `settled` tell the rest."""
        threading.Thread(target=self.load, name="load-models", daemon=True).start()

    def load(self) -> None:
        """Fetches and loads everything. Never raises: a failure ends up in `progress` or, for one arm, in `failed`."""
        steps = 3 + len(self.spec.adapters)
        try:
            self.progress = Progress(0, steps, "fetching the original model")
            folder = self.spec.original.folder(self.base)
            self.progress = Progress(1, steps, "reading the original's weights")
            self.tokenizer = models.load_tokenizer(folder)
            original = models.load(folder)
            folders = {}
            for at, (variant, place) in enumerate(self.spec.adapters.items(), 2):
                self.progress = Progress(at, steps, f"fetching the adapter of {variant}")
                if (found := self._or_failed(variant, lambda p=place: p.folder(self.base))) is not None:
                    folders[variant] = found
            self.progress = Progress(steps - 1, steps, "cutting the pruned model and attaching the adapters")
            self.family = self._family(original, folders)
            self.progress = Progress(steps, steps, "ready")
        except Exception as error:  # a page that says why is better than a process that ends
            self.progress = Progress(self.progress.step, steps, self.progress.doing, error=without_paths(_why(error)))
        finally:
            self.settled.set()

    def check(self, prompt: str, settings: Settings) -> None:
        """Refuses what cannot be answered, before any model is needed.

        Raises:
            BadRequest: names the value and the limit.
        """
        if not prompt.strip():
            raise BadRequest("the prompt is empty; write a question first")
        if len(prompt) > MAX_PROMPT_CHARS:
            raise BadRequest(f"the prompt has {len(prompt)} characters; the limit is {MAX_PROMPT_CHARS}")
        if not 1 <= settings.max_new_tokens <= self.spec.max_new_tokens:
            raise BadRequest(f"max_new_tokens is {settings.max_new_tokens}; it must be 1 to {self.spec.max_new_tokens}")
        if not 0 <= settings.temperature <= MAX_TEMPERATURE:
            raise BadRequest(f"temperature is {settings.temperature:g}; it must be 0 (greedy) to {MAX_TEMPERATURE:g}")

    def stream(self, prompt: str, settings: Settings, variants: Sequence[str]) -> Iterator[dict[str, Answer]]:
        """Answers a prompt in all columns by turns; yields every column's state after each turn.

        A column that fails carries its error, and the others go on. Nothing is held between two turns, so that a
        visitor who leaves costs no more than the turn under way.

        Raises:
            HfsdError: the models did not load, or (BadRequest) the prompt does not fit the context.
        """
        self.check(prompt, settings)
        self.settled.wait()
        if self.progress.error:
            raise HfsdError(f"the models did not load: {self.progress.error}")
        ids = self._prompt_ids(prompt, settings)
        answers = {v: Answer() for v in variants}
        columns = {v: Column(self.tokenizer, ids, settings) for v in variants}
        while open_columns := [v for v in variants if not answers[v].done]:
            for variant in open_columns:
                answers[variant] = self._turn(variant, columns[variant])
                yield dict(answers)

    def _turn(self, variant: str, column: Column) -> Answer:
        try:
            if variant in self.failed:
                raise BadRequest(self.failed[variant])
            with self.lock, self.family.use(variant) as model:
                column.advance(model, TURN_SECONDS)
        except Exception as error:  # one column's trouble must not end the others
            return Answer(column.text(), len(column.tokens), column.seconds, done=True, error=_why(error))
        return Answer(column.text(), len(column.tokens), column.seconds, column.done)

    def _prompt_ids(self, prompt: str, settings: Settings) -> list[int]:
        ids, _ = chat.answer_ids(self.tokenizer, chat.single_turn(prompt), "")
        context = getattr(self.family.original.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and len(ids) + settings.max_new_tokens > context:
            room = context - settings.max_new_tokens
            raise BadRequest(
                f"the prompt is {len(ids)} tokens long; the limit is {room}, which is the model's context of {context} "
                f"less {settings.max_new_tokens} for the answer"
            )
        return ids

    def _family(self, original: PreTrainedModel, folders: Mapping[str, Path]) -> Family:
        """The family of all adapters that fit; one that does not is remembered as failed."""
        try:
            return Family(original, self.spec.kept, folders)
        except HfsdError:
            alone: dict[str, Callable[[], Family]] = {
                v: lambda v=v, f=f: Family(original, self.spec.kept, {v: f}) for v, f in folders.items()
            }
            fit = {v: folders[v] for v, attempt in alone.items() if self._or_failed(v, attempt) is not None}
            return Family(original, self.spec.kept, fit)

    def _or_failed(self, variant: str, attempt: Callable[[], T]) -> T | None:
        try:
            return attempt()
        except HfsdError as error:
            self.failed[variant] = without_paths(_why(error))  # shown to visitors
            return None


def read_spec(path: Path) -> Spec:
    """family.json as a record.

    Raises:
        BadRequest: there is none, or it is not what publish writes.
    """
    try:
        return plain.load(Spec, path)
    except FileNotFoundError:
        raise BadRequest(f"no {path}; this folder is run as `hfsd push` or `hfsd space RUN` stages it") from None
    except (json.JSONDecodeError, TypeError, ValueError, AttributeError) as error:
        raise BadRequest(f"{path} is not a family of models: {_why(error)}") from error


def arm_of(variant: str) -> str:
    """The arm of a variant id: `self-distilled` of `self-distilled-gsm8k-s1`."""
    fitting = [a for a in records.ARMS if variant == a or variant.startswith(f"{a}-")]
    return max(fitting, key=len, default=variant)


def _arm_first(variant: str) -> tuple[int, str]:
    arm = arm_of(variant)
    return (records.ARMS.index(arm) if arm in records.ARMS else len(records.ARMS)), variant


def _why(error: Exception) -> str:
    """One line without a traceback; our own errors already say what was given and what to do."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, HfsdError) and text else f"{type(error).__name__}: {text}".rstrip(": ")

"""What is taken from the original's card, and what is not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfsd import cards
from hfsd.original_card import SECTION_CHARS, SECTIONS, facts
from hfsd.records import ModelRef
from tests import tiny
from tests.made import made
from tests.test_cards import REPOS, front

HOME = ModelRef("org/tiny", "a" * 40)
README = """\
---
license: llama3.1
license_link: LICENSE
language:
- en
- no
- not a code
extra: {a: 1}
---

# Tiny

Not this.

## Bias, Risks and *Limitations* ##

It *knows* little, see [the paper](http://example.com/p)
and <b>nothing</b> of `code`.

- it may be wrong
- 1 in 3 answers &amp; more

### By language

Only English.

| a | b |
|---|---|

```python
# Limitations of this comment
```

## Use

Not this either.

## Safety

Nobody tested it.
"""


def test_license_languages_and_limits_carry_over():
    assert facts(README, HOME) == {
        "license": "llama3.1",
        "license_link": f"https://huggingface.co/org/tiny/blob/{'a' * 40}/LICENSE",
        "language": ["en", "no"],
        "limits": [
            "It knows little, see the paper and nothing of code.",
            "it may be wrong",
            "1 in 3 answers & more",
            "Only English.",
            "Nobody tested it.",
        ],
    }


def test_they_are_on_the_card_of_what_is_made_from_it():
    card = cards.model_card(made(facts=facts(README, HOME)), "pruned", REPOS, {})
    data = front(card)
    assert (data["license"], data["language"]) == ("llama3.1", ["en", "no"]) and data["license_link"].endswith(
        "LICENSE"
    )
    assert "### What the original's card says of itself\n\n- It knows little" in card and cards.validate(card) == []
    assert f"llama3.1, [its text](https://huggingface.co/org/tiny/blob/{'a' * 40}/LICENSE)." in card
    assert "language" not in front(cards.dataset_card(made(facts=facts(README, HOME)), REPOS, []))


@pytest.mark.parametrize(
    ("front_matter", "found"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        ("license: [mit]", {"license": "mit"}),
        ("license: [mit, gpl]", {}),
        ("license: {a: b}", {}),
        ("license: Apache-2.0\nlicense_name: mine", {"license": "apache-2.0"}),
        ("license: Tongyi Qianwen", {"license": "other", "license_name": "Tongyi Qianwen"}),
        ("license: other\nlicense_name: qwen", {"license": "other", "license_name": "qwen"}),
        ("license: other", {"license": "other", "license_name": "see the original"}),
        (
            "license: other\nlicense_name: q\nlicense_link: https://e.x/L?a=b",
            {"license": "other", "license_name": "q", "license_link": "https://e.x/L?a=b"},
        ),
        ("license: mit\nlicense_link: ../../../etc/passwd", {"license": "mit"}),
        ("license: mit\nlicense_link: 'javascript:alert(1)'", {"license": "mit"}),
        ("license: mit\nlicense_link: LICENSE", {"license": "mit"}),  # of a folder: no address holds outside of it
        ("language: de", {"language": ["de"]}),
        ("language: [en, en, false, 7, 'x y']", {"language": ["en", "no"]}),
        ("license: [", {}),
        ("- a\n- b", {}),
        ("a: !!python/object/apply:os.system [x]", {}),
    ],
)
def test_front_matter(front_matter, found):
    assert facts(f"---\n{front_matter}\n---\n# x\n") == found


def test_what_the_user_states_goes_before_the_card():
    assert not {"license", "license_link"} & facts(README, HOME, "mit").keys()


def test_a_run_reads_the_card_beside_the_weights_of_its_original(tmp_path: Path):
    from hfsd import fetch, work

    (tmp_path / "README.md").write_text(README)
    for license_, found in ((None, "llama3.1"), ("mit", "mit")):
        recipe, source = tiny.recipe(tmp_path, model__license=license_), fetch.Source(tmp_path, HOME, on_hub=True)
        told = work._card_facts(SimpleNamespace(recipe=recipe, source=source, data_commits={}))
        assert (told["license"], "license_link" in told) == (found, found == "llama3.1")
        assert told["language"] == ["en", "no"] and told["limits"][-1] == "Nobody tested it."


def test_no_card_no_facts():
    assert facts("") == facts("# Tiny\n\nText.\n") == facts("---\r\n---\r\n") == {}


def test_long_sections_are_cut_and_few():
    found = facts("# A\n" + "".join(f"## Limitations {i}\n\n{'A long sentence of it. ' * 99}\n\n" for i in range(9)))
    assert len(found["limits"]) == SECTIONS
    assert all(len(line) <= SECTION_CHARS + 6 and line.endswith("of it [...]") for line in found["limits"])


RESULTS = made()


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet="#- \n`~|*[]()<>&ab:\\_!\r\u2028", max_size=200))
def test_any_text_is_read_and_shown(source):
    found = facts(f"---\nlicense: mit\n---\n# Limitations\n\n{source}\n")
    assert found["license"] == "mit"
    assert cards.validate(cards.model_card(RESULTS, "pruned", REPOS, found)) == []

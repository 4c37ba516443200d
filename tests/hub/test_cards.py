"""What the loopback Hub accepts and refuses in the front matter of a card."""

import pytest

from .cards import check_card


@pytest.mark.parametrize(
    ("repo_type", "metadata", "error"),
    [
        ("model", "base_model: ''", '"base_model" is not allowed to be empty'),
        ("model", "base_model: [a/b, null]", '"base_model[1]" must be a string'),
        ("model", "base_model: ./runs/x", '"base_model" with value "./runs/x" is not valid'),
        ("model", "base_model: a/b/c", '"base_model" with value "a/b/c" is not valid'),
        ("model", "base_model_relation: pruned", '"base_model_relation" must be one of'),
        ("model", "license:", '"license" must be a string'),
        ("model", "language: no", '"language" with value "False" is not valid'),
        ("model", "score: {x: [.nan]}", '"score.x[0]" must be a finite number'),
        ("model", "score: !!python/name:float", "YAML parsing error"),
        ("model", "license: mit\nlicense: mit", "duplicated mapping key"),
        ("model", "- a\n- b", "must be a mapping"),
        ("model", "model-index: [{name: m}]", '"model-index[0].results" is required'),
        ("model", "model-index: [{name: m, results: [{task: {}, metrics: []}]}]", 'task[0].type" is required'),
        ("dataset", "configs: [{data_files: x}]", '"configs[0].config_name" is required'),
        ("space", "sdk: gradio\npython_version: 3.10", '"python_version" must be a string'),
        ("space", "title: x", '"sdk" is required'),
        ("space", f"sdk: gradio\nshort_description: {'x' * 61}", '"short_description" length'),
    ],
)
def test_bad_cards(repo_type: str, metadata: str, error: str) -> None:
    errors, _ = check_card(f"---\n{metadata}\n---\n# Card\n", repo_type)
    assert len(errors) == 1 and error in errors[0]


def test_good_cards() -> None:
    assert check_card("# no metadata", "model") == ([], ["empty or missing yaml metadata in repo card"])
    text = "---\r\nlicense: llama3.1\r\nlanguage: [en, zh-TW]\r\nbase_model: [gpt2, a/b-1.0]\r\n---\r\ntext --- more"
    assert check_card(text, "model") == ([], [])

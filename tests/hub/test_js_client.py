"""The official JavaScript client, @huggingface/hub, on what the Python client pushed: the server is not ours alone."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from . import hub_env, run_client
from .conftest import Client
from .server import LoopbackHub

PACKAGE = "@huggingface/hub@2.17"
pytestmark = pytest.mark.slow

PUSH = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2))
model.save_pretrained(root / "up", max_shard_size="3MB")  # several files of more than the client keeps in memory
(root / "up/README.md").write_text("---\\nlicense: mit\\ntags: [hfsd]\\n---\\n# Ünïcode\\n", encoding="utf-8")
(root / "up/deep").mkdir()
(root / "up/deep/notes.txt").write_text("deep")
api.create_repo("alice/js", private=True)
api.upload_folder(repo_id="alice/js", folder_path=root / "up")
api.create_tag("alice/js", tag="v1")
print(api.model_info("alice/js").sha)
"""

DOWNLOAD = """
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import * as hub from "@huggingface/hub";

const { HUB, TOKEN, CACHE } = process.env;
const repo = "alice/js", common = { repo, hubUrl: HUB, accessToken: TOKEN };
console.debug = () => {};
const told = { me: (await hub.whoAmI(common)).name };
const info = await hub.modelInfo({ ...common, name: repo, revision: "v1", additionalFields: ["sha", "tags"] });
told.sha = info.sha;
told.tags = info.tags;
told.folder = await hub.snapshotDownload({ ...common, revision: "v1", cacheDir: CACHE });

// every file: its hash as the Hub lists it against what has arrived
told.files = {};
for await (const entry of hub.listFiles({ ...common, recursive: true, revision: info.sha })) {
  if (entry.type !== "file") continue;
  const bytes = readFileSync(join(told.folder, entry.path));
  const blob = createHash("sha1").update(`blob ${bytes.length}\\0`).update(bytes).digest("hex");
  const sha256 = createHash("sha256").update(bytes).digest("hex");
  const right = entry.size === bytes.length && (entry.lfs ? entry.lfs.oid === sha256 : entry.oid === blob);
  told.files[entry.path] = { sha256, lfs: Boolean(entry.lfs), right };
}
const range = (await hub.downloadFile({ ...common, path: "model.safetensors.index.json" })).slice(2, 9);
told.slice = await range.text();
told.parameters = (await hub.parseSafetensorsMetadata({ ...common, computeParametersCount: true })).parameterTotal;
told.exists = await Promise.all(["config.json", "none.json"].map((path) => hub.fileExists({ ...common, path })));
told.missing = await hub.fileDownloadInfo({ ...common, path: "none.json" });
told.found = [];
for await (const model of hub.listModels({ ...common, search: { owner: "alice", tags: ["hfsd"] } })) {
  told.found.push(model.name);
}
told.refused = [];
for (const accessToken of ["hf_bob", "hf_wrong", undefined]) {
  const params = { ...common, accessToken, path: "config.json" };
  told.refused.push(await hub.fileDownloadInfo(params).catch((error) => error.statusCode));
}
console.log(JSON.stringify(told));
"""

PUSH_BACK = """
import * as hub from "@huggingface/hub";
const common = { repo: "alice/from-js", hubUrl: process.env.HUB, accessToken: process.env.TOKEN, useXet: false };
await hub.createRepo(common);
const lines = new Blob([Array.from({ length: 40_000 }, (_, i) => String(i).padStart(9, "0") + "\\n").join("")]);
const done = await hub.uploadFiles({
  ...common,
  commitTitle: "from JavaScript",
  files: [{ path: "lines.bin", content: lines }, { path: "notes.txt", content: new Blob(["text"]) }],
});
const late = { ...common, parentCommit: "0".repeat(40), file: { path: "x", content: new Blob(["x"]) } };
const status = await hub.uploadFile(late).catch((error) => error.statusCode);
console.log(JSON.stringify({ oid: done.commit.oid, status }));
"""


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which node finds the client."""
    for program in ("node", "npm"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed (apt-get install nodejs npm)")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"type": "module", "private": true}')
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", PACKAGE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"npm cannot install {PACKAGE}: {done.stderr.strip()[-300:]}")
    return folder


def _node(folder: Path, code: str, hub: LoopbackHub, cache: Path) -> dict:
    (folder / "client.mjs").write_text(code)
    env = {"PATH": os.environ["PATH"], "HUB": hub.endpoint, "TOKEN": "hf_alice", "CACHE": str(cache)}
    done = subprocess.run(["node", "client.mjs"], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_javascript_client_downloads_and_verifies(
    hub: LoopbackHub, client: Client, node_folder: Path, tmp_path: Path
) -> None:
    sha = client(PUSH).strip().splitlines()[-1]
    told = _node(node_folder, DOWNLOAD, hub, tmp_path / "js-cache")
    assert (told["me"], told["sha"]) == ("alice", sha) and "hfsd" in told["tags"]
    sent = {str(p.relative_to(tmp_path / "up")): p for p in (tmp_path / "up").rglob("*") if p.is_file()}
    files = told["files"]
    assert files.keys() == {*sent, ".gitattributes"} and all(file["right"] for file in files.values())
    for name, path in sent.items():
        assert files[name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest(), name
    weights = [name for name in files if name.endswith(".safetensors")]
    assert len(weights) > 1 and all(files[name]["lfs"] for name in weights)
    index = (tmp_path / "up/model.safetensors.index.json").read_text()
    assert told["slice"] == index[2:9]
    assert told["parameters"] == json.loads(index)["metadata"]["total_parameters"]
    assert (told["exists"], told["missing"]) == ([True, False], None)
    assert told["found"] == ["alice/js"] and told["refused"] == [404, 401, 404]


def test_javascript_client_pushes(node_folder: Path, tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "hub", {"hf_alice": "alice"}, part_size=150_000) as hub:
        told = _node(node_folder, PUSH_BACK, hub, tmp_path)
        code = """
        from huggingface_hub import HfApi, snapshot_download
        from pathlib import Path
        (head, _) = HfApi().list_repo_commits("alice/from-js")
        down = Path(snapshot_download("alice/from-js"))
        lines = b"".join(b"%09d\\n" % i for i in range(40_000))
        assert (down / "lines.bin").read_bytes() == lines and (down / "notes.txt").read_text() == "text"
        print(head.commit_id, head.title)
        """
        out = run_client(code, hub_env(hub, "hf_alice", tmp_path / "home"))
    assert out.split(maxsplit=1) == [told["oid"], "from JavaScript\n"] and told["status"] == 412
    assert len([call for call in hub.calls if call.path.startswith("/parts/")]) == 3

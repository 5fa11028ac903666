"""The pipeline with its shards at a URL."""

from pathlib import Path
from typing import Any

from cae.data.shards import Index
from pipeline import check_project
from pipeline.workspace import Workspace
from tests.pipeline.conftest import STAGES, MakeWorkspace
from tests.pipeline.test_parameters import _content
from tests.tiny import with_values


def test_shards_at_a_url_train_to_the_same_weights(
    tmp_path: Path, finished: Workspace, tiny_params: dict[str, Any], make_workspace: MakeWorkspace
) -> None:
    store = tmp_path / "store"
    raw = with_values(tiny_params, {"prepare.shards_at": f"file://{store}"})
    workspace = make_workspace(tmp_path / "root", raw)
    for stage in ("prepare", "tokenizer", "pretrain"):
        STAGES[stage](workspace)
    assert {path.name for path in workspace.prepared.iterdir()} == {"index.json", "rejects.csv"}
    local = Index.read(finished.prepared)
    assert workspace.index.model_copy(update={"shards_at": None}) == local
    # Another preparation has another hash, so it goes elsewhere.
    (folder,) = store.iterdir()
    assert local.hash.startswith(folder.name)
    assert {path.name for path in folder.iterdir()} == {shard.file for shard in local.shards}
    weights = [place.pretrained / "cae.safetensors" for place in (finished, workspace)]
    assert _content(weights[0]) == _content(weights[1])
    assert f"shards at {workspace.index.shards_at}" in next(check_project.prepared(workspace)).text

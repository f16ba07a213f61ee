"""A Hub in memory, and pipelines erased as if they had come from one."""

from types import SimpleNamespace

from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

from support import pipelines


BASE = "CompVis/stable-diffusion-v1-4"
REVISION = "1" * 40
BASE_CARD = """---
license: creativeml-openrail-m
license_link: LICENSE.md
tags:
- stable-diffusion
language: en
---

# Stable Diffusion
"""


class Hub:
    """What the tests need of a Hub, in memory: `repos[repo_id][branch][path]` is a file's bytes."""

    def __init__(self, tmp_path):
        self.tmp_path, self.writes = tmp_path, []
        self.repos = {BASE: {REVISION: {"README.md": BASE_CARD.encode()}}}

    def repo_exists(self, repo_id):
        return repo_id in self.repos

    def list_repo_files(self, repo_id, revision=None):
        if (revision or "main") not in self.repos[repo_id]:
            raise RevisionNotFoundError("no such branch", response=SimpleNamespace(headers={}, request=None))
        return sorted(self.repos[repo_id][revision or "main"])

    def hf_hub_download(self, repo_id, filename, revision=None):
        content = self.repos.get(repo_id, {}).get(revision or "main", {}).get(filename)
        if content is None:
            raise LocalEntryNotFoundError(f"no {filename} in {repo_id} at {revision}")
        file = self.tmp_path / "downloaded" / repo_id / filename
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return str(file)

    def create_repo(self, repo_id, private=None, exist_ok=False):
        assert exist_ok
        self.writes.append(("create_repo", private))
        self.repos.setdefault(repo_id, {"main": {}})

    def create_branch(self, repo_id, branch, exist_ok=False):
        assert exist_ok
        self.writes.append(("create_branch", branch))
        self.repos[repo_id].setdefault(branch, dict(self.repos[repo_id]["main"]))

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision=None):
        self.writes.append(("upload_folder", commit_message))
        files = self.repos[repo_id][revision or "main"]
        for path in sorted(folder_path.rglob("*")):
            if path.is_file():
                files[path.relative_to(folder_path).as_posix()] = path.read_bytes()
        return "the commit"

    def to_folder(self, repo_id, folder, revision="main"):
        for name, content in self.repos[repo_id][revision].items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder


def erase(pipe, concepts="van gogh", **kwargs):
    """As if the pipeline had come from the Hub."""
    pipe.register_to_config(_name_or_path=BASE)
    cached = f"/cache/models--CompVis--stable-diffusion-v1-4/snapshots/{REVISION}/unet"
    pipe.unet.register_to_config(_name_or_path=cached)
    return pipelines.erase(pipe, concepts, **kwargs)


def card_of(hub, repo_id="me/erased", branch="main"):
    return ModelCard(hub.repos[repo_id][branch]["README.md"].decode())

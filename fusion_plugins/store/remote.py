"""Stores and folders of responses on the Hugging Face hub: pushed as they are, pulled and read to the last byte.

A folder is a dataset repository of its own. Only the files that the manifest names are pushed, and a card. Tokens are
those of ``hf auth login`` or ``HF_TOKEN``; they are never printed.
"""

import os
from contextlib import closing
from pathlib import Path
from typing import Any

from fusion_plugins.errors import ConfigError, StoreError
from fusion_plugins.install import missing_package_error
from fusion_plugins.model_names import reason_of
from fusion_plugins.redaction import without_credentials
from fusion_plugins.store.files import FolderLock
from fusion_plugins.store.journal import JOURNAL_NAME
from fusion_plugins.store.maintain import AnyManifest, verify
from fusion_plugins.store.manifest import MANIFEST_NAME, TABLE_NAME, load_manifest
from fusion_plugins.store.shard_writer import SHARD_PREFIX

_CARD = """---
tags: [fusion-plugins]
configs:
- config_name: default
  data_files: [{files}]
---
# {title}

{noun}: {rows:,}. Made by {made_by}, {created}.

```bash
fusion store pull {repo} --out {folder}
```
"""


def push(folder: str | Path, repo: str, *, private: bool = True, message: str | None = None) -> str:
    """Upload a folder into a dataset repository, which is made if it is not there, and return the address.

    Args:
        folder: a store, or a folder of responses.
        repo: ``ORG/NAME``.
        private: of a repository that is made now.
        message: of the commit.

    Raises:
        StoreError: the folder is damaged or being written, the hub refuses it, or the repository holds something else,
            which a push would take the place of.
        ConfigError: ``huggingface_hub`` is not installed.
    """
    folder = Path(folder)
    api = _api()
    with closing(FolderLock(folder)):
        manifest = load_manifest(folder)
        names = [MANIFEST_NAME, JOURNAL_NAME, TABLE_NAME, *(shard.name for shard in manifest.shards)]
        card = _card(folder, repo, manifest)
        try:
            api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
            there = set(api.list_repo_files(repo, repo_type="dataset"))
        except Exception as error:  # of the network, the hub and its client
            raise _failed(f"{folder} cannot be pushed to {repo!r}", error) from None
        # A first push that was stopped has left the card alone.
        if MANIFEST_NAME not in there and (others := sorted(there - {"README.md", ".gitattributes"})):
            raise StoreError(
                f"{repo!r} holds no folder of this package but {', '.join(others[:3])}"
                f"{' ...' if len(others) > 3 else ''}, and nothing was pushed. Name a new repository."
            )
        try:
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repo, repo_type="dataset")
            done = api.upload_folder(
                folder_path=folder,
                repo_id=repo,
                repo_type="dataset",
                allow_patterns=names,
                # Shards of an earlier push that this folder no longer has would look like lost ones.
                delete_patterns=[f"{SHARD_PREFIX}*.parquet", JOURNAL_NAME],
                commit_message=message or f"{manifest.rows} {manifest.NOUN}",
            )
        except Exception as error:  # of the network, the hub and its client
            raise _failed(f"{folder} cannot be pushed to {repo!r}", error) from None
    return str(done)


def pull(repo: str, out: str | Path, *, revision: str | None = None) -> AnyManifest:
    """Download a folder from a dataset repository, read it to the last byte, and return its manifest.

    Args:
        repo: ``ORG/NAME``.
        out: the folder to write; an interrupted download is continued.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        StoreError: it cannot be downloaded, or what was downloaded is damaged or no folder of this package.
        ConfigError: ``huggingface_hub`` is not installed, or the folder to write is another store.
    """
    out = Path(out)
    download = _api().snapshot_download
    if (out / MANIFEST_NAME).exists() and not (out / ".cache" / "huggingface").exists():
        raise ConfigError(f"{out}: expected a new folder, or one that was pulled before, got a store. Name another.")
    try:
        download(
            repo,
            repo_type="dataset",
            revision=revision,
            local_dir=out,
            allow_patterns=[MANIFEST_NAME, JOURNAL_NAME, "*.parquet"],
        )
    except Exception as error:  # of the network, the hub and its client
        raise _failed(f"{repo!r} cannot be pulled", error) from None
    verdict = verify(out)
    if verdict.problems:
        raise StoreError(f"{out}, pulled from {repo!r}: {' '.join(verdict.problems)}")
    return verdict.manifest


def _api() -> Any:
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError as error:
        raise missing_package_error(error, "`fusion store push` and `pull`") from error
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="fusion-plugins")


def _card(folder: Path, repo: str, manifest: AnyManifest) -> str:
    return _CARD.format(
        title=folder.name,
        noun=manifest.NOUN.capitalize(),
        rows=manifest.rows,
        made_by=manifest.made_by,
        created=manifest.created,
        repo=repo,
        folder=folder.name,
        files=f'"{SHARD_PREFIX}*.parquet"',
    )


def _failed(what: str, error: Exception) -> StoreError:
    return StoreError(
        f"{what}: {without_credentials(reason_of(error))}. Check the name, the network and your rights (`hf auth "
        "login`), and run the same command again: what was transferred is kept."
    )

"""Replaces the code in a draft's repository on the Hub, which updates of this package do not reach."""

import json
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import StrictDataclassError

from transformers_prism.configuration_prism import PrismConfig
from transformers_prism.hub.files import AUTO_MAP, code_files, is_named_by

CONFIG = "config.json"
# Where code of earlier releases may be. Files in other folders are the user's.
_CODE = ("*.py", "custom_generate/*")


def renew_code(
    repo_id: str, token: bool | str | None = None, revision: str | None = None, message: str = "Renew code"
) -> tuple[CommitInfo, bool]:
    """Replace the code of a draft on the Hub by this package's, in one commit; weights, card, metrics and trees stay.

    Only the configuration is downloaded. Only its `auto_map` changes, if it does not name this code. Returns the
    commit, and whether it is new; if not, the repository had this code already.

    Raises:
        OSError: if the Hub refuses, or has no such repository or branch. Nothing has changed then.
        ValueError: if the repository is not a PRISM draft, or one that this package cannot read.
    """
    api = HfApi(token=token)
    info = api.model_info(repo_id, revision=revision)
    there = {file.rfilename for file in info.siblings or ()}
    files = code_files()
    config = _config_with_auto_map(api, repo_id, info.sha, there)
    if config is not None:
        files[CONFIG] = config
    left_over = [name for name in sorted(there - files.keys()) if is_named_by(name, _CODE)]
    operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    # With parent_commit the Hub refuses the commit if another one came between.
    commit = api.create_commit(
        repo_id,
        [*operations, *map(CommitOperationDelete, left_over)],
        commit_message=message,
        revision=revision,
        parent_commit=info.sha,
    )
    return commit, commit.oid != info.sha


def _config_with_auto_map(api: HfApi, repo_id: str, commit: str | None, there: set[str]) -> bytes | None:
    """The configuration with an `auto_map` that names this code; None where it does.

    Raises:
        ValueError: if it is not that of a PRISM draft, or this package cannot read it.
    """
    if CONFIG not in there:
        raise ValueError(f"{repo_id}: expected a PRISM draft, got a repository without {CONFIG}")
    try:
        content = json.loads(Path(api.hf_hub_download(repo_id, CONFIG, revision=commit)).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{repo_id}: expected JSON in {CONFIG}, got {error}") from error
    kind = content.get("model_type") if isinstance(content, dict) else type(content).__name__
    if kind != PrismConfig.model_type:
        raise ValueError(f"{repo_id}: expected a draft of model type {PrismConfig.model_type!r}, got {kind!r}")
    try:
        PrismConfig.from_dict(dict(content))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"{repo_id}: this package cannot read its {CONFIG}: {' '.join(str(error).split())}") from error
    auto_map = {**(content.get("auto_map") or {}), **AUTO_MAP}
    if content.get("auto_map") == auto_map:
        return None
    # As transformers writes it, so that no other line changes.
    return (json.dumps({**content, "auto_map": auto_map}, indent=2, sort_keys=True) + "\n").encode()

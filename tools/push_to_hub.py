#!/usr/bin/env python3
"""Upload an exported model to the Hugging Face hub.

    python tools/push_to_hub.py runs/tiny/hf owner/name [--private] [--revision step-100] [--dry-run]

FOLDER is `hf` of a run or a folder of its `exports`; its README.md becomes the model card. Log in with
`hf auth login` or set HF_TOKEN. The repository is made if it does not exist; with --revision files go to that
branch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_dapo.errors import UserError
from megatron_dapo.weights.hf import read_weight_map


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("repository", metavar="owner/name")
    parser.add_argument("--private", action="store_true", help="if the repository is made now")
    parser.add_argument("--revision", help="branch, made if it does not exist (default: main)")
    parser.add_argument("--dry-run", action="store_true", help="check the folder and list what would go")
    options = parser.parse_args()
    try:
        files = files_of(options.folder)
        if options.dry_run:
            print("\n".join(f"{path.stat().st_size:>15,} {path.name}" for path in files))
            return 0
        print(push(options.folder, options.repository, private=options.private, revision=options.revision))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def files_of(folder: Path) -> list[Path]:
    """What is uploaded. UserError when the folder is no whole checkpoint."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; give a run's hf folder, or one of its exports")
    missing = sorted(name for name in set(read_weight_map(folder).values()) if not (folder / name).is_file())
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which its index names; export it again")
    return sorted(path for path in folder.iterdir() if path.is_file())


def push(folder: Path, repository: str, *, private: bool, revision: str | None) -> str:
    """Upload the folder; returns the address of the commit. UserError for what the hub refuses."""
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        step = _step(folder)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=f"Weights after {step} steps" if step else "Weights",
        )
    except (OSError, HTTPError, HFValidationError) as error:
        raise UserError(
            f"{folder} was not uploaded to {repository}: {' '.join(str(error).split())[:500]}; log in with "
            "`hf auth login`, and check that the token may write there"
        ) from error
    return commit.commit_url


def _step(folder: Path) -> int | None:
    """Of an export's folder, step_000012."""
    digits = folder.name.removeprefix("step_")
    return int(digits) if digits != folder.name and digits.isdigit() else None


if __name__ == "__main__":
    sys.exit(main())

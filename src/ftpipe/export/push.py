"""What was exported goes to the hub, on request alone: ``export.push=user/name``.

By the driver, once the folder is finished, so that a hub out of reach costs nothing. The token is read
from the environment and goes nowhere else.
"""

from __future__ import annotations

import os

from ftpipe.artifacts import Artifact
from ftpipe.choices import Quantized
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, UserError

TOKEN = "HF_TOKEN"
# What an earlier push left is deleted in the same commit: one file of weights is read before many.
REPLACED = (
    *("*.safetensors", "*.safetensors.index.json", "*.gguf", "Modelfile"),
    *(f"{kind}/*" for kind in Quantized),
)
KEPT = ("uncommitted.diff", ".*")  # of the folder, what is nobody else's business


def check(cfg: RunConfig) -> None:
    """Refuse a push that cannot work, before anything runs.

    Raises:
        ConfigError: saying what is missing.
    """
    if cfg.export.push is None:
        return
    if "export" not in cfg.stages:
        raise ConfigError(
            f"export.push={cfg.export.push}, but 'export' is not among the stages; add it."
        )
    if not os.environ.get(TOKEN):
        raise ConfigError(
            f"export.push={cfg.export.push} needs the environment variable {TOKEN}: a token of the hub "
            "that may write (huggingface.co/settings/tokens)."
        )


def push(cfg: RunConfig, bundle: Artifact) -> str:
    """Upload a bundle and return where it is; the repository is made, private unless ``export.public``.

    Raises:
        UserError: if the hub refuses, is out of reach, or shows the repository to everybody unasked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    name, public = cfg.export.push, cfg.export.public
    assert name is not None
    files = sorted(bundle.manifest["files"])
    size = sum((bundle.path / file).stat().st_size for file in files)
    print(
        f"export: pushes {len(files)} files ({size / 10**6:,.1f} MB) of {bundle.path} to {name}, "
        f"{'for everybody to see' if public else 'private'}",
        flush=True,
    )
    try:
        api = HfApi(token=os.environ.get(TOKEN))
        where = api.create_repo(name, private=not public, exist_ok=True)
        seen = not api.repo_info(name).private
        if seen and not public:
            raise UserError(
                f"export.push={name} is there already and everybody can see it; set export.public=true, "
                "or another name. Nothing was uploaded."
            )
        api.upload_folder(
            repo_id=name,
            folder_path=str(bundle.path),
            ignore_patterns=list(KEPT),
            delete_patterns=list(REPLACED),
            commit_message=f"{bundle.path.name}, by ftpipe",
        )
    except UserError:
        raise
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set"
    except Exception as error:  # of its client's transport, too, which has names of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    else:
        return str(where)
    raise UserError(
        f"export.push={name} failed ({reason}); what was exported is in {bundle.path}, and the same "
        "command pushes it again."
    )

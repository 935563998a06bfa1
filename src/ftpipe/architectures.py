"""Which types of model can be loaded: those that transformers has a class of.

A model whose class comes as code in its own repository is refused, unless model.trust_remote_code says
otherwise. docs/models.md has the types that the recipes use.
"""

from __future__ import annotations

from ftpipe.errors import ModelError, nearest

# What early commits of a model call a type that transformers took up under another name.
LATER_NAMES = {"RefinedWeb": "falcon", "RefinedWebModel": "falcon", "stablelm_epoch": "stablelm"}


def refuse_unknown(kind: str, what: str) -> None:
    """Refuse a type of model that transformers has no class of.

    Args:
        kind: ``model_type`` of a config.json.
        what: the beginning of the sentence, which says where the type stands.

    Raises:
        ModelError: with the nearest type, or the one that it was renamed to.
    """
    from transformers import CONFIG_MAPPING

    if kind in CONFIG_MAPPING:
        return
    if kind in LATER_NAMES:
        later = LATER_NAMES[kind]
        hint = f" Later commits of such models say '{later}', which it knows: give one of those."
    else:
        hint = nearest(kind, list(CONFIG_MAPPING))
    raise ModelError(f"{what} is unknown to transformers.{hint}")


def refuse_foreign(where: str, revision: str | None) -> None:
    """Refuse a folder or hub model whose type only code of its own could load.

    What cannot be read at all is left to whoever loads it.

    Raises:
        ModelError: if transformers has no class of its type.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    try:
        stated, _ = PreTrainedConfig.get_config_dict(where, revision=revision)
    except (OSError, ValueError):
        return
    kind = str(stated.get("model_type", ""))
    if not kind or kind in CONFIG_MAPPING:
        return
    what = f"the model {where} is of the type '{kind}', which"
    if "auto_map" in stated and kind not in LATER_NAMES:
        raise ModelError(
            f"{what} transformers has no class of: it comes as code in the model's own repository, and "
            "ftpipe runs no such code. docs/models.md has the types that work; "
            "model.trust_remote_code=true runs that code, untested."
        )
    refuse_unknown(kind, what)


def without_class(error: BaseException, where: str, scored: bool) -> str | None:
    """Return why a type that transformers knows has no model for the purpose; None for other errors.

    Args:
        error: what AutoModel raised.
        scored: whether a score was asked for rather than a language model.
    """
    if not str(error).startswith("Unrecognized configuration class"):
        return None
    purpose = (
        "class with a score, so it can be neither a reward model nor a value function"
        if scored
        else "language model"
    )
    return f"the model {where} is of a type of which transformers has no {purpose}."

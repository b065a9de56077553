"""The licence of a base model, as its own card states it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard, constants, hf_hub_download
from yaml import YAMLError

from saber.paths import expanded

KEYS = ("license", "license_name", "license_link")


def licence(name: str, source: str, revision: str = "") -> dict[str, str]:
    """Return what the card of a folder or a hub repository says under `KEYS`; empty where nothing is known.

    `revision` is a branch, tag or commit of the repository, main where it is empty. Without the hub the card
    in its cache is read. A link to a file beside the card leads to the hub, and is left out where the base is
    none of its repositories.
    """
    data = _front(name, source, revision)
    found = {key: str(data[key]) for key in KEYS if isinstance(data.get(key), str)}
    link = found.get("license_link", "")
    if link and "://" not in link:
        del found["license_link"]
        if source == "hub":
            place = f"{name}/blob/{quote(revision or 'main', safe='')}"
            found["license_link"] = f"{constants.ENDPOINT}/{place}/{link.lstrip('./')}"
    return found if "license" in found else {}


def _front(name: str, source: str, revision: str) -> dict[str, Any]:
    """Return the metadata block of a model's card, empty where there is none that can be read."""
    try:
        if source == "folder":
            path = expanded(name) / constants.REPOCARD_NAME
        elif source == "hub":
            path = Path(hf_hub_download(name, constants.REPOCARD_NAME, revision=revision or None))
        else:
            return {}
        found: dict[str, Any] = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError):
        return {}
    return found

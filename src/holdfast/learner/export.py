"""The model that answers as a plain Hugging Face folder with a card, or on the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.learner.card import model_card, write_card
from holdfast.learner.config import STAGES
from holdfast.learner.skills import read_skills
from holdfast.learner.state import LearnerState
from holdfast.models import is_encoder_decoder
from holdfast.models.adapters import is_adapted, recompress


def export(state: LearnerState, target: Path, rank: int | None, title: str | None = None) -> Path:
    """Write the model that answers into a new or empty folder, see `Learner.export`.

    Parameters
    ----------
    title : str, optional
        Of the card; by default the folder's name.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunDirectoryError(f"{target}: not an empty folder. Choose a new or empty one.")
    if target.resolve().is_relative_to((state.folder.path / STAGES).resolve()):
        raise RunDirectoryError(f"{target}: lies among what was learned here. Choose a folder elsewhere.")
    if rank is not None and (state.strategy.changes_base or not is_adapted(state.model)):
        raise ConfigError(
            f"export: got rank {rank}, but what answers here is a whole model and no adapter. Leave the "
            "rank out."
        )
    target.mkdir(parents=True, exist_ok=True)
    state.strategy.export(state.context, target)
    if rank is not None:
        try:
            left = recompress(target, rank)
        except ConfigError:
            shutil.rmtree(target)
            raise
        state.context.progress.say(
            f"{target}: rank {rank} holds {100 * left:.1f} % of the adapter's squared size."
        )
    if state.learned:
        path = None if state.config.model is None else state.config.model.path
        known = path if path is not None and not Path(path).expanduser().exists() else None
        adapter = (target / "adapter_config.json").exists()
        skills = read_skills(state.folder.path)
        card = model_card(
            skills,
            base_model=known,
            adapter=adapter,
            title=title or target.name,
            encoder_decoder=is_encoder_decoder(state.model),
        )
        write_card(target, card)
    return target


def push(folder: Path, repo_id: str, *, private: bool | None, token: str | None, message: str) -> str:
    """Upload a folder to the hub; returns its address.

    Raises
    ------
    ConfigError
        It can't: no account, no permission, a name that is none, no network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=url.repo_id, commit_message=message)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"push_to_hub: '{repo_id}' can't be uploaded ({said}). Log in with `hf auth login`, check the "
            "name and the network (HF_HUB_OFFLINE), or export to a folder and upload that."
        ) from error
    return str(url)

"""The Hugging Face Hub: what it accepts, checked before anything is written, and the upload of a folder."""

import difflib
import shlex
from pathlib import Path

from deitkit.errors import RecipeError, reason_of

# The Hub's identifiers; it refuses a card with another one.
LICENCES = (
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m",
    "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2",
    "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "grok2-community",
    "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by",
    "ofl-1.1", "openmdw-1.0", "openmdw-1.1", "openrail", "openrail++", "osl-3.0", "other", "pddl", "postgresql",
    "unknown", "unlicense", "wtfpl", "zlib",
)  # fmt: skip
# What an earlier upload may have left, and a new one may not have.
OWN_FILES = (
    "config.json", "model.json", "model.onnx", "model-int8.onnx", "model.onnx.json", "model.safetensors", "recipe.yaml",
)  # fmt: skip


def check_licence(licence: str | None) -> None:
    """Raise RecipeError for a licence that the Hub does not know."""
    if licence is None or licence in LICENCES:
        return
    near = difflib.get_close_matches(licence.lower(), LICENCES, n=1)
    hint = f"did you mean {near[0]}?" if near else "name one as the Hub does, such as apache-2.0 or cc-by-4.0, or other"
    raise RecipeError(f"--licence {licence} is not one of the Hub's identifiers: {hint}")


def full_name(name: str) -> str:
    """Return a name on the Hub as USER/NAME; one without a user is of the user who is logged in.

    Raises:
        RecipeError: It cannot be a name there, or nobody is logged in.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise RecipeError(
            f"--push {name} is not a name on the Hub ({_reason(error)}): give USER/NAME or NAME"
        ) from None
    try:
        user = HfApi().whoami()["name"]
    except Exception as error:  # of the network, of HTTP, of the token
        raise RecipeError(
            f"--push {name} needs a login ({_reason(error)}): log in with hf auth login and check the network, or drop "
            "--push"
        ) from None
    return name if "/" in name else f"{user}/{name}"


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a published folder to the Hugging Face Hub, and return its address.

    Files of ours that an earlier upload left, and this folder does not have, are deleted there.

    Raises:
        RecipeError: There is no network, no login, no right to write there, or the Hub refuses the folder.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        stays_public = private and not api.repo_info(address.repo_id).private  # an existing one stays what it was
        if not stays_public:
            api.upload_folder(
                repo_id=address.repo_id,
                folder_path=folder,
                commit_message="Published with deitkit",
                delete_patterns=list(OWN_FILES),
            )
    except Exception as error:  # of the network, of HTTP, of the token, of the card
        command = shlex.join(["hf", "upload", name, str(folder), *(["--private"] if private else [])])
        raise RecipeError(
            f"--push {name} failed ({_reason(error)}): check the network, the name USER/NAME and the login (hf auth "
            f"login); {folder} is complete and can be uploaded later: {command}"
        ) from None
    if stays_public:
        raise RecipeError(
            f"--push {name} with --private: this name is a public repository already, so nothing was uploaded; choose "
            f"another name for {folder}"
        )
    return str(address)


def _reason(error: Exception) -> str:
    """Return what an error says: all of it, in one line, where the Hub lists what is wrong with a value."""
    return " ".join(str(error).split()).rstrip(".") if isinstance(error, ValueError) else reason_of(error)

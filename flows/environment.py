"""Environment variables that a run sets, unless the user has set them. They stop telemetry, and writes to the home folder."""

import os
import tomllib
from pathlib import Path


def set_defaults(folder: Path) -> None:
    """Turns telemetry off, keeps logs short, and puts the caches of Prefect and matplotlib under `folder`.

        Call it before Prefect and matplotlib are imported. It makes no folder, because nothing is written before settings and
    data are checked.
    """
    defaults = {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",  # its threads log whole documents when a server ends
        "PREFECT_CLI_COLORS": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    if url := _profiles_server():  # Prefect would use it silently, and other code would not know
        defaults["PREFECT_API_URL"] = url
    elif "PREFECT_API_URL" not in os.environ:  # the embedded server is on this machine: it answers at once, or has ended
        defaults["PREFECT_CLIENT_MAX_RETRIES"] = "2"
    if not Path("~/.prefect").expanduser().exists():  # a user of Prefect keeps the profiles and the server
        defaults["PREFECT_HOME"] = str((folder / ".prefect").resolve())
    if not Path("~/.config/matplotlib").expanduser().exists():
        defaults["MPLCONFIGDIR"] = str((folder / ".matplotlib").resolve())
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _profiles_server() -> str | None:
    """The server in the active profile of the user's Prefect."""
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    try:
        document = tomllib.loads(Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml")).read_text("utf-8"))
        profile = document["profiles"][os.environ.get("PREFECT_PROFILE", document.get("active"))]
        return str(profile["PREFECT_API_URL"])
    except (OSError, ValueError, KeyError, TypeError):  # no profile, or a broken one, which Prefect itself will report
        return None


def make_home() -> None:
    """The folder of Prefect's settings and database. Its server does not create it."""
    if "PREFECT_HOME" in os.environ:
        Path(os.environ["PREFECT_HOME"]).expanduser().mkdir(parents=True, exist_ok=True)

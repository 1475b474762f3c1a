"""Environment variables that a run sets unless the user has: nothing phones home, nothing is written into the home folder."""

import os
import tomllib
from pathlib import Path


def set_defaults(folder: Path) -> None:
    """Telemetry off, short logs, and caches of Prefect and matplotlib under `folder`; call it before either is imported.

    Makes no folder: until a configuration and its data are known to be sound, nothing is written.
    """
    defaults = {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",  # of its own threads, which log whole documents when a server goes
        "PREFECT_CLI_COLORS": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    if url := _profiles_server():  # Prefect would use it silently, and no other code would know it
        defaults["PREFECT_API_URL"] = url
    elif "PREFECT_API_URL" not in os.environ:  # the embedded server is on this machine and answers at once, or it has ended
        defaults["PREFECT_CLIENT_MAX_RETRIES"] = "2"
    if not Path("~/.prefect").expanduser().exists():  # a user who has Prefect keeps its profiles and its server
        defaults["PREFECT_HOME"] = str((folder / ".prefect").resolve())
    if not Path("~/.config/matplotlib").expanduser().exists():
        defaults["MPLCONFIGDIR"] = str((folder / ".matplotlib").resolve())
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _profiles_server() -> str | None:
    """The server that the active profile of the user's Prefect names."""
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    try:
        document = tomllib.loads(Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml")).read_text("utf-8"))
        profile = document["profiles"][os.environ.get("PREFECT_PROFILE", document.get("active"))]
        return str(profile["PREFECT_API_URL"])
    except (OSError, ValueError, KeyError, TypeError):  # no profile, or one that Prefect itself will report
        return None


def make_home() -> None:
    """The folder of Prefect's settings and database, which its server does not make."""
    if "PREFECT_HOME" in os.environ:
        Path(os.environ["PREFECT_HOME"]).expanduser().mkdir(parents=True, exist_ok=True)

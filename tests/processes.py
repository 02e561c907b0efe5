"""Whether other processes have ended."""

from pathlib import Path


def ended(pid: int) -> bool:
    """Whether no process has the number, or a dead one whose parent has not asked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True

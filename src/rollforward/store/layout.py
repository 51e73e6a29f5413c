"""Names and folders of a run, and nothing else: pure functions that build names and parse them.

A name that these functions cannot parse is not ours, and is never removed.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rollforward.position import Position

ROLE_FOLDERS = {"policy_model": "train", "optimizer": "optimizer", "ref": "ref"}
"""role -> folder, for the contract's three roles. Any other role's folder has the role's own name."""

RESERVED = frozenset(
    {"commits", "journal", "model", "train", "heartbeat", "evidence", "strategy", "log", "tensorboard"}
    | {"compile_cache", "attachments", "metrics", "pieces", "recoveries", "tables", "tmp"}
)
"""Folders that a run has or may have one day, so they cannot be role names; nor can `rank_<n>`."""

COMMITS = "commits"
EVIDENCE = "evidence"
GUESTS = "guests.json"
JOURNAL = "journal"
LOCK = "run.lock"
META = "meta.json"
MODEL = "model"
TABLES = "tables"

MAX_ATTEMPT = 999_999
"""The greatest that a name has room for."""

_NUMBER = r"(?:0|[1-9]\d{0,17})"
_ROLE = re.compile(r"[a-z][a-z0-9_]{0,39}", re.ASCII)
_BEHIND_ROLE = re.compile(
    rf"(?:\.(?P<attempt>[1-9]\d{{0,5}}))?_rank_(?P<rank>{_NUMBER})"
    rf"-(?P<position>{_NUMBER}_{_NUMBER})\.safetensors",
    re.ASCII,
)
_TABLE = re.compile(
    rf"table(?:\.(?P<attempt>[1-9]\d{{0,5}}))?_rank_(?P<rank>{_NUMBER})-(?P<position>{_NUMBER}_{_NUMBER})\.json",
    re.ASCII,
)
_SEGMENT = re.compile(rf"({_NUMBER})-({_NUMBER}_{_NUMBER})\.journal", re.ASCII)
_MANIFEST = re.compile(rf"({_NUMBER}_{_NUMBER})\.json", re.ASCII)
_RANK = re.compile(rf"rank_({_NUMBER})", re.ASCII)
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.ASCII)
_FOLDER_ROLES = {folder: role for role, folder in ROLE_FOLDERS.items()}

Generation = tuple[str, Position, int]
"""(kind, position, attempt): files written together, one by each rank. The kind is a role, or TABLES."""


@dataclass(frozen=True)
class TensorFileName:
    """A tensor file's parsed name."""

    role: str
    rank: int
    position: Position
    attempt: int = 0
    """Sets it apart from other files of this role, rank and position; on a disk, it counts those that were
    committed before."""

    @property
    def name(self) -> str:
        """The bare file name."""
        return f"{self.role}{_again(self.attempt)}_rank_{self.rank}-{self.position}.safetensors"

    @property
    def path(self) -> str:
        """Relative to the run's folder."""
        return f"{rank_folder(self.role, self.rank)}/{self.name}"

    @property
    def generation(self) -> Generation:
        """The files that were written with it."""
        return self.role, self.position, self.attempt

    @classmethod
    def parse(cls, path: str) -> "TensorFileName | None":
        """Parse a path relative to the run's folder; None when it is not one of our tensor files."""
        parts = path.split("/")
        role = role_of_folder(parts[0])
        if len(parts) != 3 or role is None or not parts[2].startswith(role):
            return None
        match = _BEHIND_ROLE.fullmatch(parts[2], len(role))
        if match is None:
            return None
        position = Position.parse(match["position"])
        parsed = cls(role, int(match["rank"]), position, int(match["attempt"] or 0))
        return parsed if parsed.path == path else None


@dataclass(frozen=True)
class TableName:
    """The parsed name of a rank's table of a checkpoint."""

    rank: int
    position: Position
    attempt: int = 0
    """Number of earlier committed tables with this rank and position."""

    @property
    def path(self) -> str:
        """Relative to the run's folder."""
        again = _again(self.attempt)
        return f"{rank_folder(TABLES, self.rank)}/table{again}_rank_{self.rank}-{self.position}.json"

    @property
    def generation(self) -> Generation:
        """The tables that were written with it."""
        return TABLES, self.position, self.attempt

    @classmethod
    def parse(cls, path: str) -> "TableName | None":
        """Parse a path relative to the run's folder; None when it is not a table."""
        match = _TABLE.fullmatch(path.rpartition("/")[2])
        if match is None:
            return None
        parsed = cls(int(match["rank"]), Position.parse(match["position"]), int(match["attempt"] or 0))
        return parsed if parsed.path == path else None


def parse_rank_file(path: str) -> TensorFileName | TableName | None:
    """Parse the path of a tensor file or a table; None when it is neither."""
    return TableName.parse(path) if path.startswith(f"{TABLES}/") else TensorFileName.parse(path)


def _again(attempt: int) -> str:
    return f".{attempt}" if attempt else ""


@dataclass(frozen=True, order=True)
class SegmentName:
    """A journal segment's parsed name."""

    rank: int
    incarnation: int
    first: Position
    """It holds no record of an earlier position."""

    @property
    def path(self) -> str:
        """Relative to the run's folder."""
        return f"{journal_folder(self.rank)}/{self.incarnation}-{self.first}.journal"

    @property
    def torn_path(self) -> str:
        """Where its torn end is kept after being cut off."""
        return f"{self.path}.torn"

    @classmethod
    def parse(cls, rank: int, name: str) -> "SegmentName | None":
        """Parse a bare file name in a rank's journal folder; None when it is not a segment."""
        match = _SEGMENT.fullmatch(name)
        return cls(rank, int(match[1]), Position.parse(match[2])) if match else None


def is_role(name: str) -> bool:
    """Whether this is a valid name for a role."""
    return _ROLE.fullmatch(name) is not None and name not in RESERVED and parse_rank(name) is None


def check_roles(names: Iterable[str]) -> None:
    """ValueError for the first one that is not a valid role name."""
    for name in names:
        if not isinstance(name, str) or not _ROLE.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot be the name of a role: a small letter comes first, then at most 39 small "
                "letters, digits and underscores, as in critic or reward_model"
            )
        if not is_role(name):
            raise ValueError(
                f"{name!r} cannot be the name of a role, since a run keeps other things in a folder of this "
                f"name; reserved are rank_<n> and {', '.join(sorted(RESERVED))}"
            )


def in_order(roles: Iterable[str]) -> list[str]:
    """Roles in the order of manifests: the contract's first, then the others by name."""
    given = set(roles)
    return [role for role in ROLE_FOLDERS if role in given] + sorted(given - ROLE_FOLDERS.keys())


def role_folder(role: str) -> str:
    """`train` for `policy_model`; the role's own name for roles outside the contract."""
    return ROLE_FOLDERS.get(role, role)


def role_of_folder(folder: str) -> str | None:
    """The role whose files are in this folder of a run; None when it is not a role's folder."""
    return _FOLDER_ROLES.get(folder) or (folder if is_role(folder) else None)


def journal_folder(rank: int) -> str:
    """`journal/rank_0`."""
    return f"{JOURNAL}/rank_{rank}"


def rank_folder(role: str, rank: int) -> str:
    """`train/rank_0` and the like."""
    return f"{role_folder(role)}/rank_{rank}"


def meta_path(role: str, rank: int) -> str:
    """The path of a rank's `meta.json` for a role."""
    return f"{rank_folder(role, rank)}/{META}"


def manifest_path(position: Position) -> str:
    """`commits/0_20.json`."""
    return f"{COMMITS}/{position}.json"


def parse_manifest_name(name: str) -> Position | None:
    """The position of a manifest in `commits/`; None when the name is not a manifest's."""
    match = _MANIFEST.fullmatch(name)
    return Position.parse(match[1]) if match else None


def parse_rank(name: str) -> int | None:
    """The rank that a folder belongs to; None when it is not a rank's folder."""
    match = _RANK.fullmatch(name)
    return int(match[1]) if match else None


def is_temporary(name: str) -> bool:
    """Whether an unfinished durable write leaves files with such a name."""
    return _TEMPORARY.fullmatch(name) is not None

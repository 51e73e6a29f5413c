"""What can be done to a folder that somebody hands over: from the documented format, at random, by a seed.

A *blind* change is one of bytes, names or kinds of files; digests tell it. A *sealed* one is an edit whose
digests were computed again, as whoever wants to mislead us would: only the rules of the format can tell it.
"""

import json
import os
import random
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollforward.store.digests import digest
from rollforward.store.journal.frames import FRONT_BYTES, NO_SALT, encode_frame

MARK = "\x1b]0;owned\x07"
"""What a terminal would act upon."""

JUNK: tuple[Any, ...] = (
    *(
        0,
        -1,
        1,
        2,
        7,
        40,
        1 << 31,
        1 << 40,
        (1 << 63) - 1,
        1 << 63,
        10**17,
        10**18,
        10**400,
        0.5,
        -0.0,
        1e308,
    ),
    *(
        True,
        False,
        None,
        "",
        "0_3",
        "9_9",
        "x",
        "../../precious",
        "/etc/passwd",
        "0" * 32,
        "\ud800",
        "é\u202e",
    ),
    *(MARK, f"a{MARK}b\nc\td", "[/bold]", "[red", "[/]", [], {}, [[]], [1, "a"], {"a": []}, ["0_3"] * 3),
)
RAW = (b"1e999", b"NaN", b"-Infinity", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\xff\xfe", b"\x00")
"""What stands in JSON only where it was not written by a JSON library."""


@dataclass
class Attack:
    """Changes one folder; remembers whether digests tell all of it."""

    folder: Path
    rng: random.Random
    others: Sequence[Path] = ()
    """Folders of other runs, to take files from."""
    outside: Path = Path("/nowhere")
    """A file that nothing may touch, for links."""
    sealed: bool = False
    done: list[str] = field(default_factory=list)

    def run(self, count: int) -> None:
        """That many changes, one on top of the other."""
        for _ in range(count):
            change = self.rng.choice(BLIND if self.rng.random() < 0.6 else SEALED)
            self.done.append(change.__name__)
            change(self)

    def file(self, part: str = "") -> Path | None:
        """One of the regular files whose path has this part."""
        found = sorted(
            p for p in self.folder.rglob("*") if part in str(p) and p.is_file() and not p.is_symlink()
        )
        found = [path for path in found if path.stat().st_size < 1 << 24]
        if not found:
            return None
        path = self.rng.choice(found)
        self.done.append(str(path.relative_to(self.folder)))
        return path

    def is_inside(self, path: Path) -> bool:
        """Whether what is written there stays in the folder: an earlier change may have made a link above."""
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder))


def flip(attack: Attack) -> None:
    path = attack.file()
    if path and (content := bytearray(path.read_bytes())):
        for _ in range(attack.rng.choice((1, 1, 8))):
            content[attack.rng.randrange(len(content))] ^= 1 << attack.rng.randrange(8)
        path.write_bytes(content)


def cut(attack: Attack) -> None:
    path = attack.file()
    if path:
        content = path.read_bytes()
        path.write_bytes(content[: attack.rng.randrange(len(content) + 1)])


def grow(attack: Attack) -> None:
    path = attack.file()
    if path:
        more = attack.rng.choice((b"\0", bytes(5000), attack.rng.randbytes(300), path.read_bytes()))
        path.write_bytes(path.read_bytes() + more)


def empty(attack: Attack) -> None:
    path = attack.file()
    if path:
        path.write_bytes(b"")


def sparse(attack: Attack) -> None:
    """Forty gigabytes that take no room."""
    path = attack.file()
    if path:
        with path.open("r+b") as file:
            file.truncate(attack.rng.choice((1 << 20, 1 << 30, 40 << 30)))


def remove(attack: Attack) -> None:
    path = attack.file()
    if path:
        path.unlink()


def exchange(attack: Attack) -> None:
    one, other = attack.file(), attack.file()
    if one and other:
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)


def from_elsewhere(attack: Attack) -> None:
    """A file of another run or rank, under its own name or under another one's."""
    if attack.others:
        theirs = Attack(attack.rng.choice(attack.others), attack.rng)
        path, own = theirs.file(), attack.file()
        if path and own:
            place = attack.folder / path.relative_to(theirs.folder) if attack.rng.random() < 0.7 else own
            if not place.is_dir() and place.parent.is_dir() and attack.is_inside(place):
                place.unlink(missing_ok=True)
                place.write_bytes(path.read_bytes())


def another_kind(attack: Attack) -> None:
    """A pipe, a folder, a socket or a link in place of a file."""
    path = attack.file()
    if path is None:
        return
    path.unlink()
    kind = attack.rng.choice(("fifo", "folder", "link", "loop", "zero", "dangling", "socket"))
    attack.done.append(kind)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            here = Path.cwd()
            os.chdir(path.parent)
            try:
                made.bind(path.name[:90])
            finally:
                os.chdir(here)
    else:
        targets = {
            "link": attack.outside,
            "loop": path,
            "zero": Path("/dev/zero"),
            "dangling": Path("nothing"),
        }
        path.symlink_to(targets[kind])


def linked_folder(attack: Attack) -> None:
    """A folder becomes a link: to itself, out of the run, to what it was."""
    folders = sorted(p for p in attack.folder.rglob("*") if p.is_dir() and not p.is_symlink())
    path = attack.rng.choice(folders)
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    path.symlink_to(attack.rng.choice((aside, path, attack.outside.parent)))
    attack.done.append(path.name)


NAMES = (
    *("train/rank_99999999", "ref/rank_999999999999", "journal/rank_99999999", "critic/rank_0", "évidence"),
    *("journal/rank_0/999999999999999999-0_0.journal", "journal/rank_0/999999999999999998-9_9.journal"),
    *(
        "journal/rank_0/77-0_0.journal",
        "commits/999999999999999999_0.json",
        "commits/0_99.json",
        "commits/x.json",
        "tables/rank_0/table_rank_0-0_99.json",
        "tables/rank_999999999999/table.1_rank_999999999999-0_3.json",
    ),
    *(
        "evidence/0_1-2",
        f"evidence/{MARK}",
        "guests.json",
        "model/x",
        "tmp",
        f"train/rank_0/{MARK}",
        "log/train.log",
    ),
    *("train/rank_0/policy_model_rank_0-0_99.safetensors", "train/rank_0/policy_model_rank_0_1-0_99.ckpt"),
    *("recoveries.jsonl", "metrics.jsonl", "run.lock", "heartbeat/rank_0.json", "train/meta.json"),
)


def stray(attack: Attack) -> None:
    """Something under a name that means something, or that no text can show."""
    name = attack.rng.choice(NAMES)
    attack.done.append(name)
    path = attack.folder / name
    if attack.rng.random() < 0.1:
        path = Path(os.fsdecode(os.fsencode(path.parent) + b"/\xff\xfe" + os.fsencode(path.name)))
    if os.path.lexists(path) or not path.parent.parent.is_dir() or not attack.is_inside(path):
        return
    if not path.parent.is_dir() and os.path.lexists(path.parent):
        return
    path.parent.mkdir(exist_ok=True)
    how = attack.rng.choice(("empty", "empty", "folder", "text", "json", "random"))
    if how == "folder" or "rank_9" in name:
        path.mkdir()
        return
    value = json.dumps(attack.rng.choice(JUNK)).encode()
    contents = {"empty": b"", "text": MARK.encode() * 40, "json": value, "random": attack.rng.randbytes(999)}
    path.write_bytes(contents[how])


BLIND: tuple[Callable[[Attack], None], ...] = (
    *(
        flip,
        flip,
        flip,
        cut,
        grow,
        empty,
        sparse,
        remove,
        exchange,
        from_elsewhere,
        another_kind,
        another_kind,
    ),
    *(linked_folder, stray, stray),
)


def edited(value: Any, rng: random.Random) -> Any:
    """A JSON value with one place changed."""
    if isinstance(value, dict | list) and value and rng.random() < 0.93:
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(list(keys))
        how = rng.random()
        if how < 0.06:
            del value[key]
        elif how < 0.12 and isinstance(value, list):
            value.append(value[key])
        elif how < 0.16 and isinstance(value, dict):
            value[str(rng.choice(JUNK))] = value[key]
        else:
            value[key] = edited(value[key], rng)
        return value
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 64, 1 << 20, 1 << 35))
    return rng.choice(JUNK)


def written(value: Any, rng: random.Random) -> bytes:
    """The value as JSON; at times with something in it that no JSON library writes."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )
    places = [at for at in range(len(text) - 1) if text[at : at + 1] == b":"]
    if places and rng.random() < 0.15:
        at = rng.choice(places) + 1
        end = next((e for e in range(at, len(text)) if text[e : e + 1] in b",}]"), len(text))
        text = text[:at] + rng.choice(RAW) + text[end:]
    if rng.random() < 0.05 and text.startswith(b"{") and len(text) > 2:
        text = b"{" + text[1:-1] + b"," + text[1:]  # every key twice
    return text


def edit_manifest(attack: Attack) -> None:
    path = attack.file("commits/")
    if path is None:
        return
    attack.sealed = True
    try:
        value = json.loads(path.read_bytes())
        del value["digest"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    body = written(edited(value, attack.rng), attack.rng)[:-1]
    path.write_bytes(body + f',"digest":"{digest(body)}"}}\n'.encode())


def edit_table(attack: Attack) -> None:
    """A rank's table, and the manifest that names it, so that only what it says can be wrong."""
    path = attack.file("tables/")
    if path is None:
        return
    attack.sealed = True
    above = attack.folder / "commits" / f"{path.stem.rpartition('-')[2]}.json"
    try:
        value, manifest = json.loads(path.read_bytes()), json.loads(above.read_bytes())
        del value["digest"], manifest["digest"]
        body = written(edited(value, attack.rng), attack.rng)[:-1]
        content = body + f',"digest":"{digest(body)}"}}\n'.encode()
        entry = manifest["tables"][int(path.parent.name.removeprefix("rank_"))]
        entry[:2] = [len(content), digest(body)]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return
    path.write_bytes(content)
    body = json.dumps(manifest, separators=(",", ":")).encode()[:-1]
    above.write_bytes(body + f',"digest":"{digest(body)}"}}\n'.encode())


def frames_of(content: bytes) -> list[tuple[int, int, bytes]]:
    """Sequence number, unsynced and payload of each frame."""
    found, at = [], 0
    while len(content) - at >= FRONT_BYTES:
        _, length, sequence, unsynced, _ = struct.unpack_from("<8sQII16s", content, at)
        if length > len(content) - at - FRONT_BYTES:
            break
        found.append((sequence, unsynced, content[at + FRONT_BYTES : at + FRONT_BYTES + length]))
        at += FRONT_BYTES + length
    return found


def segment_of(frames: Sequence[tuple[int, int, bytes]]) -> bytes:
    """A segment of these frames, as a writer would have written it."""
    content, salt = b"", NO_SALT
    for sequence, unsynced, payload in frames:
        frame = encode_frame(sequence, unsynced, payload, salt)
        salt = frame[24:40] if not content else salt
        content += frame
    return content


def edit_record(attack: Attack) -> None:
    """A record of the journal: its metadata, the shape of an array, its data; frames twice or exchanged."""
    path = attack.file(".journal")
    if path is None or not (frames := frames_of(path.read_bytes())):
        return
    attack.sealed = True
    rng = attack.rng
    number = rng.randrange(len(frames))
    sequence, unsynced, payload = frames[number]
    how = rng.choice(
        ("header", "header", "text", "data", "data", "twice", "exchange", "sequence", "unsynced")
    )
    attack.done.append(how)
    try:
        length = int.from_bytes(payload[:8], "little")
        header, data = json.loads(payload[8 : 8 + length]), payload[8 + length :]
    except ValueError:
        return
    if how == "header":
        payload = blob(written(edited(header, rng), rng), data)
    elif how == "text":
        # JSON within a text of the metadata
        about = header.get("__metadata__", {}) if isinstance(header, dict) else {}
        inner = sorted(key for key, text in about.items() if isinstance(text, str) and text[:1] in "{[")
        if inner:
            key = rng.choice(inner)
            value = written(edited(json.loads(about[key]), rng), rng)
            about[key] = value.decode("utf-8", "replace")
        payload = blob(json.dumps(header).encode(), data)
    elif how == "data" and data:
        at = rng.randrange(len(data))
        payload = blob(json.dumps(header).encode(), data[:at] + rng.randbytes(4) + data[at + 4 :])
    elif how == "twice":
        frames.insert(number, frames[number])
    elif how == "exchange":
        other = rng.randrange(len(frames))
        payload = frames[other][2]
    elif how == "sequence":
        sequence = rng.choice((0, sequence + 1, (1 << 32) - 1))
    elif how == "unsynced":
        unsynced = rng.choice((0, 1, sequence + 1, (1 << 32) - 1))
    frames[number] = sequence, unsynced, payload
    path.write_bytes(segment_of(frames))


def blob(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def edit_header(attack: Attack) -> None:
    """The header of a tensor file; the manifest does not know of it."""
    path = attack.file(".safetensors")
    if path is None:
        return
    content = path.read_bytes()
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
    except ValueError:
        return
    if attack.rng.random() < 0.2:
        claimed = attack.rng.choice((0, 7, 1 << 20, 99_000_000, 1 << 40, (1 << 64) - 1))
        path.write_bytes(claimed.to_bytes(8, "little") + content[8:])
    else:
        path.write_bytes(blob(written(edited(header, attack.rng), attack.rng), content[8 + length :]))


def edit_json(attack: Attack) -> None:
    """One of the small files that have no digest."""
    path = attack.file(attack.rng.choice(("meta.json", "run.lock", "heartbeat", "guests", "model/")))
    if path is None:
        return
    # A resumed run may take another number or start from it: it says nothing of what was computed.
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    path.write_bytes(written(edited(value, attack.rng), attack.rng).ljust(attack.rng.choice((0, 512, 4096))))


def edit_line(attack: Attack) -> None:
    """A line of the metrics or of the reports of recoveries."""
    path = attack.file(".jsonl")
    if path is None or not (lines := path.read_bytes().splitlines()):
        return
    number = attack.rng.randrange(len(lines))
    try:
        lines[number] = written(edited(json.loads(lines[number]), attack.rng), attack.rng)
    except (ValueError, RecursionError):
        return
    path.write_bytes(b"\n".join(lines) + b"\n")


SEALED: tuple[Callable[[Attack], None], ...] = (
    *(
        edit_manifest,
        edit_manifest,
        edit_table,
        edit_table,
        edit_record,
        edit_record,
        edit_record,
        edit_header,
        edit_json,
        edit_line,
    ),
)

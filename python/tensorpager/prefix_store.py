# SPDX-License-Identifier: Apache-2.0
"""`PrefixStore`: a directory of blocks of keys and values, for any number of processes and runs.

A block is a file that is named after all that its bits depend on (prefix_chain.py), so it is never changed, and one
that is there is the right one. It is written under another name and renamed when it is whole. Nothing is synced: a
block that a power failure left half written is found out by its checksums (prefix_block.py), deleted, and computed
again.

[Note: several processes]
Readers need no lock: a file that is deleted meanwhile can be read to its end. Who writes takes the lock of the
directory (flock) to make room, and to set aside all the bytes that it is going to write; so the budget holds for all
processes together, at any moment. A file under way is locked by its writer; one that is not has lost its writer, and is
deleted.

[Note: who goes]
A block is worth the seconds that computing it would take, over its bytes, over the time since it was used last: what
has not been wanted for long will hardly be wanted now. The least worth goes first, of those that no stored block
follows on: one without the block before it could never be found.

Threads: any. Blocking: yes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tensorpager.budget import parse_bytes
from tensorpager.errors import IoError
from tensorpager.prefix_block import BlockHeader, DamagedBlockError, Part, part_checksum, write_all
from tensorpager.prefix_chain import DIGEST_BYTES

__all__ = ["NewBlock", "PrefixStore", "StoredBlock"]

_SUFFIX, _NEW = ".prefix", ".new"
_NAME_LENGTH = 2 * DIGEST_BYTES
LOCK_SECONDS_MAX = 30.0
_LOCK_RETRY_SECONDS = 0.005
#: Of a block of which nobody knows what it took.
_UNKNOWN_SECONDS = 1e-3


class StoredBlock:
    """An open block. read_part() may be called from several threads."""

    def __init__(self, store: PrefixStore, name: bytes, descriptor: int, header: BlockHeader) -> None:
        self._store = store
        self._descriptor = descriptor
        self.name = name
        self.header = header

    def read_part(self, part: Part, into: memoryview) -> bool:
        """Read a part into the first bytes of memory, and verify it. False: it is damaged, and the block is not in the
        store any more. IoError."""
        payload = into[: part.size_bytes]
        done = 0
        while done < part.size_bytes:
            try:
                got = os.preadv(self._descriptor, [payload[done:]], part.offset_bytes + done)
            except OSError as error:
                raise self._store.error(error) from error
            if got <= 0:
                break
            done += got
        if done == part.size_bytes and part_checksum(self.name, part, payload) == part.checksum:
            self._store._count("bytes_read", part.size_bytes)
            return True
        self._store._remove_damaged(self.name, self._descriptor)
        return False

    def delete(self) -> None:
        """It is not what its name says: nobody is to find it again."""
        self._store._remove_damaged(self.name, self._descriptor)

    def close(self) -> None:
        """Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class NewBlock:
    """A block under way, whose bytes are set aside. write_part() may be called from several threads."""

    def __init__(self, store: PrefixStore, name: bytes, file_name: str, descriptor: int, header: BlockHeader) -> None:
        self._store = store
        self._file_name = file_name
        self._descriptor = descriptor
        self.name = name
        self.header = header
        self._parts = list(header.parts)

    def write_part(self, index: int, payload: memoryview) -> None:
        """The bytes of header.parts[index]. OSError."""
        part = self._parts[index]
        assert len(payload) == part.size_bytes
        self._parts[index] = replace(part, checksum=part_checksum(self.name, part, payload))
        write_all(self._descriptor, payload, part.offset_bytes)

    def finish(self, recompute_seconds: float) -> None:
        """All parts are written: from now on it can be found. OSError."""
        header = replace(self.header, parts=tuple(self._parts), recompute_seconds=recompute_seconds)
        write_all(self._descriptor, header.encode(self.name), 0)
        # Under the lock: who makes room might see neither name, and set aside more than there is.
        with self._store._directory() as directory, self._store._locked(directory):
            os.rename(self._file_name, _file_name(self.name), src_dir_fd=directory, dst_dir_fd=directory)
        os.close(self._descriptor)
        self._descriptor = -1
        self._store._count("blocks_saved")
        self._store._count("bytes_written", header.file_bytes)

    def abandon(self) -> None:
        """Nothing of it is left. After finish(): nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with self._store._directory() as directory, suppress(FileNotFoundError):
                os.unlink(self._file_name, dir_fd=directory)
            os.close(descriptor)


@dataclass
class _Entry:
    """A block in the directory, as eviction sees it."""

    name: str
    size_bytes: int
    used_at: float
    parent: str
    recompute_seconds: float

    def worth(self, now: float) -> float:
        """[Note: who goes]."""
        seconds = self.recompute_seconds or _UNKNOWN_SECONDS
        return seconds / max(1, self.size_bytes) / (max(0.0, now - self.used_at) + 1.0)


class PrefixStore:
    """Stored prefixes: give it to `KVCache(prefix_store=...)`.

    directory: made if it is not there, mode 0700, but not its parents; it must be the user's own and writable by nobody
    else. budget: bytes of all files in it, of all processes together; each may give another, and keeps to it when it
    writes. namespace: prefixes are found by those alone who give the same: one for each user, say, so that nobody can
    tell from the time an answer takes what others have asked. block_tokens: tokens in a block, which is loaded or
    computed as a whole; blocks of another size are others.

    IoError for a directory that can't be used, ValueError for what is no size.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        budget: int | str = "10GiB",
        *,
        namespace: str = "",
        block_tokens: int = 256,
    ) -> None:
        if block_tokens < 1:
            msg = f"block_tokens is {block_tokens}; a block has a token or more"
            raise ValueError(msg)
        self.directory = os.fspath(directory)
        self.budget_bytes = parse_bytes(budget)
        self.namespace = namespace
        self.block_tokens = block_tokens
        self._known: dict[str, tuple[str, float]] = {}  # parent and seconds, by file name: they never change
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()  # over the two above, and of the threads among themselves
        self._making = threading.Lock()
        try:
            Path(self.directory).mkdir(mode=0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise self.error(error) from error
        with self._directory():
            pass

    def __repr__(self) -> str:
        return f"PrefixStore({self.directory!r}, budget={self.budget_bytes}, namespace={self.namespace!r})"

    def stats(self) -> dict[str, int]:
        """Of this process: blocks_saved, blocks_damaged (found, and deleted), blocks_evicted, bytes_read,
        bytes_written; and stored_bytes and stored_blocks, of the directory as it is now.

        Waits for the lock, or what another process deletes and what it makes could both be counted. IoError.
        """
        with self._directory() as directory, self._locked(directory):
            sizes = [size for name, size, _ in _files(directory) if name.endswith(_SUFFIX)]
        with self._lock:
            names = ("blocks_saved", "blocks_damaged", "blocks_evicted", "bytes_read", "bytes_written")
            counts = {name: self._counts[name] for name in names}
        return {**counts, "stored_blocks": len(sizes), "stored_bytes": sum(sizes)}

    def error(self, error: OSError) -> IoError:
        """The same as one of ours, which says where."""
        return _io_error(self.directory, error)

    # -- reading

    def find(self, names: Sequence[bytes]) -> int:
        """How many of the names, from the first on, are stored. They may be gone, or damaged, when they are opened."""
        with self._directory() as directory:
            missing = (count for count, name in enumerate(names) if not _exists(directory, _file_name(name)))
            return next(missing, len(names))

    def open(self, name: bytes) -> StoredBlock | None:
        """A stored block, and it counts as used now; None when there is none, or only a damaged one, which is deleted.

        IoError when it can't be read.
        """
        with self._directory() as directory:
            try:
                descriptor = os.open(
                    _file_name(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory
                )
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENXIO):
                    raise self.error(error) from error
                self._remove_damaged(name, None)  # a link, a socket: nothing that was written here
                return None
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
                msg = "it is no file of the user's own"
                raise DamagedBlockError(msg)
            header = BlockHeader.read(descriptor, name)
            with suppress(OSError):  # on a read-only file system blocks just grow old
                os.utime(descriptor)
            return StoredBlock(self, name, descriptor, header)
        except DamagedBlockError:
            self._remove_damaged(name, descriptor)
        except OSError as error:
            os.close(descriptor)
            raise self.error(error) from error
        os.close(descriptor)
        return None

    def _remove_damaged(self, name: bytes, descriptor: int | None) -> None:
        """Delete a block that is not what it should be, unless another has taken its place meanwhile."""
        with self._directory() as directory, suppress(FileNotFoundError):
            there = os.stat(_file_name(name), dir_fd=directory, follow_symlinks=False)
            if descriptor is not None and not os.path.samestat(there, os.fstat(descriptor)):
                return
            if stat.S_ISDIR(there.st_mode):
                return
            os.unlink(_file_name(name), dir_fd=directory)
            self._count("blocks_damaged")

    # -- writing

    def create(self, blocks: Sequence[tuple[bytes, BlockHeader]]) -> list[NewBlock]:
        """Set aside room for blocks of one chain, in order: as many as the budget allows, less those that are there.

        Others are evicted for them, but none that they follow on. IoError, also when the drive is full.
        """
        made: list[NewBlock] = []
        following = {header.parent for _, header in blocks} | {name.hex() for name, _ in blocks}
        try:
            with self._directory() as directory, self._locked(directory):
                used_bytes = self._delete_abandoned(directory)
                for name, header in blocks:
                    if _exists(directory, _file_name(name)):
                        continue
                    room = self.budget_bytes - header.file_bytes
                    if used_bytes > room:
                        used_bytes -= self._evict(directory, used_bytes - room, following)
                    if used_bytes > room:
                        break
                    made.append(self._set_aside(directory, name, header))
                    used_bytes += header.file_bytes
        except BaseException as error:
            for block in made:
                block.abandon()
            if isinstance(error, OSError) and not isinstance(error, IoError):
                raise self.error(error) from error
            raise
        return made

    def _set_aside(self, directory: int, name: bytes, header: BlockHeader) -> NewBlock:
        file_name = f"{name.hex()}.{secrets.token_hex(8)}{_NEW}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(file_name, flags, 0o600, dir_fd=directory)
        block = NewBlock(self, name, file_name, descriptor, header)
        try:
            os.fchmod(descriptor, 0o600)  # whatever the umask
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.posix_fallocate(descriptor, 0, header.file_bytes)
        except BaseException:
            block.abandon()
            raise
        return block

    def _delete_abandoned(self, directory: int) -> int:
        """Delete files under way whose writers are gone. Returns the bytes of all files that are left."""
        used_bytes = 0
        for name, size_bytes, _ in _files(directory):
            if not name.endswith(_NEW) or not _is_abandoned(directory, name):
                used_bytes += size_bytes
                continue
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
        return used_bytes

    def _evict(self, directory: int, wanted_bytes: int, following: Iterable[str]) -> int:
        """[Note: who goes]. Returns the bytes that were freed, which may be fewer."""
        kept = set(following)
        entries = {entry.name: entry for entry in self._entries(directory)}
        followed = Counter(entry.parent for entry in entries.values())
        now = time.time()
        freed = 0
        while freed < wanted_bytes:
            leaves = [entry for name, entry in entries.items() if followed[name] == 0 and name not in kept]
            if not leaves:
                break
            least = min(leaves, key=lambda entry: (entry.worth(now), entry.name))
            del entries[least.name]
            followed[least.parent] -= 1
            with suppress(FileNotFoundError):
                os.unlink(least.name + _SUFFIX, dir_fd=directory)
                self._count("blocks_evicted")
            self._known.pop(least.name, None)
            freed += least.size_bytes
        return freed

    def _entries(self, directory: int) -> Iterator[_Entry]:
        for file_name, size_bytes, used_at in _files(directory):
            name = file_name.removesuffix(_SUFFIX)
            if name == file_name or len(name) != _NAME_LENGTH:
                continue
            known = self._known.get(name)
            if known is None:
                known = self._known[name] = _parent_and_seconds(directory, file_name, name)
            yield _Entry(name, size_bytes, used_at, *known)

    # -- the directory

    @contextmanager
    def _directory(self) -> Iterator[int]:
        """A descriptor of the directory, which is the user's own. IoError."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            descriptor = os.open(self.directory, flags)
        except OSError as error:
            raise self.error(error) from error
        try:
            facts = os.fstat(descriptor)
            if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
                why = "is another user's" if facts.st_uid != os.geteuid() else "can be written to by others"
                msg = f"{self.directory} {why}: prefixes are kept in a directory of one's own, mode 0700"
                raise IoError(errno.EPERM, msg)
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _locked(self, directory: int) -> Iterator[None]:
        """The lock of all processes, and of this one's threads. IoError after LOCK_SECONDS_MAX."""
        deadline = time.monotonic() + LOCK_SECONDS_MAX
        with self._making:
            while True:
                try:
                    fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        msg = (
                            f"another process has held the lock of {self.directory} for {LOCK_SECONDS_MAX:.0f} s: it "
                            "was stopped, perhaps. Nothing was saved"
                        )
                        raise IoError(errno.EAGAIN, msg) from error
                time.sleep(_LOCK_RETRY_SECONDS)
            try:
                yield
            finally:
                fcntl.flock(directory, fcntl.LOCK_UN)

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number


def _file_name(name: bytes) -> str:
    assert len(name) == DIGEST_BYTES
    return name.hex() + _SUFFIX


def _files(directory: int) -> list[tuple[str, int, float]]:
    """Name, size in bytes and time of last use of each file that is a block, or under way."""
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith((_SUFFIX, _NEW)):
                with suppress(FileNotFoundError):
                    facts = entry.stat(follow_symlinks=False)
                    found.append((entry.name, facts.st_size, facts.st_mtime))
    return found


def _exists(directory: int, file_name: str) -> bool:
    try:
        os.stat(file_name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _is_abandoned(directory: int, file_name: str) -> bool:
    """Whether no process has the file open to write to it. Asked under the directory's lock."""
    try:
        descriptor = os.open(file_name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    except OSError:
        return False  # renamed, or nothing of ours
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _parent_and_seconds(directory: int, file_name: str, name: str) -> tuple[str, float]:
    """Of a block's header; of a damaged one nothing, so that it is worth little."""
    try:
        descriptor = os.open(file_name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    except OSError:
        return "", 0.0
    try:
        header = BlockHeader.read(descriptor, bytes.fromhex(name))
    except (DamagedBlockError, OSError, ValueError):
        return "", 0.0
    finally:
        os.close(descriptor)
    return header.parent, header.recompute_seconds


def _io_error(directory: str, error: OSError) -> IoError:
    why = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        why += "; what is stored is whole. Free space, or give the store a smaller budget"
    return IoError(error.errno or 0, f"the prefix store in {directory} failed: {why}")

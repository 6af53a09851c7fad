"""Files over SFTP, as `ssh` would reach them: keys, agent, `~/.ssh/config` and known hosts of the user.

fsspec's own file system does not meet the guarantees of `storage`: it trusts every host key, writes in place,
so that others see partial files, and keeps closed connections. Needs paramiko, the extra `sftp`.
"""

import contextlib
import logging
import os
import shlex
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko
from fsspec.implementations.sftp import SFTPFileSystem

logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # what it says there is raised as well

SECONDS = 30.0
"""How long a server may take to answer."""

_PIECE = 1 << 15


class Sftp(SFTPFileSystem):
    """A connection to one host, of one thread of one process (fsspec keeps one for each)."""

    protocol = ("sftp", "ssh")

    @property
    def alive(self) -> bool:
        """Whether the connection is open."""
        return _active(self.client)

    def _connect(self) -> None:
        """Connect, or connect again.

        Raises:
            PermissionError: the host is unknown or another one than before, or takes none of the user's keys;
                to try again is of no use.
            OSError: it does not answer.
        """
        self.client = paramiko.SSHClient()
        for file in ("/etc/ssh/ssh_known_hosts", os.path.expanduser("~/.ssh/known_hosts")):
            with contextlib.suppress(FileNotFoundError):
                self.client.load_system_host_keys(file)
        self.client.set_missing_host_key_policy(paramiko.RejectPolicy())
        limits = dict.fromkeys(("timeout", "banner_timeout", "auth_timeout"), SECONDS)
        try:
            self.client.connect(**limits, **_settings(self.host, self.ssh_kwargs))
        except paramiko.BadHostKeyException as error:
            raise PermissionError(f"{error}; see ~/.ssh/known_hosts") from None
        except paramiko.SSHException as error:
            text = " ".join(str(error).split()).rstrip(".")
            if "known_hosts" in text:
                raise PermissionError(
                    f"{text}: call `ssh {self.host}` once and compare its key"
                ) from None
            if _active(
                self.client
            ):  # it speaks, but not to us; paramiko may say what key did not fit
                raise PermissionError(
                    f"{self.host} takes no key of yours; `ssh {self.host}` must work without a question "
                    "(a key without a passphrase, or an agent that has it)"
                ) from None
            raise
        self.client.get_transport().set_keepalive(int(SECONDS))
        self.ftp = self.client.open_sftp()
        self.ftp.get_channel().settimeout(SECONDS)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """The bytes [start, end) of a file, many requests at a time."""
        with self._reading(path) as stream:
            size = stream.stat().st_size
            first, last = start or 0, size if end is None else min(end, size)
            places = [(at, min(_PIECE, last - at)) for at in range(first, last, _PIECE)]
            return b"".join(stream.readv(places))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        """Write a file whole."""
        with self._replacing(path) as stream:
            stream.write(value)

    def put_file(self, lpath: str, rpath: str, callback: Any = None, **_: Any) -> None:
        """Copy a local file."""
        with open(lpath, "rb") as source, self._replacing(rpath) as stream:
            while piece := source.read(1 << 20):
                stream.write(piece)

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **_: Any) -> Any:
        if mode != "rb":
            raise ValueError(f"{mode}: files are written whole")
        stream = self._reading(path)
        stream.prefetch(stream.stat().st_size, max_concurrent_requests=64)
        return stream

    def _reading(self, path: str) -> Any:
        stream = self.ftp.open(path, "rb")
        ask = stream._prefetch_thread

        def quietly(*arguments: Any) -> None:
            with contextlib.suppress(Exception):  # whoever reads meets it too
                ask(*arguments)

        stream._prefetch_thread = quietly
        return stream

    @contextlib.contextmanager
    def _replacing(self, path: str) -> Iterator[Any]:
        """A file beside `path` that takes its place when the block ends well."""
        folder, _, name = path.rpartition("/")
        temporary = f"{folder}/.{name[:50]}.{uuid.uuid4().hex}.tmp"
        try:
            with self.ftp.open(temporary, "wb") as stream:
                stream.set_pipelined(True)
                yield stream
            # A server of OpenSSH's replaces in one step; with another, a file could be missing for a moment.
            self.ftp.posix_rename(temporary, path)
        except BaseException as error:
            with contextlib.suppress(Exception):
                self.ftp.remove(temporary)
            if "unsupported" in str(error).lower():
                raise ValueError(
                    "the server cannot replace a file in one step (posix-rename@openssh.com)"
                ) from None
            raise


@contextlib.contextmanager
def connected(url: str) -> Iterator[tuple[Sftp, str]]:
    """A file system that is connected, and the path on it; after trouble the next one connects anew."""
    system = Sftp(**Sftp._get_kwargs_from_urls(url))
    if not system.alive:
        system._connect()
    try:
        yield system, Sftp._strip_protocol(url)
    except (FileNotFoundError, IsADirectoryError, ValueError, PermissionError):
        raise
    except BaseException:
        system.client.close()
        raise


def _active(client: paramiko.SSHClient) -> bool:
    transport = client.get_transport()
    return transport is not None and transport.is_active()


def _settings(host: str, given: dict[str, Any]) -> dict[str, Any]:
    """How to reach a host: the URL's user, port and password before those of `~/.ssh/config`."""
    file = Path(os.path.expanduser("~/.ssh/config"))  # which stays if the user has no home folder
    found: dict[str, Any] = {}
    if file.is_file():
        try:
            found = dict(paramiko.SSHConfig.from_path(str(file)).lookup(host))
        except (paramiko.SSHException, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: {error}") from None
    name = found.get("hostname", host)
    port = int(given.get("port") or found.get("port") or 22)
    settings: dict[str, Any] = {"hostname": name, "port": port}
    if user := given.get("username") or found.get("user"):
        settings["username"] = user
    if "password" in given:
        settings["password"] = given["password"]
    if keys := found.get("identityfile"):
        settings["key_filename"] = [key for key in keys if os.path.exists(key)]
    command = found.get("proxycommand")
    if command is None and (jump := found.get("proxyjump")):
        command = f"ssh -W {shlex.quote(f'{name}:{port}')} {shlex.quote(jump)}"
    if command and command != "none":
        settings["sock"] = paramiko.ProxyCommand(command)
    return settings

"""A real SFTP server on loopback, in this process, for one user with one key; it shows the local files."""

import os
import socket
import threading
from pathlib import Path
from typing import Any

import paramiko


class Server:
    """Serves until `close`; `home` is a home folder with what `ssh box` needs.

    Attributes:
        lost: so many of the coming reads end their connection.
        renames: whether it can replace a file in one step.
        connections: that were made.
    """

    def __init__(self, home: Path) -> None:
        self.lost, self.renames, self.connections = 0, True, 0
        self.lock = threading.Lock()
        self.host_key, self.user_key = (paramiko.ECDSAKey.generate() for _ in range(2))
        self.transports: list[paramiko.Transport] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        folder = home / ".ssh"
        folder.mkdir()
        self.user_key.write_private_key_file(str(folder / "key"))
        key = f"{self.host_key.get_name()} {self.host_key.get_base64()}"
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {key}\n")
        (folder / "config").write_text(
            f"Host box\n HostName 127.0.0.1\n Port {self.port}\n User me\n IdentityFile {folder}/key\n"
        )
        self.thread = threading.Thread(target=self._accept)
        self.thread.start()

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join()
        for transport in self.transports:
            transport.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.connections += 1
            transport = paramiko.Transport(connection)
            transport.add_server_key(self.host_key)
            transport.set_subsystem_handler("sftp", paramiko.SFTPServer, _Files, self, transport)
            self.transports.append(transport)
            transport.start_server(threading.Event(), _Login(self))

    def loses(self) -> bool:
        """Whether this read is one that ends its connection."""
        with self.lock:
            self.lost -= 1
            return self.lost >= 0


class _Login(paramiko.ServerInterface):
    def __init__(self, server: Server) -> None:
        self.server = server

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        known = username == "me" and key == self.server.user_key
        return paramiko.AUTH_SUCCESSFUL if known else paramiko.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED


class _Handle(paramiko.SFTPHandle):
    def __init__(self, files: "_Files", flags: int) -> None:
        super().__init__(flags)
        self.files = files

    def stat(self) -> Any:
        return paramiko.SFTPAttributes.from_stat(os.fstat(self.readfile.fileno()))

    def read(self, offset: int, length: int) -> Any:
        if self.files.server.loses():
            self.files.transport.close()
        return super().read(offset, length)


def _answer(action: Any, *arguments: Any) -> Any:
    """What a call returns, or the number that stands for its error."""
    try:
        result = action(*arguments)
    except OSError as error:
        return paramiko.SFTPServer.convert_errno(error.errno)
    return paramiko.SFTP_OK if result is None else result


class _Files(paramiko.SFTPServerInterface):
    def __init__(self, login: _Login, server: Server, transport: paramiko.Transport) -> None:
        self.server, self.transport = server, transport

    def list_folder(self, path: str) -> Any:
        def entries() -> Any:
            return [
                paramiko.SFTPAttributes.from_stat(os.lstat(f"{path}/{name}"), name)
                for name in os.listdir(path)
            ]

        return _answer(entries)

    def stat(self, path: str) -> Any:
        return _answer(lambda: paramiko.SFTPAttributes.from_stat(os.stat(path)))

    def lstat(self, path: str) -> Any:
        return _answer(lambda: paramiko.SFTPAttributes.from_stat(os.lstat(path)))

    def open(self, path: str, flags: int, attr: Any) -> Any:
        def opened() -> _Handle:
            mode = "wb" if flags & os.O_WRONLY else "rb"
            handle = _Handle(self, flags)
            handle.filename = path
            handle.readfile = handle.writefile = open(path, mode, buffering=0)  # noqa: SIM115
            return handle

        return _answer(opened)

    def remove(self, path: str) -> Any:
        return _answer(os.remove, path)

    def posix_rename(self, oldpath: str, newpath: str) -> Any:
        if not self.server.renames:
            return paramiko.SFTP_OP_UNSUPPORTED
        return _answer(os.replace, oldpath, newpath)

    def mkdir(self, path: str, attr: Any) -> Any:
        return _answer(os.mkdir, path)

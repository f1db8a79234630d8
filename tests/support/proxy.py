"""A TCP proxy in front of a server, to break the line in every way a line can break."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Literal, Self

Mode = Literal["pass", "refuse", "reset", "blackhole"]


class Proxy:
    """Forwards 127.0.0.1:port to 127.0.0.1:upstream, in one of four modes.

    pass: forwards.  refuse: connecting fails at once (ECONNREFUSED).  reset: accepts, then RST.
    blackhole: accepts, swallows what is sent and never answers; the connections that exist are
    held too, in both directions, until the mode is 'pass' again.
    ``cut()`` resets every connection there is, whatever the mode.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self._mode: Mode = "pass"
        self._lock = threading.RLock()
        self._pairs: list[tuple[socket.socket, socket.socket | None]] = []
        self._closing = False
        self.connections = 0  # accepted so far
        self.delay = 0.0  # seconds for which every piece of data is held back, one after the other
        self._listener: socket.socket | None = self._listen(0)
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"proxy-{self.port}")
        self._thread.start()

    @property
    def mode(self) -> Mode:
        return self._mode

    def set(self, mode: Mode) -> None:
        """Change the mode; holds for new connections and, for 'blackhole', for those that exist."""
        with self._lock:
            if mode == "refuse" and self._listener is not None:
                self._listener.close()
                self._listener = None
            if mode != "refuse" and self._listener is None:
                self._listener = self._listen(self.port)
            self._mode = mode

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            for ends in self._pairs:
                for end in ends:
                    _reset(end)
            self._pairs.clear()

    def close(self) -> None:
        with self._lock:
            self._closing = True
            if self._listener is not None:
                self._listener.close()
                self._listener = None
            self.cut()
        self._thread.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _listen(port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        deadline = time.monotonic() + 5
        while True:
            try:
                listener.bind(("127.0.0.1", port))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        listener.listen(64)
        listener.setblocking(False)
        return listener

    def _run(self) -> None:
        while not self._closing:
            with self._lock:
                listener, pairs, mode = self._listener, list(self._pairs), self._mode
            ends: dict[socket.socket, socket.socket | None] = {}
            if mode != "blackhole":
                for client, server in pairs:
                    ends[client] = server
                    if server is not None:
                        ends[server] = client
            wanted = [*ends, *([listener] if listener else [])]
            try:
                ready, _, _ = select.select(wanted, [], [], 0.02)
            except (OSError, ValueError):  # closed by another thread meanwhile
                continue
            for sock in ready:
                if sock is listener:
                    self._accept(sock)
                else:
                    self._forward(sock, ends[sock])

    def _accept(self, listener: socket.socket) -> None:
        with self._lock:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            client.setblocking(True)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._mode == "reset":
                _reset(client)
                return
            server: socket.socket | None = None
            if self._mode == "pass":
                try:
                    server = socket.create_connection(("127.0.0.1", self.upstream), timeout=2)
                    server.settimeout(None)
                    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                except OSError:
                    _reset(client)
                    return
            self._pairs.append((client, server))

    def _forward(self, source: socket.socket, sink: socket.socket | None) -> None:
        try:
            data = source.recv(262144)
            time.sleep(self.delay)
            if data and sink is not None:
                sink.sendall(data)
            if data:
                return
        except OSError:
            pass
        with self._lock:
            for ends in [ends for ends in self._pairs if source in ends]:
                self._pairs.remove(ends)
                for end in ends:
                    if end is not None:
                        end.close()


def _reset(sock: socket.socket | None) -> None:
    """Close with RST instead of FIN."""
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

"""HTTP servers of tests, on the loopback interface."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LoopbackServer:
    """A server that runs from its making on, and can be stopped and started again.

    Args:
        handler: answers the requests.
        port: to listen on; 0 is a free one.
        path: what its `url` ends in.
    """

    def __init__(
        self, handler: type[BaseHTTPRequestHandler], port: int = 0, *, path: str = ""
    ) -> None:
        self._handler, self._path = handler, path
        self.start(port)

    def start(self, port: int) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", port), self._handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}{self._path}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join(10)

"""How long may a client take to send a request, and to read its answer?

uvicorn closes a connection that idles between requests. The rest is here: a request must be there REQUEST_SECONDS after
its first byte (the first one after the connection), within so many bytes, and an answer be read in the same time.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from llmtrain.serve import limits


class Connection(HttpToolsProtocol):
    """One client. `deadline` runs whenever bytes of a request are awaited."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.deadline: asyncio.TimerHandle | None = None
        self.unread: asyncio.TimerHandle | None = None
        self.received = 0  # bytes of the present request
        self.in_head = True
        self.draining = False
        self.unanswered: list[RequestResponseCycle] = []  # oldest first; there are several where a client does not wait

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.deadline, self.unread):
            if timer is not None:
                timer.cancel()
        for cycle in self.unanswered:  # uvicorn tells the newest alone
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._await_request()
        self.received += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.in_head and self.received > limits.HEAD_BYTES:
            self._cut(431, f"the headers have more than {limits.HEAD_BYTES} bytes")
        elif self.received > limits.REQUEST_BYTES:
            self._cut(413, f"the request has more than {limits.REQUEST_BYTES} bytes")

    def on_message_begin(self) -> None:
        self._await_request()
        self.in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.in_head = False
        super().on_headers_complete()
        self.unanswered.append(self.cycle)
        if self.draining:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
        self.in_head = True
        self.received = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self.unanswered.pop(0)
        super().on_response_complete()

    def shutdown(self) -> None:
        """Answer what comes within DRAIN_SECONDS, and tell the client to go elsewhere."""
        self.draining = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        elif self.received == 0:
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(limits.DRAIN_SECONDS, self.timeout_keep_alive_handler)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread = self.loop.call_later(limits.REQUEST_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _await_request(self) -> None:
        if self.deadline is None:
            self.deadline = self.loop.call_later(limits.REQUEST_SECONDS, self._late)

    def _late(self) -> None:
        self._cut(408, f"the request did not arrive within {limits.REQUEST_SECONDS:g} seconds")

    def _cut(self, status: int, message: str) -> None:
        """Close the connection, saying why where no answer has begun."""
        if self.transport.is_closing():
            return
        if self.received and (self.cycle is None or self.in_head or not self.cycle.response_started):
            body = json.dumps({"errors": [{"field": None, "message": message}]})
            head = f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n{body}".encode())
        self.transport.close()

"""What a browser says to the page, word by word."""

from __future__ import annotations

import http.client
import io
import json

import av
import numpy as np
from PIL import Image

JSON = {"Content-Type": "application/json"}


def call(port, method, path, body=None, headers=None, host="127.0.0.1"):
    """(status, headers, bytes) of one request."""
    connection = http.client.HTTPConnection(host, port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def said(answer):
    """The one line of an error."""
    text = json.loads(answer[2])["error"]
    assert "\n" not in text and "Traceback" not in text
    return text


def upload(port, data, media_type="application/octet-stream"):
    return call(port, "POST", "/files", data, {"Content-Type": media_type})


def ask(port, question, file=None, **more):
    """The events of an answer."""
    status, headers, body = call(port, "POST", "/ask", json.dumps({"question": question, "file": file, **more}), JSON)
    assert status == 200, body
    assert headers["content-type"].startswith("text/event-stream")
    return [json.loads(one.removeprefix("data: ")) for one in body.decode().split("\n\n") if one]


def begun(port, question, file=None):
    """A connection whose answer is still coming, and the response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/ask", json.dumps({"question": question, "file": file}), JSON)
    return connection, connection.getresponse()


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def lossless(frames, fps=2):
    """A clip whose frames come back as they are."""
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()

"""Images and videos from files or bytes to pixels; what cannot be read says why.

Pillow and FFmpeg (by PyAV) do the reading: an image is what Pillow gives, upright and scaled to 8 bits, a video frame
what FFmpeg shows at its time, upright. A file is never trusted: nothing in it makes another file or the network be
opened, and whatever is wrong with it is an `UnreadableError`.
"""

from .images import image_size, read_image
from .source import Clip, Source, UnreadableError, fit
from .videos import VideoFacts, read_video, video_facts

__all__ = [
    "Clip",
    "Source",
    "UnreadableError",
    "VideoFacts",
    "fit",
    "image_size",
    "read_image",
    "read_video",
    "video_facts",
]
